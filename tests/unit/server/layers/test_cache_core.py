"""server/layers/cache_core.py, cache_units.py, cache_blocks.py: what the machine decides, and when."""

from __future__ import annotations

import errno

import pytest

from nbdshard.common.errors import BugError, IllegalEvent
from nbdshard.common.limits import CACHE_AGE_SECONDS, CACHE_REST_SECONDS_MAX, CACHE_REST_SECONDS_MIN
from nbdshard.common.nbd.constants import STATE_HOLE, STATE_ZERO
from nbdshard.common.ranges import Range
from nbdshard.server.layers.cache_blocks import Geometry, Run, WriteBack, laid_over, runs
from nbdshard.server.layers.cache_core import CacheCore, Obstacle
from nbdshard.server.layers.cache_states import BLOCK_STATES, BlockState

GEOMETRY = Geometry(1000, block=64, grain=16, unit=128, fetch=128)  # the last block has 40 bytes, its last grain 8
EMPTY = STATE_HOLE | STATE_ZERO
NO = OSError(errno.EIO, "no")


def core(slots: int = 16) -> CacheCore:
    return CacheCore(GEOMETRY, slots)


def written(machine: CacheCore, start: int, length: int, now: float = 0.0) -> None:
    writing, obstacle = machine.begin_write(Range.of(start, length))
    assert obstacle is None
    machine.end_write(writing, now)
    machine.validate()


def held(machine: CacheCore, start: int, length: int) -> None:
    """Read, fetched and let go."""
    reading = machine.begin_read(Range.of(start, length))
    fetches, waits = machine.wanted(reading)
    assert not waits
    for fetch in fetches:
        machine.landed(fetch, machine.begin_landing(fetch))
    machine.end_read(reading)
    machine.validate()


def taken(machine: CacheCore, now: float) -> WriteBack:
    found = machine.next_write_back(now)
    assert found is not None
    return found


# -- how an image is cut


def test_an_image_is_cut_into_blocks_and_grains_to_its_last_byte() -> None:
    assert list(GEOMETRY.parts(Range(60, 130))) == [(0, 60, 64), (1, 0, 64), (2, 0, 2)]
    assert (GEOMETRY.full(0), GEOMETRY.full(15)) == (0b1111, 0b111)
    assert GEOMETRY.outer(15, 17) == 0b11
    assert GEOMETRY.inner(0, 15, 17) == 0
    assert GEOMETRY.inner(0, 16, 63) == 0b110
    assert GEOMETRY.inner(15, 16, 40) == 0b110  # up to the end of the image


@pytest.mark.parametrize(
    ("mask", "found"), [(0, []), (0b1, [(0, 1)]), (0b1011_0110, [(1, 3), (4, 6), (7, 8)]), (1 << 200, [(200, 201)])]
)
def test_a_mask_has_runs(mask: int, found: list[tuple[int, int]]) -> None:
    assert list(runs(mask)) == found


def test_what_is_dirty_is_data_over_whatever_there_was() -> None:
    below = [(Range(0, 100), EMPTY), (Range(100, 200), 0), (Range(200, 300), EMPTY)]
    over = laid_over(below, [Range(50, 150), Range(210, 220), Range(290, 400)])
    wanted = [(0, 50, EMPTY), (50, 200, 0), (200, 210, EMPTY), (210, 220, 0), (220, 290, EMPTY), (290, 300, 0)]
    assert over == [(Range(start, end), flags) for start, end, flags in wanted]


# -- states


def test_every_state_has_a_sentence_and_ways_to_known_states() -> None:
    assert set(BLOCK_STATES) == set(BlockState)
    assert all(row.sentence.endswith(".") and row.after <= set(BlockState) for row in BLOCK_STATES.values())


def test_a_block_goes_from_state_to_state() -> None:
    machine = core()
    written(machine, 0, 64)
    (block,) = machine._blocks.values()
    states = [block.state]
    first = taken(machine, 10.0)
    states.append(block.state)
    written(machine, 0, 16, 10.0)
    states.append(block.state)
    machine.written_back(first)
    states.append(block.state)
    machine.validate()
    second = taken(machine, 20.0)
    assert second.runs == [Run(Range(0, 16), [(block.slot, 0, 16)])]
    machine.written_back(second)
    states.append(block.state)
    S = BlockState
    assert states == [S.DIRTY, S.WRITING, S.REWRITTEN, S.DIRTY, S.CLEAN]
    with pytest.raises(IllegalEvent, match="CLEAN"):
        machine.written_back(second)


def test_what_is_in_use_cannot_be_dropped() -> None:
    machine = core()
    machine.begin_write(Range(0, 64))
    through = machine.begin_through(Range(0, 64))
    assert not machine.may_pass(through)
    with pytest.raises(BugError, match="while it is in use"):
        machine.drop(through, dirty=True)


# -- room


def test_the_block_that_was_longest_not_used_makes_room() -> None:
    machine = core(slots=3)
    for number in (0, 1, 2, 0, 3):
        held(machine, number * 64, 64)
    assert sorted(machine._blocks) == [0, 2, 3]


def test_a_write_is_granted_as_far_as_there_is_room() -> None:
    machine = core(slots=4)
    writing, obstacle = machine.begin_write(Range(0, 320))
    assert (writing.end, obstacle) == (3 * 64, Obstacle.ROOM)  # a fourth block is for readers
    machine.end_write(writing, 0.0)
    assert machine.begin_write(Range(0, 64))[1] is None  # what is dirty already takes no more room


def test_a_read_without_room_goes_around() -> None:
    machine = core(slots=2)
    first = machine.begin_read(Range(0, 128))
    second = machine.begin_read(Range(64, 192))
    assert [block is None for *_, block in second.parts] == [False, True]
    machine.end_read(first)
    machine.end_read(second)
    machine.validate()


def test_part_of_a_grain_is_written_only_where_the_rest_is_held() -> None:
    machine = core()
    assert machine.begin_write(Range(10, 64))[1] is Obstacle.GRAIN
    assert machine.begin_write(Range(984, 1000))[1] is Obstacle.GRAIN
    held(machine, 0, 64)
    assert machine.begin_write(Range(10, 64))[1] is None
    assert machine.begin_write(Range(992, 1000))[1] is None


# -- when something is written back


def test_what_is_dirty_is_written_back_when_it_has_aged() -> None:
    machine = core()
    written(machine, 0, 64, now=100.0)
    assert machine.next_look() == 100.0 + CACHE_AGE_SECONDS
    assert machine.next_write_back(100.0 + CACHE_AGE_SECONDS - 0.1) is None
    assert taken(machine, 100.0 + CACHE_AGE_SECONDS).unit.number == 0


def test_when_much_is_dirty_it_does_not_wait_to_age_and_the_oldest_goes_first() -> None:
    machine = core(slots=8)  # of which 7 may be dirty
    for number in (4, 0, 2):
        written(machine, number * 64, 64)
    assert machine.next_write_back(0.0) is None
    written(machine, 6 * 64, 64)
    assert [taken(machine, 0.0).unit.number for _ in range(4)] == [2, 0, 1, 3]


def test_when_a_writer_waits_it_does_not_wait_to_age() -> None:
    machine = core()
    written(machine, 0, 64)
    machine.waiting = 1
    assert machine.next_look() == 0.0
    assert taken(machine, 0.0).unit.number == 0


def test_after_a_failure_there_is_a_rest_that_doubles_and_ends_with_a_success() -> None:
    machine = core()
    written(machine, 0, 64)
    now, rest = 100.0, CACHE_REST_SECONDS_MIN
    for _ in range(8):
        machine.waiting = 1
        machine.write_back_failed(taken(machine, now), NO, now)
        machine.validate()
        assert machine.units.error is NO
        assert machine.next_write_back(now + rest - 0.01) is None
        now, rest = now + rest, min(2 * rest, CACHE_REST_SECONDS_MAX)
    machine.written_back(taken(machine, now))
    assert machine.units.error is None
    written(machine, 0, 64, now)
    assert taken(machine, now).unit.number == 0


def test_a_flush_waits_for_no_rest_and_is_told_what_failed() -> None:
    machine = core()
    written(machine, 0, 64)
    written(machine, 128, 64)
    machine.write_back_failed(taken(machine, 10.0), NO, 10.0)
    flush = machine.units.begin_flush()
    machine.written_back(taken(machine, 10.0))
    machine.write_back_failed(taken(machine, 10.0), NO, 10.0)
    assert not flush.units
    assert flush.error is NO
    assert machine.next_write_back(10.0) is None


def test_a_flush_does_not_wait_for_what_is_written_after_it() -> None:
    machine = core()
    written(machine, 0, 64)
    flush = machine.units.begin_flush()
    first = taken(machine, 0.0)
    written(machine, 0, 16)
    written(machine, 512, 64)
    machine.written_back(first)
    assert not flush.units


def test_one_unit_is_on_its_way_once() -> None:
    machine = core()
    written(machine, 0, 64)
    machine.units.begin_flush()
    taken(machine, 0.0)
    written(machine, 64, 64)
    machine.units.begin_flush()
    assert machine.next_write_back(100.0) is None


def test_what_is_clean_goes_along_between_two_pieces_and_what_is_not_held_does_not() -> None:
    machine = core()
    held(machine, 0, 64)
    for start in (0, 32, 64, 96):
        written(machine, start, 16)
    found = [run.where for run in taken(machine, 10.0).runs]
    assert found == [Range(0, 48), Range(64, 80), Range(96, 112)]
