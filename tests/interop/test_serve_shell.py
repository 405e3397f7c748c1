"""How `nbdshard serve` listens, begins and ends: sockets handed over, several processes, signals, passwords."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdshard.common.limits import SERVED_REQUESTS_MAX
from nbdshard.common.nbd.connecter import Wishes
from nbdshard.common.nbd.constants import TransmissionFlag
from nbdshard.common.ranges import Range
from support import images, processes
from support.command import EXECUTABLE, Run, copy, nbdshard, started
from support.devices import loop_device
from support.journals import fill, small_disk
from support.nbd_blocking import Connection, connect
from support.served import NAME, Served, serving
from support.servers import free_port, private_folder
from support.waiting import wait_for

MIB = images.MIB
DISK = Wishes(NAME)
MEMORY = ("-e", NAME, "raw", "memory:1M")


def listens(run: Run) -> None:
    run.until("the server to listen", lambda: "listens on" in run.err())


def instance(uri: str) -> str:
    (line,) = (line for line in nbdshard("info", uri).succeeded().out.splitlines() if "instance" in line)
    return line.rpartition(" ")[2]


# -- sockets that are handed over


def test_it_is_an_end_of_a_copy_that_starts_and_ends_it(tmp_path: Path) -> None:
    source, back = images.sparse_image(tmp_path / "source", 4 * MIB), tmp_path / "back"
    (tmp_path / "volume").mkdir()
    server = ["[", EXECUTABLE, "serve", "-e", NAME, "sharded", f"file:{tmp_path}/volume/?size=4M&chunk=64k", "]"]
    copy(source, *server).succeeded()
    copy(*server, back).succeeded()
    assert back.read_bytes() == source.read_bytes()


def test_nbdcopy_starts_it_and_ends_it(tmp_path: Path) -> None:
    image = images.filled_image(tmp_path / "image", MIB, 7)
    mark = "NBDSHARD_TEST_RUN=nbdcopy"
    subprocess.run(
        ["nbdcopy", "--", "[", EXECUTABLE, "serve", "-e", NAME, "raw", f"file:{image}", "]", str(tmp_path / "back")],
        check=True,
        timeout=60,
        env={**os.environ, mark.partition("=")[0]: "nbdcopy"},
    )
    assert (tmp_path / "back").read_bytes() == image.read_bytes()
    wait_for("the server to end", lambda: not processes.with_environment(mark))


def test_systemd_starts_it_at_the_first_client() -> None:
    with private_folder() as folder:
        where = f"--listen={folder / 'socket'}"
        wrapper = ("systemd-socket-activate", where, "--fdname=nbd", "-E", "NBDSHARD_TEST_RUN", EXECUTABLE)
        with started("serve", *MEMORY, executable=wrapper) as run:
            run.until("systemd to listen", (folder / "socket").exists)
            with Connection(folder / "socket", DISK) as connection:
                assert connection.read(Range(0, 4096)) == bytes(4096)
            run.process.terminate()  # systemd-socket-activate has become the server
            run.wait().succeeded()


HANDING_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="ours")
os.execv(sys.argv[2], sys.argv[2:])
"""


@contextlib.contextmanager
def handed(sock: socket.socket, *words: str) -> Iterator[Run]:
    """A server that is given `sock`."""
    executable = (sys.executable, "-c", HANDING_OVER, str(sock.fileno()), EXECUTABLE)
    with started("serve", *words, executable=executable, pass_fds=[sock.fileno(), 3]) as run:
        yield run


@pytest.fixture
def three() -> Iterator[None]:
    """Descriptor 3 is open, so that it can be passed on."""
    with contextlib.ExitStack() as stack:
        while (number := os.open("/dev/null", os.O_RDONLY)) < 3:
            stack.callback(os.close, number)
        stack.callback(os.close, number)
        yield


@pytest.mark.usefixtures("three")
def test_a_socket_that_is_handed_over_is_served_besides_others() -> None:
    with private_folder() as folder, socket.socket(socket.AF_UNIX) as ours:
        ours.bind(str(folder / "ours"))
        ours.listen()
        with handed(ours, *MEMORY, "--unix", str(folder / "another")) as run:
            listens(run)
            for name in ("ours", "another"):
                with Connection(folder / name, DISK) as connection:
                    assert connection.export.size == MIB
            run.process.terminate()
            assert run.wait().code == 0
        assert [path.name for path in folder.iterdir()] == ["ours"]


@pytest.mark.usefixtures("three")
def test_what_is_handed_over_must_be_a_socket_that_listens() -> None:
    with socket.socket(socket.AF_UNIX) as idle, handed(idle, *MEMORY) as run:
        where = r"descriptor 3 \(ours\), which LISTEN_FDS=1 hands over"
        assert re.search(f"{where}: is no stream socket that listens", run.wait().failed(1).err)


def test_variables_that_are_for_another_process_mean_nothing() -> None:
    with started("serve", *MEMORY, "--tcp", "127.0.0.1:0", env={"LISTEN_PID": "1", "LISTEN_FDS": "1"}) as run:
        listens(run)
        run.process.terminate()
        run.wait().succeeded()


def test_systemd_is_told_when_it_lets_clients_in_and_when_it_ends(tmp_path: Path) -> None:
    image = images.filled_image(tmp_path / "image", MIB, 0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.settimeout(60)
        supervisor.bind(f"\0nbdshard-test-{os.getpid()}")
        for more in ([], ["--processes", "2"]):
            words = ["-e", NAME, "raw", f"file:{image}", "--tcp", "127.0.0.1:0", *more]
            with started("serve", *words, env={"NOTIFY_SOCKET": f"@nbdshard-test-{os.getpid()}"}) as run:
                told = supervisor.recv(4096).decode().splitlines()
                assert told[0] == "READY=1" and told[1].startswith("STATUS=listens on nbd://127.0.0.1:")
                run.process.terminate()
                assert supervisor.recv(4096) == b"STOPPING=1"
                run.wait().succeeded()


# -- where it listens


def test_a_socket_of_a_server_that_was_killed_is_replaced_and_that_of_one_that_lives_is_not() -> None:
    with private_folder() as folder:
        words = [*MEMORY, "--unix", str(folder / "socket")]
        with started("serve", *words) as first:
            listens(first)
            nbdshard("serve", *words).failed(1, saying=["cannot be listened on"])
            first.process.kill()
            first.process.wait()
        with started("serve", *words) as second:
            listens(second)
            Connection(folder / "socket", DISK).close()
        (folder / "socket").unlink(missing_ok=True)
        (folder / "socket").touch()
        nbdshard("serve", *words).failed(1, saying=[f"{folder / 'socket'}: is there already, and no socket"])
        long = str(folder / ("x" * 108))
        said = f"{long}: a socket's path has at most 107 bytes; choose a shorter one"
        nbdshard("serve", "-e", "disk", "raw", "memory:1M", "--unix", long).failed(1, saying=[said])


def test_a_socket_that_another_server_has_put_there_is_not_removed() -> None:
    with private_folder() as folder:
        words = [*MEMORY, "--unix", str(folder / "socket")]
        with started("serve", *words) as first:
            listens(first)
            (folder / "socket").rename(folder / "old")
            (folder / "socket").touch()
            first.process.terminate()
            first.wait().succeeded()
        assert {path.name for path in folder.iterdir()} == {"old", "socket"}


def test_every_address_has_the_port_that_was_free() -> None:
    with started("serve", *MEMORY, "--tcp", "*:0") as run:
        listens(run)
        ports = {line.rpartition(":")[2] for line in run.err().splitlines()}
        assert len(ports) == 1


def test_an_address_that_this_machine_has_not_is_left_out_where_there_is_another(tmp_path: Path) -> None:
    """A name with an address of IPv6, where that is switched off."""
    script = """
        ip link set lo up; echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6; mount --bind "$0" /etc/hosts; exec "$@"
    """
    (tmp_path / "hosts").write_text("::1 both six\n127.0.0.1 both\n")
    shell = ("unshare", "--net", "--mount", "sh", "-ec", script, str(tmp_path / "hosts"), EXECUTABLE)
    try:
        subprocess.run([*shell[:-1], "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no namespaces here")
    with started("serve", *MEMORY, "--tcp", "both:0", executable=shell) as run:
        listens(run)
        assert "nbd://127.0.0.1" in run.err() and "[" not in run.err()
        run.process.terminate()
        run.wait().succeeded()
    nbdshard("serve", *MEMORY, "--tcp", "six:0", executable=shell).failed(1, saying=["six:0: cannot be listened on"])


@pytest.mark.parametrize("more", [[], ["--processes", "2"]])
def test_a_port_that_another_server_has_is_refused_also_where_both_would_share_it(
    tmp_path: Path, more: list[str]
) -> None:
    port = free_port()
    for name in ("one", "two"):
        images.filled_image(tmp_path / name, MIB, 1)
    words = ["--tcp", f"127.0.0.1:{port}", *more]
    with started("serve", "-e", NAME, "raw", f"file:{tmp_path}/one", "--processes", "2", *words[:2]) as run:
        listens(run)
        ended = nbdshard("serve", "-e", NAME, "raw", f"file:{tmp_path}/two", *words)
        ended.failed(1, saying=["cannot be listened on: Address already in use"])


def test_its_process_id_is_in_a_file_while_it_serves(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with serving("memory:1M", "--pid-file", str(path)) as served:
        assert path.read_text() == f"{served.run.pid}\n"
        served.run.process.terminate()
        served.run.wait().succeeded()
    assert not path.exists()
    image = images.filled_image(tmp_path / "image", MIB, 0)
    for more in ([], ["--processes=2"]):
        words = ["-e", NAME, "raw", f"file:{image}", "--tcp=127.0.0.1:0", "--pid-file=/nowhere/pid", *more]
        nbdshard("serve", *words).failed(1, saying=["/nowhere/pid: cannot be written"])


# -- several processes


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Served]:
    """Two processes that serve a file of 4 MiB."""
    image = images.filled_image(tmp_path / "image", 4 * MIB, 0)
    with serving(f"file:{image}", "--processes", "2", "--tcp", "127.0.0.1:0", "-v") as served:
        yield served


def tcp_uri(served: Served) -> str:
    return next(line.rpartition(" ")[2] for line in served.run.err().splitlines() if "nbd://" in line)


def of_process(served: Served, number: int) -> Connection:
    """A connection that process `number` serves; others are made until there is one."""
    port = int(tcp_uri(served).rpartition(":")[2].rstrip("/"))

    def wanted() -> Connection | None:
        connection = Connection(("127.0.0.1", port), DISK)
        mine = "{}:{}".format(*connection.socket.getsockname())
        lines = wait_for(
            "the log of it", lambda: [x for x in served.run.err().splitlines() if f"({mine}): serves" in x]
        )
        if f"serve {number}: " in lines[0]:
            return connection
        connection.close()
        return None

    return wait_for(f"the kernel to choose process {number}", wanted)


def test_processes_are_one_server(pair: Served) -> None:
    with of_process(pair, 1) as one, of_process(pair, 2) as two:
        assert one.export.flags & TransmissionFlag.CAN_MULTI_CONN
        one.client.write(0, Range(0, 4096), [b"x" * 4096])
        one.run()
        assert two.read(Range(0, 4096)) == b"x" * 4096
        two.client.flush(0)
        assert [done.error for done in two.run()] == [None]
    assert len({instance(tcp_uri(pair)) for _ in range(6)}) == 1
    assert instance(pair.uri()) == instance(tcp_uri(pair))


def test_clients_are_shared_out(pair: Served) -> None:
    port = int(tcp_uri(pair).rpartition(":")[2].rstrip("/"))
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            for where in (pair.socket, ("127.0.0.1", port)):
                connection = stack.enter_context(Connection(where, DISK))
                assert connection.read(Range(0, 4096)) == bytes(4096)
        came = re.findall(r"serve ([12]): client [0-9]+.* comes", pair.run.err())
        assert sorted(came) == ["1"] * 5 + ["2"] * 5


def test_signals_end_all_processes(pair: Served, tmp_path: Path) -> None:
    with of_process(pair, 2) as two:
        two.client.write(0, Range(0, 4096), [b"y" * 4096])
        two.run()
        pair.run.signal_group(signal.SIGTERM)
        assert two.socket.recv(1) == b""
        two.socket.close()
        assert pair.run.wait().code == 0
    assert (tmp_path / "image").read_bytes()[:4096] == b"y" * 4096


def test_a_second_signal_ends_all_processes_at_once(pair: Served) -> None:
    stopped, other = pair.run.workers()
    os.kill(stopped, signal.SIGSTOP)  # it cannot end by itself
    pair.run.process.terminate()
    wait_for("the other one to end", lambda: not processes.alive(other))
    pair.run.process.terminate()
    pair.run.wait().failed(1, saying=["ends at once"])


def test_a_process_that_dies_takes_the_others_with_it(pair: Served) -> None:
    victim = pair.run.workers()[0]
    os.kill(victim, signal.SIGKILL)
    pair.run.wait().failed(1, saying=[f"process {victim} was killed by SIGKILL: the server ends"])


def test_processes_end_when_the_first_is_killed(pair: Served) -> None:
    pair.run.process.kill()
    pair.run.process.wait()
    wait_for("the others to end", lambda: not pair.run.processes())


@pytest.mark.parametrize(
    ("driver", "conn", "what"),
    [
        ("raw", "memory:1M", "processes cannot share raw memory"),
        ("sharded", "file:/nowhere/?size=1M", "processes cannot share sharded file"),
    ],
)
def test_what_processes_would_have_to_know_of_one_another_is_refused(driver: str, conn: str, what: str) -> None:
    nbdshard("serve", "-e", NAME, driver, conn, "--processes", "2").failed(1, saying=[f"export '{NAME}': {what}"])


def test_processes_admit_as_many_clients_as_one_would(tmp_path: Path) -> None:
    image = images.filled_image(tmp_path / "image", MIB, 0)
    with serving(f"file:{image}", "--processes", "2", "--max-connections", "3") as served:
        held = [Connection(served.socket, DISK) for _ in range(3)]
        with connect(served.socket) as one_too_many:
            assert one_too_many.recv(1) == b""
        held.pop().close()

        def is_free() -> bool:
            with connect(served.socket) as peer:
                return peer.recv(1) != b""

        wait_for("the place to be free for any process", is_free)
        for connection in held:
            connection.close()


def test_each_process_tells_of_a_write_back_that_failed(tmp_path: Path) -> None:
    """A device whose backing has no room: what was acknowledged is in the page cache, and cannot leave it."""
    with small_disk(tmp_path / "disk", kib=1024) as folder:
        os.truncate(images.empty_image(folder / "backing", 16 * MIB), 16 * MIB)
        with loop_device(folder / "backing") as device:
            fill(folder / "filler")
            with serving(f"file:{device}", "--processes", "2", "--tcp", "127.0.0.1:0", "-v") as served:
                with of_process(served, 1) as one, of_process(served, 2) as two:
                    one.client.write(0, Range(0, 4 * MIB), [b"x" * (4 * MIB)])
                    assert [done.error for done in one.run()] == [None]
                    for connection in (two, one, two, one):
                        connection.client.flush(0)
                        (done,) = connection.run()
                        assert done.error is not None
                served.run.process.terminate()
                served.run.wait().failed(1, saying=["what was written may be lost"])


# -- the end


def test_every_request_that_was_sent_before_the_end_has_an_answer() -> None:
    """More than the server has taken, so that some are unread when it ends; not one answer may be lost by that."""
    count = 3 * SERVED_REQUESTS_MAX
    with serving("delay:memory:1M?delay-read=10m", "--tcp", "127.0.0.1:0") as served:
        port = int(tcp_uri(served).rpartition(":")[2].rstrip("/"))
        with Connection(("127.0.0.1", port), DISK, handles=count) as connection:
            buffers = [bytearray(1) for _ in range(count)]
            for handle, buffer in enumerate(buffers):
                connection.client.read(handle, Range.of(handle, 1), memoryview(buffer))
            connection.push([])
            served.run.process.terminate()
            errors = [done.error.errno_name if done.error else "" for done in connection.run()]
            assert len(errors) == count
            assert {"ESHUTDOWN"} <= set(errors) <= {"", "ESHUTDOWN"}  # how many it had taken by then is its business
            assert connection.socket.recv(1) == b""
        served.run.wait().succeeded()


def test_a_copy_goes_on_when_its_server_was_ended_and_started_again(tmp_path: Path) -> None:
    source, volume = images.random_image(tmp_path / "source", 8 * MIB), tmp_path / "volume"
    volume.mkdir()
    with private_folder() as folder:
        uri = f"nbd+unix:///{NAME}?socket={folder / 'socket'}"
        words = ["-e", NAME, "sharded", f"file:{volume}/?size=8M&chunk=64k", "--unix", str(folder / "socket")]
        with started("serve", *words) as first:
            listens(first)
            with started("copy", "--rate", "4M", source, uri) as run:
                run.until("something to be written", lambda: any(volume.glob("*.chunk")))
                first.process.terminate()
                first.wait().succeeded()
                assert run.process.poll() is None
                with started("serve", *words) as second:
                    run.wait().succeeded()
                    second.process.terminate()
                    second.wait().succeeded()
    nbdshard("verify", source, "[", EXECUTABLE, "serve", *words[:4], "]").succeeded()


# -- what is told, and what is not


def test_a_password_is_shown_nowhere_and_warned_of(tmp_path: Path) -> None:
    ended = nbdshard("serve", "-e", NAME, "raw", "file:http://me:hunter2@host/x")
    assert "hunter2" not in ended.failed(1, saying=["a password on the command line"]).err
    ended = copy("[", "false", "s3:http://me:hunter2@host/x", "]", tmp_path / "out")
    assert "hunter2" not in ended.failed(1, saying=["[ false s3:http://***@host/x ]"]).err
    (tmp_path / "http:").mkdir()
    images.filled_image(tmp_path / "http:" / "image", MIB, 0)
    words = ["-e", NAME, "raw", "file:http://me:hunter2@image"]
    with started("serve", *words, "--tcp", "127.0.0.1:0", "-v", cwd=tmp_path) as run:
        listens(run)
        assert "hunter2" not in processes.command_line(run.pid)
        assert "***@image" in processes.command_line(run.pid)
        assert "hunter2" not in run.err()


def test_a_password_of_a_server_in_brackets_is_in_no_journal(tmp_path: Path) -> None:
    source, journal = images.random_image(tmp_path / "source", MIB), tmp_path / "journal"
    server = f"exec {EXECUTABLE} serve -e {NAME} raw memory:1M"
    for more, password in (["--keep-journal"], "hunter2"), (["--resume", "--keep-journal"], "hunter3"):
        bracketed = ["[", "sh", "-c", server, f"s3:http://me:{password}@host/x", "]"]
        copy("--journal", journal, *more, source, *bracketed).succeeded()
        assert b"hunter" not in journal.read_bytes()
        assert "s3:http://***@host/x ]" in nbdshard("jobs", journal).succeeded().out


def test_a_login_that_the_command_to_go_on_does_not_show_is_spoken_of(tmp_path: Path) -> None:
    source, out = images.random_image(tmp_path / "source", 8 * MIB), tmp_path / "out"
    server = ["[", "sh", "-c", f"exec {EXECUTABLE} serve -e {NAME} raw file:{source}", "http://me:hunter2@host/", "]"]
    with started("copy", "--journal", tmp_path / "journal", "--rate", "1M", *server, out) as run:
        run.until("something to be written", lambda: out.exists() and out.stat().st_blocks > 0)
        run.process.send_signal(signal.SIGINT)
        ended = run.wait().failed(130, saying=["to go on: ", "http://***@host/"])
        ended.failed(130, saying=["a login, which is not shown"])
    assert "hunter2" not in ended.err


def test_names_that_are_not_utf_8_are_told_in_a_line() -> None:
    nbdshard("serve", "-e", "disk\udcff", "raw", "memory:1M").failed(1, saying=["a name in UTF-8 is needed"])
    ended = nbdshard("serve", "-e", NAME, "raw", "file:/nowhere/\udcff%41").failed(1, saying=["No such file"])
    assert len(ended.err.splitlines()) == 1
    ended = nbdshard("serve", *MEMORY, "--unix", "/nowhere/\udcff").failed(1, saying=["cannot be listened on"])
    assert len(ended.err.splitlines()) == 1


def test_open_files_are_as_many_as_may_be_and_connections_go_by_them() -> None:
    limited = ("sh", "-c", 'ulimit -Sn 64; ulimit -Hn 300; exec "$0" "$@"', EXECUTABLE)
    nbdshard("serve", *MEMORY, "--max-connections", "200", executable=limited).failed(
        1, saying=["200 connections, and 300 open files are enough for", "ulimit -n"]
    )
    with started("serve", *MEMORY, "--tcp", "127.0.0.1:0", executable=limited) as run:
        listens(run)
        limits = Path(f"/proc/{run.pid}/limits").read_text()
        assert re.search(r"Max open files +300 +300", limits)


def test_hints_and_a_description_reach_clients() -> None:
    more = "?description=what%20it%20is&hint-request=40s&hint-loss=3m&hint-backoff=100ms-2s"
    with serving(f"memory:1M{more}") as served:
        said = nbdshard("info", served.uri()).succeeded().out
        assert "request 40 s, loss 180 s, backoff 0.1 to 2 s" in said
        exports = json.loads(subprocess.check_output(["nbdinfo", "--json", "--list", served.uri("")]))["exports"]
        assert exports[0]["description"] == "what it is"
