"""Who writes to a file or a device has it alone; those who only read it share it. A second server is refused.

A regular file is locked with flock(2), a block device opened with O_EXCL, which the kernel also grants to nobody while
it is mounted. A claim has a descriptor of its own, so it holds while that is open here or in a process forked from
here, and ends with the last of them, however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import Final

from nbdshard.common.errors import UserError

_Identity = tuple[int, int]  # device and inode

_held: Final[list[Claim]] = []  # by this process
_inherited: Final[dict[_Identity, list[Claim]]] = {}  # from the process it was forked from, and not asked for yet


class Claim:
    """A file or device that is claimed, until `close`. `number` is open, and locked."""

    def __init__(self, number: int) -> None:
        self.identity = _identity(os.fstat(number))
        self.number = number
        _held.append(self)

    def close(self) -> None:
        """Give it up."""
        _held.remove(self)
        os.close(self.number)


def claim(path: Path, *, alone: bool) -> Claim:
    """The file or device at `path`, to write to it (`alone`), or only to read. Raises UserError, OSError."""
    while True:
        number = _opened(path, alone=alone)
        try:
            facts = os.fstat(number)
            if found := _inherited.get(_identity(facts)):
                os.close(number)
                return found.pop()
            if stat.S_ISREG(facts.st_mode):
                fcntl.flock(number, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                if _identity(os.stat(path)) != _identity(facts):  # it was replaced meanwhile
                    os.close(number)
                    continue
        except BaseException as error:
            os.close(number)
            if isinstance(error, BlockingIOError):
                raise UserError("is in use by another nbdshard serve", str(path), "a writer has it alone") from None
            raise
        return Claim(number)


def descriptors() -> list[int]:
    """Those of all claims of this process, which one that is forked needs to have them, too."""
    return [held.number for held in _held]


def inherit() -> None:
    """To be called in a process that was forked from one with claims: to claim the same again, once each, succeeds."""
    for held in _held:
        _inherited.setdefault(held.identity, []).append(held)


def lock_new(number: int) -> Claim:
    """A file that has no name yet, or is about to take that of one that is claimed alone. Raises OSError."""
    fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return Claim(number)


def _opened(path: Path, *, alone: bool) -> int:
    """Without ever waiting, as a FIFO would have it. A claimed device still lets others open it in the usual way."""
    flags = (os.O_RDWR if alone else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        if alone and stat.S_ISBLK(os.stat(path).st_mode):
            try:
                return os.open(path, flags | os.O_EXCL)
            except OSError as error:
                if error.errno != errno.EBUSY or not _inherited.get(_identity(os.stat(path))):
                    raise
        return os.open(path, flags)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise UserError("is mounted or in use by another program", str(path), "unmount it first") from None
        raise


def _identity(facts: os.stat_result) -> _Identity:
    return facts.st_dev, facts.st_ino
