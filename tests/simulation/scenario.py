"""What one seed stands for: two servers and their disks, a job, and what goes wrong meanwhile."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from enum import Enum, auto

from nbdshard.common.limits import CHECKPOINT_SECONDS, HEARTBEAT_SECONDS, LEASE_SECONDS, SPLICE_BYTES_MIN
from nbdshard.common.messages import EndpointAddress, JobOptions
from nbdshard.coordinator.job import Job, Verdict
from simulation.channel import Mischief
from simulation.disk import DATA, ZERO, Disk, Extent
from simulation.plumbing import PipeRules
from simulation.server_rules import Extents, Full, ServerRules

KIB = 1 << 10
MIB = 1 << 20
REQUESTS_PER_RUN = 100  # about: a run should take well below a second of real time
LONG_REQUESTS_PER_RUN = 16


class Trouble(Enum):
    """What goes wrong. The first are to be mended by the job itself, the others end it, or may."""

    NOTHING = auto()
    ERRORS = auto()  # requests fail, and succeed when they are asked again
    DEATHS = auto()  # worker processes are killed
    LEAVES = auto()  # worker processes are asked to leave, others may join
    STALL = auto()  # a worker process is not let run for longer than its leases last
    FULL = auto()  # a server admits fewer connections than it offers
    DEAD = auto()  # a server takes no connection at all
    CUT = auto()  # connections are cut
    SILENT = auto()  # a server stops answering
    BAD_BYTE = auto()  # one byte can never be read, or never be written
    FLUSH_FAILS = auto()
    STOP = auto()  # the user stops the job, perhaps twice
    VANISHING = auto()  # a worker on another machine is not heard of any more
    LATE = auto()  # what a worker on another machine and the coordinator say to one another comes late
    IMPOSSIBLE = auto()  # the ends do not fit one another
    CRASHES = auto()  # servers and coordinators crash, flushes fail; the job is resumed until it is complete


_WEIGHTS = {
    Trouble.NOTHING: 20,
    Trouble.ERRORS: 18,
    Trouble.DEATHS: 10,
    Trouble.LEAVES: 10,
    Trouble.STALL: 5,
    Trouble.FULL: 6,
    Trouble.DEAD: 3,
    Trouble.CUT: 8,
    Trouble.SILENT: 4,
    Trouble.BAD_BYTE: 4,
    Trouble.FLUSH_FAILS: 4,
    Trouble.STOP: 5,
    Trouble.VANISHING: 3,
    Trouble.LATE: 5,
    Trouble.IMPOSSIBLE: 3,
    Trouble.CRASHES: 12,
}


_WITH_ERRORS = (Trouble.DEATHS, Trouble.LEAVES, Trouble.CUT, Trouble.STOP, Trouble.VANISHING, Trouble.LATE)
_WITH_LEASES_THAT_END = (Trouble.LATE, Trouble.CRASHES)


_DEAD_WORDS = {
    Full.REFUSE: ("nobody listens",),
    Full.CLOSE: ("connection lost", "greeting"),
    Full.HANG: ("timed out", "negotiating"),
    Full.IGNORE: ("timed out", "connecting"),
}


@dataclass(frozen=True, slots=True)
class Speeds:
    """Usual seconds of each kind of wait; the worst are some ten times as long."""

    network: float
    ring: float
    server: float
    process: float
    control: float


BURSTS = Speeds(network=2e-5, ring=2e-6, server=2e-5, process=5e-3, control=1e-3)


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything about one run that is decided before it begins."""

    seed: int
    trouble: Trouble
    job: Job
    source: ServerRules
    destination: ServerRules
    speeds: Speeds
    mischief: Mischief
    capacity: int
    split_share: float
    pipes: PipeRules | None  # of every worker; None: they splice nothing
    verdicts: tuple[Verdict, ...]  # those it may end with
    error_words: tuple[str, ...] = ()  # all of which must be in the error of a failure

    @property
    def may_splice(self) -> bool:
        options = self.job.options
        return self.pipes is not None and options.data_path != "buffer" and not options.checksum


@dataclass(frozen=True, slots=True)
class Disks:
    source: Disk
    destination: Disk


def make_scenario(seed: int, trouble: Trouble | None = None) -> tuple[Scenario, Disks]:
    """The scenario of `seed`, always the same; or, for a test of one `trouble`, another of the same seed."""
    return _Maker(seed, trouble).make()


class _Maker:
    def __init__(self, seed: int, trouble: Trouble | None) -> None:
        self.seed = seed
        self.chance = random.Random(f"scenario {seed}")
        drawn = self.chance.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        self.trouble = trouble or drawn
        self.verdicts = {Verdict.COMPLETE}
        self.error_words: tuple[str, ...] = ()
        self.favours_pipes = self.chance.random() < 0.5  # else few requests are long enough for them
        # So many short replies come at once that a connection cannot take them all before the others' turn.
        self.comes_in_bursts = not self.favours_pipes and self.chance.random() < 0.1

    def make(self) -> tuple[Scenario, Disks]:
        chance = self.chance
        request_size = chance.choice((4, 8, 8, 16, 64)) * KIB
        if self.favours_pipes:
            request_size = SPLICE_BYTES_MIN * chance.choice((1, 1, 2))
        elif self.comes_in_bursts:
            request_size = 4 * KIB
        source = self._rules("source", request_size)
        destination = self._rules("destination", request_size)
        size = self._size(source, request_size)
        pipes = self._pipes()
        options = self._options(request_size, has_pipes=pipes is not None)
        job = self._job(options)
        disks = self._disks(size, source, destination, options, job)
        source, destination = self._limits(source, options), self._limits(destination, options)
        source, destination = self._trouble(source, destination, job, disks)
        scenario = Scenario(
            seed=self.seed,
            trouble=self.trouble,
            job=job,
            source=source,
            destination=destination,
            speeds=BURSTS if self.comes_in_bursts else self._speeds(),
            mischief=self._mischief(),
            capacity=chance.choice((4, 16, 64, 256)) * KIB if not self.comes_in_bursts else MIB,
            split_share=chance.choice((0.0, 0.1, 0.5)) if not self.comes_in_bursts else 0.0,
            pipes=pipes,
            verdicts=tuple(sorted(self.verdicts, key=lambda verdict: verdict.value)),
            error_words=self.error_words,
        )
        return scenario, disks

    # -- the servers ---------------------------------------------------------------------------------------------------

    def _rules(self, name: str, request_size: int) -> ServerRules:
        chance = self.chance
        knows_go = chance.random() < 0.9
        minimum = chance.choice((1, 1, 1, 512, 4096)) if knows_go else 1
        structured = chance.random() < 0.85
        maxima = [max(4 * KIB, request_size // 2), request_size, 12 * KIB, 64 * KIB, 64 * KIB, 1 << 25]
        maximum = chance.choice([each for each in maxima if each >= request_size] if self.favours_pipes else maxima)
        return ServerRules(
            name,
            block_minimum=minimum,
            block_preferred=max(minimum, chance.choice([size for size in (512, 4096, 4096, 65536) if size <= maximum])),
            block_maximum=maximum,
            knows_go=knows_go,
            structured=structured,
            extended=structured and knows_go and chance.random() < 0.3,
            multi_conn=chance.random() < 0.85,
            can_flush=chance.random() < 0.9,
            can_zero=chance.random() < 0.85,
            extents=chance.choice(
                [*Extents, Extents.NONE, Extents.EXACT, Extents.EXACT] if self.favours_pipes else list(Extents)
            ),
            error_share=self._error_share(),
            refuses_zeroes=chance.random() < 0.05,
        )

    def _error_share(self) -> float:
        if self.trouble is Trouble.ERRORS:
            return self.chance.choice((0.05, 0.2, 0.4) if self.favours_pipes else (0.01, 0.05, 0.2))
        if self.trouble in _WITH_ERRORS and self.chance.random() < 0.3:
            return 0.03
        return 0.0

    def _limits(self, rules: ServerRules, options: JobOptions) -> ServerRules:
        """What this job may ask of the server."""
        asks_zeroes = rules.can_zero and (options.allocated or not options.destination_is_zero)
        return replace(
            rules,
            requests_max=options.requests + 1,
            payload_max=max(options.queue_size, options.request_size, 4096),
            no_hole=options.allocated if asks_zeroes else None,
        )

    # -- the job -------------------------------------------------------------------------------------------------------

    def _size(self, source: ServerRules, request_size: int) -> int:
        chance = self.chance
        most = LONG_REQUESTS_PER_RUN * SPLICE_BYTES_MIN
        if not self.favours_pipes:
            most = min(3 * MIB, request_size * REQUESTS_PER_RUN)
        size = chance.choice((0, 1, chance.randint(2, 5000), *(chance.randint(1, most) for _ in range(15))))
        if chance.random() < 0.3:
            size -= size % request_size
        return size - size % source.block_minimum

    def _pipes(self) -> PipeRules | None:
        chance = self.chance
        if not self.favours_pipes and chance.random() < 0.3:
            return None
        return PipeRules(
            full_early_share=chance.choice((0.0, 0.1, 0.5)),
            short_share=chance.choice((0.0, 0.1, 0.5)) if not self.comes_in_bursts else 0.0,
            pipes_max=chance.choice((0, 1, chance.randint(2, 10), *[1000] * 17)),
            large_max=chance.choice((0, 1, chance.randint(2, 10), *[1000] * 17)),
        )

    def _options(self, request_size: int, *, has_pipes: bool) -> JobOptions:
        chance = self.chance
        is_zero = chance.random() < 0.15
        return JobOptions(
            request_size=request_size,
            requests=chance.choice((1, 2, 4, 16, 64)) if not self.comes_in_bursts else 64,
            queue_size=request_size * (chance.choice((1, 2, 5, 16, 64)) if not self.comes_in_bursts else 64),
            sparse_unit=chance.choice((None, 0 if self.favours_pipes else None, 0, 512, 4096, 64 * KIB)),
            allocated=chance.random() < 0.15,
            destination_is_zero=is_zero,
            extents=chance.random() < 0.85,
            synchronous=chance.random() < 0.08,
            flush=chance.random() < 0.85 or self.trouble is Trouble.CRASHES,  # without, a crash at the end costs data
            data_path=chance.choice(("auto", "auto", "auto", "splice", "splice", "buffer")) if has_pipes else "auto",
            connect_seconds=2.0,
            handshake_seconds=2.0,
            request_seconds=chance.choice((10.0, 30.0)),
            checksum=random.Random(f"checksum {self.seed}").random() < 0.2,  # so the rest of a seed stays what it was
        )

    def _job(self, options: JobOptions) -> Job:
        chance = self.chance
        unit = max(64 * KIB, options.request_size)
        lease, heartbeat = chance.choice(((LEASE_SECONDS, HEARTBEAT_SECONDS), (1.5, 0.3)))
        if self.trouble in _WITH_LEASES_THAT_END:
            lease, heartbeat = 1.5, 0.3
        workers = chance.choice((1, 2, 3, 4, 4)) if not self.comes_in_bursts else 1
        is_local = self.trouble not in (Trouble.VANISHING, Trouble.LATE)
        if self.trouble in (Trouble.LEAVES, Trouble.NOTHING, Trouble.CRASHES):
            is_local = chance.random() < 0.6
        loss, checkpoint = 0.0, CHECKPOINT_SECONDS
        if self.trouble is Trouble.CRASHES:
            loss, checkpoint = 30.0, chance.choice((0.0, 0.001, 0.01, 0.1))
        return Job(
            uuid=f"job {self.seed}",
            epoch=chance.randint(1, 3) if self.trouble is not Trouble.CRASHES else 1,  # as its journal begins
            source=self._address("source"),
            destinations=(self._address("destination"),),
            options=options,
            connections=chance.choice((1, 2, 4, 6, 8)) if not self.comes_in_bursts else 1,
            workers=workers,
            range_size=MIB if self.comes_in_bursts else chance.choice((unit, unit, unit, 2 * unit, 4 * unit, None)),
            local_workers=is_local,
            machine="machine",
            lease_seconds=lease,
            heartbeat_seconds=heartbeat,
            loss_seconds=loss,
            checkpoint_seconds=checkpoint,
            verify=options.flush and random.Random(f"verify {self.seed}").random() < 0.3,
        )

    def _address(self, side: str) -> EndpointAddress:
        if self.chance.random() < 0.5:
            return EndpointAddress("nbd", f"nbd+unix:///?socket=/simulated/{side}")
        return EndpointAddress("nbd", f"nbd://{side}:10809")

    # -- the disks -----------------------------------------------------------------------------------------------------

    def _disks(self, size: int, source: ServerRules, destination: ServerRules, options: JobOptions, job: Job) -> Disks:
        chance = self.chance
        data, layout = self._content(size, source.block_minimum)
        room = size + -size % destination.block_minimum
        room += destination.block_minimum * chance.choice((0, 0, 1, 7, 100))
        garbage = bytearray(chance.randbytes(room))
        if options.destination_is_zero:
            garbage[:size] = bytes(size)
        return Disks(Disk(data, layout), Disk(garbage))

    def _content(self, size: int, unit: int) -> tuple[bytearray, list[Extent]]:
        """Stretches of data, of zeroes that are known, and of zeroes that look like data."""
        chance = self.chance
        data, at = bytearray(size), 0
        layout: list[Extent] = []
        kinds = chance.choice(("d", "z", "dz", "dzn", "ddnz", "dn", *(("d", "d", "d", "ddddn") * self.favours_pipes)))
        longest = max(1, size // chance.choice((1, 3) if self.favours_pipes else (1, 3, 10, 40)))
        while at < size:
            length = chance.randint(1, longest)
            if chance.random() < 0.5:
                length += -length % chance.choice((4 * KIB, 64 * KIB))
            end = min(size, at + length + -length % unit)
            kind = chance.choice(kinds)
            if kind == "d":
                data[at:end] = chance.randbytes(end - at)
            flags = ZERO if kind == "z" else DATA
            if layout and layout[-1][2] == flags:
                layout[-1] = (layout[-1][0], end, flags)
            else:
                layout.append((at, end, flags))
            at = end
        return data, layout

    # -- what goes wrong -----------------------------------------------------------------------------------------------

    def _trouble(
        self, source: ServerRules, destination: ServerRules, job: Job, disks: Disks
    ) -> tuple[ServerRules, ServerRules]:
        """The rules of both servers under this trouble; what the job may end with is noted."""
        match self.trouble:
            case Trouble.FULL:
                limit = {
                    "connections_max": self.chance.randint(1, 3),
                    "when_full": self.chance.choice(list(Full)),
                    "multi_conn": True,
                }
                return self._either(source, destination, limit)
            case Trouble.DEAD:
                self.verdicts = {Verdict.FAILED}
                full = self.chance.choice(list(Full))
                self.error_words = _DEAD_WORDS[full]
                return self._either(source, destination, {"connections_max": 0, "when_full": full})
            case Trouble.STALL:  # its own time-outs may have passed when it runs again
                self.verdicts = {Verdict.COMPLETE, Verdict.FAILED}
                self.error_words = ("timed out",)
            case Trouble.CUT:
                self.verdicts = {Verdict.COMPLETE, Verdict.FAILED}
            case Trouble.SILENT:
                self.verdicts = {Verdict.COMPLETE, Verdict.FAILED}
                return self._either(source, destination, {"silent_after": self.chance.randint(0, 30)})
            case Trouble.BAD_BYTE:
                return self._bad_byte(source, destination, disks)
            case Trouble.FLUSH_FAILS:
                if job.options.flush and destination.can_flush and disks.source.data:
                    self.verdicts = {Verdict.FAILED}
                    self.error_words = ("destination", "flush failed", "EIO")
                return source, replace(destination, flush_fails=True)
            case Trouble.STOP:
                self.verdicts = {Verdict.COMPLETE, Verdict.STOPPED, Verdict.FAILED}
                self.error_words = ("connection lost",)
            case Trouble.VANISHING | Trouble.LATE:
                self.verdicts = {Verdict.COMPLETE, Verdict.UNFENCED, Verdict.FAILED}
                several = destination.multi_conn and self.chance.random() < 0.5
                destination = replace(destination, is_contested=True, multi_conn=several)
                return replace(source, is_contested=True), destination
            case Trouble.IMPOSSIBLE:
                return self._impossible(source, destination, disks)
            case Trouble.CRASHES:
                return self._crashes(source, destination, job)
            case _:
                pass
        return source, destination

    def _either(
        self, source: ServerRules, destination: ServerRules, changes: dict[str, object]
    ) -> tuple[ServerRules, ServerRules]:
        if self.chance.random() < 0.5:
            return replace(source, **changes), destination  # type: ignore[arg-type]
        return source, replace(destination, **changes)  # type: ignore[arg-type]

    def _bad_byte(self, source: ServerRules, destination: ServerRules, disks: Disks) -> tuple[ServerRules, ServerRules]:
        data = disks.source.data
        places = [at for at in (self.chance.randrange(len(data)) for _ in range(50 if data else 0)) if data[at]]
        if not places:
            return source, destination
        self.verdicts = {Verdict.FAILED}
        side = self.chance.choice(("source", "destination"))
        self.error_words = (side, "at offset", "EIO", "bytes")
        if side == "source":
            return replace(source, bad_byte=places[0]), destination
        return source, replace(destination, bad_byte=places[0])

    def _crashes(self, source: ServerRules, destination: ServerRules, job: Job) -> tuple[ServerRules, ServerRules]:
        """Workers elsewhere may be connected for a while when the coordinator has crashed, beside those of the next."""
        destination = replace(destination, can_flush=True, flush_failures=self.chance.choice((0, 0, 1, 2)))
        names_lives = random.Random(f"lives {self.seed}").random() < 0.5  # drawn apart: a seed stays what it was
        if names_lives and destination.structured:
            destination = replace(destination, names_lives=True, multi_conn=True)
        if not job.local_workers:
            source = replace(source, is_contested=True)
            destination = replace(destination, is_contested=True, multi_conn=True)
        return source, destination

    def _impossible(
        self, source: ServerRules, destination: ServerRules, disks: Disks
    ) -> tuple[ServerRules, ServerRules]:
        size = len(disks.source.data)
        self.verdicts = {Verdict.FAILED}
        if size > 8192 and self.chance.random() < 0.5:
            room = size - self.chance.randint(1, 4096)
            room -= room % destination.block_minimum
            del disks.destination.data[room:], disks.destination.stable[room:]
            self.error_words = ("destination", "smaller")
            return source, destination
        self.error_words = ("read-only",)
        return source, replace(destination, read_only=True)

    # -- the world -----------------------------------------------------------------------------------------------------

    def _speeds(self) -> Speeds:
        chance = self.chance

        def one(low: float, high: float) -> float:
            return float(low * (high / low) ** chance.random())

        return Speeds(
            network=one(2e-5, 5e-3),
            ring=one(2e-6, 5e-4),
            server=one(2e-5, 1e-2) if self.trouble is not Trouble.LATE else one(0.1, 1.0),  # leases outlast messages
            process=one(2e-6, 5e-3),
            control=one(1e-4, 5e-3),
        )

    def _mischief(self) -> Mischief:
        """The channel is reliable; the messages for which that does not matter show that it does not."""
        if self.trouble is not Trouble.CRASHES and self.chance.random() < 0.7:
            return Mischief()
        return Mischief(lost=0.1, doubled=0.1, overtaken=0.1)
