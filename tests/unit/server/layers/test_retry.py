"""server/layers/retry.py"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from nbdshard.common.errors import UserError
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.backends.memory import MemoryBackend
from nbdshard.server.chain import Wanted, open_backend
from nbdshard.server.device import Hole
from nbdshard.server.layers.base import Passing
from nbdshard.server.layers.retry import PASSING, Patience, Retry
from support.backends import content_of

BLOCK = Range(0, 4096)
QUICK = Patience(retries=5, delay=0.001)


class Shaky(Passing):
    """Calls fail with the errnos of `failures`, in order; then they succeed. `loses`: after which calls it has lost."""

    def __init__(self, failures: Sequence[int], loses: Sequence[int] = ()) -> None:
        super().__init__(MemoryBackend(1 << 20))
        self.failures = list(failures)
        self.calls = 0
        self._loses = loses
        self._lost = 0

    @property
    def losses(self) -> int:
        return self._lost

    def _call(self) -> None:
        self.calls += 1
        self._lost += self.calls in self._loses
        if self.failures:
            raise OSError(self.failures.pop(0), f"failure {self.calls}")

    def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
        self._call()
        return super().read(where)

    def write(self, where: Range, data: memoryview) -> None:
        self._call()
        super().write(where, data)

    def zero(self, where: Range, *, may_punch: bool, fast: bool) -> None:
        super().zero(Range(where.start, where.start + where.length // 2), may_punch=may_punch, fast=fast)
        self._call()
        if fast:
            raise OSError(errno.ENOTSUP, "slow")
        super().zero(where, may_punch=may_punch, fast=fast)

    def flush(self) -> None:
        self._call()


def over(shaky: Shaky, patience: Patience = QUICK, ending: threading.Event | None = None) -> Retry:
    return Retry(shaky, patience, ending or threading.Event())


@pytest.mark.parametrize("number", sorted(PASSING))
def test_what_may_pass_is_tried_again(number: int) -> None:
    shaky = Shaky([number] * 3)
    over(shaky).read(BLOCK)
    assert shaky.calls == 4


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSPC, errno.EPERM, errno.EROFS, errno.ENOTSUP])
def test_what_stays_wrong_is_told_at_once(number: int) -> None:
    shaky = Shaky([number])
    with pytest.raises(OSError) as caught:
        over(shaky).write(BLOCK, memoryview(bytes(4096)))
    assert (caught.value.errno, shaky.calls) == (number, 1)


def test_zeroes_are_refused_for_being_slow_at_the_first_try_only() -> None:
    """Half of it may be done by then."""
    shaky = Shaky([errno.EIO])
    retry = over(shaky)
    retry.write(BLOCK, memoryview(b"x" * BLOCK.length))
    shaky.failures = [errno.EIO]
    retry.zero(BLOCK, may_punch=True, fast=True)
    assert content_of(retry, BLOCK) == bytes(BLOCK.length)
    with pytest.raises(OSError, match="slow"):
        retry.zero(BLOCK, may_punch=True, fast=True)


def test_after_so_many_tries_the_last_error_is_told() -> None:
    shaky = Shaky([errno.EIO] * 9)
    with pytest.raises(OSError, match="failure 6"):
        over(shaky).read(BLOCK)
    assert shaky.calls == 6


def test_no_try_begins_after_the_time_for_all_of_them() -> None:
    shaky = Shaky([errno.EIO] * 9)
    with pytest.raises(OSError, match="failure 1"):
        over(shaky, Patience(retries=5, delay=4.0, total=1.0)).read(BLOCK)


class Pauses(threading.Event):
    """Notes what is waited for."""

    def __init__(self, meeting: int = 1) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._meeting = threading.Barrier(meeting)

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.seconds.append(timeout)
        self._meeting.wait(30)
        return False


def test_pauses_double_up_to_a_limit() -> None:
    pauses = Pauses()
    over(Shaky([errno.EIO] * 7), Patience(retries=7, delay=0.4, total=60.0), pauses).read(BLOCK)
    for waited, longest in zip(pauses.seconds, (0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0), strict=True):
        assert longest / 2 <= waited <= longest


def test_requests_are_tried_again_side_by_side() -> None:
    pauses = Pauses(meeting=4)  # one after another they would never meet
    retry = over(Shaky([errno.EIO] * 4), QUICK, pauses)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(retry.read, [BLOCK] * 4))


def test_a_flush_is_tried_again_where_nothing_was_lost() -> None:
    shaky = Shaky([errno.EIO] * 2)
    over(shaky).flush()
    assert shaky.calls == 3


def test_a_flush_that_tells_of_a_loss_is_never_tried_again() -> None:
    shaky = Shaky([errno.ETIMEDOUT, errno.EIO], loses=[2])
    with pytest.raises(OSError, match="failure 2"):
        over(shaky).flush()
    assert shaky.calls == 2


def test_a_loss_while_a_flush_is_tried_again_is_told_although_that_succeeds() -> None:
    shaky = Shaky([errno.ETIMEDOUT], loses=[2])
    with pytest.raises(OSError, match="something was lost while this flush was tried again"):
        over(shaky).flush()


def test_losses_before_a_flush_do_not_concern_it() -> None:
    shaky = Shaky([], loses=[1])
    retry = over(shaky)
    retry.write(BLOCK, memoryview(bytes(4096)))
    shaky.failures = [errno.EIO]
    retry.flush()
    assert (shaky.calls, retry.losses) == (3, 1)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda backend: backend.read(BLOCK), errno.ESHUTDOWN),
        (lambda backend: backend.write(BLOCK, memoryview(bytes(4096))), None),
        (lambda backend: backend.flush(), None),
    ],
)
def test_once_the_server_ends_only_what_was_to_be_written_is_tried_again(
    call: Callable[[Backend], object], expected: int | None
) -> None:
    ending = threading.Event()
    ending.set()
    found = None
    try:
        call(over(Shaky([errno.EIO]), QUICK, ending))
    except OSError as error:
        found = error.errno
    assert found == expected


def test_once_the_server_ends_a_pause_ends_with_it() -> None:
    ending = threading.Event()
    retry = over(Shaky([errno.EIO]), Patience(delay=3600.0, total=7200.0), ending)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(retry.read, BLOCK)
        ending.set()
        assert isinstance(reading.exception(30), OSError)


@pytest.mark.parametrize(
    ("parameters", "what"),
    [
        ("retries=-1", "retries=-1: a number from 0"),
        ("retry-delay=6s", "retry-delay=6s: at most 5s is allowed"),
        ("retry-max=2h", "retry-max=2h: at most 3600s is allowed"),
    ],
)
def test_a_patience_that_cannot_be_meant_is_refused(parameters: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        open_backend(Wanted("disk", "raw", f"retry:memory:1M?{parameters}"))


def test_errors_are_hidden_by_the_layer_in_front_of_them() -> None:
    backend = open_backend(Wanted("disk", "raw", "retry:error:memory:1M?error-count=4&retry-delay=1ms"))
    backend.write(BLOCK, memoryview(b"x" * 4096))
    assert bytes(backend.read(BLOCK)[0]) == b"x" * 4096  # type: ignore[arg-type]
