"""What an option's error reply means to the caller: one clear line, sorted by what can be done about it."""

from __future__ import annotations

from nbdshard.common.errors import ConnectionLost, NbdshardError, ProtocolError, UserError
from nbdshard.common.nbd.constants import (
    OPTION_REPLY_SENTENCES,
    Option,
    OptionReply,
    option_name,
    option_reply_name,
)
from nbdshard.common.nbd.options import Wishes

_ADVICE = {
    OptionReply.ERR_TLS_REQD: "nbdshard does not support TLS yet",
    OptionReply.ERR_BLOCK_SIZE_REQD: "nbdshard asks for them, so the server contradicts itself",
    OptionReply.ERR_EXT_HEADER_REQD: "it did not offer them when it was asked",
    OptionReply.ERR_POLICY: "ask who runs the server",
}


def refusal(peer: str, option: int, reply: int, message: str, wishes: Wishes) -> NbdshardError:
    """The error for `reply` to `option`; `message` is the server's own text, bounded and printable, or ""."""
    told = f" (it says: {message})" if message else ""
    if reply == OptionReply.ERR_SHUTDOWN:
        return ConnectionLost(peer, f"negotiating {option_name(option)}", f"the server is being shut down{told}")
    if reply == OptionReply.ERR_UNKNOWN:
        return UserError(f"no such export: {named(wishes.export_name)}{told}", peer, _LIST_ADVICE)
    if reply == OptionReply.ERR_UNSUP and option == Option.LIST:
        return UserError(f"the server does not list its exports{told}", peer)
    sentence = OPTION_REPLY_SENTENCES.get(reply)
    if sentence is None:
        what = f"it refuses with an error this program does not know, {option_reply_name(reply)}{told}"
        return ProtocolError(peer, f"{option_name(option)} reply", what)
    what = f"{option_name(option)} was refused: {sentence}{told}"
    return UserError(what, peer, _ADVICE.get(OptionReply(reply), ""))


_LIST_ADVICE = "`nbdshard info --list` names a server's exports"


def named(export_name: str) -> str:
    """The export's name in a sentence; the empty one is the default export."""
    return repr(export_name) if export_name else "'' (the default export)"
