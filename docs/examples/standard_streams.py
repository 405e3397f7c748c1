"""Another transport: one client, over standard input and output, as inetd, ssh or libnbd's connect_command start it."""

from __future__ import annotations

import os

from ram_disk import EXPORT, handle_request

from nbdshard.server.offers import NamedOffers
from nbdshard.server.session import Session
from nbdshard.server.simple import serve_stream


class StandardStreams:
    """All that `serve_stream` needs of a stream; a connected socket or a TLS socket has it anyway."""

    def recv_into(self, buffer: memoryview) -> int:
        return os.readv(0, [buffer])

    def sendall(self, data: memoryview | bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(1, left) :]


if __name__ == "__main__":
    serve_stream(StandardStreams(), Session(NamedOffers([EXPORT]), "who started us"), handle_request)
