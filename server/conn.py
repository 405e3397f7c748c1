"""A CONN on the command line: layers, a store, and where in the store. Pure.

::

    file:/exports/disk0.img                       a store and a place in it
    cache:retry:s3:http://host:9000/bucket/disk   layers in front of it, the outermost first
    memory:1G?block=64K                           parameters, for whoever in the chain knows them
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from urllib.parse import unquote

import msgspec

from nbdshard.common.errors import UserError


class Conn(msgspec.Struct, frozen=True):
    """A parsed CONN. `layers`: names, the outermost first."""

    layers: tuple[str, ...]
    store: str
    place: str
    parameters: Mapping[str, str] = msgspec.field(default_factory=dict)


def parse_conn(text: str, layers: Collection[str], stores: Collection[str]) -> Conn:
    """What `text` says, where `layers` and `stores` are known. Raises UserError."""
    chain: list[str] = []
    rest = text
    while True:
        name, colon, after = rest.partition(":")
        if not colon:
            raise UserError(f"{name!r} where a store, a colon and a place are expected", text, "file:/PATH, say")
        if name in stores:
            place, mark, query = after.partition("?")
            conn = Conn(tuple(chain), name, unquote(place), _parameters(query, text) if mark else {})
            if any("\0" in value for value in (conn.place, *conn.parameters.values())):
                raise UserError("there is a NUL in it", text)  # no path and no name holds one
            return conn
        if name not in layers:
            known = [f"stores are {', '.join(stores)}"] + ([f"layers {', '.join(layers)}"] if layers else [])
            raise UserError(f"{name!r} is neither a layer nor a store here", text, ", ".join(known))
        chain.append(name)
        rest = after


def _parameters(query: str, text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in query.split("&"):
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise UserError(f"{word!r} where NAME=VALUE is expected", text)
        if name in found:
            raise UserError(f"{name} twice", text)
        found[name] = unquote(value)
    return found
