"""The connecter: negotiates one connection from the greeting to the transmission phase. Sans I/O, client side.

The caller's duties, in a loop until `done`::

    send everything data_to_send() yields          (after construction and after every other call)
    receive at most len(receive_target()) bytes into receive_target()
    events = received(count)                       (or end_of_stream() where the count is 0)

Every error is raised; after a ProtocolError the machine is FAILED, after a UserError it has an ABORT to send,
which is polite and may be left out. It never asks for a byte of the transmission phase.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NoReturn

import msgspec

from nbdshard.common.errors import (
    BugError,
    ConnectionLost,
    IllegalEvent,
    NbdshardError,
    ProtocolError,
    UserError,
)
from nbdshard.common.limits import (
    CONTEXTS_MAX,
    ERROR_MESSAGE_BYTES_MAX,
    EXPORT_NAME_BYTES_MAX,
    OPTION_BYTES_MAX,
    OPTION_REPLY_BYTES_MAX,
)
from nbdshard.common.nbd import wire_options as wire
from nbdshard.common.nbd.constants import (
    EXPORT_NAME_RESERVED_BYTES,
    GREETING_MAGIC,
    OLDSTYLE_MAGIC,
    OPTION_MAGIC,
    ClientFlag,
    Command,
    HandshakeFlag,
    Option,
    OptionReply,
    is_option_error,
    option_name,
    option_reply_name,
)
from nbdshard.common.nbd.export import Export
from nbdshard.common.nbd.options import (
    FINAL_REFUSALS,
    OPTIONS,
    Goal,
    Negotiation,
    OptionTable,
    Outcome,
    Wishes,
    wanted_options,
)
from nbdshard.common.nbd.refusals import named, refusal
from nbdshard.common.nbd.states import CONNECTER_STATES, ConnecterState, advance
from nbdshard.common.nbd.wire import Malformed, Request, pack_request

__all__ = ["Connecter", "Event", "Goal", "Listed", "Negotiated", "Wishes"]

_State = ConnecterState
_MAGIC_BYTES: Final = 8
_OPTION_MASK: Final = 0xFFFFFFFF  # of a key
_DONE: Final = frozenset({_State.HAGGLED, _State.NEGOTIATED, _State.ABORTING, _State.PARTED})


class Negotiated(msgspec.Struct, frozen=True):
    """The export is known; with Goal.GO the transmission phase has begun."""

    export: Export


class Listed(msgspec.Struct, frozen=True):
    """The server's exports: (name, description), printable, in its order."""

    exports: list[tuple[str, str]]


Event = Negotiated | Listed


class Connecter:
    """Negotiates with `peer` (its printable name, for errors) until `wishes` are met or an error is raised."""

    def __init__(self, wishes: Wishes, peer: str, *, options: OptionTable = OPTIONS) -> None:
        check_wishes(wishes)
        self.peer = peer
        self.state = _State.GREETING
        self.negotiation = Negotiation(wishes)
        self._options = options
        self._sent: list[int] = []  # keys of the options sent so far; the last one is the one under way
        self._abort_wanted = False
        self._no_zeroes = False
        self._out: list[bytes] = []
        self._header = wire.OptionReplyHeader(0, 0, 0)
        self._replies = 0  # to the option under way
        self._reply_bytes = 0
        self._buffer = bytearray()
        self._filled = 0
        self._want(wire.GREETING.size)

    # -- the caller's side --------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Nothing is left to be negotiated: the result was reported, or the negotiation was given up."""
        return self.state in _DONE

    def data_to_send(self) -> list[bytes]:
        """What must be sent now, in order; it is handed out once."""
        out, self._out = self._out, []
        return out

    def receive_target(self) -> memoryview:
        """Where the next bytes go; its length is how many are wanted. Empty when none are."""
        if self.state not in _HANDLERS:
            return memoryview(b"")
        return memoryview(self._buffer)[self._filled :]

    def received(self, count: int) -> list[Event]:
        """`count` bytes have come into the last `receive_target()`."""
        if self.state not in _HANDLERS:
            raise IllegalEvent("connecter", self.state.name, "received", CONNECTER_STATES[self.state].sentence)
        if not 0 < count <= len(self._buffer) - self._filled:
            raise BugError(f"{count} bytes received where {len(self._buffer) - self._filled} were wanted")
        self._filled += count
        if self.state is _State.GREETING:
            self._check_magic()
        events: list[Event] = []
        if self._filled == len(self._buffer):
            _HANDLERS[self.state](self, events)
        return events

    def end_of_stream(self) -> None:
        """The peer closed the connection. Returns where that is a proper end, else raises ConnectionLost."""
        state = self.state
        if state in _DONE:
            if state is not _State.PARTED:
                self._go(_State.PARTED)
            return
        if state is _State.FAILED:
            raise IllegalEvent("connecter", state.name, "end_of_stream", CONNECTER_STATES[state].sentence)
        self._fail()
        if state is _State.GREETING:
            raise ConnectionLost(self.peer, "waiting for the greeting", "the server closed the connection")
        cause = "the server closed the connection"
        if state is _State.EXPORT_NAME_REPLY:
            cause += f", which is how an old server refuses an export: {named(self._export_name)}"
        raise ConnectionLost(self.peer, f"waiting for the reply to {option_name(self._under_way)}", cause)

    def abort(self) -> None:
        """Part softly: an ABORT is queued as soon as the protocol allows one (DISC in the transmission phase)."""
        if self._abort_wanted or self.state in (_State.ABORTING, _State.PARTED, _State.FAILED):
            return
        self._abort_wanted = True
        if self.state is _State.HAGGLED:
            self._send_abort()
        elif self.state is _State.NEGOTIATED:
            self._disconnect()

    # -- the greeting -------------------------------------------------------------------------------------------------

    def _check_magic(self) -> None:
        """As soon as 8 bytes tell it, whatever else does not come: a peer that speaks something else."""
        magic = bytes(self._buffer[:_MAGIC_BYTES])
        if self._filled >= _MAGIC_BYTES and magic != GREETING_MAGIC.to_bytes(_MAGIC_BYTES, "big"):
            self._blame(f"not an NBD server (it sent {wire.printable(magic)!r})")
        second = bytes(self._buffer[_MAGIC_BYTES : 2 * _MAGIC_BYTES])
        if self._filled >= 2 * _MAGIC_BYTES and second != OPTION_MAGIC.to_bytes(_MAGIC_BYTES, "big"):
            if second == OLDSTYLE_MAGIC.to_bytes(_MAGIC_BYTES, "big"):
                self._blame("an oldstyle NBD server, which nbdshard does not support")
            self._blame(f"not an NBD server (its second magic number is 0x{second.hex()})")

    def _greeted(self, events: list[Event]) -> None:
        del events  # nothing is known yet
        _, _, flags = wire.GREETING.unpack(self._buffer)
        answer = ClientFlag(0)
        if flags & HandshakeFlag.NO_ZEROES:
            answer |= ClientFlag.NO_ZEROES
            self._no_zeroes = True
        if flags & HandshakeFlag.FIXED_NEWSTYLE:
            answer |= ClientFlag.FIXED_NEWSTYLE
        self._out.append(wire.pack_client_flags(answer))
        if flags & HandshakeFlag.FIXED_NEWSTYLE:
            self._send_next()
        elif self._abort_wanted:
            self._go(_State.PARTED)  # such a server knows no ABORT
        elif self.negotiation.wishes.goal is Goal.LIST:
            self._go(_State.PARTED)
            raise UserError("the server is too old to list its exports (no fixed newstyle)", self.peer)
        else:
            self._send_export_name()

    # -- options ------------------------------------------------------------------------------------------------------

    @property
    def _under_way(self) -> int:
        return self._sent[-1] & _OPTION_MASK

    @property
    def _export_name(self) -> str:
        return self.negotiation.wishes.export_name

    def _send_next(self) -> None:
        if self._abort_wanted:
            self._send_abort()
            return
        option = wanted_options(self._options, self.negotiation, self._sent)
        if option is None:
            raise BugError(f"no option of the table leads to {self.negotiation.wishes.goal}")
        self._send(option, self._options[option].data(self.negotiation))
        self._await_reply(_State.REPLY_HEADER)

    def _send(self, key: int, data: bytes = b"") -> None:
        self._sent.append(key)
        self._replies = self._reply_bytes = 0
        self._out.append(wire.pack_option(self._under_way, data))

    def _send_abort(self) -> None:
        self._send(Option.ABORT)
        self._await_reply(_State.ABORTING)

    def _send_export_name(self) -> None:
        """The way into the transmission phase before GO was invented. An error can only be the end of the stream."""
        if self.negotiation.extended:
            # "MUST NOT be used by a client that has negotiated extended headers"
            self._blame("extended headers were agreed on, but NBD_OPT_GO is not supported")
        self._send(Option.EXPORT_NAME, self._export_name.encode())
        self._go(_State.EXPORT_NAME_REPLY)
        self._want(wire.EXPORT_NAME_REPLY.size + (0 if self._no_zeroes else EXPORT_NAME_RESERVED_BYTES))

    def _await_reply(self, state: _State) -> None:
        self._go(state)
        self._want(wire.OPTION_REPLY.size)

    def _reply_header(self, events: list[Event]) -> None:
        """The header of a reply has come: to the option under way, and of a length that is believable."""
        option = self._under_way
        try:
            header = wire.unpack_option_reply(self._buffer)
        except Malformed as error:
            self._blame(str(error))
        if header.option != option:
            self._blame(f"a reply to {option_name(header.option)}, {option_name(option)} was asked")
        if header.length > OPTION_REPLY_BYTES_MAX:
            self._blame(f"a reply of {header.length} bytes, at most {OPTION_REPLY_BYTES_MAX} are believed")
        self._replies += 1
        self._reply_bytes += header.length
        replies_max = self._options[self._sent[-1]].replies_max
        if self._replies > replies_max or self._reply_bytes > OPTION_BYTES_MAX:
            self._blame(f"no end of replies ({self._replies} so far, {self._reply_bytes} bytes)")
        self._header = header
        self._want(header.length)
        if header.length == 0:
            self._reply(events)
        else:
            self._go(_State.REPLY_PAYLOAD)

    def _reply(self, events: list[Event]) -> None:
        """A whole reply is there."""
        kind = self._header.type
        handler = self._options[self._sent[-1]]
        if is_option_error(kind):
            message = wire.printable(self._buffer, ERROR_MESSAGE_BYTES_MAX)
            outcome = Outcome.REFUSED if kind in FINAL_REFUSALS else handler.on_error(kind)
            if outcome is Outcome.REFUSED:
                self._refuse(refusal(self.peer, handler.option, kind, message, self.negotiation.wishes))
            self._follow(outcome, events)
            return
        try:
            if kind == OptionReply.ACK:
                if self._header.length:
                    raise Malformed(f"NBD_REP_ACK with {self._header.length} bytes of data")
                handler.acknowledged(self.negotiation)
            elif kind in handler.replies:
                handler.replies[kind](self.negotiation, memoryview(self._buffer))
            else:
                raise Malformed(f"{option_reply_name(kind)}, which is no answer to it")
        except Malformed as error:
            self._blame(str(error))
        if kind == OptionReply.ACK:
            self._follow(handler.on_ack, events)
        else:
            self._await_reply(_State.REPLY_HEADER)

    def _follow(self, outcome: Outcome, events: list[Event]) -> None:
        if outcome is Outcome.NEXT:
            self._send_next()
        elif outcome is Outcome.EXPORT_NAME:
            if self._abort_wanted:
                self._send_abort()
            else:
                self._send_export_name()
        elif outcome is Outcome.HAGGLED:
            self._report(events)
            self._go(_State.HAGGLED)
            if self._abort_wanted:
                self._send_abort()
        else:
            self._enter_transmission(events)

    def _abort_reply(self, events: list[Event]) -> None:
        """ACK or an error, it ends here: "clients SHOULD gracefully handle" whatever follows an ABORT."""
        del events
        self._go(_State.PARTED)

    # -- the end ------------------------------------------------------------------------------------------------------

    def _export_name_reply(self, events: list[Event]) -> None:
        try:
            self.negotiation.set_export(*wire.unpack_export_name_reply(self._buffer))
        except Malformed as error:
            self._blame(str(error))
        self._enter_transmission(events)

    def _enter_transmission(self, events: list[Event]) -> None:
        self._report(events)
        self._go(_State.NEGOTIATED)
        if self._abort_wanted:
            self._disconnect()

    def _report(self, events: list[Event]) -> None:
        if self.negotiation.wishes.goal is Goal.LIST:
            events.append(Listed(list(self.negotiation.exports)))
            return
        try:
            events.append(Negotiated(self.negotiation.export()))
        except Malformed as error:
            self._blame(str(error))

    def _disconnect(self) -> None:
        request = Request(0, Command.DISC, 0, 0, 0)
        self._out.append(pack_request(request, extended=self.negotiation.extended))
        self._go(_State.PARTED)

    def _refuse(self, error: NbdshardError) -> NoReturn:
        """The server will not have us, but the protocol is intact: an ABORT is owed, then raise `error`."""
        if isinstance(error, ProtocolError):
            self._fail()
        else:
            self._send_abort()
        raise error

    def _blame(self, what: str) -> NoReturn:
        stage = "greeting" if not self._sent else f"{option_name(self._under_way)} reply"
        self._fail()
        raise ProtocolError(self.peer, stage, what)

    def _fail(self) -> None:
        self._go(_State.FAILED)
        self._out.clear()

    def _go(self, state: _State) -> None:
        self.state = advance(CONNECTER_STATES, "connecter", self.state, state)

    def _want(self, size: int) -> None:
        self._buffer = bytearray(size)
        self._filled = 0


_HANDLERS: Final[Mapping[ConnecterState, Callable[[Connecter, list[Event]], None]]] = {
    _State.GREETING: Connecter._greeted,
    _State.REPLY_HEADER: Connecter._reply_header,
    _State.REPLY_PAYLOAD: Connecter._reply,
    _State.EXPORT_NAME_REPLY: Connecter._export_name_reply,
    _State.ABORTING: Connecter._abort_reply,
}


def check_wishes(wishes: Wishes) -> None:
    """Raises UserError where the export name cannot be sent, BugError where the contexts cannot."""
    name = wishes.export_name
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise UserError(f"the export name {name!r} is no valid Unicode") from None
    if size > EXPORT_NAME_BYTES_MAX:
        raise UserError(f"an export name of {size} bytes; the protocol allows {EXPORT_NAME_BYTES_MAX}")
    if "\0" in name:
        raise UserError(f"the export name {name!r} contains a NUL character")
    if len(wishes.contexts) > CONTEXTS_MAX or len(set(wishes.contexts)) != len(wishes.contexts):
        raise BugError(f"{len(wishes.contexts)} metadata contexts, some twice, or more than {CONTEXTS_MAX}")
