"""One run: builds the world of a scenario, lets it go to its end, and looks at what came of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from nbdshard.common.limits import GIB, MIB
from nbdshard.common.messages import EndpointAddress, FromWorker
from nbdshard.common.nbd.uri import parse_uri
from nbdshard.coordinator import job
from nbdshard.coordinator.job import Job, Outcome, Verdict
from simulation.clock import Pace, SimClock
from simulation.coordinator import SimCoordinator
from simulation.network import SimNetwork, Weather
from simulation.plumbing import PipeRules, SimPlumbing
from simulation.process import SimProcess
from simulation.ring import SimRing, SimSystem
from simulation.scenario import Disks, Scenario, Trouble, make_scenario
from simulation.server import SimServer
from simulation.server_rules import ServerRules
from simulation.session import Session
from support.blkhash import blkhash

JOB_SECONDS_MAX = 60.0  # virtual, to the end of a job; some troubles are found out by long time-outs only
JOB_SECONDS_MAX_OF = {Trouble.SILENT: 150.0, Trouble.VANISHING: 700.0, Trouble.LATE: 700.0}
STOP_SECONDS_MAX = 5.0  # from the user's wish to the end
AFTER_SECONDS_MAX = 60.0  # for the workers to leave when the job is over
EVENTS_MAX = 2_000_000
LEAVES_MAX = 2  # of workers: three in a row that opened nothing are taken for workers that cannot be started
DEATHS_MAX = 2  # of workers: a range that is lost once more fails the job
NOTHING_IS_LOST = (Trouble.NOTHING, Trouble.ERRORS, Trouble.LEAVES)  # no connection, that is


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a run."""

    scenario: Scenario
    outcome: Outcome
    seconds: float  # virtual
    events: int
    trace: int  # a hash of everything that was logged: equal for equal seeds

    def __str__(self) -> str:
        job, outcome = self.scenario.job, self.outcome
        return (
            f"seed {self.scenario.seed}: {self.scenario.trouble.name} {outcome.verdict.name}, {outcome.size} bytes, "
            f"{job.workers} workers, {job.connections} connections, {self.seconds:.3f} s, {self.events} events"
            f"{', ' + outcome.error if outcome.error else ''}"
        )


def simulate(seed: int, log: Callable[[str], None] | None = None) -> Report:
    """Run the job of `seed`. Raises AssertionError (or what the code under test raised) when something is wrong."""
    scenario, disks = make_scenario(seed)
    if scenario.trouble is Trouble.CRASHES:
        from simulation.resumed import ResumedSimulation  # which is one of these

        return ResumedSimulation(scenario, disks, log).run()
    return Simulation(scenario, disks, log).run()


class Simulation:
    """One world. Everything in it draws from the same source of chance, so a seed replays it event by event."""

    after_seconds_max = AFTER_SECONDS_MAX

    def __init__(self, scenario: Scenario, disks: Disks, log: Callable[[str], None] | None = None) -> None:
        self.scenario = scenario
        self.disks = disks
        self.clock = SimClock()
        self.chance = random.Random(f"run {scenario.seed}")
        self.trace = 0
        self._print = log
        speeds, job = scenario.speeds, scenario.job
        weather = Weather(self._pace(speeds.network), scenario.capacity, scenario.split_share)
        self.network = SimNetwork(self.clock, self.chance, weather)
        self.source = self._serve(scenario.source, job.source)
        self.destination = self._serve(scenario.destination, job.destinations[0])
        # A test may put others in their place, to see what is found out.
        self.make_plumbing: Callable[[SimSystem, SimRing], SimPlumbing] = lambda system, ring: SimPlumbing(
            system, ring, self.chance, scenario.pipes or PipeRules()
        )
        self._paces = (self._pace(speeds.ring), self._pace(speeds.process))
        self._pids = 100
        self._before = bytes(disks.destination.data)
        self._content = bytes(disks.source.data)
        size = len(self._content)
        self.destination.expected = (self._content + self._before[size:])[: self.destination.size]
        self.coordinator = self._coordinate(job)

    def _coordinate(self, job: Job) -> SimCoordinator:
        pace = self._pace(self.scenario.speeds.control)
        return SimCoordinator(job, self.clock, self.chance, pace, self.scenario.mischief, self._spawn, self.log)

    def _pace(self, usual: float) -> Pace:
        return Pace(self.chance, usual, 10 * usual, 0.02)

    def _serve(self, rules: ServerRules, address: EndpointAddress) -> SimServer:
        disk = self.disks.source if rules.name == "source" else self.disks.destination
        server = SimServer(rules, disk, self.clock, self.chance, self._pace(self.scenario.speeds.server))
        self.network.listen(_where(address), server)
        return server

    def _spawn(
        self, name: str, to_coordinator: Callable[[FromWorker], None], on_end: Callable[[SimProcess, str], None]
    ) -> SimProcess:
        self._pids += 1
        return SimProcess(
            name,
            self._pids,
            self.clock,
            self.chance,
            self._paces,
            self.network,
            self.make_plumbing if self.scenario.pipes is not None else None,
            to_coordinator,
            on_end,
        )

    def log(self, line: str) -> None:
        line = f"{self.clock.now:12.6f} {line}"
        self.trace = hash_of(self.trace, line)
        if self._print is not None:
            self._print(line)

    # -- the run -------------------------------------------------------------------------------------------------------

    def run(self) -> Report:
        """The whole job, and its end. Raises AssertionError when something is wrong."""
        self.log(str(self.scenario))
        coordinator = self.coordinator
        self._plan_trouble()
        self._start(coordinator)
        seconds_max = JOB_SECONDS_MAX_OF.get(self.scenario.trouble, JOB_SECONDS_MAX)
        over = self.clock.run_until(self._is_over, seconds_max, EVENTS_MAX)
        assert over, (
            f"the job hangs: {self.clock.now:.1f} s, {self.clock.events} events, {coordinator.scheduler.status()}"
        )
        seconds = self.clock.now
        self._let_everybody_leave()
        outcome = coordinator.outcome
        assert outcome is not None
        self._check(outcome, seconds)
        return Report(self.scenario, outcome, seconds, self.clock.events, self.trace)

    def _start(self, coordinator: SimCoordinator) -> None:
        coordinator.start()
        if not self.scenario.job.local_workers:
            for _ in range(self.scenario.job.workers):
                self.clock.after(self.chance.random() * 0.01, coordinator.start_worker)
        self._plan_paces(coordinator)

    def _plan_paces(self, coordinator: SimCoordinator) -> None:
        """In every third job the user changes the rate, pauses and goes on, and lets it go in the end.

        By a chance of its own: the other seeds stay what they were.
        """
        chance = random.Random(f"paces {self.scenario.seed}")
        if chance.random() > 0.33:
            return
        moment = 0.0
        for _ in range(chance.randint(1, 4)):
            moment += chance.random() * 0.05
            rate = chance.choice((None, 2 * MIB, 64 * MIB, GIB))
            pace = job.Pace(rate, is_paused=chance.random() < 0.5)
            self.clock.after(moment, lambda pace=pace: coordinator.set_pace(pace))  # type: ignore[misc]
        self.clock.after(moment + 0.05, lambda: coordinator.set_pace(job.Pace()))

    def _is_over(self) -> bool:
        return self.coordinator.is_over

    def _let_everybody_leave(self) -> None:
        """Workers were told to stop, those that are killed have no say; then no connection is left."""

        def quiet() -> bool:
            everybody = all(process.ended for process in self.coordinator.processes.values())
            return everybody and self.source.quiet and self.destination.quiet

        deadline = self.clock.now + self.after_seconds_max
        over = self.clock.run_until(quiet, deadline, EVENTS_MAX)
        running = [name for name, process in self.coordinator.processes.items() if not process.ended]
        assert over, f"when the job is over, workers {running} go on; sessions {self._sessions()} are open"

    def _sessions(self) -> tuple[int, int]:
        return len(self.source.sessions), len(self.destination.sessions)

    # -- what goes wrong -----------------------------------------------------------------------------------------------

    def _plan_trouble(self) -> None:
        chance, clock = self.chance, self.clock
        match self.scenario.trouble:
            case Trouble.DEATHS:
                for _ in range(chance.randint(1, DEATHS_MAX)):
                    clock.after(self._moment(), lambda: self._to_somebody("dies", lambda it: it.kill("was killed")))
            case Trouble.LEAVES:
                for _ in range(chance.randint(1, LEAVES_MAX)):
                    clock.after(self._moment(), self._somebody_leaves)
            case Trouble.STALL:
                seconds = self.scenario.job.lease_seconds * chance.uniform(0.5, 3)
                clock.after(self._moment(), lambda: self._to_somebody("stalls", lambda it: it.stall(seconds)))
            case Trouble.CUT:
                for _ in range(chance.randint(1, 3)):
                    clock.after(self._moment(), self._cut)
            case Trouble.STOP:
                stop_at = self._moment()
                clock.after(stop_at, self.coordinator.stop)
                if chance.random() < 0.3:  # while it drains
                    clock.after(stop_at + 5 * self.scenario.speeds.control * chance.random(), self._cut)
                if chance.random() < 0.5:
                    clock.after(self._moment() + self._moment(), self.coordinator.stop)
                if chance.random() < 0.3:
                    clock.after(self._moment(), self._cut)
            case Trouble.VANISHING:
                if chance.random() < 0.5:
                    clock.after(self._moment(), lambda: self._to_somebody("vanishes", lambda it: it.kill("vanished")))
                else:
                    absence = self.scenario.job.lease_seconds * chance.uniform(1, 4)
                    clock.after(self._moment(), lambda: self._to_somebody("stalls", lambda it: it.stall(absence)))
            case Trouble.LATE:
                for _ in range(chance.randint(2, 8)):
                    clock.after(self._moment(), self._hold_up)
            case _:
                pass

    def _hold_up(self) -> None:
        lease, chance = self.scenario.job.lease_seconds, self.chance
        to, back = (lease * chance.choice((0.0, 0.5, chance.uniform(0.5, 3))) for _ in range(2))
        self._to_somebody(
            f"hears what is {to:.1f} s late, and is heard {back:.1f} s late",
            lambda it: self.coordinator.hold_up(it.name, (to, back)),
        )

    def _moment(self) -> float:
        """Some time while the job probably runs: nobody knows how long it will take."""
        speeds = self.scenario.speeds
        trip = speeds.network + speeds.server + speeds.ring + speeds.process
        return self.chance.choice((10, 30, 100)) * trip * self.chance.random() + 2 * speeds.control

    def _to_somebody(self, what: str, action: Callable[[SimProcess], None]) -> None:
        running = [process for process in self.coordinator.processes.values() if not process.ended]
        if running and self.coordinator.outcome is None:
            process = self.chance.choice(running)
            self.log(f"{process.name[:8]} {what}")
            action(process)

    def _somebody_leaves(self) -> None:
        """Somebody joins first, where nobody would be put in the place of who leaves."""
        if not self.scenario.job.local_workers and self.coordinator.outcome is None:
            self.coordinator.start_worker()
        self._to_somebody("is asked to leave", lambda process: process.leave("stopped by a signal"))

    def _cut(self) -> None:
        how = self.chance.choice((Session.cut, Session.hang_up))
        if self.chance.random() < 0.7:
            server = self.chance.choice((self.source, self.destination))
            self.log(f"the {server.rules.name} will {how.__name__} half-way")
            server.break_off = how
        elif sessions := [*self.source.sessions, *self.destination.sessions]:
            session = self.chance.choice(sessions)
            self.log(f"the {session.rules.name} {how.__name__}s")
            how(session)

    # -- what must be true ---------------------------------------------------------------------------------------------

    def _check(self, outcome: Outcome, seconds: float) -> None:
        scenario = self.scenario
        assert outcome.verdict in scenario.verdicts, f"{outcome.verdict.name}: {outcome.error}"
        assert bytes(self.disks.source.data) == self._content, "the source has changed"
        size, room = len(self._content), self.disks.destination
        assert room.data[size:] == self._before[size:], "bytes behind the end of the copy have changed"
        assert outcome.counters.total <= size
        assert outcome.counters.spliced <= (outcome.counters.copied if scenario.may_splice else 0)
        if self.coordinator.stopped_at is not None:
            took = seconds - self.coordinator.stopped_at
            assert took <= STOP_SECONDS_MAX, f"stopping took {took:.1f} s"
        if outcome.verdict is Verdict.COMPLETE:
            assert outcome.error == ""
        else:
            assert outcome.error, f"{outcome.verdict.name} without a word"
            assert "\n" not in outcome.error
        if outcome.verdict is Verdict.COMPLETE or outcome.error.startswith("every byte was copied"):
            self._check_copy(outcome, size)
            self._check_connections()
        else:
            assert not outcome.durable
        if outcome.verdict is Verdict.FAILED:
            missing = [word for word in scenario.error_words if word not in outcome.error]
            assert not missing, f"{missing} is not in: {outcome.error}"

    def _check_connections(self) -> None:
        """Where no connection is cut and nobody is killed or hurried, all of them are left in good order."""
        hurried = any(process.leaves > 1 for process in self.coordinator.processes.values())
        if self.scenario.trouble in NOTHING_IS_LOST and not hurried:
            for server in (self.source, self.destination):
                assert not server.deserted, f"{server.deserted} connections to the {server.rules.name} were given up"

    def _check_copy(self, outcome: Outcome, size: int) -> None:
        disk = self.disks.destination
        assert outcome.size == size
        assert outcome.done == size, f"{outcome.counters} and {outcome.resumed} resumed of {size} bytes"
        _assert_same(disk.data, self._content, "the destination")
        assert outcome.checksum == (blkhash(self._content) if self.scenario.job.options.checksum else "")
        job, rules = self.scenario.job, self.scenario.destination
        assert outcome.durable == (job.options.flush and (rules.can_flush or size == 0)), (
            f"durable is {outcome.durable}"
        )
        found = outcome.comparison
        assert (found is not None) == job.verify
        if found is not None:
            assert (found.differing, found.counters.total) == (0, size), f"it was verified that {found}"
        if outcome.durable:
            disk.lose_unflushed()
            _assert_same(disk.data, self._content, "what is left of the destination after a power cut")


def _assert_same(found: bytearray, expected: bytes, what: str) -> None:
    if found[: len(expected)] != expected:
        wrong = [at for at in range(len(expected)) if found[at] != expected[at]]
        raise AssertionError(
            f"{what} differs from the source in {len(wrong)} bytes from offset {wrong[0]} to {wrong[-1]}"
        )


def _where(address: EndpointAddress) -> str:
    uri = parse_uri(address.address)
    return uri.socket if uri.socket is not None else f"{uri.host}:{uri.port}"


def hash_of(before: int, line: str) -> int:
    """A running hash that is the same in every process."""
    from zlib import crc32

    return crc32(line.encode(), before)
