"""`[ CMD ]`: real servers by socket activation."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nbdshard.common.errors import UserError
from nbdshard.coordinator.command_server import CommandServer
from nbdshard.coordinator.private_directory import PrivateDirectory
from support import processes
from support.waiting import wait_for

NBDKIT = ["nbdkit", "-f", "memory", "1M"]


def size_at(uri: str) -> str:
    return subprocess.run(
        ["nbdinfo", "--size", uri], capture_output=True, text=True, timeout=20, check=True
    ).stdout.strip()


def pid_of(server: CommandServer) -> int:
    return next(
        int(line.split()[1])
        for line in Path(f"/proc/self/fdinfo/{server.descriptor}").read_text().splitlines()
        if line.startswith("Pid:")
    )


@pytest.mark.parametrize("command", [NBDKIT, ["nbdkit", "memory", "1M"], ["qemu-nbd", "-t", "-f", "raw", "IMAGE"]])
def test_a_server_serves_at_its_uri_and_is_gone_after_close(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    argv = [str(tmp_path / "image") if word == "IMAGE" else word for word in command]
    with PrivateDirectory() as directory:
        server = CommandServer(argv, "source", directory)
        try:
            assert size_at(server.uri) == "1048576"
            assert not server.ended()
            pid = pid_of(server)
        finally:
            server.close()
        assert processes.state(pid) == ""
        server.close()


def test_both_sides_have_sockets_of_their_own() -> None:
    with PrivateDirectory() as directory:
        one = CommandServer(NBDKIT, "source", directory)
        two = CommandServer(["nbdkit", "-f", "memory", "2M"], "destination", directory)
        try:
            assert (size_at(one.uri), size_at(two.uri)) == ("1048576", "2097152")
        finally:
            one.close()
            two.close()


def test_the_environment_is_that_of_systemd_and_the_words_are_not_parsed_by_a_shell(tmp_path: Path) -> None:
    report = tmp_path / "report"
    script = (
        "import os, sys, socket\n"
        "s = socket.socket(fileno=3)\n"
        "stdin = os.readlink('/proc/self/fd/0')\n"
        "same = os.environ['LISTEN_PID'] == str(os.getpid())\n"
        "listening = s.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)\n"
        "facts = [same, os.environ['LISTEN_FDS'], listening, stdin, sys.argv[2:]]\n"
        "open(sys.argv[1] + '.new', 'w').write(repr(facts))\n"
        "os.rename(sys.argv[1] + '.new', sys.argv[1])\n"
        "s.detach()\n"
    )
    words = ["a b", "$HOME", "`id`", "; exit 9", "--", "'\""]
    with PrivateDirectory() as directory:
        server = CommandServer([sys.executable, "-c", script, str(report), *words], "source", directory)
        try:
            wait_for("the report", report.exists)
        finally:
            server.close()
    assert report.read_text() == repr([True, "1", 1, "/dev/null", words])


def test_what_a_server_prints_goes_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    with PrivateDirectory() as directory:
        server = CommandServer(["echo", "hello"], "source", directory)
        try:
            wait_for("the server to end", server.ended)
        finally:
            server.close()
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")


@pytest.mark.parametrize(("command", "succeeded", "how"), [("true", True, "0"), ("false", False, "1")])
def test_an_early_end_is_told_in_one_line(command: str, succeeded: bool, how: str) -> None:
    with PrivateDirectory() as directory:
        server = CommandServer([command], "destination", directory)
        try:
            assert select.select([server.descriptor], [], [], 20)[0]
            assert server.ended()
            assert server.succeeded is succeeded
            assert server.story() == (
                f"[ {command} ]: the destination server ended with exit status {how} before the copy was over"
            )
        finally:
            server.close()


def test_nobody_waits_at_the_socket_of_a_server_that_ended() -> None:
    with PrivateDirectory() as directory:
        server = CommandServer(["true"], "source", directory)
        try:
            wait_for("the server to end", server.ended)
            with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
                client.connect(directory.socket_path("source.sock"))
        finally:
            server.close()


@pytest.mark.parametrize("command", ["no-such-command-anywhere", "/no/such/path", "/etc", "./relative-none"])
def test_a_missing_command_is_told_before_anything_runs(command: str) -> None:
    with PrivateDirectory() as directory:
        with pytest.raises(UserError, match=f"no such command: {command}"):
            CommandServer([command, "x"], "source", directory)
        assert os.listdir(directory.path) == []


def test_a_server_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    script = f"import signal, time; signal.signal(15, signal.SIG_IGN); open({str(ready)!r}, 'w'); signal.pause()"
    with PrivateDirectory() as directory:
        server = CommandServer([sys.executable, "-c", script], "source", directory)
        try:
            wait_for("the server to be deaf", ready.exists)
            pid = pid_of(server)
        finally:
            server.close(0.2)
        assert processes.state(pid) == ""
        assert "was killed by SIGKILL" in server.story()


def test_a_server_does_not_hear_the_terminals_ctrl_c() -> None:
    with PrivateDirectory() as directory:
        server = CommandServer(NBDKIT, "source", directory)
        try:
            assert size_at(server.uri) == "1048576"
            assert os.getpgid(pid_of(server)) != os.getpgid(0)
        finally:
            server.close()


def test_a_server_dies_with_its_coordinator(tmp_path: Path) -> None:
    """The coordinator is a process of its own here, killed as by `kill -9`."""
    script = (
        "import sys, time, signal\n"
        "from nbdshard.coordinator.command_server import CommandServer\n"
        "from nbdshard.coordinator.private_directory import PrivateDirectory\n"
        "server = CommandServer(['nbdkit', '-f', 'memory', '1M'], 'source', PrivateDirectory())\n"
        "print(server.uri, server._child.pid, flush=True)\n"
        "signal.pause()\n"
    )
    environment = {**os.environ, "XDG_RUNTIME_DIR": "", "TMPDIR": str(tmp_path) if len(str(tmp_path)) < 50 else "/tmp"}
    coordinator = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    folder = ""
    try:
        assert coordinator.stdout is not None
        uri, _, pid = coordinator.stdout.readline().rpartition(" ")
        folder = os.path.dirname(uri.partition("socket=")[2])
        assert size_at(uri) == "1048576"  # it has passed the trampoline, and the kernel knows what to do
        with processes.adopting_orphans():
            coordinator.send_signal(signal.SIGKILL)
            coordinator.wait(20)
            wait_for("the server to die with its coordinator", lambda: not processes.alive(int(pid)))
            processes.reap(int(pid))
    finally:
        coordinator.kill()
        coordinator.wait(20)
        if coordinator.stdout is not None:
            coordinator.stdout.close()
        if folder:
            for name in os.listdir(folder):
                os.unlink(os.path.join(folder, name))
            os.rmdir(folder)
