"""Requests that fail, on both data paths: what was spliced is read again, what was in a buffer is sent again."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import images
from support.command import copy
from support.servers import nbdkit

SIZE = 64 * images.MIB
# 256 requests of 256 KiB, the shortest that are spliced. At 4 % five refusals of one request in a row, which would
# rightly fail the copy, come once in 40,000 runs, and a run without any as seldom.
OPTIONS = ("-S", "0", "--request-size", "256k", "--range-size", "4M")
PATHS = pytest.mark.parametrize("path", ["splice", "buffer"])


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images.random_image(tmp_path_factory.mktemp("image") / "source", SIZE)


@PATHS
@pytest.mark.parametrize("rate", ["error-pread-rate=4%", "error-pwrite-rate=4%"])
def test_refused_requests_are_made_good(image: Path, tmp_path: Path, ring: str, path: str, rate: str) -> None:
    copied = images.empty_image(tmp_path / "destination", SIZE)
    broken = {"filters": ["error"]}
    reads = rate.startswith("error-pread")
    with (
        nbdkit("file", str(image), *([rate] if reads else []), flags=["-r"], **(broken if reads else {})) as source,
        nbdkit("file", str(copied), *([] if reads else [rate]), **({} if reads else broken)) as destination,
    ):
        outcome = copy("--ring", ring, "--data-path", path, *OPTIONS, source.uri, destination.uri)
        outcome.succeeded()
        assert "injecting EIO" in (source if reads else destination).stderr()
    words = {"splice": "% spliced; ", "buffer": "; buffered; "}
    assert words[path] in outcome.last_line
    images.assert_identical(image, copied)


@PATHS
@pytest.mark.parametrize("rate", ["error-pread-rate=100%", "error-pwrite-rate=100%"])
def test_a_request_that_is_always_refused_fails_the_copy_in_one_line(
    image: Path, tmp_path: Path, ring: str, path: str, rate: str
) -> None:
    copied = images.empty_image(tmp_path / "destination", SIZE)
    broken = {"filters": ["error"]}
    reads = rate.startswith("error-pread")
    with (
        nbdkit("file", str(image), *([rate] if reads else []), flags=["-r"], **(broken if reads else {})) as source,
        nbdkit("file", str(copied), *([] if reads else [rate]), **({} if reads else broken)) as destination,
    ):
        outcome = copy("--ring", ring, "--data-path", path, *OPTIONS, source.uri, destination.uri)
    side = "source" if reads else "destination"
    outcome.failed(1, saying=[side, "EIO", "bytes at offset", "failed 5 times"])
    assert len(outcome.err.splitlines()) == 1, str(outcome)
