"""The I/O loop of a worker: submit operations, wait for completions. One interface, io_uring and epoll behind it.

Order of the loop, always: submit what is prepared, take completions, let their owners act on them, submit again.

Promises of every implementation (tests/unit/common/ring runs one suite against all of them):

- `submit` never blocks and never calls back; an operation completes exactly once, out of some later `wait`.
- From `submit` until its completion has been returned by `wait`, the ring holds the operation and its buffers.
- `wait` returns after `timeout` seconds at the latest, and may return nothing earlier (a signal, a wake-up). It lets
  other threads run while it waits. A signal that has a Python handler ends it, if the ring was made in the main thread.
- Results are what the system call would give: bytes moved (short counts are normal, 0 on a stream is its end), or
  `-errno`. Nothing raises for a failed operation. A cancelled one gives `-ECANCELED`.
- `CLOSE` is how a descriptor ends: what is prepared for it is submitted or discarded, the socket shut down, the rest
  cancelled, every completion reaped, the descriptor closed, and only then does the CLOSE complete. Nothing may be
  submitted for a descriptor after its CLOSE (BugError). A `Descriptor` is a generation of its number: an operation
  prepared for one can never reach another that got the same number later.
- A WATCH is the exception to "exactly once": `wait` returns it, with what is true now in `result`, each time something
  has changed on its socket (an edge), and it stays pending. A cancellation or the CLOSE ends it, as -ECANCELED. Who
  moves all there is before each wait misses nothing. One socket is watched once, and has no RECEIVE, SEND or POLL then:
  its owner makes the system calls.
- One RECEIVE and one SEND may be pending on a stream, a second one is a BugError: io_uring gives what arrives to those
  that wait in no particular order (tried: the last of five came first). File operations complete in any order.
- SPLICE moves up to `length` bytes between a pipe and a file or block device (`descriptor`, `offset`). It waits for the
  disk if it must, never for the pipe: one that is full and to be filled, or empty and to be drained, gives `-EAGAIN`.
  So no worker is held by a reader or a writer that never comes. (A socket needs no SPLICE: POLL and WATCH say when a
  splice(2) that does not wait will move something.) What goes into a pipe is the file's own pages: a later write to the
  file, or its truncation, may change the bytes that come out, but never how many.

Duties of the caller: one thread makes, uses and closes the ring. A descriptor that belongs to somebody else (ZeroMQ's,
standard input) is attached as an os.dup of it, since the ring closes what it has. SIGPIPE stays ignored, as the
interpreter sets it at its start. Signal handlers call nothing but `wake`.

The pipe of a SPLICE stays the caller's, who keeps both ends open until the completion, as if they were buffers, and
leaves them alone that long. The kernel locks a pipe while it waits for the disk: whatever else is done to either end
waits too, even if it was told not to wait or is a close(2); only poll(2) does not. So one SPLICE is pending on a pipe
at a time, or the second holds a worker while it waits for the first. After a SPLICE that was cancelled, or failed other
than with `-EAGAIN`, what is in the pipe is unknown: drain it, or close it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Protocol


class Kind(Enum):
    """What an operation does. Sources: the man pages of the system calls named."""

    RECEIVE = auto()  # readv(2) from a stream into `buffers` (memoryviews, writable): bytes, 0 = end of stream
    SEND = auto()  # writev(2) of `buffers` to a stream, never raising SIGPIPE: bytes (at least one)
    READ = auto()  # preadv(2) at `offset`
    WRITE = auto()  # pwritev(2) at `offset`
    SPLICE = auto()  # splice(2) between a file and a pipe, see Splice: bytes, 0 = end of the file, or of the pipe
    POLL = auto()  # poll(2): wait for `mask` (select.POLLIN, POLLOUT) once; the result is the mask that came true
    WATCH = auto()  # epoll(7), edge-triggered, of a socket for `mask` (select.EPOLLIN, EPOLLOUT), until it is cancelled
    SYNC = auto()  # fdatasync(2)
    CALL = auto()  # run `function()` on a thread; its return value (or exception) is in `value`; result 0 (or -1)
    CLOSE = auto()  # end a descriptor, as described above; result 0


class Descriptor:
    """One open file, from `Ring.attach` to its CLOSE. `number` is the descriptor's; generations never meet."""

    __slots__ = ("number", "is_socket", "pending", "receiving", "sending", "watched", "closing", "closed")

    def __init__(self, number: int, is_socket: bool) -> None:
        self.number = number
        self.is_socket = is_socket
        self.pending = 0  # operations submitted and not yet completed
        self.receiving = False  # a RECEIVE is pending
        self.sending = False  # a SEND is pending
        self.watched = False  # a WATCH is pending
        self.closing = False
        self.closed = False


class Operation:
    """One system call to be, its record while under way, and its completion: reused by its owner, never copied.

    `owner` is the submitter's own: the loop calls `operation.owner(operation)` or looks at it, the ring never does. It
    returns False where that gave nobody else anything to do.
    """

    __slots__ = (
        "kind",
        "descriptor",
        "buffers",
        "offset",
        "mask",
        "function",
        "owner",
        "result",
        "value",
        "pending",
        "slot",
    )

    def __init__(
        self,
        kind: Kind,
        descriptor: Descriptor | None = None,
        *,
        buffers: Sequence[memoryview | bytes] = (),
        offset: int = 0,
        mask: int = 0,
        function: Callable[[], object] | None = None,
        owner: Callable[[Operation], bool | None] | None = None,
    ) -> None:
        self.kind = kind
        self.descriptor = descriptor
        self.buffers = buffers
        self.offset = offset
        self.mask = mask
        self.function = function
        self.owner = owner
        self.result = 0
        self.value: object = None
        self.pending = False  # between submit and completion: its fields must not be touched
        self.slot = -1  # the implementation's own


class Splice(Operation):
    """A SPLICE: from the file to a pipe's write end if `into_pipe`, else from a pipe's read end to the file.

    `pipe` is the number of that end, which is not attached; `length` is the most bytes that are to move. A class of its
    own because each field of Operation costs every READ and WRITE 13 ns.
    """

    __slots__ = ("pipe", "length", "into_pipe")

    def __init__(
        self,
        descriptor: Descriptor,
        pipe: int,
        *,
        offset: int,
        length: int,
        into_pipe: bool,
        owner: Callable[[Operation], bool | None] | None = None,
    ) -> None:
        super().__init__(Kind.SPLICE, descriptor, offset=offset, owner=owner)
        self.pipe = pipe
        self.length = length
        self.into_pipe = into_pipe


class Ring(Protocol):
    """The loop's one interface. Belongs to one thread (the process's main thread); closes with `close()`."""

    name: str  # "io_uring" or "epoll": the summary line and the log say which

    @property
    def in_flight(self) -> int:
        """Operations submitted whose completion is still to come: RING_OPERATIONS_MAX at most."""

    def attach(self, number: int, *, is_socket: bool) -> Descriptor:
        """Take over an open descriptor; the ring closes it when its CLOSE completes.

        `is_socket`: a connection of ours alone, to be shut down before it is closed; it is non-blocking. Any other
        stream may be blocking, and stays so: others may share it. BugError if that does not hold, or `number` is
        attached already.
        """

    def submit(self, operation: Operation) -> None:
        """Queue `operation`. Raises BugError if it is pending already, its descriptor is closing or another ring's, it
        moves no bytes, or RING_OPERATIONS_MAX are in flight."""

    def change_watch(self, operation: Operation, mask: int) -> None:
        """Watch for `mask` from now on. What is true already is reported once more. BugError if it is not pending."""

    def cancel(self, operation: Operation) -> None:
        """Ask for an early end of a pending operation; it still completes once, as -ECANCELED or with its result."""

    def wait(self, timeout: float) -> list[Operation]:
        """Submit what is queued, wait up to `timeout` seconds for at least one completion, return all there are."""

    def wake(self) -> None:
        """Make a `wait` under way return; safe from a signal handler and from other threads."""

    def close(self) -> None:
        """Cancel what is pending, close what is attached, free the ring. Idempotent."""
