"""What one request makes of the chunks that answer it, and the table of commands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdshard.common.errors import RequestError
from nbdshard.common.nbd.commands import COMMANDS, Pending
from nbdshard.common.nbd.constants import Command
from nbdshard.common.nbd.wire import Malformed

START, LENGTH = 1000, 40
PIECES = st.lists(st.tuples(st.integers(990, 1045), st.integers(0, 20)), max_size=30)


@given(PIECES)
def test_content_is_accounted_for_byte_by_byte(pieces: list[tuple[int, int]]) -> None:
    pending = Pending(0, COMMANDS[Command.READ], START, LENGTH, 0)
    model: set[int] = set()
    for offset, length in pieces:
        new = set(range(offset, offset + length))
        allowed = bool(new) and new <= set(range(START, START + LENGTH)) and not new & model
        try:
            at = pending.cover(offset, length)
        except Malformed:
            assert not allowed
            return
        assert allowed
        assert at == offset - START
        model |= new
        assert pending.covered == len(model)
        assert (pending.entry.missing(pending) == "") == (len(model) == LENGTH)


def test_every_command_of_the_spec_but_disc_and_resize_is_in_the_table() -> None:
    assert set(COMMANDS) == set(Command) - {Command.DISC, Command.RESIZE}
    assert all(number == entry.command for number, entry in COMMANDS.items())


def test_the_table_cannot_be_changed_from_outside() -> None:
    with pytest.raises(TypeError):
        COMMANDS[99] = COMMANDS[0]  # type: ignore[index]


def test_the_first_error_counts_and_a_shutdown_always_does() -> None:
    pending = Pending(0, COMMANDS[Command.READ], START, LENGTH, 0)
    first = RequestError("EIO", 5)
    pending.fail(first)
    pending.fail(RequestError("ESHUTDOWN", 108))
    assert pending.error is first
    assert pending.shutdown
