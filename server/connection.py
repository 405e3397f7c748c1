"""One client: a thread that moves bytes between its socket and the listener, and then has them transmitted."""

from __future__ import annotations

import select
import socket
import threading
import time

from nbdshard.common import logs
from nbdshard.common.errors import BugError, NbdshardError
from nbdshard.common.limits import NEGOTIATION_SECONDS_MAX, SERVED_SOCKET_BYTES
from nbdshard.server.device import Device
from nbdshard.server.exports import Exports
from nbdshard.server.handling import NBD, Protocol
from nbdshard.server.listener import Listener
from nbdshard.server.parting import part
from nbdshard.server.transmission import Transmission
from nbdshard.server.wake import Wake, is_readable


class Connection:
    """A client's connection, from the greeting to its end. `serve` is its thread."""

    def __init__(self, sock: socket.socket, exports: Exports, client: str, protocol: Protocol = NBD) -> None:
        self.client = client
        self._protocol = protocol
        self._socket = sock
        self._exports = exports
        self._wake = Wake()
        self._is_leaving = threading.Event()
        self._out = b""  # of the negotiation, not sent yet

    def leave(self) -> None:
        """From any thread: finish what was asked, refuse the rest, and end."""
        self._is_leaving.set()
        self._wake.notify()

    def serve(self) -> None:
        """Until the connection ends. Never raises."""
        try:
            self._socket.setblocking(False)
            if self._socket.family == socket.AF_UNIX:  # TCP finds out itself how much it needs
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SERVED_SOCKET_BYTES)
            device = self._negotiate()
            if device is not None:
                self._transmit(device)
        except NbdshardError as error:
            logs.info(str(error))
            if isinstance(error, BugError):
                logs.error(f"internal error: {error}")
        except OSError as error:
            logs.info(f"{self.client}: {error.strerror or error}")
        except MemoryError:
            logs.warning(f"{self.client}: it is cut off: there is no memory for what it asks")
        except Exception as error:  # a bug, of an extension too: others are served all the same
            logs.error(f"internal error: {self.client}: {type(error).__name__}: {error}")
        finally:
            part(self._socket)

    def close(self) -> None:
        """After `serve` has returned."""
        self._wake.close()

    # -- the handshake ------------------------------------------------------------------------------------------------

    def _negotiate(self) -> Device | None:
        listener = Listener(self._exports, self.client, options=self._protocol.options)
        deadline = time.monotonic() + NEGOTIATION_SECONDS_MAX
        entered = None
        while True:
            self._out += b"".join(listener.data_to_send())
            self._send()
            if listener.done and not self._out:
                break
            if self._is_leaving.is_set():
                listener.shut_down()
                if not self._out and not is_readable(self._socket.fileno()):
                    return None
            is_wanted = not (listener.done or self._out)  # else answers to option after option would pile up
            if not self._wait(deadline, is_wanted=is_wanted):
                logs.info(f"{self.client}: it has not chosen an export within {NEGOTIATION_SECONDS_MAX:g} s")
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
        logs.info(f"{self.client}: serves {device.export.name!r}")
        transmission = Transmission(
            self._socket, device, self._exports, self._protocol.handlers, self._wake, self._is_leaving
        )
        failed = None
        try:
            transmission.run()
        except (NbdshardError, OSError) as error:
            failed = error.with_traceback(None)  # its frames hold what was to be sent
        finally:
            transmission.close()
        if failed is not None:
            raise failed

    # -- bytes --------------------------------------------------------------------------------------------------------

    def _wait(self, deadline: float, *, is_wanted: bool) -> bool:
        """Until something can be done; False where it was waited until `deadline` in vain."""
        poll = select.poll()
        events = (select.POLLIN if is_wanted else 0) | (select.POLLOUT if self._out else 0)
        if events:  # asked for nothing, it would still say, at once and for ever, that the client has gone
            poll.register(self._socket, events)
        poll.register(self._wake.number, select.POLLIN)
        found = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        self._wake.clear()
        return bool(found)

    def _send(self) -> None:
        try:
            self._out = self._out[self._socket.send(self._out) :] if self._out else b""
        except BlockingIOError:
            return

    def _receive(self, target: memoryview) -> int | None:
        """How many bytes came into `target`: 0 is the end of the stream, None that there are none yet."""
        try:
            return self._socket.recv_into(target)
        except BlockingIOError:
            return None
