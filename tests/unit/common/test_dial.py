"""common/dial.py, on sockets of this machine."""

from __future__ import annotations

import contextlib
import pickle
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdshard.common.dial import Unreachable, dial, dial_addresses, resolve
from nbdshard.common.errors import TimedOut
from nbdshard.common.nbd.uri import NbdUri
from support.waiting import WAIT_SECONDS


@contextlib.contextmanager
def tcp_listener(backlog: int = 5) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0), backlog=backlog) as server:
        yield server.getsockname()[1]


def closed_port() -> int:
    with tcp_listener() as port:
        return port


def tcp(port: int, host: str = "127.0.0.1") -> NbdUri:
    return NbdUri("tcp", host=host, port=port)


def unix(path: Path) -> NbdUri:
    return NbdUri("unix", socket=str(path))


def test_a_tcp_connection_blocks_and_does_not_delay_small_requests() -> None:
    with tcp_listener() as port, dial(tcp(port), "peer") as connection:
        assert connection.gettimeout() is None
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_unix_connection_blocks_without_a_time(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        with dial(unix(tmp_path / "s"), "peer") as connection:
            assert connection.gettimeout() is None
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16) == bytes(16)


def test_a_refused_connection_is_said_in_one_line() -> None:
    with pytest.raises(Unreachable) as caught:
        dial(tcp(closed_port()), "nbd://127.0.0.1:1")
    assert str(caught.value) == "nbd://127.0.0.1:1: connection refused: nobody listens there"


def test_a_missing_socket_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unreachable) as caught:
        dial(unix(tmp_path / "none"), "peer")
    assert str(caught.value) == f"peer: there is no socket {tmp_path}/none"


def test_a_socket_that_outlived_its_server_is_named(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
    with pytest.raises(Unreachable) as caught:
        dial(unix(tmp_path / "s"), "peer")
    assert str(caught.value) == f"peer: nobody listens on the socket {tmp_path}/s"


def test_a_path_that_is_too_long_or_no_socket_is_an_error_not_a_crash(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="path too long"):
        dial(unix(tmp_path / ("x" * 120)), "peer")
    (tmp_path / "file").touch()
    with pytest.raises(Unreachable, match="nobody listens on the socket"):
        dial(unix(tmp_path / "file"), "peer")


def test_a_name_that_does_not_resolve_is_named() -> None:
    with pytest.raises(Unreachable, match=r"^peer: the host name 'nosuch\.invalid' does not resolve: "):
        dial(tcp(1, "nosuch.invalid"), "peer")


def test_a_name_that_is_no_name_is_named() -> None:
    with pytest.raises(Unreachable, match="does not resolve: "):
        dial(tcp(1, "x" * 70 + ".invalid"), "peer")


def test_addresses_are_tried_in_order_until_one_answers() -> None:
    with tcp_listener() as port:
        addresses = [*resolve("127.0.0.1", closed_port(), "peer", 1), *resolve("127.0.0.1", port, "peer", 1)]
        with dial_addresses(addresses, "peer", 5) as connection:
            assert connection.getpeername()[1] == port


def test_a_tcp_server_that_does_not_accept_times_out() -> None:
    with tcp_listener(backlog=0) as port, dial(tcp(port), "peer"):
        start = time.monotonic()
        with pytest.raises(TimedOut) as caught:
            dial(tcp(port), "peer", 0.2)
        assert str(caught.value) == "peer: timed out while connecting: no answer within 0.2 s"
        assert 0.15 < time.monotonic() - start < WAIT_SECONDS


def test_a_unix_server_that_does_not_accept_times_out_and_not_before(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen(0)
        with dial(unix(tmp_path / "s"), "peer"):
            start = time.monotonic()
            with pytest.raises(TimedOut, match="timed out while connecting"):
                dial(unix(tmp_path / "s"), "peer", 0.2)
            assert 0.15 < time.monotonic() - start < WAIT_SECONDS


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(Unreachable("peer", "connection refused")))
    assert (str(error), error.cause) == ("peer: connection refused", "connection refused")
