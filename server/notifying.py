"""What systemd is told of the server's life: sd_notify(3), which is a datagram."""

from __future__ import annotations

import os
import socket

from nbdshard.common import logs


def notify(*lines: str) -> None:
    """Send `lines` ("READY=1", "STATUS=...") to whoever started us and wants to know. Never raises."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)  # a supervisor that does not listen does not hold us up
            sock.sendto("\n".join(lines).encode(), address)
    except OSError as error:
        logs.warning(f"the supervisor at NOTIFY_SOCKET could not be told {lines[0]}: {error.strerror or error}")
