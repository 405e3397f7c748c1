"""One child process: watched by a pidfd, ended for certain, reaped by whoever started it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence

from nbdshard.common import logs
from nbdshard.common.errors import UserError
from nbdshard.common.limits import KILLED_CHILD_SECONDS

# What a terminal, a supervisor or timeout(1) sends to the whole group: the coordinator's to act on, nobody else's.
GROUP_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})


class Child:
    """A running child process. `descriptor` (a pidfd) becomes readable when it ends."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        stdin: int | None,
        stdout: int | None,
        environment: Mapping[str, str] | None = None,
        new_session: bool = False,
        shield_from_group_signals: bool = False,
    ) -> None:
        """Start `argv`; `stdin` and `stdout` as for subprocess.Popen, standard error is ours.

        `shield_from_group_signals`: it starts, and stays, with GROUP_SIGNALS blocked. Raises UserError if it cannot be
        started.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS) if shield_from_group_signals else None
        try:
            self._process = subprocess.Popen(
                list(argv),
                stdin=stdin,
                stdout=stdout,
                env=environment,
                start_new_session=new_session,
            )
        except OSError as error:
            raise UserError(f"cannot be started: {error.strerror}", argv[0]) from None
        finally:
            if before is not None:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            self.descriptor = os.pidfd_open(self._process.pid)
        except OSError as error:
            self._process.kill()
            self._process.wait()
            raise UserError(f"cannot be watched: {error.strerror}", argv[0]) from None

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self) -> bool:
        """Whether it has ended; then it is reaped too. Never blocks."""
        return self._process.poll() is not None

    @property
    def succeeded(self) -> bool:
        """Whether it ended with status 0. Only when `ended`."""
        return self._process.returncode == 0

    def story(self) -> str:
        """How it ended, in words: "was killed by SIGKILL". Only when `ended`."""
        status = self._process.returncode
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
            try:
                self._process.wait(KILLED_CHILD_SECONDS)
            except subprocess.TimeoutExpired:  # in an uninterruptible system call, on a dead disk perhaps
                logs.error(f"process {self.pid} does not end although it was killed {KILLED_CHILD_SECONDS:g} s ago")
        os.close(self.descriptor)
        self.descriptor = -1


def close_all(children: Sequence[Child], patience_seconds: float) -> None:
    """End all of them: `patience_seconds` in all to end by themselves, then SIGKILL; reap them, close the pidfds."""
    import select

    poller = select.poll()
    running = {child.descriptor: child for child in children if child.descriptor >= 0 and not child.ended()}
    for descriptor in running:
        poller.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + patience_seconds
    while running and (left := deadline - time.monotonic()) > 0:
        for descriptor, _ in poller.poll(left * 1000):
            poller.unregister(descriptor)
            running.pop(descriptor).ended()
    for child in running.values():
        child.kill()
    for child in children:
        child.close()
