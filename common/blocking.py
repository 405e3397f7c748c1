"""A blocking NBD client: one request at a time over the sans-I/O machines, every wait with a deadline.

For `info`, `map`, tests, and other programs that want no loop; the data path has a shell of its own.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Self

import msgspec

from nbdshard.common.dial import cause_of, dial
from nbdshard.common.errors import BugError, ConnectionLost, NbdshardError, TimedOut, UserError
from nbdshard.common.limits import (
    CONNECT_SECONDS,
    DISCONNECT_SECONDS,
    FLUSH_SECONDS,
    HANDSHAKE_SECONDS,
    MIB,
    REQUEST_SECONDS,
    REQUEST_SECONDS_PER_MIB,
)
from nbdshard.common.nbd import wire_options
from nbdshard.common.nbd.client import Client, Done
from nbdshard.common.nbd.connecter import Connecter, Goal, Listed, Negotiated, Wishes
from nbdshard.common.nbd.constants import Option, OptionReply
from nbdshard.common.nbd.export import Export
from nbdshard.common.nbd.options import OPTIONS, Negotiation, OptionHandler, OptionTable, with_option
from nbdshard.common.nbd.payload import in_memory
from nbdshard.common.nbd.uri import NbdUri
from nbdshard.common.ranges import Range

_HANDLE: Final = 0  # of the only request there ever is
_PIECES_MAX: Final = 64  # buffers in one sendmsg; far below IOV_MAX
_GO: Final = "go acknowledged"  # keys of Negotiation.extra
_LISTED: Final = "contexts listed"


class Timeouts(msgspec.Struct, frozen=True):
    """Seconds each step may take; a request gets a second more for each MiB of it."""

    connect: float = CONNECT_SECONDS
    handshake: float = HANDSHAKE_SECONDS
    request: float = REQUEST_SECONDS


DEFAULT_TIMEOUTS: Final = Timeouts()


class Findings(msgspec.Struct, frozen=True):
    """All that a negotiation told, also what a copy has no use for."""

    export: Export
    go: bool  # by NBD_OPT_GO; otherwise by NBD_OPT_EXPORT_NAME, which tells no block sizes
    contexts_listed: tuple[str, ...]  # by NBD_OPT_LIST_META_CONTEXT; empty where the server lists none


class BlockingClient:
    """One connection to one export. A context manager; also closed by `close`, which disconnects softly."""

    def __init__(self, stream: _Stream, client: Client, timeouts: Timeouts) -> None:
        """Use `open`."""
        self._stream = stream
        self._client = client
        self._timeouts = timeouts
        self.export = client.export
        self.peer = stream.peer

    @classmethod
    def open(
        cls,
        uri: NbdUri,
        peer: str,
        *,
        wishes: Wishes | None = None,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
    ) -> Self:
        """Connect to `uri` (called `peer` in messages) and negotiate its export, or what `wishes` says.

        Raises Unreachable, TimedOut, ConnectionLost, ProtocolError, and UserError where the server refuses.
        """
        wishes = wishes or Wishes(uri.export_name)
        connection, export = open_export(uri, peer, wishes, timeouts)
        return cls(_Stream(connection, peer), Client(export, peer, handles=1), timeouts)

    def read(self, where: Range) -> bytes:
        """The bytes of `where`. Raises RequestError where the server says so."""
        buffer = bytearray(where.length)
        self._request(f"reading {where}", where.length, lambda: self._client.read(_HANDLE, where, memoryview(buffer)))
        return bytes(buffer)

    def write(self, where: Range, payload: bytes) -> None:
        """Write `payload`, as long as `where`."""
        self._request(f"writing {where}", where.length, lambda: self._client.write(_HANDLE, where, [payload]))

    def write_zeroes(self, where: Range, *, no_hole: bool = False) -> None:
        """Make `where` read as zeroes."""
        self._request(f"zeroing {where}", 0, lambda: self._client.write_zeroes(_HANDLE, where, no_hole=no_hole))

    def flush(self) -> None:
        """Make everything written so far durable."""
        self._request("flushing", 0, lambda: self._client.flush(_HANDLE), least=FLUSH_SECONDS)

    def extents(self, where: Range) -> list[tuple[Range, int]]:
        """Extents of base:allocation from the start of `where` on: at least one, perhaps fewer than asked for."""
        done = self._request(
            f"asking for the block status of {where}", 0, lambda: self._client.block_status(_HANDLE, where)
        )
        if not done.extents:
            raise BugError("a block status without extents")
        return done.extents

    def close(self, *, waits: bool = True) -> None:
        """Disconnect softly and close. Idempotent; never raises, the work is done by now.

        `waits`: for the server to hang up first, a moment at most.
        """
        try:
            if not self._stream.closed and not self._client.pending:
                self._client.disconnect()
                deadline = Deadline(self._stream.peer, "disconnecting", DISCONNECT_SECONDS)
                self._stream.send(in_memory(self._client.data_to_send()), deadline)
                if waits:
                    self._stream.await_end(deadline)
        except NbdshardError:
            pass
        finally:
            self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, doing: str, size: int, queue: Callable[[], None], least: float = 0) -> Done:
        """Queue one request and see it through. After anything but a RequestError the connection is closed."""
        seconds = max(least, self._timeouts.request + REQUEST_SECONDS_PER_MIB * size / MIB)
        deadline = Deadline(self._stream.peer, doing, seconds)
        queue()
        try:
            done = self._answer(deadline)
        except BaseException:
            self._stream.close()
            raise
        if done.error is not None:
            raise done.error
        return done

    def _answer(self, deadline: Deadline) -> Done:
        pieces = in_memory(self._client.data_to_send())
        self._stream.send(pieces, deadline)
        events = self._client.sent(sum(map(len, pieces)))
        while True:
            for event in events:
                if isinstance(event, Done):
                    return event
            count = self._stream.receive(self._client.receive_target(), deadline)
            if count == 0:
                self._client.end_of_stream()
                raise BugError("the end of the stream was taken for an answer")
            events = self._client.received(count)


def open_export(uri: NbdUri, peer: str, wishes: Wishes, timeouts: Timeouts) -> tuple[socket.socket, Export]:
    """A connection in the transmission phase, which is the caller's own, and what was negotiated.

    Raises as `BlockingClient.open` does.
    """
    if wishes.goal is not Goal.GO:
        raise BugError("these wishes do not lead into the transmission phase")
    connecter = Connecter(wishes, peer)
    connection = dial(uri, peer, timeouts.connect)
    try:
        event = _negotiate(_Stream(connection, peer), connecter, timeouts.handshake)
        if not isinstance(event, Negotiated):
            raise BugError("an export was asked for")
    except BaseException:
        connection.close()
        raise
    return connection, event.export


def list_exports(uri: NbdUri, peer: str, timeouts: Timeouts = DEFAULT_TIMEOUTS) -> list[tuple[str, str]]:
    """(name, description) of each export the server at `uri` names. Raises as `BlockingClient.open` does."""
    connecter = Connecter(Wishes(goal=Goal.LIST), peer)
    stream = _Stream(dial(uri, peer, timeouts.connect), peer)
    try:
        event = _negotiate(stream, connecter, timeouts.handshake)
        _part(stream, connecter)
    finally:
        stream.close()
    if not isinstance(event, Listed):
        raise BugError("a list was asked for")
    return event.exports


def _negotiate(stream: _Stream, connecter: Connecter, seconds: float) -> Negotiated | Listed:
    """Drive `connecter` to its result. A refusal is answered politely before it is raised."""
    deadline = Deadline(stream.peer, "negotiating", seconds)
    try:
        while True:
            stream.send(connecter.data_to_send(), deadline)
            count = stream.receive([connecter.receive_target()], deadline)
            if count == 0:
                connecter.end_of_stream()
                raise BugError("the end of the stream was taken for an answer")
            for event in connecter.received(count):
                return event
    except UserError:
        _part(stream, connecter)
        raise


def _part(stream: _Stream, connecter: Connecter) -> None:
    """Say ABORT where the protocol allows it, and wait a little for the server to close. Never raises."""
    deadline = Deadline(stream.peer, "disconnecting", DISCONNECT_SECONDS)
    try:
        connecter.abort()
        stream.send(connecter.data_to_send(), deadline)
        stream.await_end(deadline)
    except NbdshardError:
        pass


def inspect(uri: NbdUri, peer: str, timeouts: Timeouts = DEFAULT_TIMEOUTS) -> Findings:
    """What the server at `uri` says about its export. Raises as `BlockingClient.open` does."""
    connecter = Connecter(Wishes(uri.export_name, hints=True), peer, options=_curious())
    stream = _Stream(dial(uri, peer, timeouts.connect), peer)
    try:
        event = _negotiate(stream, connecter, timeouts.handshake)
        _part(stream, connecter)
    finally:
        stream.close()
    if not isinstance(event, Negotiated):
        raise BugError("an export was asked for")
    listed = connecter.negotiation.extra.get(_LISTED, [])
    assert isinstance(listed, list)
    return Findings(event.export, _GO in connecter.negotiation.extra, tuple(listed))


def _curious() -> OptionTable:
    """The options, and two more facts noted: whether GO was answered, which contexts there are to choose from."""
    go = OPTIONS[Option.GO]

    def acknowledged(negotiation: Negotiation) -> None:
        negotiation.extra[_GO] = True
        go.acknowledged(negotiation)

    table = with_option(OPTIONS, _LIST_CONTEXTS, before=Option.GO)
    return with_option(table, msgspec.structs.replace(go, acknowledged=acknowledged), before=Option.GO)


def _list_all(negotiation: Negotiation) -> bytes:
    """ "If zero queries are sent, the server MUST return all the metadata contexts" that one can select."""
    return wire_options.pack_context_query(negotiation.wishes.export_name, ())


def _note_context(negotiation: Negotiation, payload: memoryview) -> None:
    _, name = wire_options.unpack_meta_context(payload)
    names = negotiation.extra.setdefault(_LISTED, [])
    assert isinstance(names, list)
    names.append(wire_options.printable(name.encode()))


_LIST_CONTEXTS: Final = OptionHandler(
    Option.LIST_META_CONTEXT,
    wanted=lambda negotiation: negotiation.structured,
    data=_list_all,
    replies={OptionReply.META_CONTEXT.value: _note_context},
)


class Deadline:
    """Until when `doing` something with `peer` may take; tells what was waited for."""

    def __init__(self, peer: str, doing: str, seconds: float) -> None:
        self.peer = peer
        self.doing = doing
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left, more than 0. Raises TimedOut when there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise self.over()
        return left

    def over(self) -> TimedOut:
        return TimedOut(self.peer, self.doing, self._seconds)


class _Stream:
    """A connected socket whose failures are ours: TimedOut, ConnectionLost."""

    def __init__(self, connection: socket.socket, peer: str) -> None:
        self._connection = connection
        self.peer = peer

    @property
    def closed(self) -> bool:
        return self._connection.fileno() < 0

    def send(self, pieces: Sequence[memoryview | bytes], deadline: Deadline) -> None:
        """Send all of it."""
        rest = [memoryview(piece) for piece in pieces if len(piece)]
        while rest:
            self._connection.settimeout(deadline.left())
            try:
                count = self._connection.sendmsg(rest[:_PIECES_MAX])
            except OSError as error:
                raise self._failure(error, deadline) from None
            while rest and count >= len(rest[0]):
                count -= len(rest.pop(0))
            if count:
                rest[0] = rest[0][count:]

    def receive(self, targets: Sequence[memoryview], deadline: Deadline) -> int:
        """The number of bytes that came into `targets`; 0 at the end of the stream."""
        self._connection.settimeout(deadline.left())
        try:
            return self._connection.recvmsg_into(targets)[0]
        except OSError as error:
            raise self._failure(error, deadline) from None

    def await_end(self, deadline: Deadline) -> None:
        """Receive and forget until the server closes the connection."""
        nowhere = [memoryview(bytearray(4096))]
        while self.receive(nowhere, deadline):
            pass

    def close(self) -> None:
        self._connection.close()

    def _failure(self, error: OSError, deadline: Deadline) -> ConnectionLost:
        if isinstance(error, TimeoutError):
            return deadline.over()
        return ConnectionLost(self.peer, deadline.doing, cause_of(error))
