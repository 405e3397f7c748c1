"""Destinations that check every write themselves: nbdkit's sparse-random plugin and its checkwrite filter."""

from __future__ import annotations

from pathlib import Path

from support import images
from support.command import copy
from support.servers import nbdkit


def test_sparse_random_is_copied_onto_itself(ring: str) -> None:
    with nbdkit("sparse-random", size="2G", seed="1") as server:
        copy("--ring", ring, "--workers", "2", server.uri, server.uri).succeeded()
        assert "data does not match" not in server.stderr()


def test_sparse_random_notices_a_copy_of_other_content(ring: str) -> None:
    """So the test above can fail."""
    with nbdkit("sparse-random", size="256M", seed="1") as one, nbdkit("sparse-random", size="256M", seed="2") as two:
        copy("--ring", ring, one.uri, two.uri).failed(1, saying=["destination", "EIO"])


def test_many_small_runs_of_random_content_are_copied_onto_themselves(ring: str) -> None:
    options = {"size": "128M", "seed": "3", "percent": "40", "runlength": "65536", "random-content": "true"}
    with nbdkit("sparse-random", **options) as server:
        copy("--ring", ring, "--workers", "2", "--request-size", "64k", server.uri, server.uri).succeeded()


def test_a_hundred_gibibytes_are_copied_onto_themselves(ring: str) -> None:
    """A tenth is data: ten seconds where nothing else runs."""
    with nbdkit("sparse-random", size="100G", seed="4") as server:
        outcome = copy("--ring", ring, "--workers", "2", server.uri, server.uri, timeout=280).succeeded()
    assert "GiB zeroed" in outcome.last_line


def test_checkwrite_sees_only_writes_of_what_is_there(tmp_path: Path, ring: str) -> None:
    image = images.sparse_image(tmp_path / "image", 20_000_001)
    with (
        nbdkit("file", str(image), flags=["-r"]) as source,
        nbdkit("file", str(image), filters=["checkwrite"]) as destination,
    ):
        copy("--ring", ring, "--workers", "2", source.uri, destination.uri).succeeded()


def test_checkwrite_notices_one_byte_that_differs(tmp_path: Path, ring: str) -> None:
    """So the test above can fail."""
    image = images.random_image(tmp_path / "image", images.MIB)
    other = tmp_path / "other"
    content = bytearray(image.read_bytes())
    content[700_001] ^= 0x10
    other.write_bytes(content)
    with (
        nbdkit("file", str(image), flags=["-r"]) as source,
        nbdkit("file", str(other), filters=["checkwrite"]) as destination,
    ):
        copy("--ring", ring, source.uri, destination.uri).failed(1, saying=["destination", "EIO"])
