"""A server double that answers some requests when the test lets it."""

from __future__ import annotations

import threading

from support.doubles import Double, Request, Talk
from support.waiting import WAIT_SECONDS


class Hesitates(Double):
    """Does nothing about requests of the kinds `waits_with` until `released` is set, not even take a payload; then all,
    in order. The `first` of each kind it answers at once."""

    def __init__(self, content: bytearray, *waits_with: int, first: int = 0) -> None:
        super().__init__(content)
        self.waits_with = frozenset(waits_with)
        self.first = first
        self.released = threading.Event()

    def answer(self, talk: Talk, request: Request) -> None:
        if request.command in self.waits_with and self.count(request.command) > self.first:
            assert self.released.wait(WAIT_SECONDS), f"nobody had it answer {request}"
        super().answer(talk, request)
