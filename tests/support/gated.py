"""A backend in memory that waits, fails, and remembers what it was asked, as a test says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from nbdshard.common.ranges import Range
from nbdshard.server.backends.memory import MemoryBackend
from nbdshard.server.device import Hole
from nbdshard.server.layers.around import Around, Operation, Result
from support.waiting import WAIT_SECONDS, wait_for


class Gated(Around):
    """`size` zeroes. An operation in `shut` waits until it is opened; one in `failing` fails with that errno."""

    def __init__(self, size: int, block_size: int = 4096) -> None:
        super().__init__(MemoryBackend(size))
        self.calls: list[tuple[Operation, Range | None]] = []  # in the order in which they came
        self.failing: dict[Operation, int] = {}
        self.lost = 0
        self._block_size = block_size
        self._shut: dict[Operation, threading.Event] = {}

    @property
    def block_size(self) -> int:
        return self._block_size

    @property
    def losses(self) -> int:
        return self.lost

    def carry_out(self, operation: Operation, where: Range | None, call: Callable[[], Result]) -> Result:
        self.calls.append((operation, where))
        gate = self._shut.get(operation)
        if gate is not None:
            assert gate.wait(WAIT_SECONDS), f"{operation} was never let through"
        if operation in self.failing:
            raise OSError(self.failing[operation], f"this {operation.value} fails")
        return call()

    def close(self) -> None:
        """It is still there for the next one."""

    def shut(self, operation: Operation) -> None:
        """From now on calls of it wait."""
        self._shut[operation] = threading.Event()

    def open(self, operation: Operation) -> None:
        """Those that wait go on, and no other one waits."""
        self._shut.pop(operation).set()

    def asked(self, operation: Operation) -> list[Range | None]:
        """The ranges of all calls of it so far."""
        return [where for each, where in list(self.calls) if each is operation]

    def wait_for(self, operation: Operation, count: int) -> None:
        """Until it was called so often."""
        wait_for(f"{count} calls of {operation.value}", lambda: len(self.asked(operation)) >= count)

    def content(self, start: int, length: int) -> bytes:
        """What is there, whatever waits or fails."""
        return content_of(self.below.read(Range.of(start, length)))


def content_of(parts: Sequence[memoryview | bytes | Hole]) -> bytes:
    """What was read as bytes."""
    return b"".join(bytes(part.length) if isinstance(part, Hole) else bytes(part) for part in parts)
