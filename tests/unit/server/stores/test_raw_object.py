"""An image that is one object: a flush uploads it, others write meanwhile, and an upload that fails loses nothing."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator

import pytest

from nbdshard.common.errors import UserError
from nbdshard.common.nbd.constants import TransmissionFlag
from nbdshard.common.ranges import Range
from nbdshard.server.backends import object as object_backend
from nbdshard.server.backends.base import Backend
from nbdshard.server.backends.object import WholeObject
from nbdshard.server.stores.bucket import Bucket
from nbdshard.server.stores.clouds import open_raw
from support.s3 import content, read, write
from support.s3_proxy import Answer, Asked, Proxied
from support.waiting import wait_for

MIB = 1 << 20
SIZE = 20 * MIB + 512
KEY = "disk.img"
Open = Callable[..., Backend]


@pytest.fixture
def opened(store: Proxied, prefix: str) -> Iterator[Open]:
    made: list[Backend] = []

    def open_it(*, read_only: bool = False, **parameters: str) -> Backend:
        made.append(open_raw("s3", store.s3.opening(f"{prefix}/{KEY}", read_only=read_only, **parameters)))
        return made[-1]

    yield open_it
    store.rule = lambda _: None
    for image in made:
        image.close()


def is_upload(asked: Asked) -> bool:
    return asked.key.endswith(KEY) and asked.method in ("PUT", "POST")


def test_an_object_is_read_by_ranges(opened: Open, bucket: Bucket, store: Proxied) -> None:
    bucket.put(KEY, b"0123456789" * 100)
    image = opened(read_only=True)
    assert (image.size, read(image, 15, 10)) == (1000, b"5678901234")
    assert image.flags & TransmissionFlag.READ_ONLY
    assert store.count("PUT") == 0  # no lock either


def test_what_is_written_is_read_at_once_and_in_the_object_after_a_flush(opened: Open, bucket: Bucket) -> None:
    old = random.Random(1).randbytes(SIZE)
    bucket.put(KEY, old)
    image = opened()
    write(image, 10 * MIB - 3, b"abcdef")
    image.zero(Range(1000, 2 * MIB), may_punch=True, fast=False)
    image.trim(Range(SIZE - 512, SIZE))
    expected = bytearray(old)
    expected[10 * MIB - 3 : 10 * MIB + 3] = b"abcdef"
    expected[1000 : 2 * MIB] = bytes(2 * MIB - 1000)
    expected[SIZE - 512 :] = bytes(512)
    assert read(image, 0, SIZE) == expected
    assert content(bucket, KEY) == old
    image.flush()
    assert content(bucket, KEY) == expected
    write(image, 0, b"again")
    expected[:5] = b"again"
    assert read(image, 0, SIZE) == expected
    image.flush()
    assert content(bucket, KEY) == expected


def test_a_flush_with_nothing_new_asks_nothing(opened: Open, bucket: Bucket, store: Proxied) -> None:
    bucket.put(KEY, b"x" * 1000)
    image = opened()
    write(image, 0, b"y")
    image.flush()
    store.asked.clear()
    image.flush()
    assert not any(is_upload(asked) for asked in store.asked)


def test_a_new_object_is_zeroes_and_there_after_a_flush(opened: Open, bucket: Bucket) -> None:
    image = opened(size="9M")
    assert read(image, 0, 9 * MIB) == bytes(9 * MIB)
    assert image.extents(Range(0, 9 * MIB)) == [(Range(0, 9 * MIB), 3)]
    image.flush()
    assert content(bucket, KEY) == bytes(9 * MIB)


def test_others_read_and_write_while_it_is_uploaded(opened: Open, bucket: Bucket, store: Proxied) -> None:
    image = opened(size=str(SIZE))
    write(image, 0, b"first" + bytes(60))
    is_held, may_go_on = threading.Event(), threading.Event()

    def hold(asked: Asked) -> Answer | None:
        if is_upload(asked):
            is_held.set()
            assert may_go_on.wait(30)
        return None

    store.rule = hold
    flush = threading.Thread(target=image.flush)
    flush.start()
    try:
        assert is_held.wait(30)
        write(image, 3, b"second")
        assert read(image, 0, 10) == b"firsecond\0"
    finally:
        may_go_on.set()
        flush.join()
    assert content(bucket, KEY)[:10] == b"first" + bytes(5)  # what was written before the flush began
    assert read(image, 0, 10) == b"firsecond\0"
    image.flush()
    assert content(bucket, KEY)[:10] == b"firsecond\0"


@pytest.mark.parametrize("answer", [Answer(503), Answer(drop=True), Answer(507)])
def test_an_upload_that_fails_is_told_and_the_next_one_has_everything(
    opened: Open, bucket: Bucket, store: Proxied, answer: Answer
) -> None:
    old = random.Random(2).randbytes(SIZE)
    bucket.put(KEY, old)
    image = opened()
    write(image, 5 * MIB, b"before")
    wrote = threading.Event()

    def fail_late(asked: Asked) -> Answer | None:
        if asked.method == "PUT" and is_upload(asked):  # a part: what is written now goes to the second overlay
            if not wrote.is_set():
                wrote.set()
                write(image, 5 * MIB + 3, b"during")
                write(image, 6 * MIB, b"elsewhere")
            return answer
        return None

    store.rule = fail_late
    with pytest.raises(OSError, match=r"writing disk\.img"):
        image.flush()
    store.rule = lambda _: None
    assert content(bucket, KEY) == old
    assert image.losses == 0
    expected = bytearray(old)
    expected[5 * MIB : 5 * MIB + 9] = b"befduring"
    expected[6 * MIB : 6 * MIB + 9] = b"elsewhere"
    assert read(image, 0, SIZE) == expected
    image.flush()
    assert content(bucket, KEY) == expected


def test_an_object_that_cannot_be_read_is_not_uploaded_with_a_gap(opened: Open, bucket: Bucket, store: Proxied) -> None:
    old = random.Random(3).randbytes(SIZE)
    bucket.put(KEY, old)
    image = opened()
    write(image, 0, b"x" * 100_000)
    store.rule = lambda asked: Answer(500) if asked.method == "GET" and asked.key.endswith(KEY) else None
    with pytest.raises(OSError, match=r"reading disk\.img: the object store answered 500"):
        image.flush()
    assert content(bucket, KEY) == old


def test_a_spool_that_is_full_is_uploaded_first(opened: Open, bucket: Bucket) -> None:
    image = opened(size="128M", spool="64M")
    for start in range(0, 128 * MIB, 8 * MIB):
        write(image, start, bytes([1 + (start >> 23)]) * 8 * MIB)
    there = bucket.get(KEY, Range.of(56 * MIB, 1))
    assert there is not None and bytes(there.data) == b"\x08"


def test_an_object_that_somebody_else_changed_is_an_error(opened: Open, bucket: Bucket) -> None:
    bucket.put(KEY, b"x" * 1000)
    image = opened()
    bucket.put(KEY, b"x" * 999)
    with pytest.raises(OSError, match=r"disk\.img has 999 bytes instead of 1000: somebody else has changed it"):
        read(image, 0, 10)
    bucket.delete(KEY)
    with pytest.raises(OSError, match=r"disk\.img is gone"):
        read(image, 0, 10)


def test_random_requests_and_flushes_leave_what_a_reference_holds(opened: Open, bucket: Bucket, seed: int) -> None:
    size = 3 * MIB + 1000
    chance = random.Random(seed)
    reference = bytearray(size)
    image = opened(size=str(size))
    for _ in range(200):
        length = chance.choice([1, 511, 4096, 65_536, 300_001])
        start = chance.randrange(size - length)
        match chance.choice(["write", "write", "zero", "trim", "read", "flush"]):
            case "write":
                data = chance.randbytes(length)
                write(image, start, data)
                reference[start : start + length] = data
            case "zero":
                image.zero(Range.of(start, length), may_punch=chance.random() < 0.5, fast=False)
                reference[start : start + length] = bytes(length)
            case "trim":
                image.trim(Range.of(start, length))
                reference[start : start + length] = read(image, start, length)
            case "read":
                assert read(image, start, length) == reference[start : start + length]
            case _ if chance.random() < 0.3:
                image.flush()
                assert content(bucket, KEY) == reference
    image.flush()
    assert content(bucket, KEY) == reference


def test_who_was_robbed_of_it_uploads_nothing(opened: Open, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbdshard.server.stores import leases

    monkeypatch.setattr(leases, "VOLUME_LEASE_RENEWAL_SECONDS", 0.02)
    bucket.put(KEY, b"x" * 1000)
    first = opened()
    write(first, 0, b"first")
    second = opened(steal="yes")
    wait_for("the first to see it", lambda: first.losses == 1)
    for call in (first.flush, lambda: write(first, 0, b"again")):
        with pytest.raises(OSError, match="has taken it over"):
            call()
    assert read(second, 0, 5) == b"xxxxx"


@pytest.mark.parametrize(
    ("parameters", "what"),
    [
        ({}, "disk.img: there is no such object; size= makes a new one"),
        ({"size": "0"}, "disk.img: a size of 0 bytes"),
        ({"size": "1M", "spool": "1M"}, "at least 64 MiB are needed"),
        ({"size": "1000T"}, "too many for one object"),
    ],
)
def test_an_object_that_cannot_be_is_told_in_a_line(opened: Open, parameters: dict[str, str], what: str) -> None:
    with pytest.raises(UserError, match=what):
        opened(**parameters)
    opened(size="1M")  # it was given back


def test_another_size_than_it_has_is_refused(opened: Open, bucket: Bucket) -> None:
    bucket.put(KEY, b"x" * 1000)
    with pytest.raises(UserError, match=r"size=1048576, and the object has 1000 bytes"):
        opened(size="1M")


@pytest.mark.parametrize(
    ("size", "part"), [(1, 8), (8000, 8), (8001, 9), (64_000, 64), (640_000, 64)], ids=lambda each: f"{each}M"
)
def test_parts_are_as_small_as_their_number_allows(bucket: Bucket, size: int, part: int) -> None:
    whole = WholeObject(bucket, KEY, size * MIB, is_there=False)
    assert object_backend._part_bytes(whole) == part * MIB
