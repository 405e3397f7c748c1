"""Clients by the byte: what they send, packed, and where they connect."""

from __future__ import annotations

import socket

from nbdshard.common.nbd.connecter import Wishes
from nbdshard.common.nbd.constants import Option
from nbdshard.common.nbd.wire import Request, pack_request
from nbdshard.common.nbd.wire_options import pack_info_request, pack_option
from support.nbd_blocking import SECONDS, negotiate
from support.served import NAME, Served

PLAIN = Wishes(NAME, extended=False)
OLD = Wishes(NAME, structured=False)
FIXED = b"\0\0\0\3"  # flags
GO = FIXED + pack_option(Option.GO, pack_info_request(NAME, []))


def asked(command: int, offset: int = 0, length: int = 0, flags: int = 0, cookie: int = 1) -> bytes:
    return pack_request(Request(flags, command, cookie, offset, length), extended=False)


def asked_widely(command: int, offset: int = 0, length: int = 0, flags: int = 0) -> bytes:
    return pack_request(Request(flags, command, 1, offset, length), extended=True)


def connected_by_tcp(served: Served, wishes: Wishes | None = None) -> socket.socket:
    """A connection, negotiated if there are wishes."""
    peer = socket.create_connection(served.address, SECONDS)
    if wishes is not None:
        negotiate(peer, wishes)
    return peer
