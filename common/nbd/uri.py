"""NBD URIs (doc/uri.md of the NBD project, on top of RFC 3986), parsed strictly and without guessing.

::

    nbd://example.com:10809/export          nbd+unix:///export?socket=/run/nbd.sock
    nbd://[fe80::1%25eth0]/                 nbds://... and nbds+unix://... are refused: no TLS yet

Not with urllib's splitter: it silently drops tabs and newlines, and reads `+` as a space.
"""

from __future__ import annotations

import re
from ipaddress import AddressValueError, IPv6Address
from types import MappingProxyType
from typing import Final, Literal, NoReturn
from urllib.parse import quote, unquote_to_bytes

import msgspec

from nbdshard.common.errors import UserError
from nbdshard.common.limits import EXPORT_NAME_BYTES_MAX, UNIX_PATH_BYTES_MAX
from nbdshard.common.nbd.constants import PORT_DEFAULT

Transport = Literal["tcp", "unix", "vsock"]

_SCHEMES: Final = MappingProxyType[str, tuple[Transport, bool]](
    {
        "nbd": ("tcp", False),
        "nbds": ("tcp", True),
        "nbd+unix": ("unix", False),
        "nbds+unix": ("unix", True),
        "nbd+vsock": ("vsock", False),
        "nbds+vsock": ("vsock", True),
    }
)
_PORT_MAX: Final = 65535
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_BROKEN_PERCENT: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_NOT_IN_A_URI: Final = frozenset(' "<>\\^`{|}')
_NOT_IN_A_HOST: Final = re.compile(r"[\x00-\x20\x7f:/?#\[\]@%\\]")


class NbdUri(msgspec.Struct, frozen=True):
    """Where a server is, and which export of it is meant. `str()` gives a canonical URI back."""

    transport: Transport
    tls: bool = False
    host: str = ""  # tcp: a name or an address; an IPv6 address without brackets, its zone after a %
    port: int = PORT_DEFAULT
    socket: str | None = None  # unix: the path of the socket
    export_name: str = ""

    def __str__(self) -> str:
        scheme = next(name for name, meaning in _SCHEMES.items() if meaning == (self.transport, self.tls))
        path = "/" + quote(self.export_name, safe="/")
        if self.transport == "unix":
            return f"{scheme}://{path}?socket={quote(_to_bytes(self.socket or ''), safe='/')}"
        port = "" if self.port == PORT_DEFAULT else f":{self.port}"
        return f"{scheme}://{_host_in_uri(self.host)}{port}{path}"


def parse_uri(text: str) -> NbdUri:
    """The URI in `text`. Raises UserError that names what is wrong, and what to write instead."""
    _check_characters(text)
    match = _SCHEME.match(text)
    scheme = match[1] if match is not None else ""
    if scheme.lower() not in _SCHEMES:
        what = f"unknown scheme {scheme!r}" if scheme else "not a URI"
        raise UserError(what, text, "write nbd://HOST/EXPORT or nbd+unix:///EXPORT?socket=PATH")
    transport, tls = _SCHEMES[scheme.lower()]
    if tls:
        raise UserError(f"{scheme} asks for TLS, which nbdshard does not support yet", text)
    if transport == "vsock":
        raise UserError(f"{scheme} is not supported", text, "nbd:// and nbd+unix:// are")
    authority, path, query = _split(text, text[len(scheme) + 1 :])
    export_name = _export_name(text, path)
    parameters = _parameters(text, query, known={"socket"} if transport == "unix" else set())
    if transport == "unix":
        if authority:
            advice = f"write {scheme}:///EXPORT?socket=PATH, with three slashes"
            raise UserError(f"a host ({authority}) makes no sense with a unix socket", text, advice)
        return NbdUri("unix", socket=_socket(text, parameters), export_name=export_name)
    host, port = _authority(text, authority)
    return NbdUri("tcp", host=host, port=port, export_name=export_name)


def _check_characters(text: str) -> None:
    """Letters of other scripts are let through, though RFC 3986 wants them encoded; what one cannot see is not."""
    for character in text:
        if not character.isprintable() or character in _NOT_IN_A_URI:
            encoded = "".join(f"%{byte:02X}" for byte in _to_bytes(character))
            raise UserError(f"the character {character!r} in a URI", repr(text), f"write it as {encoded}")


def _split(text: str, rest: str) -> tuple[str, str, str]:
    """authority, path and query, still encoded."""
    broken = _BROKEN_PERCENT.search(text)
    if broken is not None:
        what = f"{text[broken.start() : broken.start() + 3]!r} is no percent-encoding"
        raise UserError(what, text, "write a percent sign itself as %25, also before the zone of an IPv6 address")
    if "#" in rest:
        raise UserError("an NBD URI has no fragment", text, "write # in a name as %23")
    if not rest.startswith("//"):
        raise UserError("no // after the scheme", text, "write nbd://HOST/EXPORT")
    rest, _, query = rest[2:].partition("?")
    authority, slash, path = rest.partition("/")
    return authority, slash + path, query


def _decode(text: str, encoded: str, what: str) -> str:
    """Percent-decoded; `+` stays itself. Bytes that are no UTF-8 and NUL are refused."""
    try:
        decoded = unquote_to_bytes(_to_bytes(encoded)).decode()
    except UnicodeDecodeError:
        raise UserError(f"the {what} is not UTF-8", text) from None
    if "\0" in decoded:
        raise UserError(f"the {what} contains a NUL character", text)
    return decoded


def _export_name(text: str, path: str) -> str:
    """ "The path part of the URI except for the leading / character"."""
    name = _decode(text, path[1:], "export name")
    if len(name.encode()) > EXPORT_NAME_BYTES_MAX:
        raise UserError(
            f"an export name of {len(name.encode())} bytes; the protocol allows {EXPORT_NAME_BYTES_MAX}", text
        )
    return name


def _parameters(text: str, query: str, known: set[str]) -> dict[str, str]:
    """The query's parameters, values still encoded. "Any other query parameters ... SHOULD be diagnosed"."""
    parameters: dict[str, str] = {}
    for part in query.split("&") if query else ():
        key, _, value = part.partition("=")
        key = _decode(text, key, "name of a parameter")
        if key in parameters:
            raise UserError(f"the parameter {key} twice", text)
        parameters[key] = value
    unknown = sorted(parameters.keys() - known)
    if any(key.startswith("tls-") for key in unknown):
        raise UserError(f"{', '.join(unknown)}: nbdshard does not support TLS yet", text)
    if unknown:
        noun = "parameter" if len(unknown) == 1 else "parameters"
        advice = "only nbd+unix:// takes a socket" if "socket" in unknown else ""
        raise UserError(f"unknown {noun} {', '.join(map(repr, unknown))}", text, advice)
    return parameters


def _socket(text: str, parameters: dict[str, str]) -> str:
    """The path of the socket: any bytes but NUL, those that are no UTF-8 as surrogates (PEP 383)."""
    path = unquote_to_bytes(_to_bytes(parameters.get("socket", "")))
    if not path:
        raise UserError("no socket parameter", text, "write nbd+unix:///EXPORT?socket=PATH")
    if b"\0" in path:
        raise UserError("the socket contains a NUL character; abstract sockets are not supported", text)
    if len(path) > UNIX_PATH_BYTES_MAX:
        raise UserError(f"a socket path of {len(path)} bytes; the system allows {UNIX_PATH_BYTES_MAX}", text)
    return path.decode("utf-8", "surrogateescape")


def _authority(text: str, authority: str) -> tuple[str, int]:
    """(host, port); an empty host is this machine."""
    if "@" in authority:
        shown = text.replace(authority, "..." + authority[authority.rindex("@") :], 1)  # it may be a password
        raise UserError("a user name is of use with TLS only, which nbdshard does not support yet", shown)
    if authority.startswith("["):
        literal, bracket, rest = authority[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            _bad_host(text, authority)
        return _ipv6(text, literal), _port(text, rest[1:])
    name, _, port = authority.partition(":")
    host = _decode(text, name, "host")
    if _NOT_IN_A_HOST.search(host) or ":" in port:
        _bad_host(text, authority)
    return host or "localhost", _port(text, port)


def _bad_host(text: str, authority: str) -> NoReturn:
    raise UserError(f"not a host: {authority!r}", text, "write an IPv6 address in brackets, as in nbd://[::1]/")


def _ipv6(text: str, literal: str) -> str:
    """RFC 6874: the zone follows a percent sign, which is encoded as %25."""
    address, percent, zone = literal.partition("%25")
    zone = _decode(text, zone, "zone")
    try:
        parsed = IPv6Address(address)
    except AddressValueError as error:
        raise UserError(f"not an IPv6 address: {error}", text) from None
    if percent and (not zone or _NOT_IN_A_HOST.search(zone)):
        raise UserError(f"not a zone of an IPv6 address: {zone!r}", text)
    return f"{parsed}%{zone}" if zone else str(parsed)


def _port(text: str, port: str) -> int:
    """RFC 3986 lets a port be empty; that is the default too."""
    if not port:
        return PORT_DEFAULT
    if not (port.isascii() and port.isdigit()) or not 0 < int(port[:6]) <= _PORT_MAX:
        raise UserError(f"not a port: {port!r}", text, f"ports are numbers from 1 to {_PORT_MAX}")
    return int(port)


def _host_in_uri(host: str) -> str:
    if ":" not in host:
        return quote(host, safe="")
    address, percent, zone = host.partition("%")
    return f"[{address}%25{quote(zone, safe='')}]" if percent else f"[{address}]"


def _to_bytes(text: str) -> bytes:
    """As the user typed it: what a shell passes in may hold bytes that are no UTF-8."""
    return text.encode("utf-8", "surrogateescape")
