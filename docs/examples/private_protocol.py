"""More protocol: `python private_protocol.py -e disk raw memory:1M --unix SOCKET` knows one more option and command.

A client may introduce itself before it chooses an export, and is told how many have. And it may have the server compare
what it has with what is stored, instead of reading it. Both sides are here; other clients notice nothing.
"""

from __future__ import annotations

import errno
import itertools
import sys
from collections.abc import Sequence

from nbdshard.cli.extended import serve_extended
from nbdshard.common.nbd.client import Client
from nbdshard.common.nbd.commands import COMMANDS, CommandEntry
from nbdshard.common.nbd.constants import Option
from nbdshard.common.nbd.options import OPTIONS, Negotiation, OptionHandler, with_option
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.device import Hole
from nbdshard.server.extensions import Extensions
from nbdshard.server.haggling import SERVED_OPTIONS, Haggling, Reply, ServedOption
from nbdshard.server.handling import HANDLERS, Answer, Protocol
from nbdshard.server.serving import Request

INTRODUCE = 0x4E424453  # an option, and the type of its reply
COMPARE = CommandEntry(0x4E42, sends_payload=True)

# -- the server

count = itertools.count(1)


def introduced(haggling: Haggling, data: memoryview) -> Sequence[Reply]:
    haggling.extra["name"] = bytes(data)  # for other options of this connection
    return [(INTRODUCE, f"{bytes(data).decode(errors='replace')}, you are number {next(count)}".encode())]


def compare(backend: Backend, request: Request) -> Answer:
    parts = backend.read(Range.of(request.offset, request.length))
    if b"".join(bytes(part.length) if isinstance(part, Hole) else part for part in parts) != request.payload:
        raise OSError(errno.EIO, "it differs")
    return lambda device: device.done(request)


PROTOCOL = Protocol(
    options={**SERVED_OPTIONS, INTRODUCE: ServedOption(INTRODUCE, introduced)},
    commands={**COMMANDS, COMPARE.command: COMPARE},
    handlers={**HANDLERS, COMPARE.command: compare},
)

# -- the client


def hear(negotiation: Negotiation, reply: memoryview) -> None:
    negotiation.extra["greeting"] = bytes(reply).decode()


def introducing(name: str) -> dict[int, OptionHandler]:
    """Options for a Connecter whose client introduces itself; a server that does not know it is done without."""
    option = OptionHandler(INTRODUCE, lambda _: True, lambda _: name.encode(), {INTRODUCE: hear})
    return dict(with_option(OPTIONS, option, before=Option.GO))


def ask_to_compare(client: Client, handle: int, where: Range, data: bytes) -> None:
    """Of a Client whose commands are `{**COMMANDS, COMPARE.command: COMPARE}`: its Done tells."""
    client.submit(handle, COMPARE.command, where, payload=[data])


if __name__ == "__main__":
    sys.exit(serve_extended(Extensions(protocol=PROTOCOL)))
