"""One child process: watched by a pidfd, ended for certain, reaped by whoever started it.

`spawn` runs a program. `fork` makes a copy of this process, with everything loaded that is loaded here; it is for the
time before there are threads, a ZeroMQ context, or anything else of which a copy would be of no use.
"""

from __future__ import annotations

import gc
import itertools
import os
import select
import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Final, NoReturn

from nbdshard.common import logs
from nbdshard.common.errors import UserError
from nbdshard.common.limits import KILLED_CHILD_SECONDS

# What a terminal, a supervisor or timeout(1) sends to the whole group: for the first process to act on, nobody else.
GROUP_SIGNALS: Final = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
NOTHING: Final = -1  # in the place of a descriptor: /dev/null

_STDIN: Final = 0
_STDOUT: Final = 1
_STDERR: Final = 2
_IGNORED_BY_PYTHON: Final = (signal.SIGPIPE, signal.SIGXFSZ)  # programs expect them to be as they are in a shell
_EXIT_FAILURE: Final = 1


class Child:
    """A running child process. `descriptor` (a pidfd) becomes readable when it ends."""

    def __init__(self, pid: int, name: str) -> None:
        """Watch the child `pid`, for which nobody else waits. Raises UserError, about `name`, if it cannot be watched.

        Then it is ended.
        """
        self.pid = pid
        self._exit_status: int | None = None  # minus the number of the signal that killed it
        try:
            self.descriptor = os.pidfd_open(pid)
        except OSError as error:
            with suppress(ProcessLookupError, ChildProcessError):  # it ended already and was reaped by the kernel
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise UserError(f"cannot be watched: {error.strerror}", name) from None

    def ended(self) -> bool:
        """Whether it has ended; then it is reaped too. Never blocks."""
        if self._exit_status is None and self.descriptor >= 0:
            try:
                result = os.waitid(os.P_PIDFD, self.descriptor, os.WEXITED | os.WNOHANG)
            except ChildProcessError:  # whoever started us has SIGCHLD ignored: the kernel reaped it and tells nothing
                self._exit_status = 0
            else:
                if result is not None:
                    exited = result.si_code == os.CLD_EXITED
                    self._exit_status = result.si_status if exited else -result.si_status
        return self._exit_status is not None

    @property
    def succeeded(self) -> bool:
        """Whether it ended with status 0. Only when `ended`."""
        return self._exit_status == 0

    def story(self) -> str:
        """How it ended, in words: "was killed by SIGKILL". Only when `ended`."""
        status = self._exit_status
        if status is None:
            return "still runs"
        if status >= 0:
            return f"ended with exit status {status}"
        try:
            return f"was killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"was killed by signal {-status}"

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, by the pidfd: never to another process that got its number. Nothing if it ended."""
        if self.descriptor < 0:
            return
        try:
            signal.pidfd_send_signal(self.descriptor, number)
        except ProcessLookupError:
            pass

    def kill(self) -> None:
        """SIGKILL; `ended` will tell when it is done."""
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Make sure that it has ended, reap it, close the pidfd. Idempotent."""
        if self.descriptor < 0:
            return
        if not self.ended():
            self.kill()
            _await_ends([self], KILLED_CHILD_SECONDS)
            if not self.ended():  # in an uninterruptible system call, on a dead disk perhaps
                logs.error(f"process {self.pid} does not end although it was killed {KILLED_CHILD_SECONDS:g} s ago")
        os.close(self.descriptor)
        self.descriptor = -1


def spawn(
    argv: Sequence[str],
    *,
    stdin: int | None,
    stdout: int | None,
    environment: Mapping[str, str] | None = None,
    new_session: bool = False,
    shield_from_group_signals: bool = False,
) -> Child:
    """Start the program `argv`. `stdin`, `stdout`: a descriptor, NOTHING, or None for ours; standard error is ours.

    No other descriptor of ours reaches it. `shield_from_group_signals`: it starts, and stays, with GROUP_SIGNALS
    blocked. Raises UserError if it cannot be started.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    actions: list[tuple[object, ...]] = []
    for descriptor, place in ((stdin, _STDIN), (stdout, _STDOUT)):
        if descriptor == NOTHING:
            actions.append((os.POSIX_SPAWN_OPEN, place, os.devnull, os.O_RDWR, 0))
        elif descriptor is not None:
            actions.append((os.POSIX_SPAWN_DUP2, descriptor, place))
    actions += [(os.POSIX_SPAWN_CLOSE, number) for number in _other_descriptors()]
    try:
        pid = os.posix_spawnp(
            argv[0],
            list(argv),
            os.environ if environment is None else environment,
            file_actions=actions,
            setsid=new_session,
            setsigmask=mask | GROUP_SIGNALS if shield_from_group_signals else mask,
            setsigdef=_IGNORED_BY_PYTHON,
        )
    except OSError as error:
        raise UserError(f"cannot be started: {error.strerror}", argv[0]) from None
    return Child(pid, argv[0])


def can_fork() -> bool:
    """Whether a copy of this process would be whole: of several threads it would lack all but one."""
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:  # there is no /proc
        return False


def fork(
    body: Callable[[], int], name: str, *, stdin: int | None, stdout: int | None, keep: Collection[int] = ()
) -> Child:
    """Start a copy of this process that does `body` and exits with the status which that returns. Only if `can_fork`.

    The copy keeps our memory and little else: of our descriptors the standard ones (`stdin` and `stdout` as for
    `spawn`) and those in `keep`, of our signal handlers none. It stays with GROUP_SIGNALS blocked. What waits in
    Python's own buffers is written by both. Raises UserError if it cannot be started; `name` is what it is called then.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        pid = os.fork()
        if pid == 0:
            _be_the_copy(body, stdin, stdout, keep)
    except OSError as error:
        raise UserError(f"cannot be started: {error.strerror}", name) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return Child(pid, name)


def close_all(children: Sequence[Child], patience_seconds: float) -> None:
    """End all of them: `patience_seconds` in all to end by themselves, then SIGKILL; reap them, close the pidfds."""
    _await_ends(children, patience_seconds)
    for child in children:
        if child.descriptor >= 0 and not child.ended():
            child.kill()
    for child in children:
        child.close()


def _await_ends(children: Sequence[Child], patience_seconds: float) -> None:
    """Wait until all have ended, but not for longer than `patience_seconds`."""
    poller = select.poll()
    running = {child.descriptor: child for child in children if child.descriptor >= 0 and not child.ended()}
    for descriptor in running:
        poller.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + patience_seconds
    while running and (left := deadline - time.monotonic()) > 0:
        for descriptor, _ in poller.poll(left * 1000):
            poller.unregister(descriptor)
            running.pop(descriptor).ended()


def _be_the_copy(body: Callable[[], int], stdin: int | None, stdout: int | None, keep: Collection[int]) -> NoReturn:
    """The rest of the life of a process that was forked. It never returns to what its parent was doing."""
    status = _EXIT_FAILURE
    try:
        gc.freeze()  # nothing of the parent's is ever collected here: it would close descriptors which are ours by then
        signal.set_wakeup_fd(-1)
        for number in GROUP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        for descriptor, place in ((stdin, _STDIN), (stdout, _STDOUT)):
            if descriptor is not None:
                os.dup2(os.open(os.devnull, os.O_RDWR) if descriptor == NOTHING else descriptor, place)
        ours = sorted({*keep, max(_other_descriptors(), default=_STDERR) + 1})
        for last, following in itertools.pairwise([_STDERR, *ours]):
            os.closerange(last + 1, following)
        status = body()
    finally:
        os._exit(status)


def _other_descriptors() -> list[int]:
    """Every open descriptor but the standard ones; and that of the listing itself, which is closed again."""
    try:
        return [number for number in map(int, os.listdir("/proc/self/fd")) if number > _STDERR]
    except OSError:  # without /proc a program inherits what we inherited; what we opened is closed by execve(2)
        return []
