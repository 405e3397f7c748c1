"""What stands in SOURCE and DESTINATION: which kind of endpoint a word means. Pure: nothing is opened.

::

    -                     StreamEndpoint    standard input or output
    null:                 NullEndpoint      a destination that takes everything
    [ CMD ARGS ... ]      CommandEndpoint   a server we start, and stop at the end
    nbd://, nbd+unix://   NbdEndpoint       a server that runs
    anything else         FileEndpoint      a local file or block device
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, TypeAlias

import msgspec

from nbdshard.common.errors import UserError
from nbdshard.common.messages import EndpointAddress, Side
from nbdshard.common.nbd.uri import NbdUri, parse_uri

KNOWN_SCHEMES: Final = ("nbd", "nbd+unix")
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
_NUMBER: Final = re.compile(r"0[xX][0-9a-fA-F]{1,8}|0[0-7]{0,12}|[1-9][0-9]{0,10}")
_NBD_LIKE: Final = re.compile(r"nbds?(\+[a-z]+)?:", re.IGNORECASE)


class NbdEndpoint(msgspec.Struct, frozen=True):
    """An export of an NBD server; `text` is the URI as the user wrote it."""

    uri: NbdUri
    text: str


class FileEndpoint(msgspec.Struct, frozen=True):
    """A local file or block device, by its path as given."""

    path: str


class StreamEndpoint(msgspec.Struct, frozen=True):
    """Standard input as a source, standard output as a destination."""


class CommandEndpoint(msgspec.Struct, frozen=True):
    """`[ CMD ARGS ... ]`: an NBD server to start by systemd socket activation."""

    argv: tuple[str, ...]


class NullEndpoint(msgspec.Struct, frozen=True):
    """`null:`, which takes every write and keeps nothing."""


Endpoint: TypeAlias = NbdEndpoint | FileEndpoint | StreamEndpoint | CommandEndpoint | NullEndpoint


def parse_endpoint(words: str | Sequence[str], side: Side) -> Endpoint:
    """The endpoint that one word of the command line means, or the words between `[` and `]`.

    Raises UserError for an empty word or command, an unknown scheme, a malformed URI, `null:` as a source.
    """
    if not isinstance(words, str):
        return _command(tuple(words), side)
    if words == "":
        raise UserError(f"the {side} is an empty word", advice="name a URI, a file, '-' or '[ CMD ARGS ... ]'")
    if "\0" in words:
        raise UserError(f"the {side} has a NUL byte in it", repr(words))
    if words == "-":
        return StreamEndpoint()
    if words == "null:":
        if side == "source":
            raise UserError("null: can only be a destination", advice="there is nothing to read from it")
        return NullEndpoint()
    if _NBD_LIKE.match(words):
        return NbdEndpoint(parse_uri(words), words)
    scheme = _SCHEME.match(words)
    if scheme is not None:
        known = ", ".join(f"{name}://" for name in KNOWN_SCHEMES)
        advice = f"known are {known}; for a local file of that name write ./{words}"
        raise UserError(f"unknown scheme {scheme[1]!r}", words, advice)
    return FileEndpoint(words)


def describe(endpoint: Endpoint, side: Side) -> str:
    """How messages name the endpoint. An NBD URI carries no credentials, so it is shown as written."""
    match endpoint:
        case NbdEndpoint():
            return endpoint.text
        case FileEndpoint():
            return endpoint.path
        case StreamEndpoint():
            return "standard input" if side == "source" else "standard output"
        case CommandEndpoint():
            return f"[ {' '.join(endpoint.argv)} ]"
        case NullEndpoint():
            return "null:"


def is_loopback_host(host: str) -> bool:
    """Whether `host`, by its text alone, means the machine that connects to it.

    Also the odd spellings a resolver takes: `127.1`, `0x7f000001`, `::ffff:127.0.0.1`, and the unspecified
    addresses, which connect to loopback. Other names that resolve to it are for the resolver to notice.
    """
    name = host.strip("[]").rstrip(".").lower()
    if name in ("", "localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback"):
        return True
    if name.endswith(".localhost"):
        return True
    try:
        address = ip_address(name.partition("%")[0])
    except ValueError:
        short = _short_address(name)
        if short is None:
            return False
        address = short
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback or address.is_unspecified


def is_remote_reachable(address: EndpointAddress) -> bool:
    """Whether a worker on another machine may open `address` and find the same disk there.

    A file, a stream, a unix socket or a loopback address means another disk on another machine; `null:` means
    the same everywhere.
    """
    if address.kind == "null":
        return True
    if address.kind != "nbd":
        return False
    uri = parse_uri(address.address)
    return uri.transport == "tcp" and not is_loopback_host(uri.host)


def _short_address(name: str) -> IPv4Address | None:
    """The other forms inet_aton(3) takes: one to four numbers, of any base in C, the last one filling up."""
    parts = name.split(".")
    if len(parts) > 4 or any(_NUMBER.fullmatch(part) is None for part in parts):
        return None
    numbers = [int(part, 16 if part[1:2] in ("x", "X") else 8 if part[0] == "0" else 10) for part in parts]
    value = numbers.pop()
    if value >= 1 << (32 - 8 * len(numbers)) or any(number > 255 for number in numbers):
        return None
    return IPv4Address(value | sum(number << (24 - 8 * place) for place, number in enumerate(numbers)))


def _command(argv: tuple[str, ...], side: Side) -> CommandEndpoint:
    if not argv:
        raise UserError(f"the {side} [ ] holds no command", advice="write [ CMD ARGS ... ]")
    return CommandEndpoint(argv)
