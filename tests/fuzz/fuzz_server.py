"""Feed spoiled client streams to the server, from the greeting on, in random pieces, for as long as asked.

    python tests/fuzz/fuzz_server.py --seconds 600 [--seed N]

Every run must end: with the connection finished, or with an error that blames the client. Never with a BugError or
anything else; no request is handed out that the export does not allow; never more is under way than the limits say;
and whatever is said is a well-formed stream, each answer to a request that was asked and has none yet. Requests are
carried out on memory, and answered in any order. The seed of a failing run is printed; `--seed N --runs 1` repeats it.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.mutations import spoil
from fuzz.running import Outcome, a_piece, main

from nbdshard.common.errors import BugError, NbdshardError
from nbdshard.common.limits import HEAD_BYTES_MAX, OPTION_DATA_BYTES_MAX
from nbdshard.common.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    CommandFlag,
    Info,
    Option,
    ReplyType,
    TransmissionFlag,
)
from nbdshard.common.nbd.export import BlockSizes
from nbdshard.common.nbd.payload import in_memory
from nbdshard.common.nbd.wire import Request as WireRequest
from nbdshard.common.nbd.wire import pack_request
from nbdshard.common.nbd.wire_options import (
    pack_client_flags,
    pack_context_query,
    pack_info_request,
    pack_option,
)
from nbdshard.server.backends.memory import MemoryBackend
from nbdshard.server.handling import handle
from nbdshard.server.offers import NamedOffers, Offer
from nbdshard.server.serving import Request
from nbdshard.server.session import Session

SIZE = 300_000  # odd, and more than a few blocks
PAYLOAD_MAX = 1 << 16
TARGET_BYTES_MAX = max(HEAD_BYTES_MAX, OPTION_DATA_BYTES_MAX, PAYLOAD_MAX)
WRITING = (Command.WRITE, Command.WRITE_ZEROES, Command.TRIM)


@dataclass(frozen=True, slots=True)
class Case:
    """What a client sends that does all right."""

    name: str
    negotiation: bytes
    requests: bytes
    read_only: bool = False


def run_case(case: Case, random: Random) -> Outcome:
    """One spoiled stream through one session. Raises what must not come out."""
    backend = MemoryBackend(SIZE, read_only=case.read_only)
    sizes = BlockSizes(1, 4096, PAYLOAD_MAX)
    offers = NamedOffers([Offer("disk", SIZE, backend.flags, sizes), Offer("other", 512, backend.flags)])
    session = Session(offers, "client")
    said = _Said(session)
    if random.random() < 0.7:  # else hardly a run would come to its requests
        stream = memoryview(case.negotiation + spoil(case.requests, random))
    else:
        stream = memoryview(spoil(case.negotiation + case.requests, random))
    open_requests: list[Request] = []
    error = ""
    try:
        while not session.finished:
            requests = list(session.resume())
            target = session.receive_target()
            assert len(target) <= TARGET_BYTES_MAX, f"a target of {len(target)} bytes"
            if target and not stream:
                open_requests += requests
                session.end_of_stream()
                break
            count = min(len(target), len(stream), a_piece(random))
            if count:
                target[:count] = stream[:count]
                stream = stream[count:]
                requests += session.received(count)
            for request in requests:
                _check(request, session)
            open_requests += requests
            is_stuck = not target  # nothing is wanted until something is answered
            while open_requests and (is_stuck or random.random() < 0.5):
                chosen = open_requests.pop(random.randrange(len(open_requests)))
                assert session.device is not None
                handle(backend, chosen)(session.device)
                is_stuck = False
            said.hear(random)
            goes_on = target or requests or open_requests or said.unsent or session.receive_target()
            assert goes_on or session.finished, "it hangs"
    except BugError:
        raise
    except NbdshardError as caught:
        error = type(caught).__name__
        str(caught).encode()
    for request in open_requests:  # those that come too late are answered into the void, or not
        assert session.device is not None
        handle(backend, request)(session.device)
    if session.device is not None and error != "ProtocolError":  # those of the same call are lost with it
        assert session.device.under_way <= 1, "an answer is missing"  # a WRITE whose payload has not all come
    said.hear(random)
    return Outcome(case.name, error)


def _check(request: Request, session: Session) -> None:
    """The export allows it, and all of it is there."""
    assert session.device is not None
    export = session.device.export
    sends = request.command == Command.WRITE
    assert len(request.payload) == (request.length if sends else 0), request
    if request.command == Command.FLUSH:
        assert (request.offset, request.length) == (0, 0), request
    else:
        assert 0 < request.length <= export.size - request.offset, request
    if request.command in (Command.READ, Command.WRITE):
        assert request.length <= export.block_sizes.maximum, request
    if export.flags & TransmissionFlag.READ_ONLY:
        assert request.command not in WRITING, request
    if request.command == Command.BLOCK_STATUS:
        assert export.contexts, request


class _Said:
    """What the session says: sent in pieces, and its answers taken apart."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._is_negotiated = False
        self.unsent = 0

    def hear(self, random: Random) -> None:
        data = b"".join(in_memory(self._session.data_to_send()))
        self.unsent += len(data)
        if self.unsent and random.random() < 0.9:
            count = random.choice((1, self.unsent, self.unsent))
            self._session.sent(count)
            self.unsent -= count
        if self._is_negotiated:
            self._take_apart(data)
        self._is_negotiated = self._session.device is not None

    def _take_apart(self, data: bytes) -> None:
        """Whole replies, one behind the other; a simple one says nothing of its length where there are no others."""
        assert self._session.device is not None
        export = self._session.device.export
        at = 0
        while at < len(data) and export.structured:
            (magic,) = struct.unpack_from(">I", data, at)
            if export.extended:
                assert magic == EXTENDED_REPLY_MAGIC, hex(magic)
                _, flags, kind, _, _, length = struct.unpack_from(">IHHQQQ", data, at)
                at += 32 + length
            elif magic == STRUCTURED_REPLY_MAGIC:
                _, flags, kind, _, length = struct.unpack_from(">IHHQI", data, at)
                at += 20 + length
            else:
                assert magic == SIMPLE_REPLY_MAGIC, hex(magic)
                flags, kind = 1, ReplyType.NONE
                at += 16
            assert flags in (0, 1)
            assert kind in tuple(ReplyType)
        assert at == len(data) or not export.structured, f"{at} of {len(data)} bytes"


# -- streams of clients -----------------------------------------------------------------------------------------------


def _negotiation(mode: str) -> bytes:
    def named(option: int, data: bytes = b"") -> bytes:
        return pack_option(option, data)

    stream = pack_client_flags(3)
    if mode == "old":
        return pack_client_flags(0) + named(Option.EXPORT_NAME, b"disk")
    stream += named(Option.LIST) + named(Option.STARTTLS) + named(4711, b"what")
    if mode == "extended":
        stream += named(Option.EXTENDED_HEADERS)
    if mode != "simple":
        stream += named(Option.STRUCTURED_REPLY)
    query = pack_context_query("disk", ["base:allocation", "x:y"])
    stream += named(Option.LIST_META_CONTEXT, query) + named(Option.SET_META_CONTEXT, query)
    stream += named(Option.INFO, pack_info_request("other", [Info.BLOCK_SIZE]))
    return stream + named(Option.GO, pack_info_request("disk", [Info.BLOCK_SIZE, Info.NAME, Info.DESCRIPTION]))


def _requests(mode: str) -> bytes:
    wide = mode == "extended"
    count = iter(range(1000))

    def ask(command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> bytes:
        if wide and payload:
            flags |= CommandFlag.PAYLOAD_LEN
        return pack_request(WireRequest(flags, command, next(count), offset, length), extended=wide) + payload

    flag = CommandFlag
    stream = ask(Command.WRITE, 1000, 700, 0, b"w" * 700) + ask(Command.READ, 900, 2000)
    stream += ask(Command.WRITE, 65_000, 5000, flag.FUA, b"v" * 5000) + ask(Command.FLUSH)
    stream += ask(Command.WRITE_ZEROES, 66_000, 100_000, flag.NO_HOLE) + ask(Command.TRIM, 0, 70_000)
    stream += ask(Command.WRITE_ZEROES, 0, 4096, flag.FAST_ZERO | flag.FUA) + ask(Command.CACHE, 0, SIZE)
    if mode in ("structured", "extended"):
        stream += ask(Command.READ, 60_000, 20_000, flag.DF) + ask(Command.BLOCK_STATUS, 0, SIZE)
        stream += ask(Command.BLOCK_STATUS, 512, 512, flag.REQ_ONE)
    stream += ask(Command.READ, SIZE - 1, 1) + ask(Command.READ, SIZE, 1) + ask(99, 1, 2, 3)
    return stream + ask(Command.READ, 0, PAYLOAD_MAX) * 5 + ask(Command.DISC)


MODES = ("old", "simple", "structured", "extended")
CASES = [
    *(Case(mode, _negotiation(mode), _requests(mode)) for mode in MODES),
    Case("read-only", _negotiation("structured"), _requests("structured"), read_only=True),
    Case("aborted", pack_client_flags(3) + pack_option(Option.LIST) + pack_option(Option.ABORT), b""),
]


def run_seed(seed: int) -> Outcome:
    """The run that belongs to one seed."""
    random = Random(seed)
    return run_case(random.choice(CASES), random)


if __name__ == "__main__":
    sys.exit(main("Fuzz the server side of the NBD core.", run_seed))
