"""Every error nbdshard raises on purpose, sorted by what the caller does next.

::

    NbdshardError
    |-- RequestError      ask again: the server refused one request; the connection is fine
    |-- ConnectionLost    reconnect: the connection is gone, and every pending request with it
    |   `-- TimedOut      ... because something was waited for in vain
    |-- ProtocolError     blame the peer: it broke the NBD or the control protocol; drop it
    |-- UserError         tell the user: bad input, a refusal, a job that cannot be done
    `-- BugError          ours: an impossible event; nothing was changed
        `-- IllegalEvent

Errors carry fields and format late: `str(error)` is the one clear line a user reads (what, where, what to do).
"""

from __future__ import annotations


class NbdshardError(Exception):
    """Root of the tree; never raised itself."""


class RequestError(NbdshardError):
    """The server answered one request with an error (NBD spec, "Error values").

    Fields: `errno_name` (spec name without the prefix, "EIO"), `errno_value` (as received), `message` (text of a
    structured error chunk, already bounded and printable, or "").
    """

    def __init__(self, errno_name: str, errno_value: int, message: str = "") -> None:
        super().__init__(errno_name, errno_value, message)
        self.errno_name = errno_name
        self.errno_value = errno_value
        self.message = message

    def __str__(self) -> str:
        return f"{self.errno_name} ({self.message})" if self.message else self.errno_name


class ConnectionLost(NbdshardError):
    """The connection to `peer` ended while `doing` something; `cause` says how ("connection reset by peer")."""

    def __init__(self, peer: str, doing: str, cause: str) -> None:
        super().__init__(peer, doing, cause)
        self.peer = peer
        self.doing = doing
        self.cause = cause

    def __str__(self) -> str:
        return f"{self.peer}: connection lost while {self.doing}: {self.cause}"


class TimedOut(ConnectionLost):
    """`peer` did not answer within `seconds` while we were `doing` something."""

    def __init__(self, peer: str, doing: str, seconds: float) -> None:
        super().__init__(peer, doing, f"no answer within {seconds:g} s")
        self.seconds = seconds

    def __str__(self) -> str:
        return f"{self.peer}: timed out while {self.doing}: {self.cause}"


class ProtocolError(NbdshardError):
    """`peer` broke its protocol: `what` it sent, at `stage` ("greeting", "NBD_OPT_GO reply", "reply header")."""

    def __init__(self, peer: str, stage: str, what: str) -> None:
        super().__init__(peer, stage, what)
        self.peer = peer
        self.stage = stage
        self.what = what

    def __str__(self) -> str:
        return f"{self.peer}: protocol error in {self.stage}: {self.what}"


class UserError(NbdshardError):
    """Something only the user can mend: `what` is wrong, `where` (a URI, path, option), `advice` if there is any."""

    def __init__(self, what: str, where: str = "", advice: str = "") -> None:
        super().__init__(what, where, advice)
        self.what = what
        self.where = where
        self.advice = advice

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        return f"{line}; {self.advice}" if self.advice else line


class BugError(NbdshardError):
    """A fault of ours. The message says which promise was broken; users are asked to report it."""


class IllegalEvent(BugError):
    """`machine` was given `event` in `state`, where its table has no such entry. Nothing was changed."""

    def __init__(self, machine: str, state: str, event: str, story: str = "") -> None:
        super().__init__(machine, state, event, story)
        self.machine = machine
        self.state = state
        self.event = event
        self.story = story

    def __str__(self) -> str:
        line = f"{self.machine} has no transition for {self.event} in state {self.state}"
        return f"{line} ({self.story})" if self.story else line
