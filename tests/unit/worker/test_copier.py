"""The copier alone, with connections that only record: how bytes get from a source to a target."""

from __future__ import annotations

from nbdshard.common.limits import LEASES_PER_WORKER, RETRIES, RETRY_DELAY_SECONDS
from nbdshard.common.messages import Counters, EndpointDescription, ErrorReport, Failed, JobOptions, Progress, Wanted
from nbdshard.common.messages import Written as WrittenMessage
from nbdshard.common.ranges import Range
from support.copier_bench import EIO, EPOCH, JOB, KIB, Bench


def options(**changes: object) -> JobOptions:
    """Small requests, no zero detection and no block status, unless a test says otherwise."""
    defaults: dict[str, object] = {
        "request_size": 4 * KIB,
        "requests": 4,
        "queue_size": 64 * KIB,
        "sparse_unit": 0,
        "extents": False,
    }
    return JobOptions(**(defaults | changes))  # type: ignore[arg-type]


def test_a_worker_with_connections_asks_for_as_many_leases_as_it_may_hold() -> None:
    bench = Bench()
    bench.pump()
    assert bench.copier.outbox == [Wanted(JOB, EPOCH, LEASES_PER_WORKER)]
    bench.pump()
    assert len(bench.copier.outbox) == 1  # the wish is known


def test_a_worker_without_a_target_asks_for_nothing() -> None:
    bench = Bench(targets=0)
    bench.pump()
    assert bench.copier.outbox == []


def test_a_lease_is_read_in_pieces_that_end_at_multiples_of_the_request_size() -> None:
    bench = Bench(options(requests=16))
    bench.lease(1024, 10_000)
    assert bench.source.made("read") == [Range(1024, 4096), Range(4096, 8192), Range(8192, 10_000)]


def test_no_write_is_queued_before_its_read_is_done() -> None:
    bench = Bench()
    bench.lease(0, 8192)
    first, second = bench.source.open
    listener = bench.source.listener
    assert listener is not None
    listener.sent(first.handle)
    listener.arriving(first.handle)
    bench.pump()
    assert bench.target.calls == []
    bench.answer(second)
    assert bench.target.made("write") == [Range(4096, 8192)]


def test_a_write_carries_the_bytes_that_were_read() -> None:
    bench = Bench()
    bench.lease(0, 4096)
    bench.answer(bench.source.open[0], data=bytes(range(256)) * 16)
    assert bench.target.open[0].payload == bytes(range(256)) * 16


def test_the_handle_is_the_row_and_is_used_again_when_the_write_is_confirmed() -> None:
    bench = Bench(options(requests=2))
    bench.lease(0, 5 * 4096)
    first, second = bench.source.open
    assert (first.handle, second.handle) == (0, 1)
    bench.answer(second)
    assert len(bench.source.calls) == 2  # its row is held until the write is confirmed
    bench.answer(bench.target.open[0])
    assert bench.source.calls[2].handle == 1
    assert bench.source.calls[2].where == Range(8192, 12_288)


def test_a_buffer_is_used_again_only_when_its_write_is_confirmed() -> None:
    bench = Bench(options(requests=1))
    bench.lease(0, 8192)
    bench.answer(bench.source.open[0], data=b"a")
    write = bench.target.open[0]
    assert bench.source.open == []
    assert write.payload == b"a" * 4096
    bench.answer(write)
    bench.answer(bench.source.open[0], data=b"b")
    assert bench.target.open[0].payload == b"b" * 4096


def test_a_reply_that_overtakes_its_send_is_taken() -> None:
    bench = Bench()
    bench.lease(0, 4096)
    call, listener = bench.source.open[0], bench.source.listener
    assert listener is not None
    listener.arriving(call.handle)
    listener.sent(call.handle)
    listener.done(call.handle, None, 4096, None)
    bench.pump()
    assert bench.target.made("write") == [Range(0, 4096)]


def test_a_lease_is_written_when_every_byte_is_acknowledged() -> None:
    bench = Bench()
    bench.lease(0, 8192)
    for _ in range(2):
        bench.answer(bench.source.open[0])
    bench.answer(bench.target.open[0])
    assert bench.told(WrittenMessage) == []
    bench.answer(bench.target.open[0])
    assert bench.told(WrittenMessage) == [WrittenMessage(JOB, EPOCH, 1, Counters(copied=8192))]
    assert bench.copier.idle


def test_a_lease_that_is_granted_twice_is_copied_once() -> None:
    bench = Bench()
    bench.lease(0, 4096)
    bench.lease(0, 4096)
    bench.answer_all()
    assert bench.source.made("read") == [Range(0, 4096)]
    assert len(bench.told(WrittenMessage)) == 1


# -- what is in flight -------------------------------------------------------------------------------------------------


def test_requests_bounds_the_reads_in_flight() -> None:
    bench = Bench(options(requests=3))
    bench.lease(0, 64 * KIB)
    assert len(bench.source.open) == 3


def test_queue_size_bounds_the_bytes_that_are_read_at_a_time() -> None:
    bench = Bench(options(requests=64, queue_size=10 * KIB))
    bench.lease(0, 64 * KIB)
    assert len(bench.source.open) == 2


def test_requests_bounds_the_writes_in_flight_and_the_rest_waits() -> None:
    bench = Bench(options(requests=2), sources=3)
    bench.lease(0, 64 * KIB)
    for recorder in bench.sources:
        for call in list(recorder.open):
            bench.answer(call)
    assert len(bench.target.open) == 2
    bench.answer(bench.target.open[0])
    assert len(bench.target.open) == 2
    bench.answer_all()
    assert sorted(str(where) for where in bench.target.made("write")) == sorted(
        str(where) for where in Range(0, 64 * KIB).split(4096)
    )


def test_queue_size_bounds_the_bytes_that_are_written_at_a_time() -> None:
    bench = Bench(options(requests=64, queue_size=8 * KIB), sources=4)
    bench.lease(0, 64 * KIB)
    for recorder in bench.sources:
        for call in list(recorder.open):
            bench.answer(call)
    assert len(bench.target.open) == 2


def test_several_sources_feed_one_target() -> None:
    bench = Bench(options(requests=2), sources=3)
    bench.lease(0, 24 * KIB)
    assert [len(recorder.open) for recorder in bench.sources] == [2, 2, 2]
    bench.answer_all()
    assert len(bench.target.calls) == 6
    assert bench.told(WrittenMessage) == [WrittenMessage(JOB, EPOCH, 1, Counters(copied=24 * KIB))]


def test_several_targets_are_all_written_to() -> None:
    bench = Bench(options(requests=2), sources=2, targets=2)
    bench.lease(0, 16 * KIB)
    bench.answer_all()
    assert [len(recorder.calls) for recorder in bench.targets] == [2, 2]


def test_synchronous_keeps_one_operation_at_a_time_in_order() -> None:
    bench = Bench(options(synchronous=True), sources=1)
    bench.lease(0, 3 * 4096)
    seen = []
    while bench.source.open or bench.target.open:
        assert len(bench.source.open) + len(bench.target.open) == 1
        call = (bench.source.open + bench.target.open)[0]
        seen.append((call.name, call.where))
        bench.answer(call)
    pieces = list(Range(0, 3 * 4096).split(4096))
    assert seen == [(name, piece) for piece in pieces for name in ("read", "write")]


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_failed_read_is_asked_again_after_pauses_that_double() -> None:
    bench = Bench()
    bench.lease(0, 4096)
    pause = RETRY_DELAY_SECONDS
    for _ in range(RETRIES):
        bench.answer(bench.source.open[0], EIO)
        assert bench.source.open == []
        assert bench.copier.deadline() == bench.now + pause
        bench.pump(pause * 0.9)
        assert bench.source.open == []
        bench.pump(pause * 0.2)
        assert [call.where for call in bench.source.open] == [Range(0, 4096)]
        pause *= 2
    bench.answer_all()
    assert bench.told(WrittenMessage) == [WrittenMessage(JOB, EPOCH, 1, Counters(copied=4096))]


def test_a_read_that_keeps_failing_fails_its_lease_with_offset_length_side_peer_and_error() -> None:
    bench = Bench()
    bench.lease(4096, 6096)
    for _ in range(RETRIES + 1):
        bench.pump(5.0)
        bench.copier.renew(bench.now, bench.now + 10.0)
        bench.answer(bench.source.open[0], EIO)
    text = "source there: read of 2000 bytes at offset 4096 failed 5 times: EIO"
    report = ErrorReport("request", text, "source", "there", 4096, 2000, "EIO")
    assert bench.told(Failed) == [Failed(JOB, EPOCH, 1, report)]
    assert bench.copier.idle
    assert bench.target.calls == []


def test_a_failed_write_is_sent_again_from_its_buffer() -> None:
    bench = Bench()
    bench.lease(0, 4096)
    bench.answer(bench.source.open[0], data=b"x")
    bench.answer(bench.target.open[0], EIO)
    assert bench.target.open == []
    bench.pump(RETRY_DELAY_SECONDS)
    again = bench.target.open[0]
    assert (again.name, again.where, again.payload) == ("write", Range(0, 4096), b"x" * 4096)
    assert len(bench.source.calls) == 1
    bench.answer(again)
    assert bench.told(WrittenMessage) == [WrittenMessage(JOB, EPOCH, 1, Counters(copied=4096))]


def test_a_write_that_keeps_failing_fails_its_lease_and_drops_what_was_not_begun() -> None:
    bench = Bench(options(requests=2))
    bench.lease(0, 16 * KIB)
    bench.answer(bench.source.open[0])
    for _ in range(RETRIES + 1):
        bench.answer(bench.target.open[0], EIO)
        bench.pump(1.0)
    assert bench.told(Failed) == []  # another read is still under way
    bench.answer(bench.source.open[0])
    text = "destination here: write of 4096 bytes at offset 0 failed 5 times: EIO"
    report = ErrorReport("request", text, "destination", "here", 0, 4096, "EIO")
    assert bench.told(Failed) == [Failed(JOB, EPOCH, 1, report)]
    assert len(bench.source.calls) == 2
    assert len(bench.target.calls) == RETRIES + 1


def test_a_lease_that_fails_takes_no_other_with_it() -> None:
    bench = Bench(options(requests=1))
    bench.lease(0, 4096, number=1)
    bench.lease(4096, 8192, number=2)
    for _ in range(RETRIES + 1):
        bench.answer(bench.source.open[0], EIO)
        bench.pump(1.0)
    bench.answer_all()
    assert [type(message) for message in bench.copier.outbox if not isinstance(message, Wanted)] == [
        Failed,
        WrittenMessage,
    ]


# -- odd ends ----------------------------------------------------------------------------------------------------------


BLOCKS = EndpointDescription("here", 1 << 20, can_zero=True, can_flush=True, block_minimum=512)


def test_a_tail_inside_a_block_keeps_the_bytes_of_the_destination_behind_it() -> None:
    bench = Bench(destination=BLOCKS)
    bench.lease(4096, 4096 + 700)
    bench.answer(bench.source.open[0], data=b"n")
    merge = bench.target.open[0]
    assert (merge.name, merge.where) == ("read", Range(4096 + 512, 4096 + 1024))
    bench.answer(merge, data=b"o")
    write = bench.target.open[0]
    assert (write.name, write.where) == ("write", Range(4096, 4096 + 1024))
    assert write.payload == b"n" * 700 + b"o" * 324
    bench.answer(write)
    assert bench.told(WrittenMessage) == [WrittenMessage(JOB, EPOCH, 1, Counters(copied=700))]


def test_reading_the_last_block_is_tried_again_and_fails_by_name() -> None:
    bench = Bench(destination=BLOCKS)
    bench.lease(0, 100)
    bench.answer(bench.source.open[0])
    for _ in range(RETRIES + 1):
        bench.answer(bench.target.open[0], EIO)
        bench.pump(1.0)
    (failed,) = bench.told(Failed)
    assert isinstance(failed, Failed)
    assert failed.error.text == "destination here: read of 512 bytes at offset 0 failed 5 times: EIO"
    assert bench.target.made("write") == []


STREAM = EndpointDescription("-", None, is_stream=True)


def test_a_stream_ends_its_lease_where_it_ends() -> None:
    bench = Bench(source=STREAM)
    bench.lease(0, 1 << 20, until_end=True)
    bench.answer(bench.source.open[0])
    bench.answer(bench.target.open[0])
    bench.answer(bench.source.open[0], count=100)
    assert bench.target.open[0].where == Range(4096, 4196)
    bench.answer(bench.target.open[0])
    assert bench.told(WrittenMessage) == [WrittenMessage(JOB, EPOCH, 1, Counters(copied=4196), end=4196)]


def test_a_stream_may_end_exactly_where_a_read_does() -> None:
    bench = Bench(source=STREAM)
    bench.lease(0, 1 << 20, until_end=True)
    bench.answer(bench.source.open[0])
    bench.answer(bench.target.open[0])
    bench.answer(bench.source.open[0], count=0)
    assert bench.told(WrittenMessage) == [WrittenMessage(JOB, EPOCH, 1, Counters(copied=4096), end=4096)]


def test_a_stream_as_long_as_the_destination_is_probed_for_its_end() -> None:
    bench = Bench(source=STREAM)
    bench.lease(0, 4096, until_end=True)
    bench.answer(bench.source.open[0])
    bench.answer(bench.target.open[0])
    probe = bench.source.open[0]
    assert probe.where == Range(4096, 4097)
    bench.answer(probe, count=0)
    (written,) = bench.told(WrittenMessage)
    assert written == WrittenMessage(JOB, EPOCH, 1, Counters(copied=4096), end=4096)


def test_a_stream_longer_than_the_destination_fails() -> None:
    bench = Bench(source=STREAM)
    bench.lease(0, 4096, until_end=True)
    bench.answer(bench.source.open[0])
    bench.answer(bench.target.open[0])
    bench.answer(bench.source.open[0])
    (failed,) = bench.told(Failed)
    assert isinstance(failed, Failed)
    assert failed.error.kind == "user"
    assert failed.error.text == "destination here: smaller than the source, which goes on after 4096 bytes"
    assert bench.target.made("write") == [Range(0, 4096)]


# -- counting ----------------------------------------------------------------------------------------------------------


def test_progress_counts_acknowledged_bytes_only() -> None:
    bench = Bench()
    bench.lease(0, 12 * KIB)
    for call in list(bench.source.open):
        bench.answer(call)
    bench.copier.report_progress()
    assert bench.told(Progress) == []
    bench.answer(bench.target.open[0])
    bench.copier.report_progress()
    bench.copier.report_progress()
    assert bench.told(Progress) == [Progress(JOB, EPOCH, 1, Counters(copied=4096))]


def test_who_drains_tells_how_far_its_leases_are() -> None:
    """It may have lost its connections: then the coordinator gives a range out in parts of which some was done."""
    bench = Bench()
    bench.lease(0, 12 * KIB)
    for call in list(bench.source.open):
        bench.answer(call)
    bench.answer(bench.target.open[0])
    bench.copier.drain()
    assert bench.told(Progress) == [Progress(JOB, EPOCH, 1, Counters(copied=4096))]


def test_a_refused_write_does_not_count() -> None:
    bench = Bench()
    bench.lease(0, 4096)
    bench.answer(bench.source.open[0])
    bench.answer(bench.target.open[0], EIO)
    bench.copier.report_progress()
    assert bench.told(Progress) == []
