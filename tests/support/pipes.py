"""Real pipes and the sockets at their ends: what tests of the spliced path do with them again and again."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Iterator

from nbdshard.worker.pipes import Pipe
from nbdshard.worker.plumbing import SystemPlumbing
from support.images import KIB, MIB
from support.waiting import WAIT_SECONDS, wait_for

PAGE = os.sysconf("SC_PAGESIZE")

Ends = tuple[socket.socket, socket.socket]  # ours, the peer's


def unix_ends() -> Ends:
    return socket.socketpair()


def tcp_ends() -> Ends:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname(), WAIT_SECONDS)
        theirs, _ = listener.accept()
    ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ours, theirs


@contextlib.contextmanager
def prepared(ends: Ends) -> Iterator[Ends]:
    """Our end, which never waits, and the peer's; closed when the block ends."""
    with ends[0] as ours, ends[1] as theirs:
        ours.setblocking(False)
        theirs.settimeout(WAIT_SECONDS)
        yield ours, theirs


def opened(plumbing: SystemPlumbing, size: int = MIB) -> Pipe:
    pipe = plumbing.open_pipe(size)
    assert isinstance(pipe, Pipe)
    return pipe


def arrive(ends: Ends, *pieces: bytes) -> None:
    """`pieces`, less than the socket's buffers hold, have come."""
    ours, theirs = ends
    for piece in pieces:
        theirs.sendall(piece)
    length = sum(map(len, pieces))
    wait_for("what was sent to arrive", lambda: waiting_in(ours, termios.FIONREAD) == length)


def waiting_in(end: socket.socket, queue: int) -> int:
    """Bytes in one of a socket's queues (ioctl(2))."""
    return int(struct.unpack("i", fcntl.ioctl(end, queue, bytes(4)))[0])


def fill_up(plumbing: SystemPlumbing, pipe: Pipe, ends: Ends, data: bytes) -> None:
    """Put `data` into the pipe by way of a socket, whatever the socket holds at a time."""
    left = memoryview(data)
    while left:
        arrive(ends, bytes(left[: 64 * KIB]))
        count = len(left[: 64 * KIB])
        assert plumbing.fill(pipe, ends[0].fileno(), count) == count
        left = left[count:]


def taken_out(plumbing: SystemPlumbing, pipe: Pipe) -> bytes:
    """All that is in the pipe."""
    buffer = bytearray(pipe.held)
    at = 0
    while pipe.held:
        count = plumbing.read(pipe, memoryview(buffer)[at:])
        assert count > 0, os.strerror(-count)
        at += count
    return bytes(buffer)


def received(end: socket.socket) -> bytes:
    """All that comes until the end."""
    got = bytearray()
    while part := end.recv(MIB):
        got += part
    return bytes(got)


def reset(end: socket.socket) -> None:
    """Close a TCP socket so that its peer gets a reset."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()


def closed_number() -> int:
    """A descriptor that is not open, and stays so as long as nobody opens one."""
    number = os.dup(0)
    os.close(number)
    return number
