"""A server of one function: `python ram_disk.py SOCKET` serves 64 MiB of memory, whole, in thirty lines."""

from __future__ import annotations

import sys
from pathlib import Path

from nbdshard.common.nbd.constants import Command, TransmissionFlag
from nbdshard.server.listening import listen_unix
from nbdshard.server.serving import Request
from nbdshard.server.simple import Result, offer, serve

SIZE = 64 << 20
EXPORT = offer("disk", SIZE, TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_WRITE_ZEROES)
disk = bytearray(SIZE)


def handle_request(request: Request) -> Result:
    where = slice(request.offset, request.offset + request.length)
    match request.command:
        case Command.READ:
            return bytes(disk[where])
        case Command.WRITE:
            disk[where] = request.payload
        case Command.WRITE_ZEROES:
            disk[where] = bytes(request.length)
    return None  # done; a FLUSH has nothing to do, and all that is known for BLOCK_STATUS is that there is data


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} SOCKET")
    serve(listen_unix(Path(sys.argv[1])), EXPORT, handle_request)
