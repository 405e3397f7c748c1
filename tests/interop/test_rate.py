"""A copy with a rate is no faster than that, and one that is told to pause writes nothing until it is to go on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdshard.common.limits import RATE_BURST_SECONDS, REQUEST_BYTES_DEFAULT
from support import images
from support.command import Outcome, Run, copy, nbdshard, started
from support.doubles import CMD_READ, CMD_WRITE, Double, double
from support.hesitant import Hesitates
from support.servers import at_socket, nbdkit, private_folder
from support.waiting import WAIT_SECONDS, wait_for

MIB = images.MIB
SIZE = 64 * MIB
LIMIT = 32 * MIB
SLOW = ("--rate", "8M", "--request-size", "256k")


def sockets_of(run: Run) -> list[Path]:
    return sorted((run.folder / "state" / "nbdshard").glob("nbdshard-*.ctl"))


def uuid_of(run: Run) -> str:
    (path,) = wait_for("the job's socket", lambda: sockets_of(run))
    return path.name.removeprefix("nbdshard-").partition(".")[0]


def ctl(run: Run, *words: str, job: str | None = None) -> Outcome:
    """`nbdshard ctl` in the environment of `run`."""
    return nbdshard("ctl", job or uuid_of(run), *words, env={"XDG_STATE_HOME": str(run.folder / "state")})


def status(run: Run) -> dict[str, object]:
    found = json.loads(ctl(run, "status", "--json").succeeded().out)
    assert isinstance(found, dict)
    return found


class Ends:
    """A double to write to, whose requests are seen, and what it is to hold in the end."""

    def __init__(self, size: int, target: Double | None = None) -> None:
        self.content = images.random_bytes(size)
        self.source = Double(bytearray(self.content))
        self.target = target or Double(bytearray(size))

    def has_begun(self) -> bool:
        return self.target.count(CMD_WRITE) > 0

    @property
    def writes(self) -> int:
        return self.target.count(CMD_WRITE)


@contextlib.contextmanager
def under_way(ring: str, *options: str, target: Double | None = None) -> Iterator[tuple[Run, Ends]]:
    """A copy that has begun to write."""
    ends = Ends(SIZE, target)
    with (
        double(ends.source) as source,
        double(ends.target) as target,
        started("copy", "--ring", ring, "--workers", "2", *options, source, target) as run,
    ):
        wait_for("the first write", ends.has_begun)
        yield run, ends


def finish(run: Run, ends: Ends) -> None:
    """It has no limit any more, ends well, and leaves no socket."""
    ctl(run, "rate", "off").succeeded()
    run.wait().succeeded()
    assert sockets_of(run) == []
    assert ends.target.content == ends.content


@pytest.mark.parametrize("data_path", ["splice", "buffer"])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_copy_takes_at_least_the_time_its_rate_bids(tmp_path: Path, ring: str, workers: int, data_path: str) -> None:
    image = images.random_image(tmp_path / "source", SIZE)
    destination = images.empty_image(tmp_path / "destination", SIZE)
    words = ["--ring", ring, "--workers", str(workers), "--data-path", data_path, "--rate", "32M"]
    with nbdkit("file", str(image)) as source, nbdkit("file", str(destination)) as target:
        start = time.monotonic()
        copy(*words, source.uri, target.uri).succeeded()
        seconds = time.monotonic() - start
    images.assert_identical(image, destination)
    burst = max(LIMIT * RATE_BURST_SECONDS, workers * REQUEST_BYTES_DEFAULT)
    assert seconds >= (SIZE - burst) / LIMIT


@pytest.mark.parametrize("data_path", ["splice", "buffer"])
def test_a_copy_that_pauses_writes_nothing_and_goes_on_where_it_was(ring: str, data_path: str) -> None:
    with under_way(ring, *SLOW, "--data-path", data_path, "--progress=json") as (run, ends):
        paused = ctl(run, "pause").succeeded()
        assert "paused" in paused.out
        # What is under way ends; then two progress reports in a row, a second apart, must show the same.
        wait_for("writes to end", lambda: ends.writes == status(run)["bytes_done"] // (256 * 1024))  # type: ignore[operator]
        before, reports = ends.writes, run.err().count('"phase": "paused"')
        wait_for("two more reports", lambda: run.err().count('"phase": "paused"') >= reports + 2)
        assert ends.writes == before
        assert before * 256 * 1024 < len(ends.content)
        found = status(run)
        assert (found["phase"], found["paused"]) == ("paused", True)
        assert found["connections"]
        assert "copying" in ctl(run, "continue").succeeded().out
        wait_for("writes", lambda: ends.writes > before)
        finish(run, ends)


def test_local_files_pause_too(tmp_path: Path, ring: str) -> None:
    image = images.random_image(tmp_path / "source", SIZE)
    destination = tmp_path / "destination"
    with started("copy", "--ring", ring, "--rate", "4M", image, destination) as run:
        wait_for("some data", lambda: destination.exists() and images.allocated_bytes(destination))
        ctl(run, "pause").succeeded()
        wait_for("a pause", lambda: status(run)["phase"] == "paused")
        ctl(run, "rate", "off").succeeded()
        assert status(run)["paused"]
        ctl(run, "continue").succeeded()
        run.wait().succeeded()
    images.assert_identical(image, destination)


def test_reading_back_has_the_rate_too_and_pauses(ring: str) -> None:
    target = Hesitates(bytearray(SIZE), CMD_READ)
    with under_way(ring, "--verify", "--request-size", "256k", "--rate", "64M", target=target) as (run, ends):
        run.until("the reading back", lambda: target.count(CMD_READ))
        assert status(run)["phase"] == "verifying"
        ctl(run, "rate", "1M").succeeded()
        target.released.set()
        assert "paused" in ctl(run, "pause").succeeded().out
        assert status(run)["phase"] == "paused"
        assert "verifying" in ctl(run, "continue").succeeded().out
        finish(run, ends)


def test_the_rate_changes_while_a_copy_runs_and_status_tells_it(ring: str) -> None:
    with under_way(ring, *SLOW) as (run, ends):
        assert status(run)["rate_limit_bytes_per_second"] == 8 * MIB
        line = ctl(run, "rate", "4M", job=uuid_of(run)[:6]).succeeded().out
        assert "at most 4 MiB/s" in line
        assert line.startswith(uuid_of(run))
        assert status(run)["rate_limit_bytes_per_second"] == 4 * MIB
        assert "no limit" in ctl(run, "rate", "off").succeeded().out
        run.wait().succeeded()
    assert ends.target.content == ends.content


def test_ctrl_c_ends_a_copy_that_pauses_and_it_can_be_resumed(tmp_path: Path, ring: str) -> None:
    """Ranges are small, so that some are written, flushed and in the journal."""
    image = images.random_image(tmp_path / "source", SIZE)
    destination = images.empty_image(tmp_path / "destination", SIZE)
    journal = tmp_path / "journal"
    words = ["copy", "--ring", ring, "--range-size", "4M", "--checkpoint", "0.2", "--journal", str(journal)]
    with nbdkit("file", str(image), threads=1) as source, nbdkit("file", str(destination), threads=1) as target:
        with started(*words, "--rate", "4M", source.uri, target.uri) as run:
            wait_for("the journal", journal.exists)
            ctl(run, "pause", job=str(journal)).succeeded()
            run.signal_group(signal.SIGINT)
            outcome = run.wait()
            assert outcome.code == 130, str(outcome)
            assert "--resume" in outcome.err
        nbdshard(*words, "--resume", source.uri, target.uri).succeeded()
    images.assert_identical(image, destination)


def test_a_job_is_reached_after_its_user_has_logged_out(ring: str) -> None:
    """Which removes the runtime directory with all that is in it; and from then on workers can be started, too."""
    with under_way(ring, *SLOW) as (run, ends):
        shutil.rmtree(run.folder / "run")
        assert "paused" in ctl(run, "pause").succeeded().out
        lost = run.workers()
        os.kill(lost[0], signal.SIGKILL)
        wait_for("another worker", lambda: len(set(run.workers()) - set(lost)) == 1)
        wait_for("it to be connected", lambda: status(run)["workers"] == 2)
        ctl(run, "continue").succeeded()
        finish(run, ends)


def test_a_job_is_reached_by_its_journal_before_there_is_one(tmp_path: Path, ring: str) -> None:
    journal = tmp_path / "journal"
    with under_way(ring, *SLOW, "--journal", str(journal)) as (run, ends):
        assert json.loads(ctl(run, "status", "--json").succeeded().out)["journal"] == str(journal)
        assert uuid_of(run) in ctl(run, "pause", job=str(journal)).succeeded().out
        wait_for("the journal", journal.exists)
        assert uuid_of(run) in ctl(run, "status", job=str(journal)).succeeded().out
        ctl(run, "status", job=str(tmp_path / "another")).failed(1, saying=["no such job runs", uuid_of(run)])
        ctl(run, "continue").succeeded()
        finish(run, ends)
    assert not journal.exists()


@pytest.mark.parametrize("subcommand", ["verify", "checksum"])
def test_what_only_reads_has_a_rate_and_can_be_told_to_pause(tmp_path: Path, ring: str, subcommand: str) -> None:
    image = images.random_image(tmp_path / "image", SIZE)
    operands = [str(image)] * (2 if subcommand == "verify" else 1)
    with started(subcommand, "--ring", ring, "--rate", "4M", *operands) as run:
        wait_for("some progress", lambda: sockets_of(run) and status(run)["bytes_done"])
        assert status(run)["rate_limit_bytes_per_second"] == 4 * MIB
        ctl(run, "pause").succeeded()
        wait_for("a pause", lambda: status(run)["phase"] == "paused")
        ctl(run, "continue").succeeded()
        ctl(run, "rate", "off").succeeded()
        run.wait().succeeded()


def test_a_worker_that_is_lost_during_a_pause_is_replaced_by_one_that_pauses(ring: str) -> None:
    with under_way(ring, *SLOW) as (run, ends):
        ctl(run, "pause").succeeded()
        lost = run.workers()
        os.kill(lost[0], signal.SIGKILL)
        wait_for("another worker", lambda: len(set(run.workers()) - set(lost)) == 1)
        wait_for("it to be connected", lambda: status(run)["workers"] == 2)
        assert status(run)["phase"] == "paused"
        ctl(run, "continue").succeeded()
        finish(run, ends)


def told(run: Run, words: str) -> int:
    """How often that was said, by a copy that has not ended."""
    assert run.process.poll() is None, run.err()
    return run.err().count(words)


def test_short_losses_far_apart_do_not_end_a_copy_that_pauses(tmp_path: Path, ring: str) -> None:
    """Nothing is completed between them, for longer than a server is waited for."""
    image = images.random_image(tmp_path / "source", SIZE)
    destination = images.empty_image(tmp_path / "destination", SIZE)
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(private_folder()) / "source"
        words = ("nbdkit", "-f", "-U", str(path), "file", str(image))
        source = stack.enter_context(at_socket(path, *words))
        options = ("--ring", ring, "--rate", "16M", "--loss-timeout", "3", "--reconnect-delay", "0.2")
        run = stack.enter_context(started("copy", *options, source.uri, destination))
        wait_for("some data", lambda: images.allocated_bytes(destination))
        ctl(run, "pause").succeeded()
        for losses in (1, 2):
            source.kill()
            wait_for("the loss", lambda count=losses: told(run, "waiting for it") == count)
            source = stack.enter_context(at_socket(path, *words))
            wait_for("the connection", lambda count=losses: told(run, "connected again") == count)
            back = status(run)["elapsed_seconds"]
            wait_for("time to pass", lambda since=back: status(run)["elapsed_seconds"] > since + 3)
        ctl(run, "continue").succeeded()
        ctl(run, "rate", "off").succeeded()
        run.wait().succeeded()
    images.assert_identical(image, destination)


class SlowToFlush(Double):
    """Answers a flush when `may_flush` is set."""

    may_flush = False

    def flush(self, talk, request):  # type: ignore[no-untyped-def]
        wait_for("leave to flush", lambda: self.may_flush)
        super().flush(talk, request)


def test_status_tells_of_a_flush_that_takes_its_time(ring: str) -> None:
    target = SlowToFlush(bytearray(MIB))
    with (
        double(Double(bytearray(b"data" * (MIB // 4)))) as one,
        double(target) as other,
        started("copy", "--ring", ring, one, other) as run,
    ):
        wait_for("the flush", lambda: status(run)["phase"] == "flushing")
        target.may_flush = True
        run.wait().succeeded()


def test_coordinator_and_workers_of_other_processes_have_a_rate_too(tmp_path: Path, ring: str) -> None:
    ends = Ends(SIZE)
    url = f"ipc://{tmp_path}/listen"
    words = ("coordinator", "--listen", url, *SLOW)
    with (
        double(ends.source) as source,
        double(ends.target) as target,
        started(*words, source, target) as run,
        started("worker", "--ring", ring, "--connect", url) as worker,
    ):
        wait_for("the first write", ends.has_begun)
        assert status(run)["rate_limit_bytes_per_second"] == 8 * MIB
        finish(run, ends)
        worker.wait().succeeded()


# -- orders that cannot be carried out ---------------------------------------------------------------------------------


class Stuck(Double):
    """Answers no write until it may."""

    def __init__(self, size: int) -> None:
        super().__init__(bytearray(size))
        self.may_answer = threading.Event()

    def write(self, talk, request, data):  # type: ignore[no-untyped-def]
        assert self.may_answer.wait(60)
        super().write(talk, request, data)


def test_a_job_that_is_ending_says_that_it_takes_no_more_orders(ring: str) -> None:
    source, target = Double(bytearray(images.random_bytes(4 * MIB))), Stuck(4 * MIB)
    with (
        double(source) as one,
        double(target) as other,
        started("copy", "--ring", ring, *SLOW, one, other) as run,
    ):
        wait_for("a write without an answer", lambda: target.count(CMD_WRITE) > 0)
        run.signal_group(signal.SIGINT)
        wait_for("the end to begin", lambda: status(run)["phase"] == "stopping")
        for words in (["pause"], ["rate", "1M"]):
            ctl(run, *words).failed(1, saying=["the job is ending"])
        target.may_answer.set()
        assert run.wait().code == 130


def test_where_no_such_job_runs_that_is_said_in_a_line(tmp_path: Path) -> None:
    environment = {"XDG_RUNTIME_DIR": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}
    tmp_path.chmod(0o700)
    outcome = nbdshard("ctl", "6f1c0b1e", "status", env=environment).failed(1)
    assert outcome.err == "nbdshard: 6f1c0b1e: no such job runs; no copy of yours runs\n"


def test_jobs_that_run_are_named_to_who_names_another(ring: str) -> None:
    with under_way(ring, *SLOW) as (run, ends):
        ctl(run, "status", job="nonesuch").failed(1, saying=["no such job runs", uuid_of(run)])
        finish(run, ends)


def test_the_socket_of_a_job_that_was_killed_is_told_of_and_removed(ring: str) -> None:
    with under_way(ring, *SLOW) as (run, _):
        job = uuid_of(run)
        os.kill(run.pid, signal.SIGKILL)
        run.process.wait(WAIT_SECONDS)
        wait_for("the workers to end", lambda: not run.workers())
        ctl(run, "status", job=job).failed(1, saying=["no such job runs", "it was killed"])
        assert sockets_of(run) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["jump"], "unknown order 'jump'; known are status, pause, continue or rate LIMIT"),
        (["pause", "now"], "one word too many: 'now'"),
        (["rate"], "rate: how many bytes per second?"),
        (["rate", "0"], "'pause' has it wait"),
        (["rate", "fast"], "rate: 'fast' is not a number of bytes per second"),
        (["rate", "1M", "2M"], "one word too many: '2M'"),
        ([], "what is the job to do?"),
    ],
)
def test_words_that_are_no_order_are_refused_before_anybody_is_asked(words: list[str], says: str) -> None:
    nbdshard("ctl", "6f1c", *words).failed(2, saying=[says])


@pytest.mark.parametrize("limit", ["0", "1k", "fast", "-1"])
def test_a_copy_refuses_a_rate_that_is_none(limit: str) -> None:
    copy(f"--rate={limit}", "null:", "null:").failed(2, saying=["--rate", "bytes per second"])


def test_a_hostile_client_neither_stops_nor_ends_a_copy(ring: str) -> None:
    """More clients than are listened to, that say nothing, rubbish, too much, or go at once."""
    with under_way(ring, *SLOW) as (run, ends), contextlib.ExitStack() as stack:
        uuid_of(run)
        (path,) = sockets_of(run)
        for order in (
            b"",
            b"x" * 100_000,
            b"{}",
            b"[" * 1000,
            b'{"version":2}',
            b"\xff",
            b'{"version":1,"order":"jump"}',
        ):
            for _ in range(3):
                client = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                client.settimeout(WAIT_SECONDS)
                with contextlib.suppress(OSError):
                    client.connect(str(path))
                    if order:
                        client.send(order)
        before = ends.writes
        wait_for("more writes", lambda: ends.writes > before + 2)
        assert status(run)["phase"] == "copying"
        finish(run, ends)
