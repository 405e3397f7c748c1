"""Option haggling as a table: for each option how to ask, what to make of its replies, what a refusal means.

An option is added by an `OptionHandler` of one's own, from anywhere: `Connecter(wishes, peer, options=
with_option(OPTIONS, mine, before=Option.GO))`. Handlers write what they learn into the `Negotiation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from types import MappingProxyType
from typing import Final

import msgspec

from nbdshard.common.errors import BugError
from nbdshard.common.limits import EXPORTS_LISTED_MAX, OPTION_REPLIES_MAX
from nbdshard.common.nbd import wire_options as wire
from nbdshard.common.nbd.constants import (
    BASE_ALLOCATION,
    BLOCK_BYTES_UNLIMITED,
    EXPORT_BYTES_MAX,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)
from nbdshard.common.nbd.export import BlockSizes, Export
from nbdshard.common.nbd.hints import NO_HINTS, QUERY, Hints, parse_hints
from nbdshard.common.nbd.wire import Malformed

MINIMUM_BLOCK_BYTES_MAX: Final = 1 << 16  # spec, "Block size constraints"
PREFERRED_BLOCK_BYTES_MIN: Final = 1 << 9  # same place


class Goal(Enum):
    """What a negotiation is for."""

    GO = auto()  # enter the transmission phase
    INFO = auto()  # learn what GO would tell, then leave
    LIST = auto()  # learn the names of the exports, then leave


class Wishes(msgspec.Struct, frozen=True):
    """What the caller wants of the server; what it does not offer is done without."""

    export_name: str = ""
    contexts: tuple[str, ...] = (BASE_ALLOCATION,)
    structured: bool = True
    extended: bool = True
    hints: bool = False  # how patient to be: costs a round trip
    goal: Goal = Goal.GO


class Negotiation(msgspec.Struct):
    """What is known so far; the handlers' shared notebook. `extra` is for handlers from outside."""

    wishes: Wishes
    structured: bool = False
    extended: bool = False
    contexts_offered: dict[str, int] = msgspec.field(default_factory=dict)  # told, but not acknowledged yet
    contexts: dict[str, int] = msgspec.field(default_factory=dict)
    size: int | None = None
    flags: TransmissionFlag = TransmissionFlag.HAS_FLAGS
    block_sizes: BlockSizes | None = None
    canonical_name: str = ""
    description: str = ""
    exports: list[tuple[str, str]] = msgspec.field(default_factory=list)
    hints: Hints | None = None
    extra: dict[str, object] = msgspec.field(default_factory=dict)

    def set_export(self, size: int, flags: int) -> None:
        """Note size and flags. Raises Malformed where the spec does not allow them."""
        if size > EXPORT_BYTES_MAX:
            raise Malformed(f"an export size of {size} bytes, beyond 2^63 - 1")
        if not flags & TransmissionFlag.HAS_FLAGS:
            raise Malformed(f"transmission flags {flags:#x} without NBD_FLAG_HAS_FLAGS")
        self.size = size
        self.flags = TransmissionFlag(flags)

    def export(self) -> Export:
        """The result. Raises Malformed where the server did not tell enough, or contradicts itself."""
        if self.size is None:
            raise Malformed("NBD_REP_ACK without a NBD_INFO_EXPORT before it")
        if self.block_sizes is not None:
            _check_against_size(self.block_sizes, self.size)
        flags = self.flags
        if not self.structured:
            # "MUST leave this flag clear if structured replies have not been negotiated": nbdkit and others
            # have set it anyway, which is harmless as long as nobody acts on it.
            flags &= ~TransmissionFlag.SEND_DF
        return Export(
            name=self.wishes.export_name,
            size=self.size,
            flags=flags,
            # No block sizes told: what the spec says a client SHOULD assume. Its advice of a 512 byte minimum
            # is left to the caller, which may always use tighter sizes; as a rule it would refuse odd tails.
            block_sizes=self.block_sizes or BlockSizes(),
            structured=self.structured,
            extended=self.extended,
            contexts=MappingProxyType(dict(self.contexts)),
            description=self.description,
            canonical_name=self.canonical_name if self.canonical_name != self.wishes.export_name else "",
            hints=self.hints or NO_HINTS,
        )


class Outcome(Enum):
    """What becomes of a negotiation when an option got its final reply."""

    NEXT = auto()  # the next option the table wants
    TRANSMISSION = auto()  # both sides are in the transmission phase now
    HAGGLED = auto()  # what was wished for is known
    EXPORT_NAME = auto()  # the server is too old for this option: EXPORT_NAME instead
    REFUSED = auto()  # the server will not let us go on: an error for the caller


def _nothing(_negotiation: Negotiation) -> bytes:
    return b""


def _no_effect(_negotiation: Negotiation) -> None:
    return None


def _go_on(_reply: int) -> Outcome:
    """Done without: only the replies that end any negotiation count (`FINAL_REFUSALS`)."""
    return Outcome.NEXT


def _refuse(_reply: int) -> Outcome:
    return Outcome.REFUSED


class OptionHandler(msgspec.Struct, frozen=True):
    """One entry of the table.

    `wanted` says whether to send the option at its turn, `data` what with, `replies` which intermediate
    replies there may be and what they mean (they raise Malformed on nonsense), `acknowledged` what
    NBD_REP_ACK changes, `on_error` what follows from an error reply that does not end every negotiation. `variant`
    tells entries of one option apart that ask it different things.
    """

    option: int
    wanted: Callable[[Negotiation], bool]
    data: Callable[[Negotiation], bytes] = _nothing
    replies: Mapping[int, Callable[[Negotiation, memoryview], None]] = msgspec.field(default_factory=dict)
    acknowledged: Callable[[Negotiation], None] = _no_effect
    on_ack: Outcome = Outcome.NEXT
    on_error: Callable[[int], Outcome] = _go_on
    replies_max: int = OPTION_REPLIES_MAX
    variant: int = 0

    @property
    def key(self) -> int:
        """Its place in the table: the option's number, above which is the variant."""
        return self.variant << 32 | self.option


OptionTable = Mapping[int, OptionHandler]

# Errors after which no option will do better: never "go on without", whatever was asked.
FINAL_REFUSALS: Final = frozenset({OptionReply.ERR_TLS_REQD, OptionReply.ERR_SHUTDOWN})


# -- EXTENDED_HEADERS, STRUCTURED_REPLY ------------------------------------------------------------------------------


def _wants_extended(negotiation: Negotiation) -> bool:
    wishes = negotiation.wishes
    return wishes.extended and wishes.structured and wishes.goal is not Goal.LIST


def _has_extended(negotiation: Negotiation) -> None:
    negotiation.extended = negotiation.structured = True


def _wants_structured(negotiation: Negotiation) -> bool:
    return negotiation.wishes.structured and not negotiation.structured and negotiation.wishes.goal is not Goal.LIST


def _has_structured(negotiation: Negotiation) -> None:
    negotiation.structured = True


# -- LIST_META_CONTEXT -----------------------------------------------------------------------------------------------
#
# Not sent along with another option, which would cost nothing: "The client MUST NOT send any option until it has
# received a final reply to any option it has sent".

HINTS_KEY: Final = 1 << 32 | Option.LIST_META_CONTEXT


def _wants_hints(negotiation: Negotiation) -> bool:
    return negotiation.wishes.hints and negotiation.structured


def _hints_query(negotiation: Negotiation) -> bytes:
    return wire.pack_context_query(negotiation.wishes.export_name, (QUERY,))


def _hints_reply(negotiation: Negotiation, payload: memoryview) -> None:
    _, name = wire.unpack_meta_context(payload)
    if negotiation.hints is None:  # the first one counts; names that are none may be there
        negotiation.hints = parse_hints(name)


# -- SET_META_CONTEXT ------------------------------------------------------------------------------------------------


def _wants_contexts(negotiation: Negotiation) -> bool:
    return negotiation.structured and bool(negotiation.wishes.contexts)


def _context_query(negotiation: Negotiation) -> bytes:
    return wire.pack_context_query(negotiation.wishes.export_name, negotiation.wishes.contexts)


def _context_reply(negotiation: Negotiation, payload: memoryview) -> None:
    number, name = wire.unpack_meta_context(payload)
    if name not in negotiation.wishes.contexts:
        raise Malformed(f"metadata context {wire.printable(name.encode())!r}, which was not asked for")
    offered = negotiation.contexts_offered
    if name in offered:
        raise Malformed(f"metadata context {name} twice")
    if number in offered.values():
        raise Malformed(f"metadata context id {number} twice")
    offered[name] = number


def _has_contexts(negotiation: Negotiation) -> None:
    # Only now: "if an error is returned, the client MUST disregard any context replies" that came before it.
    negotiation.contexts = negotiation.contexts_offered


# -- INFO, GO --------------------------------------------------------------------------------------------------------

_INFOS_WANTED: Final = (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)


def _info_request(negotiation: Negotiation) -> bytes:
    return wire.pack_info_request(negotiation.wishes.export_name, _INFOS_WANTED)


def _info_export(negotiation: Negotiation, payload: memoryview) -> None:
    negotiation.set_export(*wire.unpack_info_export(payload))


def _info_name(negotiation: Negotiation, payload: memoryview) -> None:
    negotiation.canonical_name = wire.printable(payload[wire.INFO_TYPE.size :])


def _info_description(negotiation: Negotiation, payload: memoryview) -> None:
    negotiation.description = wire.printable(payload[wire.INFO_TYPE.size :])


def _info_block_size(negotiation: Negotiation, payload: memoryview) -> None:
    negotiation.block_sizes = checked_block_sizes(*wire.unpack_info_block_size(payload))


INFOS: Final[Mapping[int, Callable[[Negotiation, memoryview], None]]] = {
    Info.EXPORT: _info_export,
    Info.NAME: _info_name,
    Info.DESCRIPTION: _info_description,
    Info.BLOCK_SIZE: _info_block_size,
}


def _info_reply(negotiation: Negotiation, payload: memoryview) -> None:
    handler = INFOS.get(wire.unpack_info_type(payload))
    if handler is not None:  # "MUST ignore information types that it does not recognize"
        handler(negotiation, payload)


def checked_block_sizes(minimum: int, preferred: int, maximum: int) -> BlockSizes:
    """The sizes, if they keep the rules of the spec ("Block size constraints"). Raises Malformed if not."""
    if not _is_power_of_two(minimum) or minimum > MINIMUM_BLOCK_BYTES_MAX:
        raise Malformed(f"a minimum block size of {minimum} bytes: not a power of 2 up to 65536")
    if not _is_power_of_two(preferred) or preferred < max(minimum, PREFERRED_BLOCK_BYTES_MIN):
        raise Malformed(
            f"a preferred block size of {preferred} bytes: not a power of 2 of at least "
            f"{max(minimum, PREFERRED_BLOCK_BYTES_MIN)}"
        )
    if maximum == 0 or (maximum % minimum and maximum != BLOCK_BYTES_UNLIMITED):
        raise Malformed(f"a maximum block size of {maximum} bytes: not a multiple of the minimum, {minimum}")
    return BlockSizes(minimum, preferred, maximum, advertised=True)


def _check_against_size(sizes: BlockSizes, export_size: int) -> None:
    """ "MUST be at least as large as the smaller of the preferred block size or export size"."""
    if sizes.maximum < min(sizes.preferred, export_size):
        raise Malformed(f"a maximum block size of {sizes.maximum} bytes, less than the preferred, {sizes.preferred}")


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def _fall_back(reply: int) -> Outcome:
    return Outcome.EXPORT_NAME if reply == OptionReply.ERR_UNSUP else Outcome.REFUSED


# -- LIST ------------------------------------------------------------------------------------------------------------


def _server_reply(negotiation: Negotiation, payload: memoryview) -> None:
    name, description = wire.unpack_server(payload)
    negotiation.exports.append((wire.printable(name), wire.printable(description)))


# -- the table, in the order in which options are sent ---------------------------------------------------------------


def _goal_is(goal: Goal) -> Callable[[Negotiation], bool]:
    return lambda negotiation: negotiation.wishes.goal is goal


_INFO_REPLIES: Final = {OptionReply.INFO.value: _info_reply}

OPTIONS: Final[OptionTable] = MappingProxyType(
    {
        handler.key: handler
        for handler in (
            OptionHandler(Option.EXTENDED_HEADERS, _wants_extended, acknowledged=_has_extended),
            OptionHandler(Option.STRUCTURED_REPLY, _wants_structured, acknowledged=_has_structured),
            OptionHandler(
                Option.LIST_META_CONTEXT,
                _wants_hints,
                data=_hints_query,
                replies={OptionReply.META_CONTEXT.value: _hints_reply},
                variant=1,
            ),
            OptionHandler(
                Option.SET_META_CONTEXT,
                _wants_contexts,
                data=_context_query,
                replies={OptionReply.META_CONTEXT.value: _context_reply},
                acknowledged=_has_contexts,
            ),
            OptionHandler(
                Option.INFO,
                _goal_is(Goal.INFO),
                data=_info_request,
                replies=_INFO_REPLIES,
                on_ack=Outcome.HAGGLED,
                on_error=_fall_back,
            ),
            OptionHandler(
                Option.LIST,
                _goal_is(Goal.LIST),
                replies={OptionReply.SERVER.value: _server_reply},
                on_ack=Outcome.HAGGLED,
                on_error=_refuse,
                replies_max=EXPORTS_LISTED_MAX,
            ),
            OptionHandler(
                Option.GO,
                _goal_is(Goal.GO),
                data=_info_request,
                replies=_INFO_REPLIES,
                on_ack=Outcome.TRANSMISSION,
                on_error=_fall_back,
            ),
        )
    }
)


def with_option(table: OptionTable, handler: OptionHandler, *, before: int) -> OptionTable:
    """`table` with one more option, sent before that with the key `before`. Raises BugError if that is not there."""
    if before not in table:
        raise BugError(f"option {before} is not in the table")
    entries: list[tuple[int, OptionHandler]] = []
    for number, entry in table.items():
        if number == before:
            entries.append((handler.key, handler))
        if number != handler.key:
            entries.append((number, entry))
    return MappingProxyType(dict(entries))


def wanted_options(table: OptionTable, negotiation: Negotiation, after: Sequence[int]) -> int | None:
    """The key of the next option to send, given those already sent; None when the table has nothing more to say."""
    for number, handler in table.items():
        if number not in after and handler.wanted(negotiation):
            return number
    return None
