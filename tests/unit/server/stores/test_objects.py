"""Images in an object store: what the objects are, what is asked of the store, and what its faults do."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from nbdshard.common import limits
from nbdshard.common.errors import UserError
from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range
from nbdshard.server import volume_changes
from nbdshard.server.backends.base import Backend
from nbdshard.server.chain import STORES, sharded
from nbdshard.server.stores import objects
from nbdshard.server.stores.base import Store
from nbdshard.server.stores.bucket import Bucket
from nbdshard.server.volumes import Volume
from support.s3 import PASSWORD, S3, content, keys, read, write
from support.s3_proxy import Answer, Asked, Proxied
from support.waiting import wait_for

MIB = 1 << 20
CHUNK = 65_536
SIZE = 40 * CHUNK + 1000
Open = Callable[..., Backend]


@pytest.fixture
def opened(store: Proxied, prefix: str) -> Iterator[Open]:
    """Opens the image; closed at the end."""
    made: list[Backend] = []

    def open_it(size: int | None = SIZE, *, read_only: bool = False, **parameters: str) -> Backend:
        if size is not None:
            parameters |= {"size": str(size), "chunk": str(CHUNK)}
        made.append(sharded(STORES["s3"]).open(store.s3.opening(prefix, read_only=read_only, **parameters)))
        return made[-1]

    yield open_it
    store.rule = lambda _: None
    for image in made:
        image.close()


def chunks(bucket: Bucket) -> list[str]:
    return [key for key in keys(bucket) if key.endswith(".chunk")]


def failing(method: str, part: str, answer: Answer) -> Callable[[Asked], Answer | None]:
    return lambda asked: answer if asked.method == method and part in asked.key else None


# -- what is there


def test_a_chunk_is_an_object_with_what_was_written(opened: Open, bucket: Bucket) -> None:
    image = opened()
    write(image, CHUNK - 2, b"abcd")
    assert content(bucket, "disk.0.chunk") == bytes(CHUNK - 2) + b"ab"
    assert content(bucket, "disk.1.chunk") == b"cd"
    write(image, CHUNK + 1, b"xyz")
    assert content(bucket, "disk.1.chunk") == b"cxyz"
    assert read(image, CHUNK - 3, 8) == b"\0abcxyz\0"


def test_an_image_is_found_again_without_its_size(opened: Open) -> None:
    image = opened()
    write(image, SIZE - 5, b"five!")
    image.close()
    again = opened(None)
    assert (again.size, again.block_size) == (SIZE, CHUNK)
    assert read(again, SIZE - 5, 5) == b"five!"


def test_a_read_of_what_an_object_does_not_reach_is_zeroes(opened: Open) -> None:
    image = opened()
    write(image, 0, b"abc")
    assert read(image, 2, 3) == b"c\0\0"
    assert read(image, 3, 100) == bytes(100)
    assert read(image, CHUNK * 3, CHUNK * 2) == bytes(CHUNK * 2)


def test_a_whole_chunk_is_put_without_being_read(opened: Open, store: Proxied) -> None:
    image = opened()
    write(image, 0, b"x" * CHUNK)
    write(image, 40 * CHUNK, b"y" * 1000)  # the last one, which is short
    assert (store.count("PUT", ".chunk"), store.count("GET", ".chunk")) == (2, 0)
    write(image, 5, b"z")
    assert (store.count("PUT", ".chunk"), store.count("GET", ".chunk")) == (3, 1)


def test_a_chunk_of_nothing_but_zeroes_is_deleted(opened: Open, bucket: Bucket) -> None:
    image = opened()
    write(image, 0, b"a" * 4 * CHUNK)
    image.zero(Range(CHUNK - 4096, 2 * CHUNK), may_punch=True, fast=False)
    assert chunks(bucket) == ["disk.0.chunk", "disk.2.chunk", "disk.3.chunk"]
    assert len(content(bucket, "disk.0.chunk")) == CHUNK - 4096
    image.trim(Range(0, CHUNK - 4096))
    write(image, 2 * CHUNK, bytes(CHUNK))
    assert chunks(bucket) == ["disk.3.chunk"]
    assert read(image, 0, 4 * CHUNK) == bytes(3 * CHUNK) + b"a" * CHUNK


def test_zeroes_that_cannot_be_fast_are_refused_without_a_transfer(opened: Open, store: Proxied) -> None:
    image = opened()
    write(image, 0, b"x" * CHUNK)
    store.asked.clear()
    with pytest.raises(OSError, match="take as long as data") as caught:
        image.zero(Range(10, 20), may_punch=True, fast=True)
    assert caught.value.errno == errno.ENOTSUP
    image.zero(Range(CHUNK + 10, CHUNK + 20), may_punch=True, fast=True)  # of a chunk that is not there
    assert {asked.method for asked in store.asked if asked.is_of_chunk} <= {"GET", "DELETE"}


def test_zeroes_behind_the_end_of_an_object_leave_it_as_it_is(opened: Open, bucket: Bucket, store: Proxied) -> None:
    image = opened()
    write(image, 0, b"x" * 100)
    store.asked.clear()
    image.zero(Range(100, 200), may_punch=True, fast=False)
    assert store.count("PUT", ".chunk") == 0
    assert content(bucket, "disk.0.chunk") == b"x" * 100


def test_zeroes_with_something_behind_them_are_kept(opened: Open, bucket: Bucket) -> None:
    image = opened()
    write(image, 0, b"a" * CHUNK)
    image.zero(Range(10, 20), may_punch=True, fast=False)
    image.zero(Range(CHUNK * 7, CHUNK * 7 + 5), may_punch=True, fast=False)
    assert content(bucket, "disk.0.chunk") == b"a" * 10 + bytes(10) + b"a" * (CHUNK - 20)
    assert chunks(bucket) == ["disk.0.chunk"]


def test_what_we_deleted_is_not_asked_for_again(opened: Open, store: Proxied) -> None:
    image = opened()
    write(image, 0, b"a" * CHUNK)
    image.trim(Range(0, CHUNK))
    store.asked.clear()
    assert read(image, 0, 10) == bytes(10)
    image.trim(Range(0, CHUNK))
    assert not store.count("GET", ".chunk") and not store.count("DELETE")


# -- block status


def test_block_status_is_taken_from_a_listing(opened: Open, store: Proxied) -> None:
    image = opened()
    for chunk in (1, 2, 10, 11, 40):
        write(image, chunk * CHUNK, b"x")
    image.close()
    again = opened(None)
    store.asked.clear()
    expected = [
        (Range(0, CHUNK), 3),
        (Range(CHUNK, 3 * CHUNK), 0),
        (Range(3 * CHUNK, 10 * CHUNK), 3),
        (Range(10 * CHUNK, 12 * CHUNK), 0),
        (Range(12 * CHUNK, 40 * CHUNK), 3),
        (Range(40 * CHUNK, SIZE), 0),
    ]
    assert again.extents(Range(0, SIZE)) == expected
    write(again, 0, b"x")
    again.trim(Range(CHUNK, 12 * CHUNK))
    assert again.extents(Range(0, SIZE)) == [(Range(0, CHUNK), 0), (Range(CHUNK, 40 * CHUNK), 3), expected[-1]]
    assert store.count("GET", ".chunk") == 1  # of the chunk a part of which was written


def test_a_listing_of_many_pages(opened: Open, bucket: Bucket) -> None:
    size = 2500 * CHUNK
    opened(size).close()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: bucket.put(f"disk.{number}.chunk", b"x"), range(0, 2500, 2)))
    bucket.put("disk.99999999999.chunk", b"x")  # beyond the end, and others that are none
    bucket.put("disk.007.chunk", b"x")
    bucket.put("diskette.1.chunk", b"x")
    image = opened(None)
    found: Extents = []
    while not found or found[-1][0].end < size:
        found += image.extents(Range(found[-1][0].end if found else 0, size))
    assert found == [(Range.of(number * CHUNK, CHUNK), 3 if number % 2 else 0) for number in range(2500)]


def test_until_a_listing_succeeds_everything_is_data(
    opened: Open, store: Proxied, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "LISTING_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(objects, "LISTING_WAIT_SECONDS", 0.0)
    opened().close()
    store.rule = lambda asked: Answer(500) if asked.method == "GET" and not asked.key else None
    image = opened(None, read_only=True)
    assert image.extents(Range(0, SIZE)) == [(Range(0, SIZE), 0)]
    store.rule = lambda _: None
    wait_for("the listing", lambda: image.extents(Range(0, SIZE)) == [(Range(0, SIZE), 3)])


def test_a_store_whose_listings_are_not_trusted_is_asked_for_each_chunk(opened: Open, store: Proxied) -> None:
    image = opened(listing="no")
    write(image, CHUNK, b"x")
    assert image.extents(Range(0, 3 * CHUNK)) == [
        (Range(0, CHUNK), 3),
        (Range(CHUNK, 2 * CHUNK), 0),
        (Range(2 * CHUNK, 3 * CHUNK), 3),
    ]
    assert store.count("GET", "disk.2.chunk") == 1


# -- many at once


def test_a_request_over_many_chunks_is_carried_out_side_by_side(opened: Open, store: Proxied) -> None:
    image = opened()
    is_full = threading.Event()

    def hold(asked: Asked) -> Answer | None:
        if ".chunk" in asked.key:
            if store.under_way >= limits.OBJECT_WRITES_AT_ONCE:
                is_full.set()
            assert is_full.wait(30)
        return None

    store.rule = hold
    write(image, 0, b"x" * 40 * CHUNK)
    assert store.under_way_max == limits.OBJECT_WRITES_AT_ONCE


def test_reads_do_not_wait_for_writes(opened: Open, store: Proxied) -> None:
    image = opened()
    write(image, 0, b"r" * CHUNK)
    may_go_on = threading.Event()

    def hold(asked: Asked) -> Answer | None:
        if asked.method == "PUT" and ".chunk" in asked.key:
            assert may_go_on.wait(30)
        return None

    store.rule = hold
    writer = threading.Thread(target=write, args=(image, CHUNK, b"w" * 39 * CHUNK))
    writer.start()
    try:
        wait_for("every place of a write to be taken", lambda: store.under_way == limits.OBJECT_WRITES_AT_ONCE)
        assert read(image, 0, CHUNK) == b"r" * CHUNK
    finally:
        may_go_on.set()
        writer.join()


def test_large_chunks_are_fewer_at_a_time(s3: S3, prefix: str) -> None:
    store = objects.ObjectStore(s3.bucket(prefix), can_list=False)
    store.track(Volume(1 << 40, 32 << 20, "disk.", ".chunk", "disk.volume"))
    assert store._reads.count == store._writes.count == limits.OBJECT_TRANSFER_BYTES_MAX // (32 << 20)


def test_parts_of_one_chunk_from_many_threads_are_all_there(opened: Open) -> None:
    image = opened()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: write(image, n * 100, bytes([n + 1]) * 100), range(64)))
    assert read(image, 0, 6400) == b"".join(bytes([n + 1]) * 100 for n in range(64))


# -- faults


def test_a_store_that_finds_nothing_where_there_is_something_is_asked_again(opened: Open, store: Proxied) -> None:
    image = opened()
    write(image, 0, b"a" * CHUNK)
    answers = iter([Answer(416, "InvalidRange")])
    store.rule = lambda asked: next(answers, None) if asked.method == "GET" and asked.is_of_chunk else None
    assert read(image, 0, CHUNK) == b"a" * CHUNK
    store.rule = failing("GET", ".chunk", Answer(416, "InvalidRange"))
    with pytest.raises(OSError, match="finds nothing where the object has bytes"):
        read(image, 0, CHUNK)


@pytest.mark.parametrize(
    ("answer", "number", "sentence"),
    [
        (Answer(503, "SlowDown"), errno.EIO, "reading disk.0.chunk: the object store answered 503 SlowDown"),
        (Answer(500), errno.EIO, "reading disk.0.chunk: the object store answered 500"),
        (Answer(403, "AccessDenied"), errno.EACCES, "reading disk.0.chunk: the object store answered 403 AccessDenied"),
        (Answer(404, "NoSuchBucket"), errno.EIO, "reading disk.0.chunk: the object store answered 404 NoSuchBucket"),
        (Answer(404), errno.EIO, "reading disk.0.chunk: the object store answered 404"),
        (Answer(drop=True), errno.EIO, "reading disk.0.chunk: the object store cannot be reached"),
        (Answer(cut=100), errno.EIO, "reading disk.0.chunk: the object store"),
    ],
)
def test_a_read_that_fails_is_told(opened: Open, store: Proxied, answer: Answer, number: int, sentence: str) -> None:
    """Zeroes only where the store says that this very object is not there."""
    image = opened()
    write(image, 0, b"a" * CHUNK)
    store.rule = failing("GET", ".chunk", answer)
    with pytest.raises(OSError) as raised:
        read(image, 0, CHUNK)
    assert (raised.value.errno, str(raised.value.strerror)[: len(sentence)]) == (number, sentence)
    store.rule = lambda _: None
    assert read(image, 0, CHUNK) == b"a" * CHUNK


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        (Answer(503, "SlowDown"), errno.EIO),
        (Answer(507), errno.ENOSPC),
        (Answer(403, "QuotaExceeded"), errno.ENOSPC),
        (Answer(403, "AccessDenied"), errno.EACCES),
        (Answer(drop=True), errno.EIO),
    ],
)
def test_a_write_that_fails_is_told_and_what_was_there_stays(
    opened: Open, store: Proxied, answer: Answer, number: int
) -> None:
    image = opened()
    write(image, 0, b"a" * CHUNK)
    store.rule = failing("PUT", ".chunk", answer)
    with pytest.raises(OSError) as raised:
        write(image, 10, b"b")
    assert raised.value.errno == number
    assert "writing disk.0.chunk" in str(raised.value.strerror)
    store.rule = lambda _: None
    image.flush()  # what was acknowledged is there
    assert read(image, 0, CHUNK) == b"a" * CHUNK


def test_a_part_is_not_written_where_the_rest_cannot_be_read(opened: Open, store: Proxied, bucket: Bucket) -> None:
    image = opened()
    write(image, 0, b"a" * CHUNK)
    store.rule = failing("GET", ".chunk", Answer(500))
    for change in (
        lambda: write(image, 10, b"b"),
        lambda: image.trim(Range(0, 10)),
    ):
        with pytest.raises(OSError, match="answered 500"):
            change()
    assert content(bucket, "disk.0.chunk") == b"a" * CHUNK


def test_a_deletion_that_fails_is_told(opened: Open, store: Proxied) -> None:
    image = opened()
    write(image, 0, b"a" * CHUNK)
    store.rule = lambda asked: Answer(500) if asked.method == "DELETE" else None
    with pytest.raises(OSError, match=r"deleting disk\.0\.chunk"):
        image.trim(Range(0, CHUNK))
    store.rule = lambda _: None
    assert read(image, 0, CHUNK) == b"a" * CHUNK


def test_a_store_that_does_not_answer_is_given_up(opened: Open, store: Proxied) -> None:
    image = opened(timeout="1s")
    write(image, 0, b"a" * CHUNK)
    may_end = threading.Event()

    def stall(asked: Asked) -> Answer | None:
        if ".chunk" in asked.key:
            may_end.wait(30)
            return Answer(drop=True)
        return None

    store.rule = stall
    try:
        with pytest.raises(OSError, match=r"reading disk\.0\.chunk: the object store took too long"):
            read(image, 0, CHUNK)
        with pytest.raises(OSError, match=r"writing disk\.1\.chunk: the object store took too long"):
            write(image, CHUNK, b"b" * CHUNK)
    finally:
        may_end.set()


def test_a_chunk_that_is_longer_than_a_chunk_is_not_shortened(opened: Open, bucket: Bucket) -> None:
    image = opened()
    bucket.put("disk.0.chunk", b"x" * (CHUNK + 1))
    with pytest.raises(OSError, match=r"disk\.0\.chunk has 65537 bytes, and a chunk 65536"):
        write(image, 5, b"a")


# -- what is done to a volume that nobody serves


def test_a_volume_is_listed_resized_and_deleted(store: Proxied, prefix: str, bucket: Bucket) -> None:
    size = 12 * MIB  # in chunks of 4 MiB
    image = sharded(STORES["s3"]).open(store.s3.opening(prefix, size=str(size)))
    write(image, 0, b"a" * size)
    image.close()

    def changing() -> Store:
        return STORES["s3"].open(store.s3.opening(prefix))

    with contextlib.closing(changing()) as there:
        (found,) = volume_changes.listed(there)
        assert (found.name, found.stored_bytes) == ("disk", size)
    with contextlib.closing(changing()) as there:
        volume_changes.resize(there, "disk", 6 * MIB, may_shrink=True)
    assert chunks(bucket) == ["disk.0.chunk", "disk.1.chunk"]
    assert len(content(bucket, "disk.1.chunk")) == 2 * MIB
    with contextlib.closing(changing()) as there:
        volume_changes.delete(there, "disk")
    assert not chunks(bucket) and "disk.volume" not in keys(bucket)


# -- opening


def test_a_volume_that_is_not_there(opened: Open) -> None:
    with pytest.raises(UserError, match="disk: there is no such volume; size= makes a new one"):
        opened(None)


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (Answer(403, "InvalidAccessKeyId"), "the object store answered 403 InvalidAccessKeyId"),
        (Answer(404, "NoSuchBucket"), "the object store answered 404 NoSuchBucket"),
        (Answer(drop=True), "the object store cannot be reached"),
    ],
)
def test_a_store_that_lets_nobody_in_is_told_in_a_line(opened: Open, store: Proxied, answer: Answer, what: str) -> None:
    store.rule = lambda _: answer
    for read_only in (False, True):
        with pytest.raises(UserError, match=what) as raised:
            opened(read_only=read_only)
        assert PASSWORD not in str(raised.value) and "\n" not in str(raised.value)
