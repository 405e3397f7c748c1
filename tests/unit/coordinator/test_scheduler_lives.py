"""A destination that names its lives: what it acknowledged before its connections were lost stays good, or does not."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from nbdshard.common import messages
from nbdshard.common.limits import LEAF_BYTES, MIB
from nbdshard.common.messages import EndpointDescription
from nbdshard.common.nbd.hints import Hints
from nbdshard.common.ranges import Range
from nbdshard.coordinator.instructions import Instruction, Journal
from nbdshard.coordinator.job import Verdict
from support.schedules import (
    EPOCH,
    UUID,
    Stage,
    ended,
    flushed,
    flushes_in,
    hello,
    job,
    leases_in,
    open_failed,
    opened,
    server,
    wanted,
    written,
)

SOURCE = server(16 * MIB, can_multi_conn=True)
DISK = server(16 * MIB, can_multi_conn=True)
FIRST, SECOND = "00000001-0000-4000-8000-000000000000", "00000002-0000-4000-8000-000000000000"
LOST = "destination nbd://b: connection lost while writing: connection reset by peer"


def disk(instance: str = FIRST, **changes: object) -> EndpointDescription:
    return replace(DISK, hints=Hints(instance=instance), **changes)


def copying(*names: str, destination: EndpointDescription | None = None, **options: object) -> Stage:
    """A job of four ranges whose workers are connected to the first life of the destination's server."""
    what = job(workers=len(names), connections=len(names), loss_seconds=60.0, range_size=4 * MIB)
    stage = Stage(replace(what, options=replace(what.options, **options)))
    stage.start()
    for name in names:
        stage.say(name, hello(name), opened(SOURCE, destination or disk()))
    return stage


def some_written(stage: Stage, name: str, count: int = 1) -> list[messages.Lease]:
    """`name` is granted so many leases, and writes them."""
    granted = leases_in(stage.say(name, wanted(count)))
    assert len(granted) == count
    stage.say(name, *map(written, granted))
    return granted


def comes_back(stage: Stage, name: str, destination: EndpointDescription, *awake: str) -> list[Instruction]:
    """`name` has lost its connections, and gets new ones after a pause."""
    stage.wait(1.0, name, *awake)
    return stage.say(name, opened(SOURCE, destination))


def ranges_granted(stage: Stage, name: str) -> list[Range]:
    """What `name` is given when it wants all there is."""
    found: list[Range] = []
    more = leases_in(stage.say(name, wanted(2)))
    while more:
        found += [lease.range for lease in more]
        more = leases_in(stage.say(name, *map(written, more), wanted(2)))
    return found


def test_what_the_same_life_acknowledged_is_not_copied_again_but_flushed() -> None:
    stage = copying("a")
    (first,) = some_written(stage, "a")
    stage.say("a", open_failed(LOST, side="destination"))
    comes_back(stage, "a", disk())
    (second,) = leases_in(stage.say("a", wanted(1)))
    assert second.range == Range(4 * MIB, 8 * MIB)
    (flush,) = flushes_in(stage.wait(6.0, "a"))
    # The worker itself knows of nothing that it wrote over its new connections.
    assert Journal(durable=(first.range,)) in stage.say("a", flushed(flush))


def test_the_job_can_end_with_that_flush() -> None:
    stage = copying("a")
    some_written(stage, "a", 2)
    stage.say("a", open_failed(LOST, side="destination"))
    comes_back(stage, "a", disk())
    last = leases_in(stage.say("a", wanted(2)))
    (flush,) = flushes_in(stage.say("a", *map(written, last)))
    stage.say("a", flushed(flush, *last))
    assert ended(stage, "a") == (Verdict.COMPLETE, "")


def test_what_another_life_acknowledged_is_copied_again() -> None:
    stage = copying("a")
    (first,) = some_written(stage, "a")
    stage.say("a", open_failed(LOST, side="destination"))
    comes_back(stage, "a", disk(SECOND))
    assert first.range in ranges_granted(stage, "a")


def test_a_server_that_says_nothing_any_more_proves_nothing() -> None:
    stage = copying("a")
    (first,) = some_written(stage, "a")
    stage.say("a", open_failed(LOST, side="destination"))
    comes_back(stage, "a", DISK)
    assert first.range in ranges_granted(stage, "a")


def test_without_several_connections_to_flush_for_one_another_nothing_is_proved() -> None:
    alone = disk(can_multi_conn=False)
    stage = copying("a", destination=alone)
    (first,) = some_written(stage, "a")
    stage.say("a", open_failed(LOST, side="destination"))
    comes_back(stage, "a", alone)
    assert first.range in ranges_granted(stage, "a")


def test_where_nobody_wants_a_flush_nothing_is_kept() -> None:
    """The job would end without having asked."""
    stage = copying("a", flush=False)
    (first,) = some_written(stage, "a")
    stage.say("a", open_failed(LOST, side="destination"))
    comes_back(stage, "a", disk())
    assert first.range in ranges_granted(stage, "a")


def test_another_life_takes_back_what_the_others_wrote_and_what_they_are_writing() -> None:
    stage = copying("a", "b")
    (first,) = some_written(stage, "b")
    (under_way,) = leases_in(stage.say("b", wanted(1)))
    stage.say("a", open_failed(LOST, side="destination"))
    comes_back(stage, "a", disk(SECOND), "b")
    stage.say("b", written(under_way))
    granted = ranges_granted(stage, "a")
    assert first.range in granted
    assert under_way.range in granted


def test_a_flush_that_was_lost_with_its_connection_proves_nothing_either() -> None:
    """It may be the one that the kernel had told of a lost write-back."""
    stage = copying("a")
    (first,) = some_written(stage, "a")
    assert len(flushes_in(stage.wait(6.0, "a"))) == 1
    stage.say("a", open_failed(LOST, side="destination"))
    comes_back(stage, "a", disk())
    assert first.range in ranges_granted(stage, "a")


def test_a_flush_that_fails_after_the_return_fails_the_job() -> None:
    stage = copying("a")
    some_written(stage, "a")
    stage.say("a", open_failed(LOST, side="destination"))
    comes_back(stage, "a", disk())
    (flush,) = flushes_in(stage.wait(6.0, "a"))
    failure = messages.ErrorReport("request", "destination nbd://b: flush failed: EIO", "destination")
    stage.say("a", flushed(flush, durable=False, failure=failure))
    assert ended(stage, "a") == (Verdict.FAILED, "destination nbd://b: flush failed: EIO")


def test_who_dies_before_it_comes_back_leaves_nothing() -> None:
    stage = copying("a", "b")
    (first,) = some_written(stage, "a")
    stage.say("a", open_failed(LOST, side="destination"))
    stage.gone("a")
    assert first.range in ranges_granted(stage, "b")


def test_nobody_waits_for_one_that_does_not_come_back_when_nothing_else_is_left_to_do() -> None:
    stage = copying("a", "b")
    (first,) = some_written(stage, "a")
    stage.say("a", open_failed(LOST, side="destination"))
    rest = ranges_granted(stage, "b")
    assert sorted(rest) == [Range(n * MIB, (n + 4) * MIB) for n in (0, 4, 8, 12)]
    assert rest[-1] == first.range


def test_nobody_waits_for_the_digests_of_one_that_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """While many are held, of ranges that come before its own in the checksum, nothing new is begun."""
    stage = copying("a", "b", checksum=True)
    (first,) = leases_in(stage.say("a", wanted(1)))
    of_one = sum(run.memory_bytes for run in with_digests(first)[0].runs)
    monkeypatch.setattr("nbdshard.coordinator.copying.DIGEST_BYTES_MAX", of_one * 3 // 2)
    stage.say("a", *with_digests(first), open_failed(LOST, side="destination"))
    (second,) = leases_in(stage.say("b", wanted(1)))
    followed = stage.say("b", *with_digests(second), wanted(2))
    for flush in flushes_in(followed):
        followed += stage.say("b", flushed(flush, second))
    assert first.range in [lease.range for lease in leases_in(followed)]


def with_digests(lease: messages.Lease) -> tuple[messages.Leaves, messages.Written]:
    count = lease.range.length // LEAF_BYTES
    run = messages.LeafRun(lease.range.start, (bytes(31) + b"1") * count)
    return messages.Leaves(UUID, EPOCH, lease.lease, [run]), replace(written(lease), leaves=count)
