"""The mapfile of GNU ddrescue that a job is written as."""

from __future__ import annotations

import os

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdshard.common.ranges import Range
from nbdshard.coordinator.mapfile import mapfile
from support.journals import facts

pieces = st.lists(st.tuples(st.integers(0, 90), st.integers(1, 10)).map(lambda t: Range.of(*t)), max_size=8)


def lines(text: str) -> list[str]:
    """Without comments."""
    return [line for line in text.splitlines() if not line.startswith("#")]


def test_the_mapfile_of_a_job_half_done() -> None:
    text = mapfile(facts(0x300000000), [Range(0, 0x100000), Range(0x200000, 0x300000)], [Range(0x100000, 0x100200)])
    assert text == (
        "# Mapfile. Created by nbdshard\n"
        "# Job: 6f1c0b1e-0d5e-4d55-9f0e-3a2c2c9d7e11\n"
        "# Source: nbd://source.example/disk\n"
        "# Destination: disk.img\n"
        "# current_pos  current_status  current_pass\n"
        "0x00100200     ?               1\n"
        "#      pos        size  status\n"
        "0x00000000  0x00100000  +\n"
        "0x00100000  0x00000200  -\n"
        "0x00100200  0x000FFE00  ?\n"
        "0x00200000  0x00100000  +\n"
        "0x00300000  0x2FFD00000  ?\n"
    )


def test_a_job_that_has_not_begun_is_one_untried_block() -> None:
    assert lines(mapfile(facts(4096), [])) == [
        "0x00000000     ?               1",
        "0x00000000  0x00001000  ?",
    ]


def test_a_job_with_every_byte_durable_is_finished() -> None:
    assert lines(mapfile(facts(4096), [Range(0, 1024), Range(1024, 4096)])) == [
        "0x00000000     +               1",
        "0x00000000  0x00001000  +",
    ]


def test_an_unreadable_block_is_bad_although_zeroes_were_made_durable_in_its_place() -> None:
    assert lines(mapfile(facts(4096), [Range(0, 4096)], [Range(512, 1024), Range(3584, 4096)])) == [
        "0x00000000     +               1",
        "0x00000000  0x00000200  +",
        "0x00000200  0x00000200  -",
        "0x00000400  0x00000A00  +",
        "0x00000E00  0x00000200  -",
    ]


def test_a_job_of_no_bytes_has_no_blocks() -> None:
    assert lines(mapfile(facts(0), [])) == ["0x00000000     +               1"]


def test_a_range_beyond_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[4000, 5000\) is not within the job's 4096 bytes"):
        mapfile(facts(4096), [Range(4000, 5000)])


def test_a_name_stays_on_its_line_and_can_be_written_in_utf_8() -> None:
    source = msgspec.structs.replace(facts().source, named=os.fsdecode("/srv/new\nline ä ".encode() + b"\xff"))
    text = mapfile(msgspec.structs.replace(facts(4096), source=source), [])
    assert text.splitlines()[2] == "# Source: /srv/new\\nline ä \\udcff"
    text.encode()


@given(durable=pieces, unreadable=pieces)
def test_the_blocks_adjoin_each_other_and_say_of_each_byte_what_became_of_it(
    durable: list[Range], unreadable: list[Range]
) -> None:
    status = ["?"] * 100
    for letter, ranges in (("+", durable), ("-", unreadable)):
        for piece in ranges:
            status[piece.start : piece.end] = letter * piece.length
    said = []
    for line in lines(mapfile(facts(100), durable, unreadable))[1:]:
        position, size, letter = line.split()
        assert int(position, 16) == len(said)
        said += [letter] * int(size, 16)
    assert said == status
