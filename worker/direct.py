"""One connection's socket, moved by direct calls whenever it is ready: what payload that may be spliced needs.

The ring watches the socket, edge-triggered, so all that can be moved is moved each time; whoever stops earlier has to
come back by itself (`has_more`). The link owns the connection's life; this is its hands.
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
from nbdshard.worker.pipes import Plumbing, small_pieces

_READABLE = select.EPOLLIN | select.EPOLLRDHUP
_ENDING = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


class DirectStream:
    """Watches `descriptor`; `changed(operation)` is called when something about it has, and shall call `take_note`.

    `may_send` is asked before each piece is sent: we may have been stopped for long in the middle of all this.
    `error` is the -errno that ended it, `ended` that the server has closed the connection, `has_more` that `receive`
    has something left to do.
    """

    def __init__(
        self,
        ring: Ring,
        descriptor: Descriptor,
        plumbing: Plumbing,
        client: Client,
        peer: str,
        changed: Callable[[Operation], bool],
        may_send: Callable[[], bool] = lambda: True,
    ) -> None:
        self.error = 0
        self.ended = False
        self._ring = ring
        self._number = descriptor.number
        self._plumbing = plumbing
        self._client = client
        self._peer = peer
        self._may_send = may_send
        self._out: list[Piece] = []
        self._sent = 0  # bytes the client was not told of
        self._is_full = False  # the socket took no more
        self.has_more = True  # there may be something to receive
        self._payload: PipedPayload | None = None  # what is arriving, if it goes into a pipe
        self._left = self._taken = 0  # bytes of that
        self._is_ending = False  # the other side has closed, or the connection has failed
        self._has_told_of_full_pipe = False
        self._watch = Operation(Kind.WATCH, descriptor, mask=_READABLE, owner=changed)
        ring.submit(self._watch)

    @property
    def idle(self) -> bool:
        """All that was queued is sent."""
        return not self._out and not self._client.has_data_to_send

    @property
    def at_rest(self) -> bool:
        """Nothing is under way either way, and nothing is wrong."""
        return not (self._out or self._sent or self._is_full or self._payload or self.error or self.ended)

    def pause(self) -> None:
        """Somebody else uses the socket: nothing that happens to it is told, but its failure."""
        self._ring.change_watch(self._watch, 0)

    def resume(self) -> None:
        """The socket is ours again: what has happened meanwhile is told, or found out by `receive`."""
        self.has_more = True
        self._ring.change_watch(self._watch, _READABLE)

    def take_note(self, events: int) -> bool:
        """The ring has reported `events` (select.EPOLL*) of the socket. Whether it takes more after it was full."""
        if events == select.EPOLLIN and not self._is_full:  # as nearly always
            self.has_more = True
            return False
        if events & _ENDING:
            self._is_ending = True
        if events & ~select.EPOLLOUT:
            self.has_more = True
        if self._is_full and events & ~select.EPOLLIN:
            self._is_full = False
            self._ring.change_watch(self._watch, _READABLE)
            return True
        return False

    def push(self) -> None:
        """Send what is queued as far as the socket takes it; `send` reports it, and any failure."""
        if self._is_full or self.error:
            return
        out = self._out
        while out or (out := self._client.data_to_send()):  # also what was queued while the socket was full
            self._out = out
            if not self._may_send():
                return
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
        end = 1 if not isinstance(out[0], Elsewhere) else 0
        while 0 < end < len(out) and end < BUFFERS_PER_SEND_MAX and not isinstance(out[end], Elsewhere):
            end += 1
        if end == 0:
            raise BugError("a piece that is in no pipe")
        pieces = in_memory(out[:end])
        count = self._plumbing.send(self._number, pieces, more=end < len(out))
        if end == 1 and count == len(pieces[0]):  # as nearly always
            del out[0]
            return count
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

    def send(self, dispatch: Callable[[list[Event]], None]) -> None:
        """Send what is queued; events go to `dispatch`. Look at `error` afterwards."""
        self.push()
        count, self._sent = self._sent, 0
        if count:
            dispatch(self._client.sent(count))

    def receive(self, dispatch: Callable[[list[Event]], None]) -> bool:
        """Take what has arrived; events go to `dispatch`. Whether there were any.

        Raises ProtocolError where the server breaks the protocol. Look at `error`, `ended` and `has_more` afterwards.
        """
        client, told = self._client, False
        for _ in range(RECEIVES_PER_TURN_MAX):
            if not self.has_more:
                break
            payload = self._payload
            if payload is not None:
                taken = self._take_into_pipe(payload)
            elif target := client.receive_target():
                taken = self._take_into_memory(target)
            else:
                payload = self._begin_payload()
                taken = self._take_into_pipe(payload)
            if taken:
                events = client.received(taken)
                if events:
                    dispatch(events)
                    told = True
            if payload is not None and payload.pipe.is_full:
                self._spill(payload)
        return told

    def _begin_payload(self) -> PipedPayload:
        payload = self._client.payload_sink
        assert isinstance(payload, PipedPayload)
        self._payload = payload
        self._left = self._client.payload_left
        self._taken = 0
        return payload

    def _take_into_pipe(self, payload: PipedPayload) -> int:
        """What is in the pipe, once that is all there will be: the client need not know of every piece. Else 0."""
        left = self._left
        count = self._plumbing.fill(payload.pipe, self._number, left)
        if count > 0:
            self._left -= count
            self._taken += count
        if count == -EAGAIN and self._is_ending:
            payload.pipe.is_full = True  # or else the end would have been met
        if count < left and not payload.pipe.is_full:
            self._took_less(count)
            return 0
        self._payload = None
        return self._taken

    def _take_into_memory(self, target: list[memoryview]) -> int:
        count = self._plumbing.receive(self._number, target)
        if count < (len(target[0]) if len(target) == 1 else sum(map(len, target))):
            self._took_less(count)
        return max(0, count)

    def _took_less(self, count: int) -> None:
        """All that had arrived was taken: what comes later makes an edge of its own. Unless the end has come."""
        if count == 0:
            self.ended = True
        elif count < 0 and count != -EAGAIN:
            self.error = count
        elif count > 0 and self._is_ending:
            return
        self.has_more = False

    def _spill(self, payload: PipedPayload) -> None:
        payload.spill()
        if not self._has_told_of_full_pipe:
            self._has_told_of_full_pipe = True
            logs.info(f"{self._peer}: {small_pieces(payload.pipe.capacity, payload.pipe.held)}")
