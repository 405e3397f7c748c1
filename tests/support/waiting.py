"""The one place where tests wait: poll a condition until a deadline, and say what was waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")

POLL_SECONDS = 0.005
WAIT_SECONDS = 60.0  # no wait takes a second of it; on a machine that is busy with other things one may


def wait_for(
    what: str, condition: Callable[[], Value], seconds: float = WAIT_SECONDS, poll: float = POLL_SECONDS
) -> Value:
    """The first true value of `condition()`. Raises TimeoutError naming `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s in vain for {what}")
        time.sleep(poll)
