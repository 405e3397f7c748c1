"""The coordinator's loop with real workers, real servers and real processes that misbehave."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nbdshard.common.channel import CoordinatorChannel, WorkerChannel
from nbdshard.common.control_url import ControlUrl
from nbdshard.common.errors import BugError, UserError
from nbdshard.common.limits import DRAIN_SECONDS
from nbdshard.common.machine import machine_id
from nbdshard.common.messages import PROTOCOL_VERSION, EndpointAddress, Hello, JobOptions
from nbdshard.common.signals import SignalWatch
from nbdshard.coordinator.command_server import CommandServer
from nbdshard.coordinator.instructions import Instruction
from nbdshard.coordinator.job import Job, Outcome, Status, Verdict
from nbdshard.coordinator.launcher import Launcher, WorkerCommand
from nbdshard.coordinator.private_directory import PrivateDirectory
from nbdshard.coordinator.progress import NoDisplay
from nbdshard.coordinator.scheduler import Scheduler
from nbdshard.coordinator.service import Shell, run_job
from support import processes
from support.gates import Gate
from support.servers import Server, nbdkit, private_folder

MIB = 1 << 20
NULL = EndpointAddress(kind="null", address="null:")
OPTIONS = JobOptions(request_size=MIB, requests=16, queue_size=16 * MIB, sparse_unit=None)


class Watching(NoDisplay):
    """A display that calls `act(status)` at every turn of the loop."""

    def __init__(self, act: Callable[[Status], None]) -> None:
        self._act = act

    def due(self) -> float:
        return 0.0

    def show(self, status: Status, now: float) -> None:
        self._act(status)


@dataclass
class World:
    """What a job needs; the fields may be changed before `run`."""

    directory: PrivateDirectory
    signals: SignalWatch
    executable: str | None = None
    watch: Callable[[Status], None] = lambda _: None
    prepare: Callable[[int], None] = lambda _: None
    servers: list[CommandServer] = field(default_factory=list)
    worker_start_seconds: float = 20.0
    finish_seconds: float = 20.0
    make_scheduler: Callable[[Job, float], Scheduler] = Scheduler
    launcher: Launcher | None = None

    @property
    def url(self) -> str:
        return f"ipc://{self.directory.socket_path('control.sock')}"

    def run(self, source: str, destination: EndpointAddress = NULL, **job: object) -> Outcome:
        with contextlib.ExitStack() as stack:
            channel = CoordinatorChannel(ControlUrl("ipc", path=self.url.removeprefix("ipc://")))
            stack.callback(channel.close)
            command = WorkerCommand(self.url, "auto")
            if self.executable is not None:
                command = WorkerCommand(self.url, "auto", executable=self.executable)
            self.launcher = Launcher(command)
            stack.callback(self.launcher.close, 0)
            shell = Shell(
                channel,
                self.launcher,
                self.prepare,
                self.servers,
                Watching(self.watch),
                self.signals,
                worker_start_seconds=self.worker_start_seconds,
                finish_seconds=self.finish_seconds,
            )
            address = EndpointAddress(kind="nbd", address=source)
            fields: dict[str, object] = {"uuid": "job", "epoch": 1, "machine": machine_id(), "workers": 2, **job}
            return run_job(
                Job(source=address, destinations=(destination,), options=OPTIONS, **fields),  # type: ignore[arg-type]
                shell,
                self.make_scheduler,
            )


@pytest.fixture
def world() -> Iterator[World]:
    with SignalWatch() as signals, PrivateDirectory() as directory:
        world = World(directory, signals)
        try:
            yield world
        finally:
            for server in world.servers:
                server.close()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_job_runs_to_its_end(world: World) -> None:
    with nbdkit("pattern", size="64M") as server:
        outcome = world.run(server.uri, workers=2)
    assert (outcome.verdict, outcome.size, outcome.counters.total) == (Verdict.COMPLETE, 64 * MIB, 64 * MIB)


def test_workers_that_cannot_be_started_fail_the_job(world: World) -> None:
    world.executable = "/no/such/python"
    outcome = world.run("nbd://127.0.0.1:1")
    assert outcome.verdict is Verdict.FAILED
    assert "/no/such/python: cannot be started: No such file or directory" in outcome.error


def test_workers_that_end_before_they_join_fail_the_job(world: World, tmp_path: Path) -> None:
    world.executable = script(tmp_path / "worker", "exit 3")
    outcome = world.run("nbd://127.0.0.1:1")
    assert outcome.verdict is Verdict.FAILED
    assert "ended with exit status 3" in outcome.error


def test_workers_that_never_join_are_killed_and_fail_the_job(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    world.executable = script(tmp_path / "worker", "exec sleep 100")
    world.worker_start_seconds = 0.2
    outcome = world.run("nbd://127.0.0.1:1")
    assert outcome.verdict is Verdict.FAILED
    assert "was killed by SIGKILL" in outcome.error
    assert "did not join within 0.2 s; it is killed" in capfd.readouterr().err


def test_a_worker_killed_in_mid_copy_costs_nothing_but_time(world: World) -> None:
    killed: list[str] = []
    opened: list[bool] = []

    def kill_one(status: Status) -> None:
        if not opened and status.workers == 2:
            gate.open()
            opened.append(True)
        if not killed and opened and status.counters.total > 8 * MIB:
            assert world.launcher is not None
            killed.append(next(iter(world.launcher.names())))
            world.launcher.kill(killed[0])

    world.watch = kill_one
    with (
        private_folder() as folder,
        nbdkit("pattern", size="256M", threads=1) as server,
        nbdkit("null", (gate := Gate(folder)).option, size="256M", filters=["pause"], threads=1) as destination,
    ):
        gate.shut()
        address = EndpointAddress(kind="nbd", address=destination.uri)
        outcome = world.run(server.uri, address, workers=2, range_size=4 * MIB)
    assert killed
    assert (outcome.verdict, outcome.counters.total) == (Verdict.COMPLETE, 256 * MIB)
    assert outcome.workers >= 2


def test_a_strangers_messages_are_dropped(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    stranger: list[WorkerChannel] = []

    def knock(_status: Status) -> None:
        if not stranger:
            stranger.append(WorkerChannel(world.url, time.monotonic()))
            name = stranger[0].name
            stranger[0].send(Hello(PROTOCOL_VERSION, name, machine_id(), host="h", pid=1, ring="epoll"))

    world.watch = knock
    try:
        with nbdkit("pattern", size="64M") as server:
            outcome = world.run(server.uri)
        assert outcome.verdict is Verdict.COMPLETE
        assert "was not started by this coordinator; its message is dropped" in capfd.readouterr().err
        assert stranger[0].receive() == []
    finally:
        stranger[0].close(0)


def test_a_destination_that_cannot_be_prepared_fails_the_job_in_its_words(world: World) -> None:
    def refuse(size: int) -> None:
        raise UserError(f"cannot be given {size} bytes: No space left on device", "/dest")

    world.prepare = refuse
    with nbdkit("pattern", size="1M") as server, nbdkit("memory", size="1M") as destination:
        address = EndpointAddress(kind="nbd", address=destination.uri)
        outcome = world.run(server.uri, address, destination_grows=True)
    assert outcome.verdict is Verdict.FAILED
    assert outcome.error == "/dest: cannot be given 1048576 bytes: No space left on device"


@pytest.mark.parametrize(("command", "status"), [("exit 5", 5), ("exit 0", 0)])
def test_a_server_of_ours_that_ends_early_fails_the_job(
    world: World, tmp_path: Path, command: str, status: int
) -> None:
    server = CommandServer([script(tmp_path / "server", command)], "source", world.directory)
    world.servers.append(server)
    outcome = world.run(server.uri)
    assert outcome.verdict is Verdict.FAILED
    if status:  # one that left with success may be told by a worker that finds nobody there
        assert f"the source server ended with exit status {status} before the copy was over" in outcome.error


def slow_source() -> contextlib.AbstractContextManager[Server]:
    return nbdkit("pattern", "delay-read=20ms", size="1G", filters=["delay"], threads=1)


def test_a_signal_stops_the_job_and_the_workers_leave_by_themselves(world: World) -> None:
    sent: list[bool] = []

    def interrupt(status: Status) -> None:
        if not sent and status.counters.total:
            sent.append(True)
            signal.raise_signal(signal.SIGINT)

    world.watch = interrupt
    with slow_source() as server:
        outcome = world.run(server.uri)
    assert outcome.verdict is Verdict.STOPPED
    assert 0 < outcome.counters.total < 1 << 30
    assert outcome.unfenced == ()


def test_a_signal_before_the_loop_stops_the_job_too(world: World) -> None:
    signal.raise_signal(signal.SIGTERM)
    with slow_source() as server:
        outcome = world.run(server.uri)
    assert outcome.verdict is Verdict.STOPPED


def test_a_second_signal_does_not_wait_for_workers_that_hang(world: World) -> None:
    """Both workers are stopped: they will never answer."""
    sent: list[float] = []

    def interrupt(status: Status) -> None:
        if not sent and status.counters.total and world.launcher is not None:
            for pid in processes.children(os.getpid()):
                if "nbdshard.cli.main worker" in processes.command_line(pid):
                    os.kill(pid, signal.SIGSTOP)
            sent.append(time.monotonic())
            signal.raise_signal(signal.SIGINT)
            threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()

    world.watch = interrupt
    with slow_source() as server:
        outcome = world.run(server.uri)
    assert outcome.verdict is Verdict.STOPPED
    assert time.monotonic() - sent[0] < DRAIN_SECONDS


class Broken(Scheduler):
    """Breaks a promise of its own once bytes were copied."""

    def tick(self, now: float) -> list[Instruction]:
        if self.status().counters.total:
            raise BugError("two leases of one range")
        return super().tick(now)


class Endless(Scheduler):
    """Does not finish when it is told to stop."""

    def stop(self, reason: str, now: float) -> list[Instruction]:
        return []


def test_a_fault_of_ours_ends_everything(world: World) -> None:
    world.make_scheduler = Broken
    with slow_source() as server, pytest.raises(BugError, match="two leases of one range"):
        world.run(server.uri)
    # That no worker is left is seen by the fixture all tests have.


def test_a_scheduler_that_never_finishes_is_a_fault_of_ours(world: World) -> None:
    world.make_scheduler = Endless
    world.finish_seconds = 0.2
    signal.raise_signal(signal.SIGINT)
    with slow_source() as server, pytest.raises(BugError, match=r"did not finish within 0\.2 s of being told to stop"):
        world.run(server.uri)
