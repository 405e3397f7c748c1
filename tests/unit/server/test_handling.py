"""From requests to a backend's calls: what the flags of each ask for, and what becomes of what goes wrong."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import pytest

from nbdshard.common.nbd.constants import Command, CommandFlag, Errno
from nbdshard.common.nbd.export import Export
from nbdshard.common.ranges import Range
from nbdshard.server.backends.memory import MemoryBackend
from nbdshard.server.device import Device, Hole
from nbdshard.server.handling import handle
from nbdshard.server.serving import Request
from support.twins import FLAGS, MIB, said_by_device

F = CommandFlag


class Listening(MemoryBackend):
    """Memory that tells what it was asked, and fails where it is told to."""

    def __init__(self, failing: str = "", error: BaseException | None = None) -> None:
        super().__init__(MIB)
        self.heard: list[str] = []
        self._failing, self._error = failing, error

    def _hear(self, what: str) -> None:
        self.heard.append(what)
        if self._error is not None and what.startswith(self._failing):
            raise self._error

    def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
        self._hear("read")
        return super().read(where)

    def write(self, where: Range, data: memoryview) -> None:
        self._hear(f"write {bytes(data)!r}")

    def zero(self, where: Range, *, may_punch: bool, fast: bool) -> None:
        self._hear(f"zero {may_punch=} {fast=}")

    def trim(self, where: Range) -> None:
        self._hear("trim")

    def cache(self, where: Range) -> None:
        self._hear("cache")

    def flush(self) -> None:
        self._hear("flush")


def asked(command: int, flags: int = 0) -> Request:
    request = Request(command, flags, 1, *((0, 0) if command == Command.FLUSH else (512, 4)))
    request.payload = bytearray(b"data")
    return request


def answered(backend: Listening, request: Request) -> int:
    """The error that the client is told."""
    device = Device(Export("disk", MIB, FLAGS, structured=False), "client")
    device.under_way = 1
    handle(backend, request)(device)
    return int.from_bytes(said_by_device(device)[4:8], "big")


@pytest.mark.parametrize(
    ("command", "flags", "expected"),
    [
        (Command.READ, 0, ["read"]),
        (Command.READ, F.FUA, ["read"]),
        (Command.WRITE, 0, ["write b'data'"]),
        (Command.WRITE, F.FUA, ["write b'data'", "flush"]),
        (Command.WRITE_ZEROES, 0, ["zero may_punch=True fast=False"]),
        (Command.WRITE_ZEROES, F.NO_HOLE, ["zero may_punch=False fast=False"]),
        (Command.WRITE_ZEROES, F.FAST_ZERO | F.FUA, ["zero may_punch=True fast=True", "flush"]),
        (Command.TRIM, 0, ["trim"]),
        (Command.TRIM, F.FUA, ["trim", "flush"]),
        (Command.CACHE, F.FUA, ["cache"]),
        (Command.FLUSH, 0, ["flush"]),
    ],
)
def test_each_request_is_its_calls(command: int, flags: int, expected: list[str]) -> None:
    backend = Listening()
    assert answered(backend, asked(command, flags)) == 0
    assert backend.heard == expected


@pytest.mark.parametrize("command", [Command.WRITE, Command.WRITE_ZEROES, Command.TRIM])
def test_what_was_to_be_durable_and_is_not_is_an_error(command: int) -> None:
    assert answered(Listening("flush", OSError(errno.EIO, "worn out")), asked(command, F.FUA)) == Errno.EIO
    backend = Listening("", OSError(errno.ENOSPC, "full"))
    assert answered(backend, asked(command, F.FUA)) == Errno.ENOSPC
    assert len(backend.heard) == 1  # what failed is not flushed


def test_a_flush_that_is_not_supported_does_not_say_so_of_zeroes_that_were_made() -> None:
    backend = Listening("flush", OSError(errno.ENOTSUP, "no flushes"))
    assert answered(backend, asked(Command.WRITE_ZEROES, F.FAST_ZERO | F.FUA)) == Errno.EIO
    backend = Listening("zero", OSError(errno.ENOTSUP, "slow"))
    assert answered(backend, asked(Command.WRITE_ZEROES, F.FAST_ZERO | F.FUA)) == Errno.ENOTSUP


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EPERM, ""), Errno.EPERM),
        (OSError(errno.EACCES, ""), Errno.EPERM),
        (OSError(errno.EROFS, ""), Errno.EPERM),
        (OSError(errno.EDQUOT, ""), Errno.ENOSPC),
        (OSError(errno.EFBIG, ""), Errno.ENOSPC),
        (OSError(errno.ENODEV, ""), Errno.EIO),
        (OSError(errno.ESHUTDOWN, ""), Errno.ESHUTDOWN),
        (OSError("without a number"), Errno.EIO),
        (MemoryError(), Errno.ENOMEM),
        (KeyError("a bug"), Errno.EIO),
    ],
)
def test_whatever_goes_wrong_is_an_error_the_protocol_knows(
    error: BaseException, expected: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert answered(Listening("", error), asked(Command.WRITE)) == expected
    assert ("internal error" in capfd.readouterr().err) is isinstance(error, KeyError)


def test_a_command_without_a_handler_is_a_bug_and_an_answer(capfd: pytest.CaptureFixture[str]) -> None:
    assert answered(Listening(), asked(4711)) == Errno.EIO
    assert "internal error" in capfd.readouterr().err
