"""Ctrl-C, a second Ctrl-C, a server that dies, a worker that dies: always an end, and nothing left behind."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdshard.common.limits import DRAIN_SECONDS
from support import images, processes
from support.command import Run, started
from support.doubles import CMD_READ, Double, double
from support.hostile import NEVER_ANSWERS_READS
from support.servers import Server, nbdkit
from support.waiting import WAIT_SECONDS, wait_for

SIZE = 256 * images.MIB


@contextmanager
def slow_source() -> Iterator[Server]:
    """About 16 MiB/s over all connections: a copy that can be disturbed. threads=1: nbdkit 1.32.5 would abort."""
    with nbdkit("pattern", str(SIZE), "rate=128M", filters=["rate"], threads=1) as server:
        yield server


def pattern_sha256(size: int) -> str:
    """Of nbdkit's pattern."""
    digest = hashlib.sha256()
    for start in range(0, size, images.MIB):
        digest.update(images.pattern(start, images.MIB))
    return digest.hexdigest()


def copying(target: Double) -> bool:
    """Whether something has arrived, so the copy is under way."""
    return any(request.command == 1 for request in list(target.requests))


@contextmanager
def under_way(ring: str, *options: str) -> Iterator[tuple[Run, Server, Double]]:
    """A copy that has begun to write, with two workers."""
    target = Double(bytearray(SIZE))
    with (
        slow_source() as source,
        double(target) as uri,
        started("copy", "--ring", ring, "--workers", "2", *options, source.uri, uri) as run,
    ):
        wait_for("the first write", lambda: copying(target))
        assert len(run.workers()) >= 2
        yield run, source, target


def test_ctrl_c_drains_says_how_far_it_got_and_exits_130(ring: str) -> None:
    with under_way(ring) as (run, source, _):
        run.signal_group(signal.SIGINT)
        outcome = run.wait()
        assert outcome.code == 130, str(outcome)
        assert "stopped" in outcome.last_line
        assert "Assertion" not in source.stderr()


def test_sigterm_to_the_command_alone_stops_it_too(ring: str) -> None:
    with under_way(ring) as (run, _, _):
        os.kill(run.pid, signal.SIGTERM)
        outcome = run.wait()
        assert outcome.code in (130, 143), str(outcome)
        assert "stopped" in outcome.last_line


def test_a_write_that_was_begun_is_finished_before_the_end(ring: str) -> None:
    """The double would fail the test had a payload been cut short: it takes each whole, or sees the end between two."""
    with under_way(ring) as (run, _, target):
        run.signal_group(signal.SIGINT)
        run.wait()
        written = [request for request in target.requests if request.command == 1]
        for request in written:
            expected = images.pattern(request.offset, request.length)
            assert target.content[request.offset : request.offset + request.length] == expected


def test_a_second_ctrl_c_stops_at_once(ring: str) -> None:
    """The source has stopped answering, so draining would take its time."""
    with under_way(ring) as (run, source, _):
        source.suspend()
        run.signal_group(signal.SIGINT)
        run.signal_group(signal.SIGINT)
        outcome = run.wait(DRAIN_SECONDS)
        assert outcome.code == 130, str(outcome)


def test_ctrl_c_ends_a_copy_whose_source_does_not_answer(ring: str) -> None:
    source = NEVER_ANSWERS_READS(bytearray(images.MIB))
    with double(source) as one, started("copy", "--ring", ring, one, "null:") as run:
        wait_for("a read", lambda: source.count(CMD_READ) > 0)
        run.signal_group(signal.SIGINT)
        assert run.wait().code == 130


def test_ctrl_c_before_anything_was_connected_ends_it(ring: str, tmp_path: Path) -> None:
    with nbdkit("null", "1M") as server:
        server.suspend()
        with started("copy", "--ring", ring, server.uri, tmp_path / "out") as run:
            wait_for("the workers", lambda: run.workers())
            run.signal_group(signal.SIGINT)
            assert run.wait().code == 130
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_server_killed_in_mid_copy_fails_it_in_one_line(tmp_path: Path, ring: str, side: str) -> None:
    destination = images.empty_image(tmp_path / "destination", SIZE)
    with (
        slow_source() as source,
        nbdkit("file", str(destination)) as target,
        started("copy", "--ring", ring, "--workers", "2", "--loss-timeout=0", source.uri, target.uri) as run,
    ):
        wait_for("the first write", lambda: images.allocated_bytes(destination) > 0)
        (source if side == "source" else target).kill()
        outcome = run.wait()
        outcome.failed(1, saying=[side])
        assert len(outcome.err.splitlines()) == 1, str(outcome)


def test_a_worker_that_is_killed_is_replaced_and_the_copy_succeeds(tmp_path: Path, ring: str) -> None:
    """Its ranges are copied again by the others, or it is started again."""
    destination = images.empty_image(tmp_path / "destination", SIZE)
    source_args = (str(SIZE), "rate=512M")
    with (
        nbdkit("pattern", *source_args, filters=["rate"], threads=1) as source,
        nbdkit("file", str(destination), threads=1) as target,
        started("copy", "--ring", ring, "--workers", "2", source.uri, target.uri) as run,
    ):
        wait_for("the first write", lambda: images.allocated_bytes(destination) > 0)
        os.kill(run.workers()[0], signal.SIGKILL)
        run.wait().succeeded()
    with destination.open("rb") as file:
        assert file.read(images.MIB) == images.pattern(0, images.MIB)
        file.seek(SIZE - images.MIB)
        assert file.read() == images.pattern(SIZE - images.MIB, images.MIB)
    assert images.sha256(destination) == pattern_sha256(SIZE)


def test_workers_do_not_outlive_a_coordinator_that_is_killed(ring: str) -> None:
    with under_way(ring) as (run, _, _):
        workers = run.workers()
        os.kill(run.pid, signal.SIGKILL)
        run.process.wait(WAIT_SECONDS)
        wait_for("the workers to end", lambda: not any(processes.alive(pid) for pid in workers))
