"""Starts the local worker processes of a job, watches them, and ends them.

A local worker keeps to its coordinator's process group, so that a terminal's Ctrl-Z and fg reach the whole job; but the
signals that ask for an end (Ctrl-C, SIGTERM to the group) stay blocked in it: the coordinator asks its workers to stop
by messages, so that they drain. When the coordinator dies of a SIGKILL, the kernel kills its workers (the worker asks
for that itself, `--parent`; see cli.worker).

Every worker is given the same command line. But those that are forked, while this process is still young, have loaded
already what both need: the first one, and spares. A spare waits, as a copy of this process, until it is given out as a
worker, or has been for nothing. Once all are given out, workers are started as programs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

import msgspec

from nbdshard.common.child import NOTHING, Child, can_fork, close_all, fork, spawn
from nbdshard.common.errors import UserError
from nbdshard.common.limits import SPARE_WORKERS_MAX, WORKER_EXIT_SECONDS
from nbdshard.common.machine import new_worker_name

STDIN = 0
STDERR = 2

WorkerMain = Callable[[Sequence[str]], int]  # given the words of a worker's command line, be it; the exit status


class WorkerCommand(msgspec.Struct, frozen=True):
    """What every local worker of one job is started with."""

    url: str  # the coordinator's ipc address
    ring: str  # "auto", "io_uring" or "epoll"
    verbose: bool = False
    inherits_stdin: bool = False  # the source is our standard input
    inherits_stdout: bool = False  # the destination is our standard output
    executable: str = sys.executable

    def argv(self, name: str, parent: int) -> list[str]:
        """The program that is the worker called `name`, and its arguments."""
        return [self.executable, "-P", "-m", "nbdshard.cli.main", *self.words(name, parent)]

    def words(self, name: str, parent: int) -> list[str]:
        """What follows `nbdshard` on the worker's command line; no secret is in it, others can read it."""
        words = ["worker", "--connect", self.url, "--name", name, "--parent", str(parent), "--ring", self.ring]
        return [*words, "--verbose"] if self.verbose else words

    @property
    def stdin(self) -> int | None:
        return None if self.inherits_stdin else NOTHING

    @property
    def stdout(self) -> int | None:
        return None if self.inherits_stdout else STDERR


class Departure(msgspec.Struct, frozen=True):
    """A local worker's end, as its process tells it."""

    worker: str
    reason: str


class _Spare:
    """A copy of this process that waits at a pipe, its standard input, until it is wanted as the worker `name`."""

    def __init__(self, command: WorkerCommand, main: WorkerMain) -> None:
        """Raises OSError or UserError when there can be no new pipe or process."""
        self.name = new_worker_name()
        words = command.words(self.name, os.getpid())

        def wait() -> int:
            if not os.read(STDIN, 1):  # it is not wanted, or there is no coordinator any more
                return 0
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, STDIN)
            os.close(nothing)
            return main(words)

        gate, self._opener = os.pipe()
        try:
            self.child = fork(wait, "a spare worker", stdin=gate, stdout=command.stdout)
        except UserError:
            os.close(self._opener)
            raise
        finally:
            os.close(gate)

    def want(self) -> bool:
        """Have it begin. False if it does not wait any more, whatever ended it."""
        try:
            return os.write(self._opener, b"!") == 1
        except BrokenPipeError:
            return False
        finally:
            os.close(self._opener)

    def dismiss(self) -> None:
        """Let it go; instead of `want`."""
        os.close(self._opener)


class Launcher:
    """The local workers. Owns their processes: `close` leaves none behind."""

    def __init__(self, command: WorkerCommand) -> None:
        self._command = command
        self._children: dict[str, Child] = {}
        self._ahead: list[str] = []
        self._spares: list[_Spare] = []

    def start_ahead(self, main: WorkerMain, spares: int = 0) -> None:
        """Start one worker that the next `start` gives out: it loads while its coordinator still does.

        Where copies of this process will do, it is one, and so are up to SPARE_WORKERS_MAX of `spares`, which cost next
        to nothing until `start` gives them out; a copy calls `main`. Raises UserError as `start` does.
        """
        if not can_fork():
            self._ahead.append(self._spawn())
            return
        self._ahead.append(self._fork(main))
        for _ in range(min(spares, SPARE_WORKERS_MAX)):
            try:
                self._spares.append(_Spare(self._command, main))
            except (OSError, UserError):  # nobody has asked for it yet; `start` will tell
                return

    def start(self) -> str:
        """Start one worker; return its name. Raises UserError when there can be no new process."""
        if self._ahead:
            return self._ahead.pop()
        while self._spares:
            spare = self._spares.pop()
            if spare.want():
                self._children[spare.name] = spare.child
                return spare.name
            spare.child.close()
        return self._spawn()

    def _spawn(self) -> str:
        name = new_worker_name()
        command = self._command
        self._children[name] = spawn(
            command.argv(name, os.getpid()),
            stdin=command.stdin,
            stdout=command.stdout,
            shield_from_group_signals=True,
        )
        return name

    def _fork(self, main: WorkerMain) -> str:
        name = new_worker_name()
        command = self._command
        words = command.words(name, os.getpid())
        self._children[name] = fork(lambda: main(words), "a worker", stdin=command.stdin, stdout=command.stdout)
        return name

    @property
    def descriptors(self) -> list[int]:
        """A pidfd for each running worker, to be polled for reading."""
        return [child.descriptor for child in self._children.values()]

    def names(self) -> list[str]:
        """The workers whose processes were not seen to end."""
        return list(self._children)

    def reap(self) -> list[Departure]:
        """Those that have ended since the last call. Never blocks."""
        gone = [name for name, child in self._children.items() if child.ended()]
        departures: list[Departure] = []
        for name in gone:
            child = self._children.pop(name)
            departures.append(Departure(name, f"worker {name[:8]} (process {child.pid}) {child.story()}"))
            child.close()
        return departures

    def kill(self, worker: str) -> None:
        """SIGKILL to `worker`, if it is one of ours and runs; `reap` tells when it has ended."""
        child = self._children.get(worker)
        if child is not None:
            child.kill()

    def close(self, patience_seconds: float = WORKER_EXIT_SECONDS) -> None:
        """Wait up to `patience_seconds` for the workers to leave by themselves, kill the rest, reap all."""
        for spare in self._spares:
            spare.dismiss()
        close_all([*self._children.values(), *(spare.child for spare in self._spares)], patience_seconds)
        self._children.clear()
        self._spares.clear()
