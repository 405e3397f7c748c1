"""How the server closes a client's connection so that its last answers arrive."""

from __future__ import annotations

import select
import socket
import time

from nbdshard.common.limits import PARTING_BYTES, PARTING_SECONDS


def part(sock: socket.socket) -> None:
    """Close `sock`, after the client has closed its end or PARTING_SECONDS are over. Never raises.

    What a client sends to a closed socket, or has sent and nobody has read, makes the kernel reset the connection, and
    drop what the client has not read yet. So nothing more is said, and what still comes is thrown away.
    """
    try:
        sock.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + PARTING_SECONDS
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0 and poll.poll(left * 1000):
            if not sock.recv(PARTING_BYTES):
                break
    except OSError:  # it has gone
        pass
    sock.close()
