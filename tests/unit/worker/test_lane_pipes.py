"""A lane and the pipes that can be had: one for its payload or no lane, one to look with or a search in memory."""

from __future__ import annotations

from errno import EMFILE

import pytest

from nbdshard.worker.lane import Lane
from nbdshard.worker.pipes import Pipe
from nbdshard.worker.plumbing import SystemPlumbing
from nbdshard.worker.stretch import Outcome
from support.images import KIB, MIB, random_bytes
from support.lane_bench import UNIT, lane_bench

SECTOR = 4 * KIB  # the unit of zero detection


class FewPipes(SystemPlumbing):
    """A user's share of pipe memory that is used up, or all descriptors."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.open = 0

    def open_pipe(self, size: int) -> Pipe | int:
        if self.capacity < 0:
            return self.capacity
        self.open += 1
        return super().open_pipe(self.capacity)

    def close_pipe(self, pipe: Pipe) -> None:
        self.open -= 1
        super().close_pipe(pipe)


@pytest.mark.parametrize(
    ("capacity", "why"),
    [
        (-24, "no pipe can be opened"),
        (4 * KIB, "a pipe can hold only 4096 bytes (pipe-max-size, pipe-user-pages-soft)"),
    ],
)
def test_without_a_pipe_that_holds_a_request_there_is_no_lane(capacity: int, why: str) -> None:
    plumbing = FewPipes(capacity)
    lane = Lane(UNIT, 0, 8, MIB, lambda: 0.0, lambda: None, plumbing)
    assert lane.prepare() == why
    lane.close()
    lane.close()
    assert plumbing.open == 0


class PoorLooks(SystemPlumbing):
    """The pipe for looks is smaller than what is to be looked at, or there is none."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size
        self._has_opened = False

    def open_pipe(self, size: int) -> Pipe | int:
        if not self._has_opened:
            self._has_opened = True
            return super().open_pipe(size)
        return super().open_pipe(self._size) if self._size > 0 else self._size


CONTENTS = {"dense": random_bytes(6 * UNIT), "zeroes": (b"a" * SECTOR + bytes(SECTOR)) * (3 * UNIT // SECTOR)}


@pytest.mark.parametrize("size", [4 * KIB, 16 * KIB, -EMFILE])
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_a_lane_that_sees_only_a_part_of_its_pipe_searches_it_in_memory_and_says_so(content: bytes, size: int) -> None:
    with lane_bench(sparse_unit=SECTOR, zeroes=True, plumbing=PoorLooks(size)) as bench:
        bench.serve_reads(content)
        bench.serve_writes()
        bench.begin((0, 6 * UNIT))
        assert bench.end() == Outcome()
        held = bytearray(bench.store(6 * UNIT))
        for start, end in bench.stretches[0].zeroes:
            held[start:end] = bytes(end - start)
        assert held == content
        assert bench.stretches[0].spliced == 0
        assert list(bench.lane.remarks) == [
            "no pipe could be had to look at spliced payload with; what is searched for zeroes goes through a buffer"
        ]
