"""Every number of the NBD protocol that has a name, for both sides, under its spec name (spec, "Values")."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

# -- magic numbers, spec name in the comment --------------------------------------------------------------------------
GREETING_MAGIC: Final = 0x4E42444D41474943  # NBDMAGIC, also known as INIT_PASSWD
OPTION_MAGIC: Final = 0x49484156454F5054  # IHAVEOPT: newstyle greeting, and every option sent by a client
OLDSTYLE_MAGIC: Final = 0x00420281861253  # cliserv_magic
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513  # NBD_REQUEST_MAGIC
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71  # NBD_EXTENDED_REQUEST_MAGIC
SIMPLE_REPLY_MAGIC: Final = 0x67446698  # NBD_SIMPLE_REPLY_MAGIC
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF  # NBD_STRUCTURED_REPLY_MAGIC
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C  # NBD_EXTENDED_REPLY_MAGIC

PORT_DEFAULT: Final = 10809  # assigned by IANA
EXPORT_NAME_RESERVED_BYTES: Final = 124  # zeroes after the reply to EXPORT_NAME, unless NO_ZEROES
EXPORT_BYTES_MAX: Final = (1 << 63) - 1  # offsets are signed 64-bit numbers (off_t) on every system that serves them
BLOCK_BYTES_UNLIMITED: Final = 0xFFFFFFFF  # NBD_INFO_BLOCK_SIZE's maximum for "no inherent limit"
BASE_ALLOCATION: Final = "base:allocation"


class HandshakeFlag(IntFlag):
    """16 bits in the server's greeting."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlag(IntFlag):
    """32 bits, the client's answer to the greeting."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class TransmissionFlag(IntFlag):
    """16 bits about an export, from EXPORT_NAME, INFO or GO."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Option(IntEnum):
    """What a client sends during option haggling."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(IntEnum):
    """What a server answers to an option; bit 31 marks an error (`is_option_error`)."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = (1 << 31) + 1
    ERR_POLICY = (1 << 31) + 2
    ERR_INVALID = (1 << 31) + 3
    ERR_PLATFORM = (1 << 31) + 4
    ERR_TLS_REQD = (1 << 31) + 5
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_SHUTDOWN = (1 << 31) + 7
    ERR_BLOCK_SIZE_REQD = (1 << 31) + 8
    ERR_TOO_BIG = (1 << 31) + 9
    ERR_EXT_HEADER_REQD = (1 << 31) + 10


OPTION_REPLY_SENTENCES: Final[dict[int, str]] = {
    OptionReply.ACK: "the server accepts the option",
    OptionReply.SERVER: "the server describes one of its exports",
    OptionReply.INFO: "the server tells a detail of the export",
    OptionReply.META_CONTEXT: "the server names a metadata context",
    OptionReply.ERR_UNSUP: "the server does not know the option",
    OptionReply.ERR_POLICY: "the server's configuration forbids it",
    OptionReply.ERR_INVALID: "the server calls the request invalid",
    OptionReply.ERR_PLATFORM: "the server's platform does not support it",
    OptionReply.ERR_TLS_REQD: "the server insists on TLS",
    OptionReply.ERR_UNKNOWN: "the server has no such export",
    OptionReply.ERR_SHUTDOWN: "the server is being shut down",
    OptionReply.ERR_BLOCK_SIZE_REQD: "the server insists that block sizes are negotiated",
    OptionReply.ERR_TOO_BIG: "the request or its answer is too big for the server",
    OptionReply.ERR_EXT_HEADER_REQD: "the server insists on extended headers",
}


class Info(IntEnum):
    """Details of an export in the replies to INFO and GO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Command(IntEnum):
    """Requests of the transmission phase."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CommandFlag(IntFlag):
    """16 bits in every request."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ReplyFlag(IntFlag):
    """16 bits in every structured or extended reply chunk."""

    DONE = 1 << 0


class ReplyType(IntEnum):
    """Kinds of structured and extended reply chunks; bit 15 marks an error (`is_error_chunk`)."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


class Errno(IntEnum):
    """Error values on the wire; they happen to be Linux's."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


STATE_HOLE: Final = 1 << 0  # base:allocation: not allocated
STATE_ZERO: Final = 1 << 1  # base:allocation: reads as zeroes

_ERRNOS: Final[dict[int, Errno]] = {value.value: value for value in Errno}
_OPTION_NAMES: Final[dict[int, str]] = {value.value: f"NBD_OPT_{value.name}" for value in Option}
_OPTION_REPLY_NAMES: Final[dict[int, str]] = {value.value: f"NBD_REP_{value.name}" for value in OptionReply}
_COMMAND_NAMES: Final[dict[int, str]] = {value.value: f"NBD_CMD_{value.name}" for value in Command}
_REPLY_TYPE_NAMES: Final[dict[int, str]] = {value.value: f"NBD_REPLY_TYPE_{value.name}" for value in ReplyType}


def is_option_error(reply: int) -> bool:
    """Whether this option reply type is an error, known or not (bit 31)."""
    return bool(reply & 1 << 31)


def is_error_chunk(reply_type: int) -> bool:
    """Whether this reply chunk type is an error, known or not (bit 15)."""
    return bool(reply_type & 1 << 15)


def as_errno(value: int) -> Errno:
    """The error value to act on: "unknown values should be treated as EINVAL" (spec, "Error values")."""
    return _ERRNOS.get(value, Errno.EINVAL)


def errno_name(value: int) -> str:
    """ "EIO"; for a value outside the spec, what it is treated as and the number that came."""
    known = _ERRNOS.get(value)
    return known.name if known is not None else f"EINVAL (unknown error value {value})"


def option_name(option: int) -> str:
    """ "NBD_OPT_GO"; unknown options by their number."""
    return _OPTION_NAMES.get(option, f"option {option}")


def option_reply_name(reply: int) -> str:
    """ "NBD_REP_ACK"; unknown replies by their number."""
    return _OPTION_REPLY_NAMES.get(reply, f"reply type {reply:#x}")


def command_name(command: int) -> str:
    """ "NBD_CMD_READ"; unknown commands by their number."""
    return _COMMAND_NAMES.get(command, f"command {command}")


def reply_type_name(reply_type: int) -> str:
    """ "NBD_REPLY_TYPE_NONE"; unknown types by their number."""
    return _REPLY_TYPE_NAMES.get(reply_type, f"reply type {reply_type:#x}")
