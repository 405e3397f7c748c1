"""Digests on their way to the checksum: lost, wrong, too many, of ranges that are copied again."""

from __future__ import annotations

from hashlib import sha256

import pytest
from msgspec.structs import replace

from nbdshard.common import messages
from nbdshard.common.limits import LEAF_BYTES, MIB
from nbdshard.common.messages import Counters, EndpointDescription, LeafRun
from nbdshard.common.ranges import Range
from nbdshard.coordinator import copying
from nbdshard.coordinator.instructions import Instruction, Journal, Send
from nbdshard.coordinator.job import Verdict
from support.blkhash import blkhash
from support.schedules import (
    EPOCH,
    OPTIONS,
    UUID,
    Stage,
    ended,
    failed,
    flushed,
    flushes_in,
    goodbye,
    job,
    leases_in,
    server,
    stops,
    wanted,
)

SIZE = 8 * MIB
RANGE = 2 * MIB
CHECKSUM = replace(OPTIONS, checksum=True)


def content(version: int = 0) -> bytes:
    """Data and zeroes in turn, a MiB each; `version`: of the data."""
    return b"".join(bytes([17 * at + version]) * MIB if at % 2 else bytes(MIB) for at in range(SIZE // MIB))


def digests(lease: messages.Lease, version: int = 0) -> messages.Leaves:
    whole, runs = content(version), []
    for at in range(lease.range.start, lease.range.end, LEAF_BYTES):
        leaf = whole[at : at + LEAF_BYTES]
        if leaf.strip(b"\0"):
            runs.append(LeafRun(at, sha256(leaf).digest()))
    return messages.Leaves(UUID, EPOCH, lease.lease, runs)


def written(lease: messages.Lease, leaves: int | None = None) -> messages.Written:
    count = len(digests(lease).runs) if leaves is None else leaves
    return messages.Written(UUID, EPOCH, lease.lease, Counters(copied=lease.range.length), leaves=count)


def stage(
    workers: int = 1, disk: EndpointDescription | None = None, options: messages.JobOptions = CHECKSUM
) -> tuple[Stage, list[messages.Lease]]:
    """A job whose workers are connected; the leases of the first one."""
    disk = disk or server(SIZE)
    one = Stage(job(options=options, workers=workers, connections=workers, range_size=RANGE))
    one.start()
    for name in "ab"[:workers]:
        one.join(name, disk, disk)
    return one, leases_in(one.say("a", wanted(2)))


def write_all(one: Stage, worker: str, todo: list[messages.Lease], version: int = 0) -> list[Instruction]:
    """`worker` writes these leases, and what it is granted then; the last instructions."""
    followed: list[Instruction] = []
    while todo:
        lease = todo.pop(0)
        followed = one.say(worker, digests(lease, version), written(lease), wanted(2))
        todo += leases_in(followed)
    return followed


def finish(one: Stage, worker: str, followed: list[Instruction]) -> str:
    for flush in flushes_in(followed):
        numbers = [lease.lease for lease in one.sent[worker] if isinstance(lease, messages.Lease)]
        one.say(worker, messages.Flushed(UUID, EPOCH, flush.flush, numbers, True))
    assert ended(one, worker) == (Verdict.COMPLETE, "")
    return one.outcome.checksum


def noted(followed: list[Instruction]) -> list[int]:
    sent = [item.message for item in followed if isinstance(item, Send)]
    return [message.lease for message in sent if isinstance(message, messages.Noted)]


def test_the_outcome_has_the_checksum() -> None:
    one, leases = stage()
    assert finish(one, "a", write_all(one, "a", leases)) == blkhash(content())


def test_without_being_asked_for_there_is_none_and_digests_are_a_fault() -> None:
    one, leases = stage(options=OPTIONS)
    followed = one.say("a", digests(leases[0]))
    assert "digests that nobody has asked for" in stops(followed)[0][1]


def test_a_lease_whose_digests_were_lost_is_not_noted_until_they_have_come() -> None:
    one, (first, *others) = stage()
    assert noted(one.say("a", written(first))) == []
    part = replace(digests(first), runs=digests(first).runs[:3])
    assert noted(one.say("a", part, written(first))) == []
    followed = one.say("a", digests(first), written(first), wanted(2))  # all of them again
    assert noted(followed) == [first.lease]
    others += leases_in(followed)
    assert finish(one, "a", write_all(one, "a", others)) == blkhash(content())


def test_what_comes_again_after_it_was_noted_changes_nothing() -> None:
    one, (first, *others) = stage()
    one.say("a", digests(first), written(first))
    assert noted(one.say("a", digests(first, version=1), written(first))) == [first.lease]
    others += leases_in(one.say("a", wanted(2)))
    assert finish(one, "a", write_all(one, "a", others)) == blkhash(content())


@pytest.mark.parametrize(
    ("runs", "count", "fault"),
    [
        ([LeafRun(1, bytes(32))], 1, "do not fit"),
        ([LeafRun(RANGE, bytes(32))], 1, "do not fit"),
        ([LeafRun(0, bytes(33))], 1, "do not fit"),
        ([LeafRun(0, bytes(64)), LeafRun(LEAF_BYTES, bytes(32))], 3, "do not fit"),
        ([LeafRun(0, bytes(64))], 1, "it sent 2 digests of a lease that has 1"),
        ([LeafRun(0, bytes(32 * 40))], 40, "more digests than"),
    ],
)
def test_a_worker_whose_digests_do_not_fit_is_stopped(runs: list[LeafRun], count: int, fault: str) -> None:
    one, (first, *_) = stage()
    followed = one.say("a", messages.Leaves(UUID, EPOCH, first.lease, runs))
    if not stops(followed):
        followed = one.say("a", written(first, count))
    assert fault in stops(followed)[0][1]


def test_a_short_leaf_at_the_end_must_be_told() -> None:
    one, (only,) = stage(disk=server(LEAF_BYTES + 512))
    assert "no digest of the short leaf" in stops(one.say("a", written(only, 0)))[0][1]


def test_a_range_that_is_copied_again_counts_as_it_was_the_last_time() -> None:
    one, leases = stage(2)
    before = leases_in(one.say("b", wanted(1)))
    one.say("b", digests(before[0], version=9), written(before[0]))
    one.gone("b")  # nothing it wrote was flushed
    leases += leases_in(one.say("a", wanted(2)))
    assert finish(one, "a", write_all(one, "a", leases)) == blkhash(content())


def test_a_lease_that_failed_leaves_no_digests() -> None:
    one, (first, *others) = stage()
    one.say("a", digests(first, version=9))
    others += leases_in(one.say("a", failed(first, "connection", "lost"), wanted(2)))
    assert finish(one, "a", write_all(one, "a", others)) == blkhash(content())


def test_digests_go_to_the_journal_with_the_ranges_that_are_durable() -> None:
    one, leases = stage()
    flush = flushes_in(write_all(one, "a", list(leases)))
    granted = [message for message in one.sent["a"] if isinstance(message, messages.Lease)]
    (journal,) = [item for item in one.say("a", flushed(flush[0], *granted)) if isinstance(item, Journal)]
    assert journal.durable == (Range(0, SIZE),)
    assert list(journal.leaves) == [run for lease in granted for run in digests(lease).runs]


@pytest.mark.parametrize("can_flush", [False, True], ids=["no FLUSH", "--no-flush"])
def test_what_is_never_flushed_has_a_checksum(can_flush: bool) -> None:
    one, leases = stage(disk=server(SIZE, can_flush=can_flush), options=replace(CHECKSUM, flush=not can_flush))
    followed = write_all(one, "a", leases)
    for flush in flushes_in(followed):
        one.say("a", messages.Flushed(UUID, EPOCH, flush.flush, [], False))
    one.say("a", goodbye())
    assert one.outcome.checksum == blkhash(content())


@pytest.mark.parametrize("flush", [True, False], ids=["flush", "--no-flush"])
def test_while_too_many_digests_are_held_no_new_range_is_leased(monkeypatch: pytest.MonkeyPatch, flush: bool) -> None:
    monkeypatch.setattr(copying, "DIGEST_BYTES_MAX", 2000)  # less than one range has
    one, (first, second) = stage(2, options=replace(CHECKSUM, flush=flush))
    followed = one.say("a", digests(second), written(second), wanted(2))  # the first one is late
    assert leases_in(followed) == []
    assert leases_in(one.say("b", wanted(2))) == []
    for each in flushes_in(followed):  # what is written is to be flushed at once
        one.say("a", flushed(each, second))
    assert bool(flushes_in(followed)) == flush
    followed = one.say("a", digests(first), written(first))
    for each in flushes_in(followed):
        followed += one.say("a", flushed(each, first))
    granted = [item.worker for item in followed if isinstance(item, Send) and isinstance(item.message, messages.Lease)]
    assert granted, "nothing is held any more"


def test_a_range_that_came_back_is_leased_however_much_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "DIGEST_BYTES_MAX", 2000)
    one, (first, second) = stage(2)
    one.say("a", digests(second), written(second), wanted(2))
    assert leases_in(one.say("b", wanted(2))) == []
    again = leases_in(one.say("a", failed(first, "connection", "lost")))
    assert (again[0].range.start, again[-1].range.end) == (first.range.start, first.range.end)


def test_a_copy_that_fails_or_is_stopped_has_none() -> None:
    one, leases = stage()
    one.say("a", digests(leases[0]), written(leases[0]))
    one.stop()
    one.say("a", goodbye())
    assert (one.outcome.verdict, one.outcome.checksum) == (Verdict.STOPPED, "")
