"""Addresses of the control channel."""

from __future__ import annotations

import pytest

from nbdshard.common.control_url import ControlUrl, parse_control_url, unmapped
from nbdshard.common.errors import UserError


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("tcp://127.0.0.1:5555", ControlUrl("tcp", "127.0.0.1", 5555)),
        ("tcp://host.example:0", ControlUrl("tcp", "host.example", 0)),
        ("tcp://[::1]:80", ControlUrl("tcp", "::1", 80)),
        ("tcp://*:5555", ControlUrl("tcp", "*", 5555)),
        ("ipc:///run/x.sock", ControlUrl("ipc", path="/run/x.sock")),
    ],
)
def test_an_address_is_read_and_written_back(text: str, url: ControlUrl) -> None:
    assert parse_control_url(text) == url
    assert str(url) == text


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "not an address of the control channel"),
        ("host:5555", "not an address of the control channel"),
        ("udp://host:5555", "not an address of the control channel"),
        ("inproc://x", "not an address of the control channel"),
        ("tcp://host", "not of the form tcp://host:port"),
        ("tcp://host:", "not of the form tcp://host:port"),
        ("tcp://host:port", "not of the form tcp://host:port"),
        ("tcp://::1:5555", "not of the form tcp://host:port"),
        ("tcp://a b:5555", "not of the form tcp://host:port"),
        ("tcp://host:5555/path", "not of the form tcp://host:port"),
        ("tcp://host:65536", "a port is at most 65535"),
        ("ipc://relative", "the path of an ipc address is absolute"),
        ("ipc://@abstract", "the path of an ipc address is absolute"),
        ("ipc:///" + "x" * 107, "a unix socket's path has at most 107 bytes"),
    ],
)
def test_what_is_no_address_is_refused_with_its_reason(text: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        parse_control_url(text)


@pytest.mark.parametrize(
    "text",
    ["ipc:///run/x", "tcp://127.0.0.1:1", "tcp://127.9.9.9:1", "tcp://[::1]:1", "tcp://localhost:1", "tcp://127.1:1"],
)
def test_loopback_and_unix_sockets_are_private(text: str) -> None:
    assert parse_control_url(text).is_private()


@pytest.mark.parametrize("text", ["tcp://*:1", "tcp://0.0.0.0:1", "tcp://[::]:1", "tcp://192.0.2.1:1", "tcp://eth0:1"])
def test_what_others_can_reach_is_not_private(text: str) -> None:
    assert not parse_control_url(text).is_private()


def test_zeromqs_spelling_of_ipv4_is_made_readable() -> None:
    assert unmapped("tcp://[::ffff:10.0.0.1]:5555") == "tcp://10.0.0.1:5555"
    assert unmapped("tcp://[::]:5555") == "tcp://[::]:5555"
