"""worker/comparer.py on recorders: what is asked of either side, and what is reported."""

from __future__ import annotations

import pytest

from nbdshard.common.messages import (
    Compared,
    Counters,
    EndpointDescription,
    ErrorReport,
    Failed,
    JobOptions,
    Lease,
    Mode,
    Progress,
    Wanted,
)
from nbdshard.common.nbd.constants import STATE_HOLE, STATE_ZERO
from nbdshard.common.ranges import Range
from nbdshard.worker.comparer import Comparer
from nbdshard.worker.shape import CopyShape
from support.copier_bench import EIO, EPOCH, JOB, KIB, Call, Recorder

UNIT = 4 * KIB
SIZE = 16 * UNIT
ZERO = STATE_HOLE | STATE_ZERO


class Bench:
    """One comparer between a recorder for each side; requests of 4 KiB, two at a time on each connection."""

    def __init__(
        self,
        sizes: tuple[int, int] = (SIZE, SIZE),
        *,
        mode: Mode = "compare",
        extents: bool = False,
        minimum: int = 1,
        attempts: int = 2,
        readers: int = 1,
    ) -> None:
        options = JobOptions(
            request_size=UNIT,
            requests=2,
            queue_size=64 * KIB,
            sparse_unit=None,
            extents=extents,
            attempts=attempts,
            mode=mode,
        )
        self.now = 100.0
        source = EndpointDescription("there", sizes[0], can_extents=True)
        destination = EndpointDescription("here", sizes[1], can_extents=True, block_minimum=minimum)
        shape = CopyShape.of(source, destination, options)
        self.comparer = Comparer(shape, options, (source, destination), JOB, EPOCH)
        self.sources = [Recorder(f"source{index}", source) for index in range(readers)]
        self.targets = [Recorder(f"target{index}", destination) for index in range(readers)]
        for recorder in self.sources:
            recorder.listener = self.comparer.add_source(recorder)
        for recorder in self.targets:
            recorder.listener = self.comparer.add_target(recorder, 2)

    @property
    def calls(self) -> list[Call]:
        """What is not answered, first of the source."""
        return [call for recorder in (*self.sources, *self.targets) for call in recorder.open]

    def lease(self, start: int, end: int, number: int = 1) -> None:
        self.comparer.grant(Lease(JOB, EPOCH, number, Range(start, end), 10.0), self.now + 10.0)
        self.pump()

    def pump(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.comparer.pump(self.now)

    def answer(self, call: Call, data: bytes | int = 0, flags: int | None = None) -> None:
        """A read brings `data`, or so many times that byte; block status `flags` for all that was asked."""
        assert call.where is not None
        extents = [(call.where, flags or 0)] if call.name == "extents" else None
        if call.buffer is not None:
            call.buffer[:] = bytes([data]) * len(call.buffer) if isinstance(data, int) else data
        self._done(call, None, extents)

    def refuse(self, call: Call) -> None:
        self._done(call, EIO, None)

    def _done(self, call: Call, error: object, extents: object) -> None:
        listener = call.connection.listener
        assert listener is not None
        call.connection.open.remove(call)
        listener.done(call.handle, error, call.where.length if call.where else 0, extents)  # type: ignore[arg-type]
        self.pump()

    def answer_all(self, data: bytes | int = 0) -> None:
        while self.calls:
            self.answer(self.calls[0], data)

    def told(self, kind: type) -> list[object]:
        return [message for message in self.comparer.outbox if isinstance(message, kind)]


def test_both_sides_are_read_and_what_is_the_same_is_reported_so() -> None:
    bench = Bench()
    bench.lease(0, 2 * UNIT)
    assert bench.sources[0].made("read") == bench.targets[0].made("read") == [Range(0, UNIT), Range(UNIT, 2 * UNIT)]
    bench.answer_all(7)
    assert bench.told(Compared) == [Compared(JOB, EPOCH, 1, Counters(compared=2 * UNIT))]
    assert bench.comparer.idle
    assert not bench.comparer.leases


def test_nothing_is_ever_written_or_flushed() -> None:
    bench = Bench(extents=True)
    bench.lease(0, SIZE)
    bench.answer(bench.calls[0], flags=ZERO)
    bench.answer_all(1)
    bench.comparer.flush(3)
    asked = {call.name for recorder in (*bench.sources, *bench.targets) for call in recorder.calls}
    assert asked == {"extents", "read"}


def test_no_more_than_the_requests_of_a_connection_are_under_way() -> None:
    bench = Bench()
    bench.lease(0, SIZE)
    assert len(bench.calls) == 4
    bench.answer(bench.sources[0].open[0])
    assert len(bench.calls) == 3  # a pair is over when both sides are
    bench.answer(bench.targets[0].open[0])
    assert len(bench.calls) == 4


def test_connections_of_a_side_share_its_reads() -> None:
    bench = Bench(readers=2)
    bench.lease(0, SIZE)
    assert [len(recorder.open) for recorder in (*bench.sources, *bench.targets)] == [2, 2, 2, 2]


def test_differences_are_told_in_order_and_neighbours_as_one() -> None:
    bench = Bench()
    bench.lease(0, 2 * UNIT)
    one = bytes(UNIT)
    second, first = bench.targets[0].open[1], bench.targets[0].open[0]
    for call in list(bench.sources[0].open):
        bench.answer(call, one)
    bench.answer(second, b"\1" + one[1:512] + b"\1" + one[513:])
    bench.answer(first, one[:1000] + b"\1" + one[1001:-1] + b"\1")
    (compared,) = bench.told(Compared)
    assert compared == Compared(
        JOB,
        EPOCH,
        1,
        Counters(compared=2 * UNIT),
        4 * 512,
        (Range(512, 1024), Range(UNIT - 512, UNIT + 1024)),
    )


def test_zeroes_on_both_sides_are_not_read() -> None:
    bench = Bench(extents=True)
    bench.lease(0, SIZE)
    assert [call.name for call in bench.calls] == ["extents", "extents"]
    for call in bench.calls:
        bench.answer(call, flags=ZERO)
    assert bench.told(Compared) == [Compared(JOB, EPOCH, 1, Counters(skipped=SIZE))]


@pytest.mark.parametrize("zero", [0, 1])
def test_where_one_side_says_zeroes_only_the_other_is_read_and_must_be_zeroes(zero: int) -> None:
    bench = Bench(extents=True)
    bench.lease(0, 2 * UNIT)
    for side, recorder in enumerate((bench.sources[0], bench.targets[0])):
        bench.answer(recorder.open[0], flags=ZERO if side == zero else 0)
    silent, read = (bench.sources[0], bench.targets[0])[:: 1 if zero == 0 else -1]
    assert silent.made("read") == []
    assert len(read.open) == 2
    bench.answer(read.open[0], 0)
    bench.answer(read.open[0], bytes(UNIT - 1) + b"\1")
    (compared,) = bench.told(Compared)
    assert compared == Compared(JOB, EPOCH, 1, Counters(compared=2 * UNIT), 512, (Range(2 * UNIT - 512, 2 * UNIT),))


def test_block_status_that_fails_says_nothing() -> None:
    bench = Bench(extents=True)
    bench.lease(0, UNIT)
    for call in bench.calls:
        bench.refuse(call)
    assert [call.name for call in bench.calls] == ["read", "read"]


def test_the_rest_of_the_longer_side_is_read_alone_and_must_be_zeroes() -> None:
    bench = Bench((UNIT + 100, 4 * UNIT))
    bench.lease(0, 4 * UNIT)
    one = bytes(range(100))
    bench.answer(bench.sources[0].open[0], 5)
    bench.answer(bench.sources[0].open[0], one)
    assert bench.sources[0].made("read") == [Range(0, UNIT), Range(UNIT, UNIT + 100)]
    bench.answer(bench.targets[0].open[0], 5)
    bench.answer(bench.targets[0].open[0], one + bytes(512 - 100))  # up to the end of the source's last block
    bench.answer(bench.targets[0].open[0], b"\1" + bytes(len(bench.targets[0].open[0].buffer or b"") - 1))
    bench.answer_all(0)
    (compared,) = bench.told(Compared)
    assert isinstance(compared, Compared)
    assert compared.done == Counters(compared=4 * UNIT)
    assert compared.differences == (Range(UNIT + 512, UNIT + 1024),)


def test_what_was_copied_is_read_up_to_the_sources_end_whatever_the_size_of_the_destination() -> None:
    for size in (0, UNIT, 100 * UNIT):  # a file had another size when it was opened
        bench = Bench((2 * UNIT, size), mode="read-back")
        bench.lease(0, 2 * UNIT)
        assert bench.targets[0].made("read") == [Range(0, UNIT), Range(UNIT, 2 * UNIT)]


def test_the_last_block_of_the_destination_is_read_whole_and_compared_as_far_as_the_source_goes() -> None:
    bench = Bench((UNIT + 100, 2 * UNIT), mode="read-back", minimum=4096, extents=True)
    bench.lease(0, UNIT + 100)
    assert bench.targets[0].made("extents") == [Range(0, 2 * UNIT)]
    for call in bench.calls:
        bench.answer(call, flags=0)
    assert bench.targets[0].made("read") == [Range(0, UNIT), Range(UNIT, 2 * UNIT)]
    bench.answer_all(0)
    assert bench.told(Compared) == [Compared(JOB, EPOCH, 1, Counters(compared=UNIT + 100))]


def test_a_read_that_fails_is_tried_again_after_a_pause() -> None:
    bench = Bench()
    bench.lease(0, UNIT)
    bench.answer(bench.targets[0].open[0])
    bench.refuse(bench.sources[0].open[0])
    assert bench.calls == []
    assert bench.comparer.deadline() is not None
    bench.pump(1.0)
    bench.answer(bench.sources[0].open[0])
    assert bench.told(Compared) == [Compared(JOB, EPOCH, 1, Counters(compared=UNIT))]


def test_a_retry_keeps_its_row_while_others_go_on() -> None:
    bench = Bench()
    bench.lease(0, SIZE)
    bench.refuse(bench.sources[0].open[0])
    bench.answer(bench.targets[0].open[0])
    assert len(bench.sources[0].open) == 1  # the other of the two; the third waits until the first is over
    bench.pump(1.0)
    assert len(bench.sources[0].open) == 2
    bench.answer_all()
    assert len(bench.told(Compared)) == 1


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_read_that_fails_for_the_last_time_fails_its_lease_once_all_is_quiet(side: str) -> None:
    bench = Bench(attempts=1)
    bench.lease(0, 2 * UNIT)
    recorder = bench.sources[0] if side == "source" else bench.targets[0]
    bench.refuse(recorder.open[1])
    assert bench.told(Failed) == []
    bench.answer_all()
    (failed,) = bench.told(Failed)
    assert isinstance(failed, Failed)
    peer = recorder.description.peer
    assert failed.error == ErrorReport(
        "request", f"{side} {peer}: read of 4096 bytes at offset 4096 failed once: {EIO}", side, peer, UNIT, UNIT, "EIO"
    )
    assert bench.told(Compared) == []
    assert bench.comparer.idle


def test_a_revoked_lease_is_told_to_have_failed() -> None:
    bench = Bench()
    bench.lease(0, SIZE)
    bench.comparer.revoke(1)
    bench.comparer.revoke(2)  # of which nothing is known
    bench.answer_all()
    (failed,) = bench.told(Failed)
    assert isinstance(failed, Failed)
    assert (failed.lease, failed.error.kind) == (1, "connection")


def test_drained_it_begins_nothing_more_and_is_idle_when_all_is_answered() -> None:
    bench = Bench()
    bench.lease(0, SIZE)
    bench.refuse(bench.sources[0].open[0])  # waits for its next try
    bench.comparer.drain()
    bench.answer_all()
    assert not bench.comparer.idle
    bench.pump(10.0)
    assert bench.comparer.idle
    assert bench.calls == []
    assert bench.told(Compared) == bench.told(Failed) == []
    bench.lease(0, SIZE, number=2)
    assert bench.calls == []


def test_two_leases_are_wanted_and_a_repeated_one_is_known() -> None:
    bench = Bench()
    bench.pump()
    assert bench.told(Wanted) == [Wanted(JOB, EPOCH, 2)]
    bench.lease(0, UNIT)
    bench.lease(0, UNIT)
    assert len(bench.sources[0].calls) == 1
    bench.answer_all()
    assert bench.told(Wanted)[1:] == [Wanted(JOB, EPOCH, 2)]


def test_without_a_connection_to_either_side_leases_wait() -> None:
    options = JobOptions(request_size=UNIT, requests=2, queue_size=UNIT, sparse_unit=None, mode="read-back")
    ends = (EndpointDescription("there", SIZE), EndpointDescription("here", SIZE))
    comparer = Comparer(CopyShape.of(*ends, options), options, ends, JOB, EPOCH)
    comparer.grant(Lease(JOB, EPOCH, 1, Range(0, UNIT), 10.0), 0.0)
    comparer.pump(0.0)
    assert comparer.outbox == []
    recorders = [Recorder(end.peer, end) for end in ends]
    recorders[0].listener = comparer.add_source(recorders[0])
    comparer.pump(0.0)
    assert recorders[0].calls == []
    recorders[1].listener = comparer.add_target(recorders[1], 2)
    comparer.pump(0.0)
    assert [recorder.made("read") for recorder in recorders] == [[Range(0, UNIT)]] * 2


def test_progress_is_told_once_for_each_step() -> None:
    bench = Bench()
    bench.lease(0, SIZE)
    bench.comparer.report_progress()
    assert bench.told(Progress) == []
    bench.answer(bench.sources[0].open[0])
    bench.answer(bench.targets[0].open[0])
    bench.comparer.report_progress()
    bench.comparer.report_progress()
    assert bench.told(Progress) == [Progress(JOB, EPOCH, 1, Counters(compared=UNIT))]


def test_who_drains_tells_how_far_its_leases_are() -> None:
    bench = Bench()
    bench.lease(0, SIZE)
    bench.answer(bench.sources[0].open[0])
    bench.answer(bench.targets[0].open[0])
    bench.comparer.drain()
    assert bench.told(Progress) == [Progress(JOB, EPOCH, 1, Counters(compared=UNIT))]


def test_nothing_is_tried_again_while_the_rate_is_0() -> None:
    bench = Bench()
    bench.lease(0, UNIT)
    bench.comparer.limit(0)
    bench.refuse(bench.sources[0].open[0])
    bench.pump(10.0)
    assert len(bench.sources[0].calls) == 1
    assert bench.comparer.deadline() is None
    bench.comparer.limit(None)
    bench.pump()
    assert len(bench.sources[0].calls) == 2


def test_buffers_are_used_again() -> None:
    bench = Bench()
    bench.lease(0, SIZE)
    bench.answer_all()
    buffers = {id(call.buffer.obj) for call in bench.sources[0].calls + bench.targets[0].calls if call.buffer}
    assert len(buffers) == 4


# -- a rate ------------------------------------------------------------------------------------------------------------


def test_pairs_are_begun_as_the_rate_allows_and_the_comparer_says_when() -> None:
    bench = Bench()
    bench.pump()
    bench.comparer.limit(UNIT)  # a pair each second
    bench.lease(0, 2 * UNIT)
    assert bench.calls == []
    assert bench.comparer.deadline() == pytest.approx(bench.now + 1.0)
    for second in (1, 2):
        bench.pump(1.001)
        assert [call.where for call in bench.calls] == [Range((second - 1) * UNIT, second * UNIT)] * 2
        bench.answer_all()
    bench.pump()
    assert any(isinstance(message, Compared) for message in bench.comparer.outbox)
    assert bench.comparer.deadline() is None


def test_what_both_sides_say_is_zeroes_waits_for_no_token() -> None:
    bench = Bench(extents=True)
    bench.pump()
    bench.comparer.limit(UNIT)
    bench.lease(0, UNIT, number=1)
    bench.lease(UNIT, 3 * UNIT, number=2)
    while questions := [call for call in bench.calls if call.name == "extents"]:
        start = questions[0].where.start if questions[0].where is not None else 0
        bench.answer(questions[0], flags=ZERO if start else 0)
    bench.pump()
    assert bench.calls == []
    assert bench.told(Compared) == [Compared(JOB, EPOCH, 2, Counters(skipped=2 * UNIT))]
    bench.pump(1.001)
    assert [call.where for call in bench.calls] == [Range(0, UNIT)] * 2


def test_a_rate_of_0_begins_no_pair_and_asks_for_no_extents() -> None:
    bench = Bench(extents=True)
    bench.comparer.limit(0)
    bench.lease(0, 2 * UNIT)
    bench.pump(10.0)
    assert bench.calls == []
    assert bench.comparer.deadline() is None
    bench.comparer.limit(None)
    bench.pump()
    assert {call.name for call in bench.calls} == {"extents"}
