"""One connection's socket, moved by direct calls whenever it is ready: what payload that may be spliced needs.

The ring watches the socket, edge-triggered, so all that can be moved is moved each time: whoever stops earlier comes
back by itself (`move` tells). The link owns the connection's life; this is its hands.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from errno import EAGAIN

from nbdshard.common import logs
from nbdshard.common.errors import BugError
from nbdshard.common.limits import BUFFERS_PER_SEND_MAX, RECEIVES_PER_TURN_MAX
from nbdshard.common.nbd.client import Client, Event
from nbdshard.common.nbd.payload import Elsewhere, Piece, in_memory
from nbdshard.common.ring import Descriptor, Kind, Operation, Ring
from nbdshard.worker.piped import PipedPayload, PipeRun
from nbdshard.worker.pipes import Plumbing

_READABLE = select.EPOLLIN | select.EPOLLRDHUP
_ENDING = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


class DirectStream:
    """Watches `descriptor`; `changed(operation)` is called when something about it has, and shall call `take_note`.

    `error` is the -errno that ended it, `ended` that the server has closed the connection.
    """

    def __init__(
        self,
        ring: Ring,
        descriptor: Descriptor,
        plumbing: Plumbing,
        client: Client,
        peer: str,
        changed: Callable[[Operation], bool],
    ) -> None:
        self.error = 0
        self.ended = False
        self._ring = ring
        self._number = descriptor.number
        self._plumbing = plumbing
        self._client = client
        self._peer = peer
        self._out: list[Piece] = []
        self._sent = 0  # bytes the client was not told of
        self._is_full = False  # the socket took no more
        self._is_readable = True  # there may be something to receive
        self._is_ending = False  # the other side has closed, or the connection has failed
        self._has_told_of_full_pipe = False
        self._watch = Operation(Kind.WATCH, descriptor, mask=_READABLE, owner=changed)
        ring.submit(self._watch)

    @property
    def idle(self) -> bool:
        """All that was queued is sent."""
        return not self._out

    def take_note(self, events: int) -> None:
        """The ring has reported `events` (select.EPOLL*) of the socket."""
        if events & _ENDING:
            self._is_ending = True
        if events & ~select.EPOLLOUT:
            self._is_readable = True
        if self._is_full and events & ~select.EPOLLIN:
            self._is_full = False
            self._ring.change_watch(self._watch, _READABLE)

    def push(self) -> None:
        """Send what is queued as far as the socket takes it; `move` reports it, and any failure."""
        if self._is_full or self.error:
            return
        out = self._out
        if not out:
            out = self._out = self._client.data_to_send()
        while out:
            piece = out[0]
            if isinstance(piece, PipeRun):
                count = self._plumbing.drain(piece.pipe, self._number, piece.left, more=len(out) > 1)
                if count > 0:
                    piece.left -= count
                    if not piece.left:
                        del out[0]
            else:
                count = self._send_from_memory(out)
            if count <= 0:
                self._could_not_send(count)
                return
            self._sent += count

    def _send_from_memory(self, out: list[Piece]) -> int:
        """Send from the front of `out` up to what is in a pipe, and drop what was sent: bytes, or -errno."""
        end = 0
        while end < len(out) and end < BUFFERS_PER_SEND_MAX and not isinstance(out[end], Elsewhere):
            end += 1
        if end == 0:
            raise BugError("a piece that is in no pipe")
        pieces = in_memory(out[:end])
        count = self._plumbing.send(self._number, pieces, more=end < len(out))
        left, index = count, 0
        while left > 0:
            length = len(pieces[index])
            if left < length:
                out[index] = memoryview(pieces[index])[left:]
                break
            left -= length
            index += 1
        del out[:index]
        return count

    def _could_not_send(self, result: int) -> None:
        if result not in (0, -EAGAIN):
            self.error = result
            return
        self._is_full = True
        self._ring.change_watch(self._watch, _READABLE | select.EPOLLOUT)

    def move(self, dispatch: Callable[[list[Event]], None]) -> bool:
        """Move what can be moved now, both ways; events go to `dispatch`. Whether there were any, or more is to do.

        Raises ProtocolError where the server breaks the protocol; look at `error` and `ended` afterwards.
        """
        told = self._move_out(dispatch)
        if self._is_readable and not self.error:
            told = self._move_in(dispatch) or told
        return told

    def _move_out(self, dispatch: Callable[[list[Event]], None]) -> bool:
        self.push()
        count, self._sent = self._sent, 0
        if count:
            dispatch(self._client.sent(count))
        return count > 0

    def _move_in(self, dispatch: Callable[[list[Event]], None]) -> bool:
        client, plumbing, number = self._client, self._plumbing, self._number
        told = False
        for _ in range(RECEIVES_PER_TURN_MAX):
            target = client.receive_target()
            payload: PipedPayload | None = None
            if target:
                wanted = sum(map(len, target))
                count = plumbing.receive(number, target)
            else:
                wanted, sink = client.payload_left, client.payload_sink
                assert isinstance(sink, PipedPayload)
                payload = sink
                count = plumbing.fill(payload.pipe, number, wanted)
            if count > 0:
                events = client.received(count)
                if events:
                    dispatch(events)
                    told = True
                if count == wanted:
                    continue
            elif count == 0:
                self.ended = True
            elif count != -EAGAIN:
                self.error = count
            if payload is not None and payload.pipe.is_full:
                self._spill(payload)
            elif count <= 0 or not self._is_ending:
                # All that had arrived was taken: what comes later makes an edge of its own.
                self._is_readable = False
                return told
        return True  # the others have their turn now

    def _spill(self, payload: PipedPayload) -> None:
        payload.spill()
        if not self._has_told_of_full_pipe:
            self._has_told_of_full_pipe = True
            logs.info(
                f"{self._peer}: its data comes in small pieces: a pipe of {payload.pipe.capacity} bytes was full with "
                f"{payload.pipe.held}; the rest of such payload goes through a buffer"
            )
