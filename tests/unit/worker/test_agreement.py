"""Whether one more connection leads to what the first one does."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from nbdshard.common.errors import ConnectionLost, UserError
from nbdshard.common.messages import Assign, EndpointAddress, EndpointDescription, JobOptions, Side
from nbdshard.common.nbd.hints import Hints
from nbdshard.worker.agreement import check_agreement, check_likeness

END = EndpointAddress("nbd", "nbd://a")
OPTIONS = JobOptions(request_size=4096, requests=4, queue_size=65536, sparse_unit=0)
FIRST, SECOND = "00000001-0000-4000-8000-000000000000", "00000002-0000-4000-8000-000000000000"


def end(instance: str = "", size: int = 4096) -> EndpointDescription:
    return EndpointDescription("nbd://a", size, hints=Hints(instance=instance))


def assign(expected: EndpointDescription | None = None) -> Assign:
    expected_destinations = None if expected is None else [expected]
    return Assign("job", 1, END, [END], OPTIONS, 1, 1, 2.0, 10.0, expected, expected_destinations)


@pytest.mark.parametrize(
    "sides", [("source", FIRST, SECOND), ("destination", FIRST, FIRST), ("destination", FIRST, "")]
)
def test_what_matters_not_is_not_minded(sides: tuple[Side, str, str]) -> None:
    side, first, found = sides
    check_likeness(assign(), side, end(found), end(first))


def test_a_destination_that_was_started_again_in_between_is_lost() -> None:
    with pytest.raises(ConnectionLost, match="the server was started again meanwhile"):
        check_likeness(assign(), "destination", end(SECOND), end(FIRST))


def test_another_size_is_refused() -> None:
    with pytest.raises(UserError, match="nbd://a: differs from one connection to the next: size 8192 instead of 4096"):
        check_likeness(assign(), "source", end(size=8192), end())
    with pytest.raises(UserError, match="nbd://a: is not what the job began with: size 8192 instead of 4096"):
        check_agreement(assign(end()), "destination", end(size=8192))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"read_only": True}, "read-only yes instead of no"),
        ({"can_multi_conn": True}, "multi-conn yes instead of no"),
        ({"block_minimum": 512}, "block-minimum 512 instead of 1"),
        ({"size": None}, "size unknown instead of 4096"),
    ],
)
def test_what_differs_is_told_in_words(change: dict[str, int | None], told: str) -> None:
    assert replace(end(), **change).difference(end()) == told


def test_a_server_that_was_started_again_since_the_job_began_is_no_other_export() -> None:
    check_agreement(assign(end(FIRST)), "destination", end(SECOND))
