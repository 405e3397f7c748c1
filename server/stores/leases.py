"""One writer for a volume in an object store: a lease, kept up as an object that says whose it is.

Leases of a volume are numbered, an object each: KEY.lock.1, KEY.lock.2 and so on, and the highest one counts. One is
taken by creating the next number, which a store lets one server do; only its holder ever writes it again, every
VOLUME_LEASE_RENEWAL_SECONDS. It may be taken over when its holder gave it back, or was not heard for
VOLUME_LEASE_SECONDS by the store's own clock. So nothing depends on clocks of servers being the same::

    holder                                   who takes over
      puts N again (it was late)               reads N: silent for too long
      is there an N + 1?  no: it goes on       creates N + 1
                          yes: it stops        has N changed since?  yes: it gives N + 1 back; no: it is the holder

At least one of the two sees the other. A holder stops by itself when it could not renew in time, so early that a call
it has begun is over before the lease is. What a network or a store delays longer may still arrive: a lease is no fence.

A store that ignores "only if there is none" would let two servers have one lease. It is found out by trying when a
volume is opened; then a lease is put, and looked at again VOLUME_LEASE_SETTLE_SECONDS later and at each renewal: who
finds another's name in it, has not got it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import threading
import time
import uuid
from datetime import datetime
from functools import partial
from typing import Final

import msgspec

from nbdshard.common import logs
from nbdshard.common.errors import UserError
from nbdshard.common.limits import (
    VOLUME_LEASE_NOTE_BYTES_MAX,
    VOLUME_LEASE_RENEWAL_SECONDS,
    VOLUME_LEASE_RETRY_SECONDS,
    VOLUME_LEASE_SECONDS,
    VOLUME_LEASE_SETTLE_SECONDS,
    VOLUME_LEASE_TRIES_MAX,
)
from nbdshard.common.ranges import Range
from nbdshard.server.stores.bucket import Bucket, Found

_NOTE: Final = Range(0, VOLUME_LEASE_NOTE_BYTES_MAX)
_GENERATION: Final = re.compile(r"[1-9][0-9]{0,17}")


_now = partial(time.clock_gettime, time.CLOCK_BOOTTIME)  # goes on while the machine is suspended: others do not wait


class Note(msgspec.Struct, frozen=True):
    """What a lease's object says, as JSON. `beat`: how often it was renewed; `free`: it was given back."""

    owner: str
    host: str
    process: int
    beat: int
    free: bool = False


class Lease:
    """The right to write what `key` of `bucket` stands for, taken when this is made. Raises UserError, OSError.

    `steal`: also from a server that is alive; it stops when it next renews.
    """

    def __init__(self, bucket: Bucket, key: str, *, steal: bool = False) -> None:
        self._bucket = bucket
        self._key = key
        self._note = Note(str(uuid.uuid4()), socket.gethostname(), os.getpid(), 0)
        self._lost = ""  # to whom, or why
        self._is_over = threading.Event()
        self._valid_until = 0.0
        self._number = 0
        self._is_exclusive, now = self._probe()
        if not self._is_exclusive:
            logs.warning(
                f"{key}: this store does not refuse to create what is there; servers are told apart by waiting"
            )
        for _ in range(VOLUME_LEASE_TRIES_MAX):
            if self._take(now, steal=steal):
                break
        else:
            raise UserError("other servers are taking it at the same time", key, "try again")
        self._renewer = threading.Thread(target=self._renew, daemon=True)
        self._renewer.start()

    @property
    def losses(self) -> int:
        return 1 if self._lost else 0

    def check(self) -> None:
        """Raises OSError where nothing may be written any more, or at the moment."""
        if self._lost:
            raise OSError(errno.EIO, f"{self._key} must not be written any more: {self._lost}")
        if _now() >= self._valid_until:
            raise OSError(errno.EIO, f"{self._key} must not be written now: its lock could not be renewed in time")

    def release(self) -> None:
        """Give it back, so that nobody has to wait for it."""
        self._is_over.set()
        self._renewer.join()
        if not self._lost:
            with contextlib.suppress(OSError):  # then it runs out
                self._put(self._number, free=True)

    # -- taking it ----------------------------------------------------------------------------------------------------

    def _probe(self) -> tuple[bool, datetime]:
        """Whether the store lets one server only create an object, and what time it is there."""
        key = f"{self._key}.probe.{self._note.owner}"
        is_refused = self._bucket.create(key, b"1") and not self._bucket.create(key, b"2")
        found = self._bucket.get(key, _NOTE)
        self._bucket.delete(key)
        if found is None or found.modified is None:
            raise OSError(errno.EIO, "the object store has not kept what was put into it")
        return is_refused, found.modified

    def _take(self, now: datetime, *, steal: bool) -> bool:
        """Take the next lease; False where another server was quicker."""
        begun = _now()
        before = self._newest()
        held = self._read(before) if before else None
        if held is not None and not steal:
            self._refuse_if_alive(held, now)
        mine = before + 1
        if not self._create(mine):
            return False
        if held is not None and not steal and self._has_spoken(before, held):
            self._put(mine, free=True)
            raise UserError("another server is writing it", self._key, "it was slow to say so, and has just come back")
        if held is not None and not _note(held).free:
            logs.warning(f"{self._key}: takes it over from {_named(_note(held))}")
        self._number = mine
        self._valid_until = begun + VOLUME_LEASE_SECONDS - self._bucket.call_seconds
        with contextlib.suppress(OSError):
            if before > 1:
                self._bucket.delete(self._of(before - 1))  # the one before stays: a listing that lags shows it
        return True

    def _newest(self) -> int:
        """The number of the highest lease; 0 where there is none."""
        start = f"{self._key}.lock."
        found = 0
        for page in self._bucket.stored(start, lambda key: key.startswith(start)):
            words = [key.removeprefix(start) for key, _ in page]
            found = max([found, *(int(word) for word in words if _GENERATION.fullmatch(word))])
        while self._read(found + 1) is not None:  # a listing may lag behind
            found += 1
        return found

    def _refuse_if_alive(self, held: Found, now: datetime) -> None:
        note = _note(held)
        if note.free or held.modified is None:
            return
        seconds = (now - held.modified).total_seconds()
        if seconds < VOLUME_LEASE_SECONDS:
            raise UserError(
                f"{_named(note)} writes it, and was heard {max(seconds, 0):.0f} s ago",
                self._key,
                f"it is free when that ends, or {VOLUME_LEASE_SECONDS:g} s after it was heard last;"
                " read-only=yes opens it without writing; steal=yes takes it from a server that you know to be gone",
            )

    def _create(self, number: int) -> bool:
        if self._is_exclusive:
            if self._bucket.create(self._of(number), self._text()):
                return True
        else:
            self._put(number)
            self._is_over.wait(VOLUME_LEASE_SETTLE_SECONDS)
        return self._is_mine(number)  # an answer that was lost is asked for again, and then it is there: ours

    def _has_spoken(self, number: int, before: Found) -> bool:
        now = self._read(number)
        return now is not None and now.data != before.data and not _note(now).free

    # -- keeping it ---------------------------------------------------------------------------------------------------

    def _renew(self) -> None:
        is_told = False
        wait = VOLUME_LEASE_RENEWAL_SECONDS
        while not self._is_over.wait(wait) and not self._lost:
            begun = _now()
            try:
                self._look()
            except OSError as error:
                wait = VOLUME_LEASE_RETRY_SECONDS
                if not is_told:
                    logs.warning(f"{self._key}: its lock cannot be renewed: {error.strerror}")
                is_told = True
            else:
                wait, is_told = VOLUME_LEASE_RENEWAL_SECONDS, False
                if self._lost:
                    logs.error(f"{self._key}: nothing is written any more: {self._lost}")
                else:
                    self._valid_until = begun + VOLUME_LEASE_SECONDS - self._bucket.call_seconds

    def _look(self) -> None:
        """Renew, unless it is another's by now."""
        if not self._is_mine(self._number):
            self._lost = "its lock was removed, or overwritten by another server"
            return
        self._note = msgspec.structs.replace(self._note, beat=self._note.beat + 1)
        self._put(self._number)
        newer = self._read(self._number + 1)
        if newer is not None:
            self._lost = f"{_named(_note(newer))} has taken it over"

    def _is_mine(self, number: int) -> bool:
        found = self._read(number)
        return found is not None and _note(found).owner == self._note.owner

    # -- objects ------------------------------------------------------------------------------------------------------

    def _of(self, number: int) -> str:
        return f"{self._key}.lock.{number}"

    def _text(self, *, free: bool = False) -> bytes:
        return msgspec.json.encode(msgspec.structs.replace(self._note, free=free))

    def _put(self, number: int, *, free: bool = False) -> None:
        self._bucket.put(self._of(number), self._text(free=free))

    def _read(self, number: int) -> Found | None:
        return self._bucket.get(self._of(number), _NOTE)


def _note(found: Found) -> Note:
    try:
        return msgspec.json.decode(found.data, type=Note)
    except msgspec.MsgspecError:
        return Note("", "a server of another kind", 0, 0)


def _named(note: Note) -> str:
    return logs.printable(f"{note.host} (process {note.process})")
