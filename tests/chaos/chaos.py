"""Copies under one fault after another, until there were enough of them. Each copy is compared at its end.

A copy that ended before it was complete is resumed; the only reasons that are let pass are those that nbdshard names
itself (`EXCUSES`). Everything that happened is told with its time, and printed if it goes wrong.
"""

from __future__ import annotations

import heapq
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Final

from chaos.faults import FAULTS_PER_COPY, SERVER_KINDS, Fault, Kind, Shape, fault, shape
from chaos.servers import Place, lasting_port
from support import cutting, images, processes
from support.blkhash import blkhash_of
from support.command import Outcome, Run, started
from support.servers import private_folder
from support.waiting import wait_for

SIZE: Final = 96 * images.MIB
COPY_SECONDS: Final = 200.0  # for one copy, its faults and resumptions included; it takes 15 as a rule
END_SECONDS: Final = 20.0  # for the processes of a killed coordinator to be gone
COMPARE_SECONDS: Final = 60.0
BEGUN_BYTES: Final = images.MIB  # that the destination's server has written
RESUMPTIONS_MAX: Final = 20  # of one copy
OPTIONS: Final = (
    *("--checkpoint", "0.3"),
    *("--connect-timeout", "2"),
    *("--handshake-timeout", "2"),
    *("--request-timeout", "2"),
    *("--reconnect-delay", "1"),
    *("--loss-timeout", "60"),
)
# Why a copy may end with 1 under all this, to be resumed: a range goes back only so often.
EXCUSES: Final = ("was lost 3 times", "was lost 16 times", "16 times for the range", "no flush covered")


@dataclass(slots=True)
class Tally:
    """What happened in a whole run."""

    faults: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    copies: int = 0


class Broken(AssertionError):
    """Something that must never happen, with the whole story of that copy."""


def run(seed: int, faults: int, folder: Path, say: Callable[[str], None]) -> Tally:
    """Copy until `faults` of them have struck. Raises Broken; `say` is told everything as it happens."""
    tally = Tally()
    image = images.sparse_image(folder / "image", SIZE, seed)
    struck = 0
    while struck < faults:
        with private_folder() as sockets:
            kind = CopyElsewhere if shape(seed, tally.copies).elsewhere else Copy
            copy = kind(shape(seed, tally.copies), image, folder, sockets, tally, say)
            wanted = [fault(seed, struck + number) for number in range(min(FAULTS_PER_COPY, faults - struck))]
            struck += copy.under(wanted)
        tally.copies += 1
    return tally


class Copy:
    """One copy, with everything around it."""

    _codes: tuple[int, ...] = (0, 75)  # that it may end with, besides 1

    def __init__(
        self, shape: Shape, image: Path, folder: Path, sockets: Path, tally: Tally, say: Callable[[str], None]
    ) -> None:
        self._shape = shape
        self._image = image
        self._copied = images.filled_image(folder / "copied", SIZE)
        self._journal = folder / "journal"
        self._tally = tally
        self._say = say
        self._began = time.monotonic()
        self._story: list[str] = []
        slow_source = shape.source == "nbdkit"
        self._places = {
            "source": Place(shape.source, image, sockets, shape.transport, is_slow=slow_source),
            "destination": Place(shape.destination, self._copied, sockets, shape.transport, is_slow=not slow_source),
        }
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._left: Iterator[Fault] = iter(())
        self._struck = 0

    def under(self, faults: list[Fault]) -> int:
        """Copy under these faults to the end, and compare; how many of them struck before that."""
        self._tell(f"copy: {self._shape}")
        self._left = iter(faults)
        try:
            self._to_the_end()
            for place in self._places.values():
                place.kill()  # what was flushed is there all the same
            self._compare()
        except (AssertionError, TimeoutError, OSError) as error:
            raise Broken("\n".join([str(error), "--- what happened:", *self._story])) from error
        finally:
            for place in self._places.values():
                place.kill()
            self._remove_journal()
        return self._struck

    # -- the copy ------------------------------------------------------------------------------------------------------

    def _to_the_end(self) -> None:
        for attempt in range(RESUMPTIONS_MAX):
            self._mend_all()
            before = cutting.inodes(self._places["destination"].pid)
            with self._command(resumes=attempt > 0 and self._journal.exists()) as run:
                self._next_fault(run, before)
                outcome = self._watch(run)
            if outcome is not None and self._is_complete(outcome):
                self._check_sum(outcome)
                return
        raise AssertionError(f"it was not complete after {RESUMPTIONS_MAX} runs")

    @contextmanager
    def _command(self, *, resumes: bool) -> Iterator[Run]:
        with started("copy", "--ring", self._shape.ring, *self._words(resumes=resumes)) as run:
            yield run

    def _words(self, *, resumes: bool) -> list[str]:
        """What `copy` and `coordinator` have in common."""
        self._tell("resume" if resumes else "begin")
        shape = self._shape
        words = [*OPTIONS, "--data-path", shape.data_path, "-T", str(shape.workers), "-C", str(shape.connections)]
        words += ["--range-size", f"{shape.range_mib}M", *(["--checksum"] if shape.checksum else [])]
        words += ["--verify"] if shape.verify else []
        words += ["--journal", str(self._journal), *(["--resume"] if resumes else [])]
        return [*words, *(place.uri for place in self._places.values())]

    def _is_complete(self, outcome: Outcome) -> bool:
        return outcome.code == 0

    def _watch(self, run: Run) -> Outcome | None:
        """Do what is due until the command ends; how it ended, or None if we killed it."""
        while True:
            deadline = self._began + COPY_SECONDS
            due = min(self._agenda[0][0] if self._agenda else deadline, deadline)
            wait_for(
                "something to do",
                lambda due=due: run.process.poll() is not None or self._look() or time.monotonic() >= due,  # type: ignore[misc]
                COPY_SECONDS,
            )
            if run.process.poll() is not None:
                return self._ended(run)
            if time.monotonic() >= deadline:
                raise TimeoutError(f"the copy hangs\n{run.err()}")
            if self._agenda and self._agenda[0][0] <= time.monotonic():
                heapq.heappop(self._agenda)[2]()

    def _ended(self, run: Run) -> Outcome | None:
        self._agenda.clear()
        if run.process.returncode == -signal.SIGKILL:
            for pid in run.processes():
                _send(pid, signal.SIGCONT)  # a spare that was stopped may have found no time to see to its own end
            wait_for("the processes of a killed coordinator to end", lambda: not run.processes(), END_SECONDS)
            self._tally.ends["killed"] += 1
            self._tell_output(run)
            return None
        outcome = run.wait(END_SECONDS)  # no process, no file, no traceback
        self._tell(f"ended with {outcome.code}")
        self._tell_output(run)
        self._tally.ends[str(outcome.code)] += 1
        if outcome.code == 1:
            assert any(excuse in outcome.last_line for excuse in EXCUSES), str(outcome)
        else:
            assert outcome.code in self._codes, str(outcome)
        return outcome

    def _compare(self) -> None:
        """cmp(1): neither our code nor anybody's idea of holes."""
        ended = subprocess.run(
            ["cmp", str(self._image), str(self._copied)], capture_output=True, text=True, timeout=COMPARE_SECONDS
        )
        assert ended.returncode == 0, f"the copy differs: {ended.stdout}{ended.stderr}"
        self._tell("identical")

    def _check_sum(self, outcome: Outcome) -> None:
        """Through all resumptions it is that of the whole image."""
        if self._shape.checksum:
            expected = blkhash_of(self._image)
            assert outcome.out.split()[:1] == [expected], f"{expected} is the image's checksum\n{outcome}"

    def _remove_journal(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self._journal}{suffix}").unlink(missing_ok=True)

    # -- faults --------------------------------------------------------------------------------------------------------

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (time.monotonic() + seconds, next(self._order), action))

    def _next_fault(self, run: Run, before: set[str]) -> None:
        """The next one is due after its pause; that counts from when data moves: a server that is lost before a copy
        has begun is not waited for, so that a mistyped name is told at once."""
        following = next(self._left, None)
        if following is not None:
            pid = self._places["destination"].pid
            self._await(run, "a connection", lambda: self._is_ours(cutting.inodes(pid), before))
            begun = processes.bytes_written(pid) + BEGUN_BYTES
            self._await(run, "data", lambda: not processes.alive(pid) or processes.bytes_written(pid) > begun)
            self._later(following.pause, lambda: self._strike(following, run))

    def _is_ours(self, now: set[str], before: set[str]) -> bool:
        """What a run that was killed had sent is carried out, and its connections are gone."""
        return bool(now) and not now & before

    def _await(self, run: Run, what: str, condition: Callable[[], bool]) -> None:
        wait_for(what, lambda: run.process.poll() is not None or self._look() or condition(), COPY_SECONDS)

    def _strike(self, it: Fault, run: Run) -> None:
        self._struck += 1
        self._tally.faults[it.kind.name] += 1
        self._tell(f"fault {self._struck}: {it}")
        if it.kind in SERVER_KINDS:
            self._strike_server(it, self._places[it.side])
        elif it.kind is Kind.KILL_COORDINATOR:
            os.kill(run.pid, signal.SIGKILL)
        elif it.kind is Kind.STOP_COORDINATOR:
            os.kill(run.pid, signal.SIGSTOP)
            self._later(it.seconds, lambda: _send(run.pid, signal.SIGCONT))
        elif workers := self._workers(run):
            victim = workers[int(it.pick * len(workers))]
            if it.kind is Kind.KILL_WORKER:
                _send(victim, signal.SIGKILL)
            else:
                _send(victim, signal.SIGSTOP)
                self._later(it.seconds, lambda: _send(victim, signal.SIGCONT))
        following = next(self._left, None)
        if following is not None:
            self._later(following.pause, lambda: self._strike(following, run))

    def _workers(self, run: Run) -> list[int]:
        return sorted(run.workers())

    def _strike_server(self, it: Fault, place: Place) -> None:
        if it.kind is Kind.KILL_SERVER:
            place.kill()
            self._later(it.seconds, place.start)
        elif it.kind is Kind.STALL_SERVER:
            place.stop()
            self._later(it.seconds, place.go_on)
        elif place.runs:
            found = cutting.connections(place.pid)
            chosen = found if it.kind is Kind.CUT_ALL else found[int(it.pick * len(found)) :][:1]
            for number in chosen:
                cutting.cut(place.pid, number)

    def _look(self) -> bool:
        """A server that dies by itself is started again, as a supervisor would."""
        for side, place in self._places.items():
            if line := place.died():
                self._tell(f"the {side} died by itself: {line}")
                self._tally.ends[f"{self._shape.source if side == 'source' else self._shape.destination} died"] += 1
                self._later(0.2, place.start)
        return False

    def _mend_all(self) -> None:
        for place in self._places.values():
            place.go_on()
            place.start()

    # -- the story -----------------------------------------------------------------------------------------------------

    def _tell(self, line: str) -> None:
        line = f"{time.monotonic() - self._began:8.3f} {line}"
        self._story.append(line)
        self._say(line)

    def _tell_output(self, run: Run) -> None:
        for line in run.err().splitlines():
            self._tell(f"    {line}")


class CopyElsewhere(Copy):
    """The same with workers that nobody's child processes are, as on other machines. A supervisor starts them again.

    Those of a coordinator that was killed run on, and say what they have to say to the next one, at the same address.
    """

    _codes = (0, 4, 75)  # 4: a worker was not heard to close its connections, for it was killed

    @contextmanager
    def _command(self, *, resumes: bool) -> Iterator[Run]:
        self._crew: list[Run] = []
        url = f"tcp://127.0.0.1:{self._port}"
        with started("coordinator", "--listen", url, *self._words(resumes=resumes)) as run:
            self._coordinator = run
            yield run

    def _start_worker(self) -> Run:
        url = f"tcp://127.0.0.1:{self._port}"
        return self._all.enter_context(started("worker", "--connect", url, "--ring", self._shape.ring))

    def under(self, faults: list[Fault]) -> int:
        self._port = lasting_port()
        with ExitStack() as self._all:
            return super().under(faults)

    def _look(self) -> bool:
        self._crew = [worker for worker in self._crew if worker.process.poll() is None]
        if self._coordinator.process.poll() is None and len(self._crew) < self._shape.workers:
            self._crew.append(self._start_worker())
        return super()._look()

    def _workers(self, run: Run) -> list[int]:
        return [worker.pid for worker in self._crew]

    def _is_ours(self, now: set[str], before: set[str]) -> bool:
        return bool(now - before)

    def _is_complete(self, outcome: Outcome) -> bool:
        return outcome.code == 0 or "every byte was copied" in outcome.last_line


def _send(pid: int, number: signal.Signals) -> None:
    if processes.alive(pid):
        os.kill(pid, number)
