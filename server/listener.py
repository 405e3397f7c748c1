"""The listener: negotiates one connection from the greeting to the transmission phase. Sans I/O, server side.

The connecter's twin. The caller's duties, in a loop until `done`::

    send everything data_to_send() yields          (after construction and after every other call)
    receive at most len(receive_target()) bytes into receive_target()
    events = received(count)                       (or end_of_stream() where the count is 0)

A client that breaks the protocol makes `received` raise ProtocolError; the machine is FAILED then. Whatever else a
client asks for is answered, if only with a refusal. The caller bounds the time that all this may take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NoReturn

import msgspec

from nbdshard.common.errors import BugError, ConnectionLost, IllegalEvent, ProtocolError
from nbdshard.common.limits import (
    ERROR_MESSAGE_BYTES_MAX,
    EXPORT_NAME_BYTES_MAX,
    OPTION_DATA_BYTES_MAX,
    OPTION_DATA_BYTES_SKIPPED_MAX,
    OPTIONS_MAX,
)
from nbdshard.common.nbd import wire_options as wire
from nbdshard.common.nbd.constants import ClientFlag, HandshakeFlag, Option, OptionReply, option_name
from nbdshard.common.nbd.export import Export
from nbdshard.common.nbd.states import advance
from nbdshard.common.nbd.wire import Malformed
from nbdshard.server.haggling import SERVED_OPTIONS, Haggling, OptionTable, Refusal, Then, told_flags
from nbdshard.server.offers import Offers
from nbdshard.server.states import LISTENER_STATES, ListenerState

_State = ListenerState
_DONE: Final = frozenset({_State.ENTERED, _State.PARTED, _State.FAILED})
_FLAGS_KNOWN: Final = int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES)


class Entered(msgspec.Struct, frozen=True):
    """The client has chosen: the transmission phase has begun."""

    export: Export


class Listener:
    """Negotiates with `client` (its printable name, for errors) about `offers`."""

    def __init__(self, offers: Offers, client: str, *, options: OptionTable = SERVED_OPTIONS) -> None:
        self.client = client
        self.state = _State.CLIENT_FLAGS
        self.haggling = Haggling(offers)
        self._options = options
        self._out = [wire.pack_greeting(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)]
        self._option = 0
        self._is_shutting_down = False
        self._seen = 0  # options
        self._skip = 0  # bytes of the option's data that are still to be dropped
        self._buffer = bytearray()
        self._filled = 0
        self._want(wire.CLIENT_FLAGS.size)

    # -- the caller's side --------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Nothing is left to be negotiated. What is queued is still to be sent."""
        return self.state in _DONE

    def data_to_send(self) -> list[bytes]:
        """What must be sent now, in order; it is handed out once."""
        out, self._out = self._out, []
        return out

    def receive_target(self) -> memoryview:
        """Where the next bytes go; its length is how many are wanted. Empty when none are."""
        if self.state in _DONE:
            return memoryview(b"")
        return memoryview(self._buffer)[self._filled :]

    def received(self, count: int) -> list[Entered]:
        """`count` bytes have come into the last `receive_target()`. Raises ProtocolError."""
        if self.state in _DONE:
            raise IllegalEvent("listener", self.state.name, "received", LISTENER_STATES[self.state].sentence)
        if not 0 < count <= len(self._buffer) - self._filled:
            raise BugError(f"{count} bytes received where {len(self._buffer) - self._filled} were wanted")
        self._filled += count
        if self._filled < len(self._buffer):
            return []
        _HANDLERS[self.state](self)
        if self.state is _State.ENTERED:
            return [Entered(self.haggling.export())]
        return []

    def end_of_stream(self) -> None:
        """The client closed the connection. Raises ConnectionLost where it was in the middle of something."""
        if self.state in _DONE:
            return
        state, is_between = self.state, not self._filled
        self._go(_State.PARTED)
        if state is _State.OPTION_HEADER and is_between:
            return  # a client may leave between two options, if not politely
        if state is _State.CLIENT_FLAGS and is_between:
            return  # it only looked whether somebody is there
        doing = "waiting for its flags" if state is _State.CLIENT_FLAGS else "waiting for an option"
        raise ConnectionLost(self.client, doing, "the client closed the connection")

    def shut_down(self) -> None:
        """Answer ERR_SHUTDOWN to whatever is asked from now on: "unwilling to continue negotiation"."""
        self._is_shutting_down = True

    # -- the client's flags -------------------------------------------------------------------------------------------

    def _flags(self) -> None:
        (flags,) = wire.CLIENT_FLAGS.unpack(self._buffer)
        if flags & ~_FLAGS_KNOWN:
            self._blame("client flags", f"flags {flags:#x}, of which {flags & ~_FLAGS_KNOWN:#x} are unknown")
        self.haggling.is_fixed = bool(flags & ClientFlag.FIXED_NEWSTYLE)
        self.haggling.no_zeroes = bool(flags & ClientFlag.NO_ZEROES)
        self._await_option()

    # -- options ------------------------------------------------------------------------------------------------------

    def _await_option(self) -> None:
        self._go(_State.OPTION_HEADER)
        self._want(wire.OPTION.size)

    def _header(self) -> None:
        try:
            self._option, length = wire.unpack_option(self._buffer)
        except Malformed as error:
            self._blame("option header", str(error))
        self._seen += 1
        if self._seen > OPTIONS_MAX:
            self._blame("option header", f"no end of options ({self._seen} so far)")
        if length > OPTION_DATA_BYTES_SKIPPED_MAX:
            self._blame(option_name(self._option), f"{length} bytes of data")
        if length > OPTION_DATA_BYTES_MAX:
            self._skip = length
            self._go(_State.SKIPPING)
            self._want(min(self._skip, OPTION_DATA_BYTES_MAX))
        elif length:
            self._go(_State.OPTION_DATA)
            self._want(length)
        else:
            self._want(0)
            self._answer()

    def _skipped(self) -> None:
        self._skip -= len(self._buffer)
        if self._skip:
            self._want(min(self._skip, OPTION_DATA_BYTES_MAX))
            return
        if self._option == Option.EXPORT_NAME:
            self._go(_State.PARTED)  # "the server should close the TCP connection": it has no other refusal
            return
        self._reply(OptionReply.ERR_TOO_BIG, f"at most {OPTION_DATA_BYTES_MAX} bytes of data are looked at".encode())
        self._await_option()

    def _answer(self) -> None:
        """A whole option is there."""
        if self._option == Option.EXPORT_NAME:
            self._export_name()
            return
        if not self.haggling.is_fixed:
            self._blame(option_name(self._option), "sent by a client that does not understand a refusal")
        entry = self._options.get(self._option)
        try:
            if self._is_shutting_down and self._option != Option.ABORT:
                raise Refusal(OptionReply.ERR_SHUTDOWN, "the server is shutting down")
            if entry is None:
                raise Refusal(OptionReply.ERR_UNSUP, "this server does not know it")
            replies = entry.answer(self.haggling, memoryview(self._buffer))
        except Refusal as refusal:
            self._reply(refusal.reply, refusal.sentence.encode()[:ERROR_MESSAGE_BYTES_MAX])
            self._await_option()
            return
        except Malformed as error:
            self._reply(OptionReply.ERR_INVALID, str(error).encode()[:ERROR_MESSAGE_BYTES_MAX])
            self._await_option()
            return
        for kind, payload in replies:
            self._reply(kind, payload)
        self._reply(OptionReply.ACK)
        if entry.then is Then.NEXT:
            self._await_option()
        else:
            self._go(_State.ENTERED if entry.then is Then.TRANSMISSION else _State.PARTED)

    def _export_name(self) -> None:
        """The way into the transmission phase before GO was invented."""
        haggling = self.haggling
        try:
            name = wire.text(memoryview(self._buffer)[: EXPORT_NAME_BYTES_MAX + 1], "an export name")
        except Malformed:
            self._go(_State.PARTED)
            return
        offer = haggling.offers.find(name)
        if haggling.extended:
            self._blame("NBD_OPT_EXPORT_NAME", "after extended headers were agreed on")
        if offer is None or self._is_shutting_down:
            self._go(_State.PARTED)
            return
        haggling.choose(offer, name)
        flags = told_flags(offer, haggling)
        self._out.append(wire.pack_export_name_reply(offer.size, flags, zeroes=not haggling.no_zeroes))
        self._go(_State.ENTERED)

    def _reply(self, kind: int, payload: bytes = b"") -> None:
        self._out.append(wire.pack_option_reply(self._option, kind, payload))

    # -- states -------------------------------------------------------------------------------------------------------

    def _blame(self, stage: str, what: str) -> NoReturn:
        self._go(_State.FAILED)
        raise ProtocolError(self.client, stage, what)

    def _go(self, state: _State) -> None:
        self.state = advance(LISTENER_STATES, "listener", self.state, state)

    def _want(self, size: int) -> None:
        self._buffer = bytearray(size)
        self._filled = 0


_HANDLERS: Final[Mapping[ListenerState, Callable[[Listener], None]]] = {
    _State.CLIENT_FLAGS: Listener._flags,
    _State.OPTION_HEADER: Listener._header,
    _State.OPTION_DATA: Listener._answer,
    _State.SKIPPING: Listener._skipped,
}
