"""Success means flushed: on every connection that wrote, and a flush that fails fails the copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import images
from support.command import copy
from support.doubles import CMD_FLUSH, CMD_WRITE, EIO, Double, Request, Talk, double
from support.servers import nbdkit
from support.sides import eval_methods

SIZE = 8 * images.MIB


@pytest.fixture
def source_image(tmp_path: Path) -> Path:
    return images.random_image(tmp_path / "source", SIZE)


def test_every_connection_that_wrote_is_flushed_after_its_last_write(source_image: Path, ring: str) -> None:
    target = Double(bytearray(SIZE))
    with double(target) as uri:
        copy("--ring", ring, "--workers", "2", "--request-size", "64k", source_image, uri).succeeded()
    wrote = {request.connection for request in target.requests if request.command == CMD_WRITE}
    assert wrote
    for connection in wrote:
        commands = [request.command for request in target.requests if request.connection == connection]
        assert CMD_FLUSH in commands[len(commands) - 1 - commands[::-1].index(CMD_WRITE) :]


def test_no_flush_sends_none(source_image: Path, ring: str) -> None:
    target = Double(bytearray(SIZE))
    with double(target) as uri:
        outcome = copy("--ring", ring, "--no-flush", source_image, uri).succeeded()
    assert target.count(CMD_FLUSH) == 0
    assert "not flushed" in outcome.last_line


def test_a_flush_that_fails_fails_the_copy_and_is_never_tried_into_success(source_image: Path, ring: str) -> None:
    class FailsOnce(Double):
        """The kernel reports a lost write-back only once: the second flush would succeed."""

        def flush(self, talk: Talk, request: Request) -> None:
            talk.done(request, EIO if self.count(CMD_FLUSH) == 1 else 0, "write-back failed")

    target = FailsOnce(bytearray(SIZE))
    with double(target) as uri:
        outcome = copy("--ring", ring, "--workers", "1", "--connections", "1", source_image, uri)
    outcome.failed(1, saying=["destination", "flush", "EIO"])
    assert target.count(CMD_FLUSH) == 1


def test_a_server_whose_flush_always_fails_fails_the_copy(tmp_path: Path, source_image: Path, ring: str) -> None:
    destination = images.empty_image(tmp_path / "destination", SIZE)
    with nbdkit("eval", *eval_methods(destination, flush="echo EIO no disk >&2; exit 1")) as server:
        copy("--ring", ring, source_image, server.uri).failed(1, saying=["destination", "flush", "EIO"])


def test_a_server_without_flush_leaves_durability_unknown(tmp_path: Path, source_image: Path, ring: str) -> None:
    destination = images.empty_image(tmp_path / "destination", SIZE)
    with nbdkit("eval", *eval_methods(destination, can_flush="exit 3")) as server:
        outcome = copy("--ring", ring, source_image, server.uri).succeeded()
    images.assert_identical(source_image, destination)
    assert "durability unknown" in outcome.last_line
