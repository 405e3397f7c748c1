"""A program for the system's Python, which has libnbd: random requests over several connections to the export at a URI.

usage: libnbd_client.py URI CONNECTIONS REQUESTS SEED

The export is empty at first. It ends with 0 when every answer was what the reference says, and prints what was asked.
"""

from __future__ import annotations

import select
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import nbd

from support.lots import Lots, Request, Wrong

DEPTH = 8  # requests under way on a connection
WAIT_MS = 60_000
PIECE_BYTES = 1 << 20


class Client:
    """One connection. What it asks for comes from `lots`, and so does what comes of it."""

    def __init__(self, uri: str, lots: Lots, asked: Counter[str]) -> None:
        self.handle = nbd.NBD()
        self.handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        self.handle.connect_uri(uri)
        self.under_way = 0
        self._lots = lots
        self._asked = asked
        self._next: list[Request] = []  # asked for by what was done
        self.failures: list[Exception] = []  # of callbacks: libnbd would print them, and go on

    def fill(self) -> None:
        """Ask for as much as there may be under way."""
        while self.under_way < DEPTH:
            request = self._next.pop() if self._next else self._lots.take()
            if request is None:
                return
            self._ask(request)
            self._asked[request.kind] += 1
            self.under_way += 1

    def drain(self) -> None:
        """Until everything is answered that was asked for."""
        while self.under_way or self._next:
            while self._next:
                self._ask(self._next.pop())
                self.under_way += 1
            wait([self])

    def _ask(self, request: Request) -> None:
        handle, start, length = self.handle, request.start, request.length
        answer: Any = None
        fua = nbd.CMD_FLAG_FUA if request.fua else 0

        def completed(error: Any) -> int:
            self.under_way -= 1
            found = answer.to_bytearray() if isinstance(answer, nbd.Buffer) else answer
            try:
                self._completed(request, error.value, _clipped(found, length) if request.kind == "extents" else found)
            except Exception as failure:
                self.failures.append(failure)
            return 1

        match request.kind:
            case "write":
                handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(request.data)), start, completed, fua)
            case "zero":
                flags = fua | (0 if request.may_punch else nbd.CMD_FLAG_NO_HOLE)
                handle.aio_zero(length, start, completed, flags | (nbd.CMD_FLAG_FAST_ZERO if request.fast else 0))
            case "trim":
                handle.aio_trim(length, start, completed, fua)
            case "flush":
                handle.aio_flush(completed)
            case "extents":
                answer = []

                def extent(_context: str, _offset: int, entries: list[int], _error: Any) -> int:
                    answer.extend(zip(entries[::2], entries[1::2], strict=True))
                    return 0

                handle.aio_block_status(length, start, extent, completed)
            case _:
                answer = nbd.Buffer(length)
                handle.aio_pread(answer, start, completed)

    def _completed(self, request: Request, number: int, answer: object) -> None:
        if number and not request.fast:
            raise Wrong(f"{request}: errno {number}")
        if number:
            self._lots.give_back(request)
        elif follow := self._lots.done(request, answer):
            self._next.append(follow)


def _clipped(extents: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """ "The server MAY extend the last extent beyond the request"."""
    rest = length - sum(each for each, _ in extents[:-1])
    return [*extents[:-1], *((min(each, rest), flags) for each, flags in extents[-1:])]


def wait(clients: list[Client]) -> None:
    """Until something came to one of them, or could be sent. Raises Wrong."""
    poll = select.poll()
    by_number = {}
    for client in clients:
        direction = client.handle.aio_get_direction()
        events = (select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0) | (
            select.POLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0
        )
        number = client.handle.aio_get_fd()
        by_number[number] = client.handle
        poll.register(number, events)
    ready = poll.poll(WAIT_MS)
    if not ready:
        raise Wrong(f"no answer within {WAIT_MS / 1000:g} s")
    for number, events in ready:
        handle = by_number[number]
        if events & (select.POLLIN | select.POLLHUP | select.POLLERR):
            handle.aio_notify_read()
        elif events & select.POLLOUT:
            handle.aio_notify_write()
    for client in clients:
        if client.failures:
            raise client.failures[0]


def main(uri: str, connections: int, requests: int, seed: int) -> None:
    first = nbd.NBD()
    first.connect_uri(uri)
    lots = Lots(first.get_size(), seed, can_trim=first.can_trim(), can_fast=first.can_fast_zero())
    asked: Counter[str] = Counter()
    clients = [Client(uri, lots, asked) for _ in range(connections)]
    while asked.total() < requests:
        for client in clients:
            client.fill()
        wait(clients)
    for client in clients:
        client.drain()
    for start in range(0, len(lots.reference), PIECE_BYTES):
        piece = lots.reference[start : start + PIECE_BYTES]
        if first.pread(len(piece), start) != piece:
            raise Wrong(f"the export differs in [{start}, {start + len(piece)}) at the end")
    for handle in (first, *(client.handle for client in clients)):
        handle.shutdown()
    print(dict(asked))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
