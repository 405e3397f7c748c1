"""A few seconds of the fuzzer in every run of the tests; `make fuzz` goes on for longer."""

from __future__ import annotations

import tracemalloc
from random import Random

from fuzz.fuzz_client import run_case, run_seed
from fuzz.mutations import spoil
from fuzz.running import Outcome
from fuzz.streams import CASES, Case

RUNS = 4000
RUNS_MEASURED = 300
MEMORY_BYTES_MAX = 16 << 20  # the largest body is 2 MiB; a spoiled stream itself may have 1 MiB


class Unspoilt(Random):
    """Chooses no mutations, and the largest pieces."""

    def choice(self, options: tuple[int, ...]) -> int:  # type: ignore[override]
        return options[0] if options[0] == 0 else options[-1]


def test_every_stream_is_correct_before_it_is_spoilt() -> None:
    for case in CASES:
        assert spoil(case.stream, Unspoilt(1)) == case.stream
        outcome = run_case(Case(case.name, case.stream, case.start), Unspoilt(1))
        # Replies end with the last one: then the end of the stream was not asked for.
        assert outcome.error in ("", "ConnectionLost"), outcome


def test_spoilt_streams_end_with_events_or_with_an_error_for_the_caller(seed: int) -> None:
    found: set[Outcome] = set()
    for number in range(RUNS):
        run = seed * 1_000_000 + number
        try:
            found.add(run_seed(run))
        except BaseException:
            print(f"python tests/fuzz/fuzz_client.py --runs 1 --seed {run}")
            raise
    assert {outcome.case for outcome in found} == {case.name for case in CASES}
    assert {outcome.error for outcome in found} == {"", "ConnectionLost", "ProtocolError", "UserError"}


def test_spoilt_streams_do_not_make_the_machines_take_memory(seed: int) -> None:
    tracemalloc.start()
    try:
        for number in range(RUNS_MEASURED):
            run_seed(seed * 2_000_000 + number)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MEMORY_BYTES_MAX
