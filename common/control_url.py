"""Where a coordinator listens and a worker connects: `ipc:///path/of/socket` or `tcp://host:port`."""

from __future__ import annotations

import re
import socket
from typing import Literal

import msgspec

from nbdshard.common.errors import UserError
from nbdshard.common.limits import UNIX_PATH_BYTES_MAX

_TCP = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^:\[\]/\s]+)):(?P<port>\d{1,5}|\*)")


class ControlUrl(msgspec.Struct, frozen=True):
    """An address of the control channel. TCP has `host` ("*": every interface) and `port` (0: any), ipc has
    `path`.
    """

    scheme: Literal["ipc", "tcp"]
    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.scheme == "ipc":
            return f"ipc://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"

    def is_private(self) -> bool:
        """Whether only this machine can reach it: a unix socket, or a host all of whose addresses are
        loopback.
        """
        return self.scheme == "ipc" or _is_loopback(self.host)


def parse_control_url(text: str) -> ControlUrl:
    """The address written in `text`. Raises UserError naming what is wrong with it."""
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in ("ipc", "tcp"):
        raise UserError("not an address of the control channel", text, "write tcp://host:port or ipc:///path")
    return _parse_ipc(text, rest) if scheme == "ipc" else _parse_tcp(text, rest)


def _parse_ipc(text: str, path: str) -> ControlUrl:
    if not path.startswith("/") or "\0" in path:
        raise UserError("the path of an ipc address is absolute", text, "write ipc:///path")
    if len(path.encode()) > UNIX_PATH_BYTES_MAX:
        raise UserError(f"a unix socket's path has at most {UNIX_PATH_BYTES_MAX} bytes", text)
    return ControlUrl("ipc", path=path)


def _parse_tcp(text: str, rest: str) -> ControlUrl:
    match = _TCP.fullmatch(rest)
    if match is None:
        raise UserError("not of the form tcp://host:port", text, "an IPv6 address stands in brackets")
    port = 0 if match["port"] == "*" else int(match["port"])
    if port > 65535:
        raise UserError("a port is at most 65535", text)
    return ControlUrl("tcp", host=match["six"] or match["host"], port=port)


def unmapped(endpoint: str) -> str:
    """ZeroMQ's own spelling of a bound endpoint with IPv4 addresses written as such."""
    return re.sub(r"\[::ffff:([0-9.]+)\]", r"\1", endpoint)


def _is_loopback(host: str) -> bool:
    import ipaddress  # 5 ms, and only a network's address needs it

    if host == "*":
        return False
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    addresses = [ipaddress.ip_address(str(sockaddr[0]).partition("%")[0]) for *_, sockaddr in found]
    return bool(addresses) and all(_loopback(address) for address in addresses)


def _loopback(address: object) -> bool:
    mapped = getattr(address, "ipv4_mapped", None)
    return bool(getattr(mapped or address, "is_loopback", False))
