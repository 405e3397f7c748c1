"""Run nbdshard as users do, in a process group of its own, and see that it leaves nothing behind.

Every run gets a mark in its environment, which all its descendants inherit, and a private TMPDIR and XDG_RUNTIME_DIR:
so a process or a socket directory that survives the run is found, whatever else runs on the machine.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from support import processes
from support.servers import private_folder
from support.waiting import WAIT_SECONDS, wait_for

RUN_SECONDS = 100.0
END_SECONDS = WAIT_SECONDS  # for descendants to be gone once the command has ended

EXECUTABLE = str(Path(sys.executable).parent / "nbdshard")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str
    command: Sequence[str]

    def __str__(self) -> str:
        return f"`{' '.join(self.command)}` ended with {self.code}\nout: {self.out}\nerr: {self.err}"

    @property
    def last_line(self) -> str:
        """The last line of standard error: an error's one line, or the summary."""
        lines = self.err.strip().splitlines()
        return lines[-1] if lines else ""

    def succeeded(self) -> Outcome:
        assert self.code == 0, str(self)
        return self

    def failed(self, code: int = 1, *, saying: Sequence[str] = ()) -> Outcome:
        """It ended with `code`, and one line of standard error holds every word of `saying`."""
        assert self.code == code, str(self)
        assert any(all(words in line for words in saying) for line in self.err.splitlines() or [""]), (
            f"no line says {list(saying)}\n{self}"
        )
        return self


@dataclass(slots=True)
class Run:
    """A command under way."""

    command: list[str]
    process: subprocess.Popen[bytes]
    mark: str
    folder: Path
    out_path: Path
    err_path: Path
    ignore: frozenset[str] = field(default_factory=frozenset)

    @property
    def pid(self) -> int:
        return self.process.pid

    def out(self) -> str:
        return self.out_path.read_text(errors="replace")

    def err(self) -> str:
        return self.err_path.read_text(errors="replace")

    def processes(self) -> list[int]:
        """Every living process of the run, the command itself included."""
        return processes.with_environment(self.mark)

    def workers(self) -> list[int]:
        """Every living process of the run but the command itself."""
        return [pid for pid in self.processes() if pid != self.pid]

    def signal_group(self, number: int = signal.SIGINT) -> None:
        """What the terminal does on Ctrl-C: the signal goes to every process of the group.

        Returns when the command has taken it: another one sent before that would be lost.
        """
        processes.kill_group(self.pid, number)
        wait_for("the signal to be delivered", lambda: not processes.is_pending(self.pid, number))

    def until(self, what: str, condition: Callable[[], object]) -> None:
        """Return when `condition` holds, while the command runs; it fails the test if it has ended by then."""
        wait_for(what, lambda: condition() or self.process.poll() is not None)
        assert self.process.poll() is None, f"the command had ended before the test had seen {what}\n{self.err()}"

    def wait(self, seconds: float = RUN_SECONDS) -> Outcome:
        """How it ended. Raises TimeoutError with what it wrote; it is an error to leave anything behind."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(
                f"`{' '.join(self.command)}` did not end in {seconds:g} s\nout: {self.out()}\nerr: {self.err()}"
            ) from None
        outcome = Outcome(code, self.out(), self.err(), self.command)
        assert "Traceback" not in outcome.err, str(outcome)
        self.assert_no_leftovers()
        return outcome

    def assert_no_leftovers(self) -> None:
        """No process of the run is alive, and no file or directory of it is left."""
        try:
            wait_for("the run's processes to end", lambda: not self.processes(), END_SECONDS)
        except TimeoutError:
            left = {pid: processes.command_line(pid) for pid in self.processes()}
            raise AssertionError(f"left behind by {self.command}: {left}\nerr: {self.err()}") from None
        for name in ("tmp", "run"):
            left_files = [str(path) for path in (self.folder / name).rglob("*")]
            assert not left_files, f"left behind by {self.command}: {left_files}"


@contextlib.contextmanager
def started(
    *args: str | Path,
    stdin: int | None = subprocess.DEVNULL,
    stdout: int | None = None,
    env: Mapping[str, str] | None = None,
    user: int | None = None,
    executable: Sequence[str] = (EXECUTABLE,),
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> Iterator[Run]:
    """`nbdshard ARGS` running; killed, with all its descendants, when the block ends. `user`: a uid to run as."""
    command = [*executable, *(str(arg) for arg in args)]
    mark = f"NBDSHARD_TEST_RUN={secrets.token_hex(8)}"
    with private_folder() as folder, contextlib.ExitStack() as stack:
        for name in ("tmp", "run"):
            (folder / name).mkdir(mode=0o700)
            if user is not None:
                os.chown(folder / name, user, user)
        err = stack.enter_context((folder / "err").open("wb"))
        out = stack.enter_context((folder / "out").open("wb"))
        environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "XDG_RUNTIME_DIR": str(folder / "run")}
        environment |= {"XDG_STATE_HOME": str(folder / "state")}
        environment |= {mark.partition("=")[0]: mark.partition("=")[2], **(env or {})}
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=out if stdout is None else stdout,
            stderr=err,
            env=environment,
            start_new_session=True,
            cwd=cwd or "/",
            pass_fds=pass_fds,
            user=user,
            group=user,
            extra_groups=[] if user is not None else None,
        )
        run = Run(command, process, mark, folder, folder / "out", folder / "err")
        try:
            yield run
        finally:
            _end(run)


def _end(run: Run) -> None:
    processes.kill_group(run.pid)
    for pid in run.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.process.wait(END_SECONDS)


def nbdshard(*args: str | Path, timeout: float = RUN_SECONDS, input: bytes | None = None, **how: object) -> Outcome:
    """Run `nbdshard ARGS` to its end; `input` is its standard input. See `started` for the rest."""
    with contextlib.ExitStack() as stack:
        if input is not None:
            file = stack.enter_context(tempfile.TemporaryFile())
            file.write(input)
            file.seek(0)
            how["stdin"] = file.fileno()
        run = stack.enter_context(started(*args, **how))  # type: ignore[arg-type]
        return run.wait(timeout)


def copy(*args: str | Path, timeout: float = RUN_SECONDS, **how: object) -> Outcome:
    """`nbdshard copy ARGS`."""
    return nbdshard("copy", *args, timeout=timeout, **how)  # type: ignore[arg-type]
