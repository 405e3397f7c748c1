"""A session: one client from the greeting to its end, a listener and then a device in one machine. Sans I/O.

The caller's duties, until `finished`::

    send everything data_to_send() yields, in order, and report it with sent(count)
    receive into receive_target() while it is not empty, and report it with received(count), or end_of_stream()
    answer each request that received() and resume() return, once, in any order, by calls of `device`

`received` and `end_of_stream` raise ProtocolError and ConnectionLost: the connection is to be closed then.
"""

from __future__ import annotations

from collections.abc import Sequence

from nbdshard.common.nbd.commands import COMMANDS, CommandTable
from nbdshard.common.nbd.payload import Piece
from nbdshard.server.device import Device
from nbdshard.server.haggling import SERVED_OPTIONS, OptionTable
from nbdshard.server.listener import Listener
from nbdshard.server.offers import Offers
from nbdshard.server.serving import Request


class Session:
    """Serves `offers` to `client` (its printable name, for errors). `device`: once the client has chosen an export."""

    def __init__(
        self,
        offers: Offers,
        client: str,
        *,
        options: OptionTable = SERVED_OPTIONS,
        commands: CommandTable = COMMANDS,
    ) -> None:
        self.device: Device | None = None
        self._listener = Listener(offers, client, options=options)
        self._commands = commands
        self._haggled: list[bytes] = self._listener.data_to_send()
        self._unsent = sum(map(len, self._haggled))  # bytes of the negotiation, which go first

    def receive_target(self) -> memoryview:
        """Where the next bytes go. Empty while none are wanted."""
        return (self._listener if self.device is None else self.device).receive_target()

    def received(self, count: int) -> Sequence[Request]:
        """`count` bytes have come into the last `receive_target()`: the requests that are whole now."""
        if self.device is not None:
            return self.device.received(count)
        for entered in self._listener.received(count):
            self.device = Device(entered.export, self._listener.client, commands=self._commands)
        said = self._listener.data_to_send()
        self._haggled += said
        self._unsent += sum(map(len, said))
        return ()

    def resume(self) -> Sequence[Request]:
        """Requests that had come while too much was under way. To be called when something was answered and sent."""
        return () if self.device is None else self.device.resume()

    def end_of_stream(self) -> None:
        """The client closed the connection."""
        (self._listener if self.device is None else self.device).end_of_stream()

    def data_to_send(self) -> list[Piece]:
        """What is queued and not handed out yet, in order."""
        pieces: list[Piece] = [*self._haggled]
        self._haggled = []
        if self.device is not None:
            pieces += self.device.data_to_send()
        return pieces

    def sent(self, count: int) -> None:
        """`count` more of the bytes handed out have left."""
        haggled = min(count, self._unsent)
        self._unsent -= haggled
        if self.device is not None and count > haggled:
            self.device.sent(count - haggled)

    def shut_down(self) -> None:
        """Refuse what is asked from now on; what was asked before is still to be answered."""
        (self._listener if self.device is None else self.device).shut_down()

    @property
    def finished(self) -> bool:
        """Nothing is left to be answered or sent, and the client wants nothing more: close the connection."""
        if self.device is not None:
            return self.device.finished
        return self._listener.done and not self._unsent
