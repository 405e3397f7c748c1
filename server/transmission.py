"""The transmission phase of one connection: moves bytes between its socket and the device, and requests to who can
carry them out. It decides nothing about the protocol.

There are four ways for a request:

- through a pipe: payload of a READ or a WRITE goes between the socket and a file without coming here (`conduit.py`). A
  READ's is in the pipe, all of it, before its header is queued: what cannot be read is an error, not a broken promise;
- at once: what a backend can do without waiting (`Prompt`), this thread does, and gathers the answers in one call;
- away: the crew's threads carry it out, side by side, and wake this one when there is an answer;
- later: it is kept until the socket takes what is queued, a place at the crew or memory is free.

What has come of a WRITE goes to its file while the rest comes: who leaves in the middle of one may leave a part of it
behind, as the protocol allows for what was not answered; it is never answered as done. Answers without payload are held
back, a few of them, while small requests come without a gap, and said before anything is waited for.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from nbdshard.common import logs
from nbdshard.common.errors import NbdshardError
from nbdshard.common.limits import (
    HELD_BACK_BYTES_MAX,
    HELD_BACK_PAYLOAD_MAX,
    INLINE_BYTES_MAX,
    INLINE_PAUSE,
    INLINE_SECONDS_MAX,
    SENT_PIECES_MAX,
    SERVED_AT_ONCE,
    SERVED_STALL_LOOKS,
    SERVED_STALL_SECONDS,
    SPLICE_BYTES_MIN,
    STORED_BYTES_MIN,
    YIELDS_MAX,
)
from nbdshard.common.nbd.constants import Command
from nbdshard.common.nbd.payload import Elsewhere
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Direct, Place, Prompt
from nbdshard.server.conduit import Conduit, PipeRun
from nbdshard.server.device import Device
from nbdshard.server.exports import Exports
from nbdshard.server.handling import HANDLERS, Answer, HandlerTable, changes, failure, flushed, flushes, handle
from nbdshard.server.serving import Request
from nbdshard.server.wake import Wake, is_readable

_READ: Final = Command.READ.value
_WRITE: Final = Command.WRITE.value
_KEPT_BYTES_MAX: Final = 1 << 16  # payload of small WRITEs that are kept for later


class Transmission:
    """Serves `device` at `sock`, which does not block, by `backend`. `run` is the connection's thread."""

    def __init__(
        self,
        sock: socket.socket,
        device: Device,
        exports: Exports,
        handlers: HandlerTable,
        wake: Wake,
        is_leaving: threading.Event,
    ) -> None:
        """`is_leaving`, told by `wake`: finish what was asked, refuse the rest, and end."""
        backend = exports.backend(device.export.name)
        self._socket = sock
        self._number = sock.fileno()
        self._device = device
        self._backend = backend
        self._handlers = handlers
        self._crew = exports.crew(device.export.name)
        self._wake = wake
        self._share = exports.budget.join(wake.notify, self._cut)
        self._is_leaving = is_leaving
        self._leaves = False  # it knows of that
        self._is_stalled = False  # it is said to be, by others
        self._answers: deque[Answer] = deque()  # of other threads; appending and popping are atomic
        self._out: deque[memoryview | PipeRun] = deque()
        self._kept: deque[Request] = deque()  # for later, in order
        self._kept_bytes = 0
        self._away = 0
        self._made = 0  # bytes read at once, and not sent yet
        self._is_short = False  # of memory
        self._looked_at = 0.0  # whether somebody holds it to no purpose
        self._pause = 0  # writes that go away because one took long
        # What may be done here, by handlers that nobody replaced.
        can_read = handlers.get(_READ) is HANDLERS[_READ]
        can_write = handlers.get(_WRITE) is HANDLERS[_WRITE]
        prompt = backend if isinstance(backend, Prompt) else None
        direct = backend if isinstance(backend, Direct) else None
        self._reads_now = prompt if can_read else None
        self._writes_now = prompt if can_write else None
        self._reads_directly = direct if can_read else None
        self._writes_directly = direct if can_write else None
        self._outward, self._inward = Conduit(), Conduit()
        self._stored = 0  # bytes of the payload of what is incoming that are in its file
        self._piped: Request | None = None  # it is incoming, and its payload goes through a pipe ...
        self._piped_to = Range(0, 1)  # ... to there
        self._poll, self._waking = select.poll(), select.poll()
        self._poll.register(wake.number, select.POLLIN)
        self._waking.register(wake.number, select.POLLIN)
        self._events, self._registered = 0, -1  # that are to be waited for at the socket, and that the poll knows of

    def _cut(self) -> None:
        """From any thread: others wait for the memory that it holds, if it does nothing with it, end."""
        self._is_stalled = True
        self._wake.notify()

    def run(self) -> None:
        """Until the connection ends. Raises NbdshardError and OSError."""
        device = self._device
        self._share.moved_at = time.monotonic()
        self._listen()
        has_come = False  # something that may be followed by more: then what is to be said is said together
        while not device.finished:
            if self._wake.clear():
                self._listen()
            if requests := device.resume():
                self._keep(requests)
            if self._kept:
                self._go_on()
            has_waited = has_come and not self._out and self._may_wait()
            has_sent = not has_waited and self._send()
            is_idle = not (device.under_way or device.unsaid or self._out)
            if self._leaves and is_idle and not is_readable(self._number):
                return  # only now: what was just answered has left too, and what had come is refused
            if device.finished:
                return
            if self._is_stalled and self._is_in_the_way():
                logs.warning(f"{device.client}: takes nothing while others wait for the memory it holds: it is cut off")
                return
            try:
                has_come = self._receive()
            except NbdshardError:
                with contextlib.suppress(OSError):  # what went wrong before is what is to be told
                    self._send()  # what was done before has its answer
                raise
            if not (has_come or has_sent or has_waited or self._wait()):
                return

    def _may_wait(self) -> bool:
        """Whether what is to be said may be held back while more requests come: they are little, and it is."""
        incoming = self._device.incoming
        is_little = incoming is None or incoming.length <= HELD_BACK_PAYLOAD_MAX
        return is_little and self._device.unsaid <= HELD_BACK_BYTES_MAX

    def _listen(self) -> None:
        """To what other threads say."""
        self._take_answers()
        if self._is_leaving.is_set() and not self._leaves:
            self._leaves = True
            self._device.shut_down()

    def close(self) -> None:
        """After `run`: waits for the calls that are still made for it."""
        while self._away:
            self._wake.clear()
            self._take_answers()
            if self._away:
                self._waking.poll()
        self._out.clear()  # first, for what is given back is there for others at once
        self._kept.clear()
        self._device.data_to_send()
        if self._device.incoming is not None:
            self._device.incoming.payload = bytearray()
        self._share.leave()
        self._outward.close()
        self._inward.close()

    def _take_answers(self) -> None:
        while self._answers:
            answer = self._answers.popleft()
            self._away -= 1
            answer(self._device)

    # -- requests -----------------------------------------------------------------------------------------------------

    def _keep(self, requests: list[Request]) -> None:
        self._kept += requests
        for request in requests:
            self._kept_bytes += len(request.payload)

    def _go_on(self) -> None:
        kept = self._kept
        while kept:
            size = len(kept[0].payload)
            if not self._begin(kept[0]):
                break
            kept.popleft()
            self._kept_bytes -= size

    def _begin(self, request: Request) -> bool:
        """Carry it out, or have it carried out; False where that is for later."""
        if request.command == _READ:
            done = self._read_here(request)
            if done is not None:
                return done
        elif request.command == _WRITE and self._writes_now is not None and self._write_here(self._writes_now, request):
            return True
        return self._send_away(request)

    def _send_away(self, request: Request) -> bool:
        if self._away >= SERVED_AT_ONCE:
            return False
        if request.command == _READ and not request.held and not self._hold(request):
            return False
        call = partial(handle, self._backend, request, self._handlers)
        self._hand_over(call, is_flush=flushes(request), is_change=changes(request))
        return True

    def _hand_over(self, call: Callable[[], Answer], *, is_flush: bool, is_change: bool = False) -> None:
        def carry_out() -> None:
            self._answers.append(call())
            self._wake.notify()

        self._away += 1
        self._crew.carry_out(carry_out, is_flush=is_flush, is_change=is_change)

    def _hold(self, request: Request) -> bool:
        """Take memory for what `request` carries; False where it has to wait for that."""
        is_first, was_short = not self._share.held, self._is_short
        self._is_short = not self._share.take(request.length)
        if self._is_short:
            self._looked_at = self._looked_at if was_short else time.monotonic()
            return False
        if is_first:
            self._share.got_on_at = time.monotonic()
        request.held = request.length
        return True

    def _need_none(self) -> None:
        """What goes by a pipe may have waited for memory before: others must not wait for it to take that."""
        if self._is_short:
            self._is_short = False
            self._share.give_up()

    def _read_here(self, request: Request) -> bool | None:
        """As `_begin`; None where it is not for this thread."""
        length = request.length
        where = Range.of(request.offset, length)
        direct, prompt, device = self._reads_directly, self._reads_now, self._device
        try:
            if direct is not None and length >= SPLICE_BYTES_MIN and direct.is_direct(where, to_write=False):
                if self._out or self._outward.held:
                    return False
                with direct.reading(where) as place:
                    if place is not None and self._outward.fill(place, length):
                        self._need_none()
                        device.content(request, [PipeRun(self._outward)])
                        return True
            if prompt is None or length > INLINE_BYTES_MAX:
                return None
            if self._out or self._made >= INLINE_BYTES_MAX:
                return False
            if not request.held and not self._hold(request):
                return False
            parts = prompt.read_now(where)
            if parts is None:
                return None
            device.content(request, parts)
            self._made += length
        except Exception as error:
            failure(request, error)(device)
        return True

    def _write_here(self, prompt: Prompt, request: Request) -> bool:
        if self._pause:
            self._pause -= 1
            return False
        if request.length > INLINE_BYTES_MAX:
            return False
        began = time.monotonic()
        try:
            if not prompt.write_now(Range.of(request.offset, request.length), memoryview(request.payload)):
                return False
        except Exception as error:
            failure(request, error)(self._device)
            return True
        self._took(began)
        self._wrote(request)
        return True

    def _took(self, began: float) -> None:
        """This thread has written since then."""
        if time.monotonic() - began > INLINE_SECONDS_MAX:
            self._pause = INLINE_PAUSE

    def _wrote(self, request: Request) -> None:
        """The bytes are in their place; they may have to be durable, too."""
        if request.fua:
            self._hand_over(lambda: flushed(self._backend, request), is_flush=True)
        else:
            self._device.done(request)

    # -- receiving ----------------------------------------------------------------------------------------------------

    def _receive(self) -> bool:
        """Whether anything came. If not, `_events` says whether that is what has to be waited for."""
        device = self._device
        self._events = 0
        incoming = device.incoming
        if incoming is not None:
            if self._piped is incoming or self._goes_by_pipe(incoming):
                return self._receive_into_pipe(incoming)
            if not incoming.held and not self._hold(incoming):
                return False
        elif self._kept_bytes > _KEPT_BYTES_MAX:
            return False
        target = device.receive_target()
        if not target:
            return False
        try:
            count = self._socket.recv_into(target)
        except BlockingIOError:
            self._events = select.POLLIN
            return False
        if count:
            self._share.moved_at = time.monotonic()
            self._keep(device.received(count))
            incoming = device.incoming
            if incoming is not None and not self._kept and self._may_wait() and self._goes_by_pipe(incoming):
                self._receive_into_pipe(incoming)  # which is nearly always there already
        else:
            device.end_of_stream()
        return True

    def _goes_by_pipe(self, request: Request) -> bool:
        direct = self._writes_directly
        if direct is None or request.command != _WRITE or request.length < SPLICE_BYTES_MIN or request.held:
            return False
        if self._pause:
            return False
        where = Range(request.offset, request.offset + request.length)
        if not direct.is_direct(where, to_write=True) or not self._inward.is_open_for(1):
            return False
        self._piped, self._piped_to, self._stored = request, where, 0
        if self._is_short:
            self._need_none()
        return True

    def _receive_into_pipe(self, request: Request) -> bool:
        """As `_receive`: until all of the payload is in its file, or no more of it has come."""
        device, inward, has_moved, yields = self._device, self._inward, False, 0
        while self._piped is request:
            count = inward.receive(self._number, device.incoming_left)
            if count:
                has_moved, yields = True, 0
                if device.moved(count):
                    self._piped = None
                    self._store(request, inward.held)
                elif inward.held >= STORED_BYTES_MIN:  # while the client sends more
                    self._store(request, self._whole_pages(request) or inward.held)
            elif count == 0:
                device.end_of_stream()
                return True
            elif inward.held and is_readable(self._number):  # so it is the pipe that is full, or some just came
                has_moved = True  # and if that failed there is an answer to be sent
                self._store(request, self._whole_pages(request) or inward.held)
            elif yields < YIELDS_MAX and not device.unsaid:
                yields += 1  # the client is in the middle of sending, and may soon be done
                os.sched_yield()
            else:
                self._events = select.POLLIN
                break
        if has_moved:
            self._share.moved_at = time.monotonic()
        return has_moved

    def _whole_pages(self, request: Request) -> int:
        """How much of what is in the pipe ends with a page of the file: to write a part of one may take reading it."""
        at = request.offset + (self._stored or len(request.payload))
        return max((at + self._inward.held) // mmap.PAGESIZE * mmap.PAGESIZE - at, 0)

    def _store(self, request: Request, length: int) -> None:
        """The first `length` bytes in the pipe into the file, and the request is done when that was the rest of it."""
        began = time.monotonic()
        assert self._writes_directly is not None
        try:
            with self._writes_directly.writing(self._piped_to, is_all=self._piped is None) as place:
                if not self._stored and request.payload:  # it came along with the header
                    self._stored = _write_all(place, request.payload)
                self._inward.store(place.number, place.offset + self._stored, length)
                self._stored += length
        except Exception as error:
            self._inward.close()
            self._piped = None
            failure(request, error)(self._device)
            return
        self._took(began)
        if self._piped is None:
            self._wrote(request)

    # -- sending ------------------------------------------------------------------------------------------------------

    def _send(self) -> bool:
        """Send what the socket takes of what is queued: whether it took anything."""
        out, sent = self._out, 0
        for piece in self._device.data_to_send():
            if isinstance(piece, Elsewhere):
                assert isinstance(piece, PipeRun)  # nothing else is given to the device
                out.append(piece)
            elif piece:
                out.append(memoryview(piece))
        while out:
            first = out[0]
            if isinstance(first, PipeRun):
                count = first.conduit.send(self._number, more=len(out) > 1)
                first.length -= count
                if not first.length:
                    out.popleft()
            else:
                count = self._send_memory(first)
            if not count:
                break
            sent += count
        if not sent:
            return False
        free = self._device.sent(sent)
        self._share.moved_at = time.monotonic()
        if free:
            self._share.give(free)
            self._share.got_on_at = self._share.moved_at
        if not out:
            self._made = 0
        return True

    def _send_memory(self, first: memoryview) -> int:
        """The pieces in memory at the head of the queue, as far as the socket takes them."""
        out = self._out
        try:
            if len(out) == 1:
                count = left = self._socket.send(first)
            else:
                count = left = self._send_pieces()
        except BlockingIOError:
            return 0
        while left:
            piece = out[0]
            assert isinstance(piece, memoryview)
            if left < len(piece):
                out[0] = piece[left:]
                break
            left -= len(piece)
            out.popleft()
        return count

    def _send_pieces(self) -> int:
        pieces, flags = list[memoryview](), 0
        for piece in self._out:
            if isinstance(piece, PipeRun):
                flags = socket.MSG_MORE  # a header, to share a segment with its payload
                break
            if len(pieces) == SENT_PIECES_MAX:
                break
            pieces.append(piece)
        return self._socket.sendmsg(pieces, (), flags)

    # -- waiting ------------------------------------------------------------------------------------------------------

    def _is_in_the_way(self) -> bool:
        """Whether what it holds is the client's fault: it does not take what is there, or send what it promised."""
        self._is_stalled = False
        return bool(self._out or self._device.incoming)

    def _wait(self) -> bool:
        """Until something can be done. False where nothing can: the client has gone while nothing is wanted of it."""
        events = self._events | (select.POLLOUT if self._out else 0)
        if events != self._registered:
            self._poll.register(self._number, events)
            self._registered = events
        found = self._poll.poll(SERVED_STALL_SECONDS / SERVED_STALL_LOOKS * 1000 if self._is_short else None)
        if self._is_short and (now := time.monotonic()) - self._looked_at >= SERVED_STALL_SECONDS / SERVED_STALL_LOOKS:
            self._looked_at = now
            self._share.cut_stalled(now)
        return bool(events) or all(number != self._number for number, _ in found)


def _write_all(place: Place, data: bytearray) -> int:
    at, view = 0, memoryview(data)
    while at < len(data):
        at += os.pwrite(place.number, view[at:], place.offset + at)
    return at
