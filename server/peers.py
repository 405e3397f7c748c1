"""Processes that are one server share out its clients, so that each has as many as the others.

The kernel gives a client to one of them by a hash of its address, or to who comes first: of four clients all may come
to one process, and the others idle. So who lets a client in hands it on to the process that has the fewest. What each
has is in memory that they share; every number there has one writer, and only ever grows.
"""

from __future__ import annotations

import errno
import mmap
import socket
from collections.abc import Sequence
from typing import Final

_NUMBER_BYTES: Final = 8
_WORD: Final = b"+"  # something has to be said where a descriptor is handed over


class Peers:
    """What `count` processes share. To be made before they are forked; each then has its `Peer`."""

    def __init__(self, count: int) -> None:
        self._memory = memoryview(mmap.mmap(-1, _NUMBER_BYTES * count * (count + 1))).cast("Q")
        self._boxes = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(count)]
        for box in self._boxes:
            for end in box:
                end.setblocking(False)

    def __len__(self) -> int:
        return len(self._boxes)

    def descriptors(self, index: int) -> list[int]:
        """Those that the process `index` is to keep."""
        return [self._boxes[index][0].fileno(), *(box[1].fileno() for box in self._boxes)]

    def peer(self, index: int) -> Peer:
        """The part of process `index`, to be taken by it."""
        return Peer(index, self._memory, self._boxes[index][0], [box[1] for box in self._boxes])

    def close(self) -> None:
        """By the process that has started the others, which needs none of it."""
        for box in self._boxes:
            for end in box:
                end.close()


class Peer:
    """One of the processes."""

    def __init__(self, index: int, memory: memoryview, box: socket.socket, boxes: Sequence[socket.socket]) -> None:
        self._index = index
        self._memory = memory  # for each process what each has given it, itself included; then what has ended in each
        self._box, self._boxes = box, boxes

    @property
    def descriptor(self) -> int:
        """Readable when a client has been handed to this process."""
        return self._box.fileno()

    def clients(self, index: int) -> int:
        """How many process `index` has, or is about to have."""
        count = len(self._boxes)
        return sum(self._memory[index * count : (index + 1) * count]) - self._memory[count * count + index]

    def hand_on(self, sock: socket.socket) -> bool:
        """Whether `sock`, a client that has just come, is another's from now on; else it is counted as one of ours."""
        best = min(range(len(self._boxes)), key=lambda index: (self.clients(index), index != self._index))
        if best != self._index:
            try:
                socket.send_fds(self._boxes[best], [_WORD], [sock.fileno()])
            except OSError:  # it is about to end, or has no room: so the client stays here
                best = self._index
            else:
                sock.close()
        self._memory[best * len(self._boxes) + self._index] += 1
        return best != self._index

    def take(self) -> socket.socket | None:
        """A client that has been handed to this process; None if there is none. Raises OSError where it is lost."""
        try:
            _, numbers, flags, _ = socket.recv_fds(self._box, len(_WORD), 1)
        except BlockingIOError:
            return None
        if not numbers:
            raise OSError(errno.EMFILE if flags & socket.MSG_CTRUNC else errno.ECONNABORTED, "it did not arrive")
        return socket.socket(fileno=numbers[0])

    def ended(self) -> None:
        """A client of this process has gone. Under a lock, if several threads say so."""
        self._memory[len(self._boxes) ** 2 + self._index] += 1
