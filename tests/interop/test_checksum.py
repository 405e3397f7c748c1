"""The checksum is that of the content, whoever serves it and however it is read; and that of both sides of a copy."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import images
from support.blkhash import blkhash, blkhash_of
from support.command import copy, nbdshard, started
from support.servers import nbd_server, nbdkit, qemu_nbd

SIZE = 24 * images.MIB + 513


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images.sparse_image(tmp_path_factory.mktemp("image") / "source", SIZE)


def checksum(*words: str | Path) -> str:
    outcome = nbdshard("checksum", *words).succeeded()
    digest, name = outcome.out.rstrip("\n").split("  ")
    assert name == str(words[-1])
    assert outcome.err == ""
    return digest


def dense(image: Path, path: Path) -> Path:
    """The same content without a hole."""
    path.write_bytes(image.read_bytes())
    return path


@pytest.mark.parametrize("workers", ["1", "2", "4"])
def test_sparse_or_dense_served_or_not_and_by_any_number_of_workers_it_is_the_same(
    image: Path, tmp_path: Path, ring: str, workers: str
) -> None:
    expected, options = blkhash_of(image), ("--ring", ring, "-T", workers)
    full = dense(image, tmp_path / "dense")
    with (
        nbdkit("file", str(image), flags=["-r"]) as one,
        nbdkit("file", str(full), flags=["-r", "--no-sr"]) as two,
    ):
        for source in (image, full, one.uri, two.uri):
            assert checksum(*options, source) == expected, source


def test_servers_of_whole_sectors_give_the_same(tmp_path: Path) -> None:
    image = images.sparse_image(tmp_path / "whole", 8 * images.MIB)
    with qemu_nbd(image, "-r", clients=8) as qemu, nbd_server(image) as plain:
        assert checksum(qemu.uri) == checksum(plain.uri) == blkhash_of(image)


@pytest.mark.parametrize("request_size", ["4k", "64k", "1M"])
@pytest.mark.parametrize("range_size", ["64k", "1M", "1G"])
def test_the_sizes_of_ranges_and_requests_do_not_matter(image: Path, request_size: str, range_size: str) -> None:
    with nbdkit("file", str(image), flags=["-r"]) as server:
        options = ("--request-size", request_size, "--range-size", range_size)
        assert checksum(*options, server.uri) == checksum(*options, "--no-extents", image) == blkhash_of(image)


@pytest.mark.parametrize("size", [0, *images.ODD_SIZES, 65535, 65536, 65537])
def test_images_of_any_size_have_one(tmp_path: Path, size: int) -> None:
    image = images.random_image(tmp_path / "image", size)
    assert checksum(image) == blkhash_of(image)
    assert checksum(images.empty_image(tmp_path / "hole", size)) == blkhash(bytes(size))


def test_what_is_known_to_be_zeroes_is_not_read() -> None:
    size = 1 << 40
    with nbdkit("memory", str(size)) as server:
        outcome = nbdshard("checksum", "--json", server.uri).succeeded()
    said = json.loads(outcome.out)
    assert (said["bytes_read"], said["bytes_zero"], said["size"]) == (0, size, size)
    assert (said["source"], said["algorithm"]) == (server.uri, "blkhash sha256/64k")


def test_a_server_is_started_for_it_and_named_by_its_command(image: Path) -> None:
    outcome = nbdshard("checksum", "[", "nbdkit", "-r", "file", image, "]").succeeded()
    assert outcome.out == f"{blkhash_of(image)}  [ nbdkit -r file {image} ]\n"


def test_reads_that_fail_and_are_repeated_do_not_change_it(image: Path) -> None:
    with nbdkit("file", str(image), flags=["-r"], filters=["error"], **{"error-pread-rate": "20%"}) as server:
        assert checksum("--request-size", "64k", "--retries", "100", server.uri) == blkhash_of(image)


# -- copy --checksum ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["1", "2", "4"])
def test_a_copy_has_the_checksum_of_its_source_and_of_its_destination(
    image: Path, tmp_path: Path, ring: str, workers: str
) -> None:
    copied = images.filled_image(tmp_path / "copy", SIZE)
    with nbdkit("file", str(image), flags=["-r"]) as source, nbdkit("file", str(copied)) as destination:
        options = ("--checksum", "--ring", ring, "-T", workers, "--range-size", "4M")
        outcome = copy(*options, source.uri, destination.uri).succeeded()
        assert outcome.out == f"{blkhash_of(image)}  {source.uri}\n"
        assert "; buffered;" in outcome.last_line
        assert checksum(destination.uri) == checksum(source.uri) == blkhash_of(copied)
    images.assert_identical(image, copied)


@pytest.mark.parametrize(
    "options",
    [
        ("--no-flush",),
        ("--allocated",),
        ("--no-extents", "--request-size", "4k"),
        ("--sparse", "0"),
        ("--synchronous",),
        ("--data-path=buffer",),
        ("--destination-is-zero",),
    ],
    ids=" ".join,
)
def test_other_options_do_not_change_it(image: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    outcome = copy("--checksum", *options, image, tmp_path / "copy").succeeded()
    assert outcome.out == f"{blkhash_of(image)}  {image}\n"
    images.assert_identical(image, tmp_path / "copy")


def test_writes_that_fail_and_are_repeated_are_not_hashed_twice(image: Path, tmp_path: Path) -> None:
    copied = images.filled_image(tmp_path / "copy", SIZE)
    with nbdkit("file", str(copied), filters=["error"], **{"error-pwrite-rate": "20%"}) as destination:
        outcome = copy("--checksum", "--retries", "100", image, destination.uri).succeeded()
    assert outcome.out.startswith(blkhash_of(image))
    images.assert_identical(image, copied)


def test_what_is_salvaged_counts_as_the_zeroes_that_are_written(image: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    bad = f'[ "$4" -lt 8192 -a "$(($3+$4))" -gt 4096 ] && {{ echo EIO >&2; exit 1; }}; dd if={image} skip=$4 count=$3'
    script = [f"get_size=echo {SIZE}", f"pread={bad} iflag=skip_bytes,count_bytes status=none"]
    with nbdkit("eval", *script) as source:
        outcome = copy("--checksum", "--salvage", "--retries", "0", source.uri, copied)
    outcome.failed(3)
    assert outcome.out == f"{blkhash_of(copied)}  {source.uri}\n"
    content = bytearray(image.read_bytes())
    content[4096:8192] = bytes(4096)
    assert copied.read_bytes() == content


def test_a_destination_without_flush_does_not_change_it(image: Path, tmp_path: Path) -> None:
    copied = images.filled_image(tmp_path / "copy", SIZE)
    script = [
        "can_flush=exit 3",
        f"get_size=echo {SIZE}",
        f"pwrite=dd of={copied} bs=1M seek=$4B conv=notrunc status=none",
    ]
    with nbdkit("eval", *script, threads=1) as destination:
        outcome = copy("--checksum", "--request-size", "1M", image, destination.uri).succeeded()
    assert "durability unknown" in outcome.last_line
    assert outcome.out.startswith(blkhash_of(image))


def test_a_copy_to_standard_output_tells_it_on_standard_error(image: Path, tmp_path: Path) -> None:
    with (tmp_path / "copy").open("wb") as file:
        outcome = copy("--checksum", image, "-", stdout=file.fileno()).succeeded()
    assert outcome.last_line == f"nbdshard: {blkhash_of(image)}  {image}"
    images.assert_identical(image, tmp_path / "copy")


def test_the_last_json_object_has_it(image: Path) -> None:
    outcome = copy("--checksum", "--progress=json", image, "null:").succeeded()
    objects = [json.loads(line) for line in outcome.err.splitlines() if line.startswith("{")]
    assert objects[-1]["checksum"] == blkhash_of(image)
    assert {each["checksum"] for each in objects[:-1]} <= {None}


def test_a_copy_that_fails_has_none(image: Path) -> None:
    with nbdkit("memory", "1M") as small:
        outcome = copy("--checksum", image, small.uri).failed(1, saying=["smaller than the source"])
    assert outcome.out == ""


def test_a_worker_that_is_killed_does_not_change_it(image: Path, tmp_path: Path) -> None:
    copied, journal = images.filled_image(tmp_path / "copy", SIZE), tmp_path / "journal"
    options = ("--checksum", "-T", "2", "--range-size", "1M", "--checkpoint", "0.1", "--journal", journal)
    with (
        nbdkit("file", str(image), flags=["-r"], filters=["rate"], threads=1, rate="40M") as source,
        nbdkit("file", str(copied)) as destination,
        started("copy", *options, source.uri, destination.uri) as run,
    ):
        run.until("some of it to be durable", journal.exists)
        os.kill(run.workers()[0], signal.SIGKILL)
        outcome = run.wait().succeeded()
    assert outcome.out == f"{blkhash_of(image)}  {source.uri}\n"
    images.assert_identical(image, copied)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (("copy", "--checksum", "--data-path=splice", "a", "null:"), 2, "--checksum and --data-path=splice contradict"),
        (("copy", "--checksum", "--range-size", "2G", "a", "null:"), 2, "with --checksum it is at most 1G"),
        (("checksum", "--range-size", "2G", "a"), 2, "with --checksum it is at most 1G"),
        (("checksum",), 2, "the source is missing"),
        (("checksum", "a", "b"), 2, "one word too many: 'b'"),
        (("checksum", "null:"), 1, "null: can only be a destination"),
        (("checksum", "/nowhere/at/all"), 1, "/nowhere/at/all: "),
        (("checksum", "--journal", "x", "a"), 2, "unrecognized arguments: --journal"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_makes_no_sense_is_refused_in_one_line(words: tuple[str, ...], code: int, line: str) -> None:
    outcome = nbdshard(*words).failed(code, saying=[line])
    assert len(outcome.err.splitlines()) == 1
    assert outcome.out == ""


@pytest.fixture
def pipe_without_data() -> Iterator[int]:
    read_end, write_end = os.pipe()
    os.close(write_end)
    yield read_end
    os.close(read_end)


STREAMS = pytest.mark.parametrize("words", [("checksum", "-"), ("copy", "--checksum", "-", "null:")], ids=" ".join)


@STREAMS
def test_a_stream_is_refused(pipe_without_data: int, words: tuple[str, ...]) -> None:
    outcome = nbdshard(*words, stdin=pipe_without_data).failed(1, saying=["a stream", "has no checksum"])
    assert len(outcome.err.splitlines()) == 1


@STREAMS
def test_a_file_as_standard_input_is_none(image: Path, words: tuple[str, ...]) -> None:
    with image.open("rb") as file:
        outcome = nbdshard(*words, stdin=file.fileno()).succeeded()
    assert outcome.out == f"{blkhash_of(image)}  -\n"
