"""Connections that are cut from outside: both ends hear of it."""

from __future__ import annotations

import os
import socket

import pytest

from support import cutting

pytestmark = pytest.mark.skipif(not cutting.is_allowed(), reason="descriptors cannot be taken here")

NO_DESCRIPTOR = 1 << 20


def test_a_tcp_connection_is_reset() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
        listener.accept()[0] as server,
    ):
        found = cutting.connections(os.getpid())
        assert {client.fileno(), server.fileno()} <= set(found)
        assert listener.fileno() not in found
        assert cutting.cut(os.getpid(), server.fileno())
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_a_unix_connection_ends_at_both_ends() -> None:
    one, other = socket.socketpair()
    with one, other:
        assert cutting.cut(os.getpid(), one.fileno())
        assert one.recv(1) == other.recv(1) == b""


def test_what_is_gone_cannot_be_cut() -> None:
    assert not cutting.cut(os.getpid(), NO_DESCRIPTOR)


def test_connections_are_told_apart_by_their_inodes() -> None:
    before = cutting.inodes(os.getpid())
    one, other = socket.socketpair()
    with one, other:
        assert len(cutting.inodes(os.getpid()) - before) == 2
