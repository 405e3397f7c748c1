"""How little a copy costs in Python without anything a copy has to have: a bound to hold the first row against.

`bare_copy.py SOCKET SOCKET BYTES` splices one payload after the other from one NBD server to another, and believes
whatever it is told: no states, leases, timeouts, retries or errors. Its processes have the kernel do what nbdshard's
have it do, so what nbdshard takes beyond it is nbdshard's own Python. It imports nothing of ours: its start counts too.
`bare.py` runs it.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import threading
from struct import Struct

MIB = 1 << 20
PROCESSES = 2
LANES = 2  # in each: a thread, a connection to each side and a pipe
DEPTH = 4
GREETING_BYTES = 18
HELLO = Struct(">IQII").pack(3, int.from_bytes(b"IHAVEOPT"), 1, 0)  # fixed newstyle, no zeroes; NBD_OPT_EXPORT_NAME ""
HELLO_REPLY_BYTES = 10
REQUEST = Struct(">IHHQQI")
REQUEST_MAGIC = 0x25609513
READ, WRITE, FLUSH = 0, 1, 3
REPLY = Struct(">IIQ")


def bare_copy(source: str, destination: str, size: int) -> None:
    """Copy `size` bytes, a multiple of 4 MiB, between the servers at two unix sockets."""
    share = size // PROCESSES
    for child in [_forked(source, destination, index * share, share) for index in range(PROCESSES)]:
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit("a process of the bare copy failed")


def _forked(source: str, destination: str, start: int, length: int) -> int:
    child = os.fork()
    if child:
        return child
    share = length // LANES
    lanes = [
        threading.Thread(target=_copy_lane, args=(source, destination, start + index * share, share))
        for index in range(LANES)
    ]
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join()
    os._exit(0)


def _connected(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MIB)
    connection.connect(path)
    _receive(connection, GREETING_BYTES)
    connection.sendall(HELLO)
    _receive(connection, HELLO_REPLY_BYTES)
    return connection


def _receive(connection: socket.socket, count: int) -> bytes:
    data = connection.recv(count, socket.MSG_WAITALL)
    if len(data) < count:
        os._exit(1)
    return data


def _request(command: int, offset: int, length: int) -> bytes:
    return REQUEST.pack(REQUEST_MAGIC, 0, command, offset // MIB, offset, length)


def _copy_lane(source: str, destination: str, start: int, length: int) -> None:
    reader, writer = _connected(source), _connected(destination)
    # Waits in the kernel until a whole payload is there: one call instead of five for each MiB.
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, MIB)
    pipe_out, pipe_in = os.pipe()
    fcntl.fcntl(pipe_in, fcntl.F_SETPIPE_SZ, MIB)
    end, asked, unanswered = start + length, start, 0
    for _ in range(start, end, MIB):
        while asked < end and asked < start + DEPTH * MIB:
            reader.send(_request(READ, asked, MIB))
            asked += MIB
        _, _, cookie = REPLY.unpack(_receive(reader, REPLY.size))
        start += MIB
        _splice(reader.fileno(), pipe_in)
        writer.send(_request(WRITE, cookie * MIB, MIB), socket.MSG_MORE)
        _splice(pipe_out, writer.fileno())
        unanswered += 1
        if unanswered == DEPTH:
            _receive(writer, REPLY.size)
            unanswered -= 1
    writer.send(_request(FLUSH, 0, 0))
    _receive(writer, REPLY.size * (unanswered + 1))


def _splice(come_from: int, go_to: int) -> None:
    left = MIB
    while left:
        left -= os.splice(come_from, go_to, left, flags=os.SPLICE_F_MOVE)


if __name__ == "__main__":
    bare_copy(sys.argv[1], sys.argv[2], int(sys.argv[3]))
