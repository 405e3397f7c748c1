"""What a server hints: read with care, whoever says it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdshard.common.limits import (
    HINT_BACKOFF_SECONDS_MAX,
    HINT_BACKOFF_SECONDS_MIN,
    HINT_LOSS_SECONDS_MAX,
    HINT_LOSS_SECONDS_MIN,
    HINT_REQUEST_SECONDS_MAX,
    HINT_REQUEST_SECONDS_MIN,
    HINTS_BYTES_MAX,
)
from nbdshard.common.messages import EndpointDescription, decode_from_worker, encode
from nbdshard.common.messages import Opened as OpenedMessage
from nbdshard.common.nbd.hints import NO_HINTS, Hints, parse_hints

UUID = "6f1c0b1e-0d5e-4d55-9f0e-3a2c2c9d7e11"
WHOLE = f"x-nbdshard:hints;v=1;request_ms=30000;loss_ms=120000;backoff_ms=200-5000;instance={UUID}"


def hinted(fields: str) -> Hints:
    found = parse_hints(f"x-nbdshard:hints;{fields}")
    assert found is not None
    return found


def test_everything_a_server_can_say_is_understood() -> None:
    assert parse_hints(WHOLE) == Hints(30.0, 120.0, 0.2, 5.0, UUID)


@pytest.mark.parametrize("name", ["", "base:allocation", "x-nbdshard:hints2;v=1", "x-nbdshard:", "x-nbdshard"])
def test_another_context_is_no_answer(name: str) -> None:
    assert parse_hints(name) is None


@pytest.mark.parametrize(
    "fields", ["", "v=1", "v=2;request_ms=1000", "request_ms=1000", "v=;request_ms=1000", "v=1;v=1"]
)
def test_without_a_version_we_know_nothing_is_understood(fields: str) -> None:
    assert hinted(fields) == NO_HINTS


def test_any_part_may_be_missing_and_unknown_ones_may_be_there() -> None:
    assert hinted("v=1;color=blue;;loss_ms=60000;=;=5;flag") == Hints(loss=60.0)
    assert hinted("request_ms=2000;v=1") == Hints(request=2.0)


@pytest.mark.parametrize(
    "fields",
    [
        "request_ms=",
        "request_ms=-1",
        "request_ms=+1000",
        "request_ms=1e9",
        "request_ms=1.5",
        "request_ms= 1000",
        "request_ms=0x10",
        "request_ms=1_000",
        "request_ms=\u0661\u0662",
        "request_ms=\u00b2",
        "request_ms=1000;request_ms=1000",
        "request_ms=1000;request_ms=2000",
        "backoff_ms=200",
        "backoff_ms=200-",
        "backoff_ms=-5000",
        "backoff_ms=5000-200",
        "backoff_ms=200-5000-9000",
        "backoff_ms=200-x",
        "instance=",
        "instance=6f1c0b1e",
        "instance=6f1c0b1e-0d5e-4d55-9f0e-3a2c2c9d7e1g",
        "instance=6f1c0b1e-0d5e-4d55-9f0e-3a2c2c9d7e1",
        f"instance={UUID}\n",
        f"instance={UUID};instance={UUID}",
    ],
)
def test_what_is_no_value_says_nothing(fields: str) -> None:
    assert hinted(f"v=1;{fields}") == NO_HINTS


def test_numbers_are_believed_within_limits() -> None:
    huge = "9" * 900
    assert hinted(f"v=1;request_ms={huge};loss_ms={huge};backoff_ms={huge}-{huge}") == Hints(
        HINT_REQUEST_SECONDS_MAX, HINT_LOSS_SECONDS_MAX, HINT_BACKOFF_SECONDS_MAX, HINT_BACKOFF_SECONDS_MAX
    )
    assert hinted("v=1;request_ms=0;loss_ms=0;backoff_ms=0-0") == Hints(
        HINT_REQUEST_SECONDS_MIN, HINT_LOSS_SECONDS_MIN, HINT_BACKOFF_SECONDS_MIN, HINT_BACKOFF_SECONDS_MIN
    )


def test_a_uuid_is_the_same_in_capital_letters() -> None:
    assert hinted(f"v=1;instance={UUID.upper()}").instance == UUID


def test_more_than_a_string_of_the_protocol_may_have_is_not_read() -> None:
    assert hinted("v=1;request_ms=1000;x=" + "y" * (HINTS_BYTES_MAX - 39)) == Hints(request=1.0)
    assert hinted("v=1;request_ms=1000;x=" + "y" * (HINTS_BYTES_MAX - 38)) == NO_HINTS


@given(
    st.lists(
        st.sampled_from(["v=1", "request_ms=", "loss_ms=", "backoff_ms=", "instance=", ";", "-", "5", UUID, "\0", "é"])
    )
)
def test_nothing_a_server_says_is_more_than_advice(parts: list[str]) -> None:
    """Whatever is made of it is within the limits that the control protocol holds hints to."""
    found = hinted("v=1;" + "".join(parts))
    end = EndpointDescription("a", 1, hints=found)
    message = OpenedMessage("job", 1, end, [end], 1, 1)
    assert decode_from_worker(encode(message), "worker") == message
