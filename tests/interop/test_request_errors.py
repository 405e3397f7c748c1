"""A server that refuses some requests is asked again; one that refuses them all fails the copy, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import images
from support.command import copy
from support.servers import nbdkit

SIZE = 8 * images.MIB


@pytest.fixture
def source_image(tmp_path: Path) -> Path:
    return images.sparse_image(tmp_path / "source", SIZE, runs=24)


@pytest.fixture
def destination_image(tmp_path: Path) -> Path:
    return images.filled_image(tmp_path / "destination", SIZE)


# Requests of 4 KiB: some 2,000 reads and writes, of which a few dozen are refused. Ranges of 64 KiB: 128 block status.
@pytest.mark.parametrize("rate", ["error-pread-rate=2%", "error-extents-rate=20%", "error-rate=2%"])
def test_a_source_that_refuses_some_requests_is_copied(
    source_image: Path, destination_image: Path, ring: str, rate: str
) -> None:
    with (
        nbdkit("file", str(source_image), rate, filters=["error"], flags=["-r"]) as source,
        nbdkit("file", str(destination_image)) as destination,
    ):
        options = ("--ring", ring, "--request-size", "4k", "--range-size", "64k")
        copy(*options, source.uri, destination.uri).succeeded()
        assert "injecting EIO" in source.stderr()
    images.assert_identical(source_image, destination_image)


# The rates keep five refusals of one request in a row (which would rightly fail the copy) at some 1 in 100,000 runs,
# and so they keep a run without any refusal: ranges of 64 KiB make some 500 zero requests.
@pytest.mark.parametrize("rate", ["error-pwrite-rate=2%", "error-zero-rate=3%", "error-rate=2%"])
def test_a_destination_that_refuses_some_requests_gets_it_all(tmp_path: Path, ring: str, rate: str) -> None:
    source_image = images.sparse_image(tmp_path / "source", 4 * SIZE, runs=24)
    destination_image = images.filled_image(tmp_path / "destination", 4 * SIZE)
    with (
        nbdkit("file", str(source_image), flags=["-r"]) as source,
        nbdkit("file", str(destination_image), rate, filters=["error"]) as destination,
    ):
        options = ("--ring", ring, "--request-size", "4k", "--range-size", "64k")
        copy(*options, source.uri, destination.uri).succeeded()
        assert "injecting EIO" in destination.stderr()
    images.assert_identical(source_image, destination_image)


def test_a_source_whose_block_status_always_fails_is_copied_as_data(
    source_image: Path, destination_image: Path, ring: str
) -> None:
    with (
        nbdkit("file", str(source_image), "error-extents-rate=100%", filters=["error"], flags=["-r"]) as source,
        nbdkit("file", str(destination_image)) as destination,
    ):
        copy("--ring", ring, source.uri, destination.uri).succeeded()
    images.assert_identical(source_image, destination_image)


@pytest.mark.parametrize("error", ["EIO", "EPERM", "ENOMEM", "EINVAL"])
def test_a_source_that_refuses_every_read_fails_the_copy_in_one_line(
    source_image: Path, destination_image: Path, ring: str, error: str
) -> None:
    with (
        nbdkit(
            "file", str(source_image), f"error={error}", "error-pread-rate=100%", filters=["error"], flags=["-r"]
        ) as source,
        nbdkit("file", str(destination_image)) as destination,
    ):
        outcome = copy("--ring", ring, source.uri, destination.uri)
    outcome.failed(1, saying=["source", str(source.folder), error, "bytes at offset", "failed"])
    assert len(outcome.err.splitlines()) == 1, str(outcome)


@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EPERM"])
def test_a_destination_that_refuses_every_write_fails_the_copy_in_one_line(
    source_image: Path, destination_image: Path, ring: str, error: str
) -> None:
    with (
        nbdkit("file", str(source_image), flags=["-r"]) as source,
        nbdkit(
            "file", str(destination_image), f"error={error}", "error-pwrite-rate=100%", filters=["error"]
        ) as destination,
    ):
        outcome = copy("--ring", ring, source.uri, destination.uri)
    outcome.failed(1, saying=["destination", str(destination.folder), error, "bytes at offset", "failed"])
    assert len(outcome.err.splitlines()) == 1, str(outcome)


def test_a_destination_that_refuses_every_zero_request_fails_or_is_written_zeroes(
    source_image: Path, destination_image: Path, ring: str
) -> None:
    with (
        nbdkit("file", str(source_image), flags=["-r"]) as source,
        nbdkit("file", str(destination_image), "error-zero-rate=100%", filters=["error"]) as destination,
    ):
        outcome = copy("--ring", ring, source.uri, destination.uri)
    if outcome.code == 0:
        images.assert_identical(source_image, destination_image)
    else:
        outcome.failed(1, saying=["destination", "EIO", "bytes at offset", "failed"])


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_server_that_shuts_down_softly_and_returns_no_more_fails_the_copy(
    source_image: Path, destination_image: Path, ring: str, side: str
) -> None:
    operation = {"source": "pread", "destination": "pwrite"}[side]
    broken = ("error=ESHUTDOWN", f"error-{operation}-rate=100%")
    source_args = (broken, ["error"]) if side == "source" else ((), [])
    destination_args = (broken, ["error"]) if side == "destination" else ((), [])
    with (
        nbdkit("file", str(source_image), *source_args[0], filters=source_args[1], flags=["-r"]) as source,
        nbdkit("file", str(destination_image), *destination_args[0], filters=destination_args[1]) as destination,
    ):
        words = ("--ring", ring, "--loss-timeout", "0", source.uri, destination.uri)
        copy(*words).failed(1, saying=[side, "the server is shutting down"])


def test_without_retries_one_refusal_fails_the_copy(source_image: Path, destination_image: Path, ring: str) -> None:
    with (
        nbdkit("file", str(source_image), "error-pread-rate=100%", filters=["error"], flags=["-r"]) as source,
        nbdkit("file", str(destination_image)) as destination,
    ):
        outcome = copy("--ring", ring, "--retries", "0", "-C", "1", source.uri, destination.uri)
    outcome.failed(1, saying=["source", "failed once", "EIO"])


def test_with_many_retries_a_source_that_mostly_refuses_is_copied(tmp_path: Path, ring: str) -> None:
    source_image = images.sparse_image(tmp_path / "source", images.MIB, runs=4)
    destination_image = images.filled_image(tmp_path / "destination", images.MIB)
    with (
        nbdkit("file", str(source_image), "error-pread-rate=60%", filters=["error"], flags=["-r"]) as source,
        nbdkit("file", str(destination_image)) as destination,
    ):
        copy("--ring", ring, "--retries", "100", source.uri, destination.uri).succeeded()
    images.assert_identical(source_image, destination_image)


def test_a_request_that_is_not_answered_in_the_time_that_was_given_loses_the_server(
    source_image: Path, destination_image: Path, ring: str
) -> None:
    with (
        nbdkit("file", str(source_image), "rdelay=60", filters=["delay"], flags=["-r"]) as source,
        nbdkit("file", str(destination_image)) as destination,
    ):
        words = ("--ring", ring, "--request-timeout", "0.5", "--loss-timeout", "0", "--no-extents")
        outcome = copy(*words, source.uri, destination.uri)
        outcome.failed(1, saying=["source", "timed out", "reading"])
