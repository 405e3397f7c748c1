"""Feed a server's bytes to the NBD machines, in pieces of any sizes, and see what comes out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, repeat

from nbdshard.common.nbd import client as client_module
from nbdshard.common.nbd import connecter as connecter_module
from nbdshard.common.nbd.client import Client
from nbdshard.common.nbd.connecter import Connecter, Wishes
from nbdshard.common.nbd.constants import Option, OptionReply, TransmissionFlag
from nbdshard.common.nbd.export import BlockSizes, Export
from nbdshard.common.nbd.payload import in_memory
from nbdshard.common.nbd.wire import Chunk, pack_chunk
from nbdshard.common.nbd.wire_options import pack_greeting, pack_info_export, pack_option_reply

FIXED = 1  # handshake flags
NO_ZEROES = 2
AS_MUCH_AS_FITS = 1 << 40
ALL_FLAGS = TransmissionFlag(0x1FFF) & ~TransmissionFlag.READ_ONLY
MIB = 1 << 20

GREETING = pack_greeting(FIXED | NO_ZEROES)
UNSUP = OptionReply.ERR_UNSUP
ACK = OptionReply.ACK


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return pack_option_reply(option, kind, data)


def info(payload: bytes, option: int = Option.GO) -> bytes:
    return pack_option_reply(option, OptionReply.INFO, payload)


def before_go(*, structured: bool = True) -> bytes:
    """A server's stream up to the reply to GO, when asked by plain `Wishes()`."""
    stream = GREETING + reply(Option.EXTENDED_HEADERS, UNSUP)
    if not structured:
        return stream + reply(Option.STRUCTURED_REPLY, UNSUP)
    return stream + reply(Option.STRUCTURED_REPLY, ACK) + reply(Option.SET_META_CONTEXT, ACK)


def size_info(size: int = MIB, flags: int = TransmissionFlag.HAS_FLAGS, option: int = Option.GO) -> bytes:
    return info(pack_info_export(size, flags), option)


def sizes_of(*sizes: int) -> Iterator[int]:
    """Sizes of pieces: those given, then as much as fits."""
    return chain(sizes, repeat(AS_MUCH_AS_FITS))


def feed_connecter(
    connecter: Connecter, stream: bytes, sizes: Iterable[int] | None = None
) -> tuple[list[connecter_module.Event], bytes]:
    """(events, what was left over when it wanted no more). Errors come through."""
    pieces = iter(sizes) if sizes is not None else repeat(AS_MUCH_AS_FITS)
    events: list[connecter_module.Event] = []
    data = memoryview(stream)
    while data:
        target = connecter.receive_target()
        if not target:
            break
        count = min(len(target), len(data), next(pieces))
        target[:count] = data[:count]
        events += connecter.received(count)
        data = data[count:]
    return events, bytes(data)


def feed_client(client: Client, stream: bytes, sizes: Iterable[int] | None = None) -> list[client_module.Event]:
    """All events of the whole stream. Errors come through."""
    pieces = iter(sizes) if sizes is not None else repeat(AS_MUCH_AS_FITS)
    events: list[client_module.Event] = []
    data = memoryview(stream)
    while data:
        count = scatter(client.receive_target(), data[: next(pieces)])
        events += client.received(count)
        data = data[count:]
    return events


def scatter(targets: list[memoryview], data: memoryview) -> int:
    """As readv(2) does: fill the targets one after the other; returns the bytes taken."""
    at = 0
    for target in targets:
        count = min(len(target), len(data) - at)
        target[:count] = data[at : at + count]
        at += count
    return at


def talk(stream: bytes, wishes: Wishes | None = None) -> tuple[Connecter, list[connecter_module.Event]]:
    """A connecter that was fed `stream`."""
    connecter = Connecter(wishes or Wishes(), "srv")
    events, _ = feed_connecter(connecter, stream)
    return connecter, events


def an_export(
    size: int = 16 * MIB,
    flags: TransmissionFlag = ALL_FLAGS,
    *,
    mode: str = "structured",
    contexts: dict[str, int] | None = None,
    block_sizes: BlockSizes | None = None,
) -> Export:
    """An export as negotiated; `mode` is "simple", "structured" or "extended"."""
    return Export(
        "",
        size,
        flags,
        block_sizes or BlockSizes(),
        structured=mode != "simple",
        extended=mode == "extended",
        contexts={"base:allocation": 7} if contexts is None else contexts,
    )


def send_all(client: Client) -> tuple[bytes, list[client_module.Event]]:
    """Everything queued leaves: the bytes, and the events of that."""
    data = b"".join(in_memory(client.data_to_send()))
    return data, client.sent(len(data)) if data else []


def chunk(
    flags: int, kind: int, cookie: int, payload: bytes = b"", *, extended: bool = False, offset: int = 0
) -> bytes:
    """One structured (or extended) reply chunk with its payload."""
    return pack_chunk(Chunk(flags, kind, cookie, offset, len(payload)), extended=extended) + payload


def data_chunk(cookie: int, offset: int, data: bytes, *, done: bool = False) -> bytes:
    """OFFSET_DATA, structured."""
    return chunk(1 if done else 0, 1, cookie, offset.to_bytes(8, "big") + data)
