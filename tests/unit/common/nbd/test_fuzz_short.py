"""A few seconds of the fuzzer in every run of the tests; `make fuzz` goes on for longer."""

from __future__ import annotations

from fuzz.fuzz_client import run_case, run_seed
from fuzz.mutations import spoil
from fuzz.running import Unspoilt, outcomes_of, peak_bytes_of
from fuzz.streams import CASES, Case

RUNS = 4000
RUNS_MEASURED = 300
MEMORY_BYTES_MAX = 16 << 20  # the largest body is 2 MiB; a spoiled stream itself may have 1 MiB


def test_every_stream_is_correct_before_it_is_spoilt() -> None:
    for case in CASES:
        assert spoil(case.stream, Unspoilt(1)) == case.stream
        outcome = run_case(Case(case.name, case.stream, case.start), Unspoilt(1))
        # Replies end with the last one: then the end of the stream was not asked for.
        assert outcome.error in ("", "ConnectionLost"), outcome


def test_spoilt_streams_end_with_events_or_with_an_error_for_the_caller(seed: int) -> None:
    first = seed * 1_000_000
    found = outcomes_of(run_seed, range(first, first + RUNS), "fuzz_client.py")
    assert {outcome.case for outcome in found} == {case.name for case in CASES}
    assert {outcome.error for outcome in found} == {"", "ConnectionLost", "ProtocolError", "UserError"}


def test_spoilt_streams_do_not_make_the_machines_take_memory(seed: int) -> None:
    first = seed * 2_000_000
    assert peak_bytes_of(run_seed, range(first, first + RUNS_MEASURED)) < MEMORY_BYTES_MAX
