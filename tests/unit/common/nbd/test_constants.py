"""The numbers of the protocol and their names."""

from __future__ import annotations

import pytest

from nbdshard.common.nbd import constants
from nbdshard.common.nbd.constants import (
    OPTION_REPLY_SENTENCES,
    Errno,
    OptionReply,
    as_errno,
    command_name,
    errno_name,
    is_error_chunk,
    is_option_error,
    option_name,
    option_reply_name,
    reply_type_name,
)


def test_the_magic_numbers_spell_what_the_spec_says() -> None:
    assert constants.GREETING_MAGIC.to_bytes(8, "big") == b"NBDMAGIC"
    assert constants.OPTION_MAGIC.to_bytes(8, "big") == b"IHAVEOPT"


@pytest.mark.parametrize(("value", "name"), [(1, "EPERM"), (5, "EIO"), (12, "ENOMEM"), (22, "EINVAL")])
def test_an_error_value_of_the_spec_has_its_name(value: int, name: str) -> None:
    assert errno_name(value) == name


@pytest.mark.parametrize(("value", "name"), [(28, "ENOSPC"), (75, "EOVERFLOW"), (95, "ENOTSUP"), (108, "ESHUTDOWN")])
def test_an_error_value_that_is_rarer_has_its_name_too(value: int, name: str) -> None:
    assert errno_name(value) == name


def test_an_unknown_error_value_is_treated_as_einval_and_its_number_told() -> None:
    assert errno_name(13) == "EINVAL (unknown error value 13)"
    assert as_errno(13) is Errno.EINVAL
    assert as_errno(5) is Errno.EIO


def test_every_option_reply_has_one_sentence() -> None:
    assert set(OPTION_REPLY_SENTENCES) == set(OptionReply)
    assert len(set(OPTION_REPLY_SENTENCES.values())) == len(OptionReply)


def test_numbers_are_named_as_in_the_spec_and_unknown_ones_by_their_value() -> None:
    assert [option_name(7), option_name(99)] == ["NBD_OPT_GO", "option 99"]
    assert [command_name(6), command_name(99)] == ["NBD_CMD_WRITE_ZEROES", "command 99"]
    assert [option_reply_name(1), option_reply_name(0x80000001)] == ["NBD_REP_ACK", "NBD_REP_ERR_UNSUP"]
    assert option_reply_name(77) == "reply type 0x4d"
    assert [reply_type_name(0x8001), reply_type_name(77)] == ["NBD_REPLY_TYPE_ERROR", "reply type 0x4d"]


def test_the_top_bit_marks_errors_known_or_not() -> None:
    assert [is_option_error(0x80000001), is_option_error(0x8000FFFF), is_option_error(3)] == [True, True, False]
    assert [is_error_chunk(0x8001), is_error_chunk(0x8777), is_error_chunk(5)] == [True, True, False]
