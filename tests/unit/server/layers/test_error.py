"""server/layers/error.py"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdshard.common.errors import UserError
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.chain import Wanted, open_backend

BLOCK = Range(0, 4096)
CALLS: dict[str, Callable[[Backend], object]] = {
    "read": lambda backend: backend.read(BLOCK),
    "write": lambda backend: backend.write(BLOCK, memoryview(b"x" * 4096)),
    "zero": lambda backend: backend.zero(BLOCK, may_punch=True, fast=False),
    "trim": lambda backend: backend.trim(BLOCK),
    "cache": lambda backend: backend.cache(BLOCK),
    "flush": lambda backend: backend.flush(),
    "extents": lambda backend: backend.extents(BLOCK),
}


def failing(parameters: str) -> Backend:
    return open_backend(Wanted("disk", "raw", f"error:memory:1M?{parameters}"))


def outcome(backend: Backend, call: str = "read") -> str:
    """The errno's name, or ""."""
    try:
        CALLS[call](backend)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


@pytest.mark.parametrize("call", CALLS)
def test_every_operation_can_fail_alone_or_with_all(call: str) -> None:
    assert outcome(failing("error=ENOSPC"), call) == "ENOSPC"
    alone = failing(f"error-{call}=ENOMEM")
    assert {name: outcome(alone, name) for name in CALLS} == {name: "ENOMEM" * (name == call) for name in CALLS}


def test_a_write_that_fails_changes_nothing() -> None:
    backend = failing("error-write-count=1")
    assert [outcome(backend, "write"), backend.extents(BLOCK)[0][1] & 1] == ["EIO", 1]
    assert [outcome(backend, "write"), backend.extents(BLOCK)[0][1] & 1] == ["", 0]


@pytest.mark.parametrize("rate", ["25%", "0.25"])
def test_a_rate_is_how_many_fail_and_a_seed_says_which(rate: str) -> None:
    one, other = (failing(f"error-rate={rate}&error-seed=7") for _ in range(2))
    outcomes = [outcome(one) for _ in range(1000)]
    assert 200 < outcomes.count("EIO") < 300
    assert outcomes == [outcome(other) for _ in range(1000)]


def test_nothing_fails_at_a_rate_of_nothing_and_all_does_at_one_of_all() -> None:
    assert {outcome(failing("error-rate=0")) for _ in range(100)} == {""}
    backend = failing("error-rate=100%")
    assert {outcome(backend) for _ in range(100)} == {"EIO"}


def test_a_count_is_how_many_of_the_first_fail() -> None:
    backend = failing("error-count=3")
    calls = ("read", "write", "flush", "trim", "read")
    assert [outcome(backend, call) for call in calls] == ["EIO", "EIO", "EIO", "", ""]


def test_what_is_said_of_one_operation_goes_before_what_is_said_of_all() -> None:
    backend = failing("error=ENOSPC&error-count=2&error-read-count=1")
    assert [outcome(backend) for _ in range(3)] == ["ENOSPC", "", ""]
    assert [outcome(backend, "write") for _ in range(3)] == ["ENOSPC", "ENOSPC", ""]


def test_it_fails_only_while_a_file_is_there(tmp_path: Path) -> None:
    file = tmp_path / "fail"
    backend = failing(f"error=EIO&error-file={file}")
    seen = [outcome(backend)]
    file.touch()
    seen.append(outcome(backend))
    file.unlink()
    seen.append(outcome(backend))
    assert seen == ["", "EIO", ""]


@pytest.mark.parametrize(
    ("parameters", "what"),
    [
        ("error-seed=1", "error: nothing is to fail; error=EIO, or error-rate=10%"),
        ("error=EWHAT", "error=EWHAT: EIO or EPERM or .* is expected"),
        ("error-rate=101%", "error-rate=101%: from 0 to 1, or from 0% to 100%, is expected"),
        ("error-rate=often", "error-rate=often: from 0 to 1"),
        ("error-read-count=-1", "error-read-count=-1: a number from 0"),
    ],
)
def test_an_error_that_cannot_be_meant_is_refused(parameters: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        failing(parameters)


def test_the_client_is_told_who_failed_it() -> None:
    with pytest.raises(OSError, match="the layer `error` fails this read"):
        failing("error=EIO").read(BLOCK)
