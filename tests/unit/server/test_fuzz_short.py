"""A few seconds of the server's fuzzer in every run of the tests; `make fuzz` goes on for longer."""

from __future__ import annotations

import tracemalloc
from random import Random

from fuzz.fuzz_server import CASES, run_case, run_seed
from fuzz.running import Outcome

RUNS = 1500
RUNS_MEASURED = 100
MEMORY_BYTES_MAX = 16 << 20  # 128 requests with a payload of 64 KiB; a spoiled stream itself may have 1 MiB


class Unspoilt(Random):
    """Chooses no mutations, and the largest pieces."""

    def choice(self, options: tuple[int, ...]) -> int:  # type: ignore[override]
        return options[0] if options[0] == 0 else options[-1]


def test_streams_that_are_right_end_well() -> None:
    for case in CASES:
        assert run_case(case, Unspoilt(1)) == Outcome(case.name, "")


def test_spoilt_streams_end_well_or_with_an_error_that_blames_the_client(seed: int) -> None:
    found: set[Outcome] = set()
    for number in range(RUNS):
        run = seed * 1_000_000 + number
        try:
            found.add(run_seed(run))
        except BaseException:
            print(f"python tests/fuzz/fuzz_server.py --runs 1 --seed {run}")
            raise
    assert {outcome.case for outcome in found} == {case.name for case in CASES}
    assert {outcome.error for outcome in found} == {"", "ConnectionLost", "ProtocolError"}


def test_spoilt_streams_do_not_make_the_machines_take_memory(seed: int) -> None:
    tracemalloc.start()
    try:
        for number in range(RUNS_MEASURED):
            run_seed(seed * 2_000_000 + number)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MEMORY_BYTES_MAX
