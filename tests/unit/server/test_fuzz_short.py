"""A few seconds of the server's fuzzer in every run of the tests; `make fuzz` goes on for longer."""

from __future__ import annotations

from fuzz.fuzz_server import CASES, run_case, run_seed
from fuzz.running import Outcome, Unspoilt, outcomes_of, peak_bytes_of

RUNS = 1500
RUNS_MEASURED = 100
MEMORY_BYTES_MAX = 16 << 20  # 128 requests with a payload of 64 KiB; a spoiled stream itself may have 1 MiB


def test_streams_that_are_right_end_well() -> None:
    for case in CASES:
        assert run_case(case, Unspoilt(1)) == Outcome(case.name, "")


def test_spoilt_streams_end_well_or_with_an_error_that_blames_the_client(seed: int) -> None:
    first = seed * 1_000_000
    found = outcomes_of(run_seed, range(first, first + RUNS), "fuzz_server.py")
    assert {outcome.case for outcome in found} == {case.name for case in CASES}
    assert {outcome.error for outcome in found} == {"", "ConnectionLost", "ProtocolError"}


def test_spoilt_streams_do_not_make_the_machines_take_memory(seed: int) -> None:
    first = seed * 2_000_000
    assert peak_bytes_of(run_seed, range(first, first + RUNS_MEASURED)) < MEMORY_BYTES_MAX
