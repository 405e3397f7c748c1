"""One client: a thread that moves bytes between its socket, the listener and then the device. It decides nothing.

Requests are carried out by the connection's own few threads, side by side, so that answers go out as they are ready.
The device lives here alone: the others hand over what it is to say, and wake this thread.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from nbdshard.common import logs
from nbdshard.common.errors import BugError, NbdshardError
from nbdshard.common.limits import NEGOTIATION_SECONDS_MAX, SENT_PIECES_MAX, SERVED_AT_ONCE
from nbdshard.common.nbd.payload import Piece, in_memory
from nbdshard.server.backends.base import Backend
from nbdshard.server.device import Device
from nbdshard.server.exports import Exports
from nbdshard.server.handling import NBD, Answer, Protocol, handle
from nbdshard.server.listener import Listener
from nbdshard.server.parting import part
from nbdshard.server.serving import Request

_READABLE: Final = select.POLLIN | select.POLLHUP | select.POLLERR


class Connection:
    """A client's connection, from the greeting to its end. `serve` is its thread."""

    def __init__(self, sock: socket.socket, exports: Exports, client: str, protocol: Protocol = NBD) -> None:
        self.client = client
        self._protocol = protocol
        self._socket = sock
        self._exports = exports
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._answers: deque[Answer] = deque()  # of other threads; appending and popping are atomic
        self._is_leaving = threading.Event()
        self._out: deque[memoryview] = deque()
        self._device: Device | None = None

    def leave(self) -> None:
        """From any thread: finish what was asked, refuse the rest, and end."""
        self._is_leaving.set()
        self._notify()

    def serve(self) -> None:
        """Until the connection ends. Never raises."""
        try:
            self._socket.setblocking(False)
            device = self._negotiate()
            if device is not None:
                self._transmit(device)
        except NbdshardError as error:
            logs.info(str(error))
            if isinstance(error, BugError):
                logs.error(f"internal error: {error}")
        except OSError as error:
            logs.info(f"{self.client}: {error.strerror or error}")
        finally:
            part(self._socket)

    def close(self) -> None:
        """After `serve` has returned."""
        os.close(self._wake)

    # -- the handshake ------------------------------------------------------------------------------------------------

    def _negotiate(self) -> Device | None:
        listener = Listener(self._exports, self.client, options=self._protocol.options)
        deadline = time.monotonic() + NEGOTIATION_SECONDS_MAX
        entered = None
        while True:
            self._queue(listener.data_to_send())
            self._send()
            if listener.done and not self._out:
                break
            is_wanted = not (listener.done or self._out)  # else answers to option after option would pile up
            if not self._wait(deadline, is_wanted=is_wanted):
                logs.info(f"{self.client}: it has not chosen an export within {NEGOTIATION_SECONDS_MAX:g} s")
                return None
            if self._is_leaving.is_set():
                listener.shut_down()
                if not self._out and not self._has_come():
                    return None
            if not is_wanted:
                continue
            count = self._receive(listener.receive_target())
            if count == 0:
                listener.end_of_stream()
                return None
            if count is not None and (events := listener.received(count)):
                entered = events[0]
        if entered is None:
            return None
        return Device(entered.export, self.client, commands=self._protocol.commands)

    # -- the transmission phase ---------------------------------------------------------------------------------------

    def _transmit(self, device: Device) -> None:
        backend = self._exports.backend(device.export.name)
        logs.info(f"{self.client}: serves {device.export.name!r}")
        with ThreadPoolExecutor(SERVED_AT_ONCE) as pool:

            def begin(requests: Sequence[Request]) -> None:
                for request in requests:
                    pool.submit(self._carry_out, backend, request)

            while not device.finished:
                while self._answers:
                    self._answers.popleft()(device)
                if self._is_leaving.is_set():
                    device.shut_down()
                begin(device.resume())
                self._queue(device.data_to_send())
                device_sent = self._send()
                if device_sent:
                    device.sent(device_sent)
                    continue
                if self._is_leaving.is_set() and not device.under_way and not self._out and not self._has_come():
                    return  # only now: what was just answered has left too, and what had come is refused
                target = device.receive_target()
                if device.finished:
                    return
                self._wait(None, is_wanted=bool(target))
                if target and (count := self._receive(target)) is not None:
                    if count == 0:
                        device.end_of_stream()
                        return
                    begin(device.received(count))

    def _carry_out(self, backend: Backend, request: Request) -> None:
        self._answers.append(handle(backend, request, self._protocol.handlers))
        self._notify()

    # -- bytes --------------------------------------------------------------------------------------------------------

    def _notify(self) -> None:
        os.eventfd_write(self._wake, 1)

    def _wait(self, deadline: float | None, *, is_wanted: bool) -> bool:
        """Until something can be done; False where it was waited until `deadline` in vain."""
        poll = select.poll()
        events = (select.POLLIN if is_wanted else 0) | (select.POLLOUT if self._out else 0)
        if events:  # asked for nothing, it would still say, at once and for ever, that the client has gone
            poll.register(self._socket, events)
        poll.register(self._wake, select.POLLIN)
        found = poll.poll(None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000)
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            pass
        return bool(found)

    def _has_come(self) -> bool:
        """Whether there is something to be read, and be it the end."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def _queue(self, pieces: Sequence[Piece]) -> None:
        self._out += [memoryview(piece) for piece in in_memory(pieces)]

    def _send(self) -> int:
        """What the socket takes of what is queued, in bytes."""
        sent = 0
        while self._out:
            try:
                count = self._socket.sendmsg([self._out[at] for at in range(min(len(self._out), SENT_PIECES_MAX))])
            except BlockingIOError:
                break
            sent += count
            while count and self._out:
                first = self._out[0]
                if count < len(first):
                    self._out[0] = first[count:]
                    break
                count -= len(first)
                self._out.popleft()
        return sent

    def _receive(self, target: memoryview) -> int | None:
        """How many bytes came into `target`: 0 is the end of the stream, None that there are none yet."""
        try:
            return self._socket.recv_into(target)
        except BlockingIOError:
            return None
