"""common/units.py"""

from __future__ import annotations

import pytest

from nbdshard.common.errors import UserError
from nbdshard.common.units import format_bytes, format_rate, format_seconds, parse_seconds, parse_size, size_text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4k", 4096),
        ("256K", 262144),
        ("1M", 1048576),
        ("1MiB", 1048576),
        ("1MB", 1048576),
        ("16m", 16777216),
        ("2G", 2147483648),
        ("3T", 3298534883328),
        ("512B", 512),
        ("7E", 8070450532247928832),
        ("9223372036854775807", 9223372036854775807),
    ],
)
def test_a_size_is_a_whole_number_with_a_binary_suffix(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "k", "-1", "+1", "1.5M", "1 M", " 1", "1X", "0x10", "1MM", "1iM", "٣", "1\n"])
def test_what_is_no_size_is_refused_with_the_option_named(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_size(text, "--queue-size")
    assert str(caught.value) == (
        f"--queue-size: {text!r} is not a size; write bytes, or a whole number with k, M, G or T"
    )


@pytest.mark.parametrize("text", ["8E", "9223372036854775808", "9999999999999999999E"])
def test_a_size_beyond_what_linux_can_address_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="larger than any disk"):
        parse_size(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1_000_000, "977 KiB"),
        (1_048_576, "1 MiB"),
        (1_048_575, "1 MiB"),
        (10_500_000, "10.0 MiB"),
        (12_000_000, "11.4 MiB"),
        (107_374_182_400, "100 GiB"),
        (1_234_567_890_123, "1.12 TiB"),
        (9_223_372_036_854_775_807, "8 EiB"),
    ],
)
def test_bytes_are_shown_in_three_digits(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_a_rate_is_bytes_per_second() -> None:
    assert format_rate(13_107_200) == "12.5 MiB/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-0.001, "0.00 s"),
        (0, "0.00 s"),
        (0.314, "0.31 s"),
        (9.994, "9.99 s"),
        (9.996, "10.0 s"),
        (59.94, "59.9 s"),
        (59.97, "1 min 00 s"),
        (302, "5 min 02 s"),
        (3599.6, "1 h 00 min"),
        (11_100, "3 h 05 min"),
        (176_400, "2 d 01 h"),
    ],
)
def test_times_are_shown_in_the_two_largest_units(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize("count", [0, 1000, 4096, 1 << 20, 3 << 30, 1 << 40])
def test_a_size_text_reads_back_as_the_same_size(count: int) -> None:
    assert parse_size(size_text(count)) == count


@pytest.mark.parametrize(
    ("text", "seconds"), [("250ms", 0.25), ("2s", 2.0), ("1.5m", 90.0), ("0s", 0.0), ("2h", 7200.0)]
)
def test_a_span_of_time_has_a_unit(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "s", "-1s", "1 s", "1d", "1e3s", ".5s", "٣s"])
def test_what_is_no_span_of_time_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"here: .* is not a span of time"):
        parse_seconds(text, "here")
