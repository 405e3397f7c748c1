"""A server of one function: `handle_request(request)` says what is read, and does whatever else is asked.

The smallest shell around a `Session`: a stream is read and written in turn, one request is answered after the other. It
bounds neither the clients' number nor their patience; for strangers there is `nbdshard.server.service`. ::

    def handle_request(request: Request) -> Result:
        match request.command:
            case Command.READ:
                return memoryview(disk)[request.offset : request.offset + request.length]
            case Command.WRITE:
                disk[request.offset : request.offset + request.length] = request.payload

    serve(listen_unix(Path("socket")), offer("disk", len(disk), TransmissionFlag.SEND_FLUSH), handle_request)

An export offers what its flags say, and no request comes that they rule out: without SEND_TRIM, none to TRIM.
"""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, cast

from nbdshard.common import logs
from nbdshard.common.errors import BugError, NbdshardError
from nbdshard.common.limits import CONNECTION_STACK_BYTES
from nbdshard.common.nbd.constants import BASE_ALLOCATION, Command, TransmissionFlag
from nbdshard.common.nbd.extents import Extents
from nbdshard.common.nbd.payload import Elsewhere, Piece, in_memory
from nbdshard.common.ranges import Range
from nbdshard.server.device import Hole
from nbdshard.server.handling import Answer, failure
from nbdshard.server.offers import NamedOffers, Offer
from nbdshard.server.serving import Request
from nbdshard.server.session import Session

Content: TypeAlias = bytes | bytearray | memoryview | Sequence[Piece | Hole]
Result: TypeAlias = Content | Extents | None
"""What `handle_request` returns: to a READ its bytes, in one piece or in several, holes among them; to a BLOCK_STATUS
the extents from the request's offset on, or None where nothing is known; to anything else None. It raises OSError where
a request fails, and its errno is what the client is told. `request.fua`: it is to be durable before it returns."""
HandleRequest: TypeAlias = Callable[[Request], Result]


class Stream(Protocol):
    """What a connected, blocking socket has, and a TLS socket."""

    def recv_into(self, buffer: memoryview, /) -> int:
        """How many bytes came, 0 at the end."""

    def sendall(self, data: memoryview | bytes, /) -> object:
        """All of `data`."""


def offer(name: str, size: int, flags: TransmissionFlag = TransmissionFlag.READ_ONLY) -> Offer:
    """An export of `size` bytes that can do what `flags` say."""
    return Offer(name, size, flags | TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_DF)


def carry_out(handle_request: HandleRequest, request: Request) -> Answer:
    """Call `handle_request`; what to answer: call it with the session's device. Never raises."""
    try:
        return answer_to(request, handle_request(request))
    except Exception as error:
        return failure(request, error)


def answer_to(request: Request, result: Result) -> Answer:
    """The answer where `handle_request` has returned `result`. Raises BugError where it does not fit the request."""
    if request.command == Command.BLOCK_STATUS:
        extents = [(Range.of(request.offset, request.length), 0)] if result is None else cast(Extents, result)
        if not extents or extents[0][0].start != request.offset:
            raise BugError(f"extents {extents} as the answer to {request!r}")
        return lambda device: device.extents(request, {BASE_ALLOCATION: extents})
    if result is None and request.command != Command.READ:
        return lambda device: device.done(request)
    if isinstance(result, bytes | bytearray | memoryview):
        result = [memoryview(result)]
    parts = cast("Sequence[Piece | Hole]", result or ())
    length = sum(part.length if isinstance(part, Hole | Elsewhere) else memoryview(part).nbytes for part in parts)
    if length != request.length:
        raise BugError(f"{length} bytes as the answer to {request!r}")
    return lambda device: device.content(request, parts)


def serve_stream(stream: Stream, session: Session, handle_request: HandleRequest) -> None:
    """Serve one client until it leaves. Raises NbdshardError where it breaks off or the protocol, and OSError."""
    while True:
        for piece in in_memory(session.data_to_send()):
            stream.sendall(piece)
            session.sent(len(piece))
        if session.finished:
            return
        requests = session.resume()
        if not requests:
            count = stream.recv_into(session.receive_target())
            if count == 0:
                session.end_of_stream()
                return
            requests = session.received(count)
        for request in requests:
            assert session.device is not None
            carry_out(handle_request, request)(session.device)


def serve(listener: socket.socket, export: Offer, handle_request: HandleRequest) -> None:
    """Serve `export` on `listener`, a thread for each client, until the socket is shut down. Raises OSError."""
    listener.setblocking(True)
    threading.stack_size(CONNECTION_STACK_BYTES)
    number = 0
    while True:
        try:
            sock, _ = listener.accept()
        except ConnectionAbortedError:
            continue  # it has gone again
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EBADF):  # shut down, closed
                return
            raise
        number += 1
        arguments = (sock, Session(NamedOffers([export]), f"client {number}"), handle_request)
        threading.Thread(target=_serve_client, args=arguments, daemon=True).start()


def _serve_client(sock: socket.socket, session: Session, handle_request: HandleRequest) -> None:
    with sock:
        try:
            serve_stream(sock, session, handle_request)
        except (NbdshardError, OSError) as error:
            logs.info(str(error))
