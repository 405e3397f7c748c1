"""Option haggling as the server's table: for each option what to answer, and what follows.

An option is added by a `ServedOption` of one's own, from anywhere: `Listener(offers, client, options={**SERVED_OPTIONS,
mine.option: mine})`. Answers write what they learn into the `Haggling`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum, auto
from types import MappingProxyType
from typing import Final, NoReturn

import msgspec

from nbdshard.common.nbd import wire_options as wire
from nbdshard.common.nbd.constants import BASE_ALLOCATION, Info, Option, OptionReply, TransmissionFlag
from nbdshard.common.nbd.export import Export
from nbdshard.common.nbd.hints import NO_HINTS, QUERY, pack_hints
from nbdshard.server.offers import Offer, Offers

_NAMESPACE: Final = BASE_ALLOCATION.partition(":")[0] + ":"  # as a query of LIST_META_CONTEXT: all that is in it


class Then(Enum):
    """What becomes of a negotiation when an option was answered."""

    NEXT = auto()  # the client's next option
    TRANSMISSION = auto()  # both sides are in the transmission phase now
    PART = auto()  # nothing more is said


class Haggling(msgspec.Struct):
    """What is agreed on so far; the answers' shared notebook. `extra` is for options from outside."""

    offers: Offers
    is_fixed: bool = False  # the client speaks fixed newstyle: it understands a refusal
    no_zeroes: bool = False
    structured: bool = False
    extended: bool = False
    contexts: dict[str, int] = msgspec.field(default_factory=dict)
    contexts_of: str | None = None  # the export they were agreed on for
    chosen: Offer | None = None
    extra: dict[str, object] = msgspec.field(default_factory=dict)

    def find(self, name: str) -> Offer:
        """The export called `name`. Raises Refusal."""
        offer = self.offers.find(name)
        if offer is None:
            raise Refusal(OptionReply.ERR_UNKNOWN, "there is no such export")
        return offer

    def choose(self, offer: Offer, name: str) -> None:
        """The client, which called it `name`, gets `offer`."""
        self.chosen = offer
        if self.contexts_of != name:  # "the server MUST treat it as if no contexts were selected"
            self.contexts.clear()

    def export(self) -> Export:
        """The result, once an offer was chosen."""
        assert self.chosen is not None
        offer = self.chosen
        return Export(
            name=offer.name,
            size=offer.size,
            flags=told_flags(offer, self),
            block_sizes=offer.block_sizes,
            structured=self.structured,
            extended=self.extended,
            contexts=MappingProxyType(dict(self.contexts)),
            description=offer.description,
            hints=offer.hints,
        )


class Refusal(Exception):
    """An answer raises it: the option is refused with the error `reply` and a sentence for the client's user."""

    def __init__(self, reply: OptionReply, sentence: str) -> None:
        super().__init__(reply, sentence)
        self.reply = reply
        self.sentence = sentence


Reply = tuple[int, bytes]  # reply type, payload


class ServedOption(msgspec.Struct, frozen=True):
    """One entry of the table.

    `answer` gives the replies in front of NBD_REP_ACK, and may raise Refusal, or wire.Malformed, which is answered
    NBD_REP_ERR_INVALID. `then`: what follows an answer that is no refusal.
    """

    option: int
    answer: Callable[[Haggling, memoryview], Sequence[Reply]]
    then: Then = Then.NEXT


OptionTable = Mapping[int, ServedOption]


def told_flags(offer: Offer, haggling: Haggling) -> TransmissionFlag:
    """The transmission flags of `offer` for this client: "MUST leave [SEND_DF] clear if structured replies have not
    been negotiated".
    """
    return offer.flags if haggling.structured else offer.flags & ~TransmissionFlag.SEND_DF


def _no_data(data: memoryview) -> None:
    if data:
        _invalid(f"{len(data)} bytes of data, where none are allowed")


def _invalid(sentence: str) -> NoReturn:
    raise Refusal(OptionReply.ERR_INVALID, sentence)


# -- STRUCTURED_REPLY, EXTENDED_HEADERS ------------------------------------------------------------------------------


def _structured(haggling: Haggling, data: memoryview) -> Sequence[Reply]:
    _no_data(data)
    if haggling.extended:
        raise Refusal(OptionReply.ERR_EXT_HEADER_REQD, "extended headers, which include it, were agreed on")
    haggling.structured = True
    return ()


def _extended(haggling: Haggling, data: memoryview) -> Sequence[Reply]:
    _no_data(data)
    if haggling.extended:
        _invalid("extended headers were agreed on before")
    haggling.extended = haggling.structured = True
    return ()


# -- LIST ------------------------------------------------------------------------------------------------------------


def _list(haggling: Haggling, data: memoryview) -> Sequence[Reply]:
    _no_data(data)
    return [(OptionReply.SERVER, wire.pack_server(offer.name, offer.description)) for offer in haggling.offers.listed()]


# -- LIST_META_CONTEXT, SET_META_CONTEXT -----------------------------------------------------------------------------


def _context_query(haggling: Haggling, data: memoryview) -> tuple[wire.ContextQuery, Offer]:
    if not haggling.structured:
        _invalid("structured replies come first")
    query = wire.unpack_context_query(data)
    return query, haggling.find(query.export_name)


def _list_contexts(haggling: Haggling, data: memoryview) -> Sequence[Reply]:
    query, offer = _context_query(haggling, data)
    names = [name for name in offer.contexts if not query.queries or {name, _NAMESPACE} & set(query.queries)]
    if QUERY in query.queries and offer.hints != NO_HINTS:
        names.append(pack_hints(offer.hints))
    return [(OptionReply.META_CONTEXT, wire.pack_meta_context(0, name)) for name in names]


def _set_contexts(haggling: Haggling, data: memoryview) -> Sequence[Reply]:
    """ "the server MUST ignore invalid queries": what it does not have is not agreed on."""
    haggling.contexts.clear()  # "replaces any prior selection", also if this one fails
    haggling.contexts_of = None
    query, offer = _context_query(haggling, data)
    chosen = {name: number for number, name in enumerate(offer.contexts, 1) if name in query.queries}
    haggling.contexts.update(chosen)
    haggling.contexts_of = query.export_name
    return [(OptionReply.META_CONTEXT, wire.pack_meta_context(number, name)) for name, number in chosen.items()]


# -- INFO, GO, ABORT -------------------------------------------------------------------------------------------------


def _info(haggling: Haggling, data: memoryview) -> Sequence[Reply]:
    request = wire.unpack_info_request(data)
    offer = haggling.find(request.export_name)
    if offer.block_sizes.minimum > 1 and Info.BLOCK_SIZE not in request.infos:
        raise Refusal(OptionReply.ERR_BLOCK_SIZE_REQD, f"requests must fit {offer.block_sizes.minimum} byte blocks")
    return [(OptionReply.INFO, detail) for detail in _details(offer, haggling, request.infos)]


def _details(offer: Offer, haggling: Haggling, wanted: Sequence[int]) -> Iterator[bytes]:
    sizes = offer.block_sizes
    yield wire.pack_info_export(offer.size, told_flags(offer, haggling))
    # Told to everybody: "NBD_INFO_BLOCK_SIZE ... the server SHOULD" do so, and who does not know it skips it.
    yield wire.pack_info_block_size(sizes.minimum, sizes.preferred, sizes.maximum)
    if Info.NAME in wanted:
        yield wire.pack_info_text(Info.NAME, offer.name)
    if Info.DESCRIPTION in wanted and offer.description:
        yield wire.pack_info_text(Info.DESCRIPTION, offer.description)


def _go(haggling: Haggling, data: memoryview) -> Sequence[Reply]:
    replies = _info(haggling, data)
    name = wire.unpack_info_request(data).export_name
    haggling.choose(haggling.find(name), name)
    return replies


def _abort(_haggling: Haggling, _data: memoryview) -> Sequence[Reply]:
    return ()


# -- the table -------------------------------------------------------------------------------------------------------
#
# EXPORT_NAME is not in it: it has no reply, and its refusal is the end of the connection (listener.py).

SERVED_OPTIONS: Final[OptionTable] = MappingProxyType(
    {
        entry.option: entry
        for entry in (
            ServedOption(Option.ABORT, _abort, Then.PART),
            ServedOption(Option.LIST, _list),
            ServedOption(Option.INFO, _info),
            ServedOption(Option.GO, _go, Then.TRANSMISSION),
            ServedOption(Option.STRUCTURED_REPLY, _structured),
            ServedOption(Option.LIST_META_CONTEXT, _list_contexts),
            ServedOption(Option.SET_META_CONTEXT, _set_contexts),
            ServedOption(Option.EXTENDED_HEADERS, _extended),
        )
    }
)
