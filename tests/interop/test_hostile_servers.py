"""Peers that are no NBD server, or lie: one clear line, exit code 1, nothing written; no hang, no traceback."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from support import images
from support.command import Outcome, copy, nbdshard
from support.doubles import CMD_WRITE, CMD_WRITE_ZEROES, Double, Request, Talk, double
from support.hostile import (
    BROKEN_GO,
    BROKEN_HANDSHAKES,
    LYING_DESTINATIONS,
    LYING_SOURCES,
    NEVER_ANSWERS_READS,
    VANISHING_DESTINATIONS,
    VANISHING_SOURCES,
    cut_after,
    replying_to_first_option,
    silent,
)
from support.listening import listening
from support.servers import free_port, nbdkit
from support.waiting import WAIT_SECONDS

SIZE = images.MIB
AT_ONCE = ("--loss-timeout", "0")  # a server that is lost is not waited for

Way = tuple[int, tuple[str, ...]]  # bytes, and options, by which the payload goes one way
WAYS: dict[str, Way] = {
    "buffers": (SIZE, ("--data-path=buffer",)),
    "pipes": (SIZE, ("--data-path=splice",)),
    "lanes": (5 * SIZE, ("--workers", "1", "--range-size", "8M")),
}
EACH_WAY = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def in_one_line(outcome: Outcome, *words: str) -> None:
    outcome.failed(1, saying=words)
    assert len(outcome.err.splitlines()) == 1, str(outcome)


@pytest.mark.parametrize("name", BROKEN_HANDSHAKES)
def test_info_blames_a_peer_that_is_no_nbd_server(name: str) -> None:
    with listening(BROKEN_HANDSHAKES[name], tcp=True) as state:
        in_one_line(nbdshard("info", state.uri), "nbd://127.0.0.1")


@pytest.mark.parametrize("name", BROKEN_HANDSHAKES)
def test_a_copy_from_a_peer_that_is_no_nbd_server_fails_and_leaves_no_file(tmp_path: Path, name: str) -> None:
    with listening(BROKEN_HANDSHAKES[name]) as state:
        in_one_line(copy(state.uri, tmp_path / "destination"), "source", state.uri.partition("=")[2])
    assert not (tmp_path / "destination").exists()


@pytest.mark.parametrize("name", ["an HTTP server", "an oldstyle server", "noise", "closes after the greeting"])
def test_a_copy_to_a_peer_that_is_no_nbd_server_fails(tmp_path: Path, ring: str, name: str) -> None:
    source = images.random_image(tmp_path / "source", SIZE)
    with listening(BROKEN_HANDSHAKES[name]) as state:
        in_one_line(copy("--ring", ring, source, state.uri), "destination", state.uri.partition("=")[2])


@pytest.mark.parametrize("name", BROKEN_GO)
def test_a_copy_from_a_server_that_lies_in_its_answer_to_go_fails(tmp_path: Path, name: str) -> None:
    with double(BROKEN_GO[name](bytearray(SIZE))) as uri:
        in_one_line(copy(uri, tmp_path / "destination"), "source")
    assert not (tmp_path / "destination").exists()


class Patient(Double):
    """Answers no write before the source has said all: else the copy may be over before the lie is heard."""

    has_spoken: threading.Event

    def write(self, talk: Talk, request: Request, data: bytes) -> None:
        assert self.has_spoken.wait(WAIT_SECONDS), "the source did not come to an end"
        super().write(talk, request, data)


@EACH_WAY
@pytest.mark.parametrize("name", LYING_SOURCES)
def test_a_source_that_breaks_the_protocol_is_blamed_and_nothing_false_is_written(
    name: str, ring: str, way: Way
) -> None:
    size, options = way
    source = LYING_SOURCES[name](bytearray(images.random_bytes(size)))
    target = Patient(bytearray(b"\xee" * size))
    target.has_spoken = source.has_spoken
    with double(source) as one, double(target) as two:
        outcome = copy("--ring", ring, *options, "-S", "0", one, two, timeout=150)
    outcome.failed(1, saying=["source", "protocol"])
    pairs = zip(target.content, source.content, strict=True)
    assert all(new in (0xEE, old) for new, old in pairs)


@EACH_WAY
@pytest.mark.parametrize("name", VANISHING_SOURCES)
def test_a_source_that_vanishes_at_every_read_fails_the_copy(name: str, ring: str, way: Way) -> None:
    size, options = way
    target = Double(bytearray(b"\xee" * size))
    with double(VANISHING_SOURCES[name](bytearray(images.random_bytes(size)))) as one, double(target) as two:
        copy("--ring", ring, *options, *AT_ONCE, one, two).failed(1, saying=["source", "connection lost"])
    assert target.count(CMD_WRITE) + target.count(CMD_WRITE_ZEROES) == 0


@EACH_WAY
@pytest.mark.parametrize("name", LYING_DESTINATIONS)
def test_a_destination_that_breaks_the_protocol_is_blamed(name: str, ring: str, way: Way) -> None:
    size, options = way
    source = Double(bytearray(images.random_bytes(size)))
    with double(source) as one, double(LYING_DESTINATIONS[name](bytearray(size))) as two:
        outcome = copy("--ring", ring, *options, one, two)
    outcome.failed(1, saying=["destination", "protocol"])


@EACH_WAY
@pytest.mark.parametrize("name", VANISHING_DESTINATIONS)
def test_a_destination_that_vanishes_at_every_write_fails_the_copy(name: str, ring: str, way: Way) -> None:
    size, options = way
    source = Double(bytearray(images.random_bytes(size)))
    with double(source) as one, double(VANISHING_DESTINATIONS[name](bytearray(size))) as two:
        copy("--ring", ring, *options, *AT_ONCE, one, two).failed(1, saying=["destination", "connection lost"])


# Greeting: 18 bytes; an option reply: 20 and what it carries. A cut within and between them, then within the replies.
@pytest.mark.parametrize("length", [1, 8, 17, 18, 19, 37, 38, 39, 57, 60, 78, 90, 98, 110, 130, 150, 170, 200, 4200])
def test_a_source_whose_connections_end_after_some_bytes_fails_the_copy(tmp_path: Path, length: int) -> None:
    server = cut_after(Double(bytearray(images.random_bytes(SIZE))), length)
    with listening(server) as state:
        copy(*AT_ONCE, state.uri, tmp_path / "out").failed(1, saying=["source", state.uri.partition("=")[2]])


def test_a_server_that_never_greets_is_given_up_after_the_handshake_timeout(tmp_path: Path, ring: str) -> None:
    with listening(silent) as state:
        in_one_line(copy("--ring", ring, state.uri, tmp_path / "out"), "source", "timed out", "10 s")


def test_a_server_that_never_answers_an_option_is_given_up_after_the_handshake_timeout(
    tmp_path: Path, ring: str
) -> None:
    with listening(replying_to_first_option(lambda _: b"")) as state:
        in_one_line(copy("--ring", ring, state.uri, tmp_path / "out"), "source", "timed out", "10 s")


def test_a_source_that_never_answers_a_read_is_given_up_after_the_request_timeout(ring: str) -> None:
    target = Double(bytearray(SIZE))
    with double(NEVER_ANSWERS_READS(bytearray(SIZE), extents=False)) as one, double(target) as two:
        copy("--ring", ring, *AT_ONCE, one, two, timeout=280).failed(1, saying=["source", "timed out"])


def test_a_port_nobody_listens_on_is_named(tmp_path: Path) -> None:
    port = free_port()
    in_one_line(copy(f"nbd://127.0.0.1:{port}/", tmp_path / "out"), "source", str(port), "refused")


def test_a_socket_that_is_not_there_is_named(tmp_path: Path) -> None:
    uri = f"nbd+unix:///?socket={tmp_path}/none"
    in_one_line(copy(uri, tmp_path / "out"), "source", f"{tmp_path}/none")


def test_an_export_the_server_does_not_have_is_named(tmp_path: Path) -> None:
    image = images.random_image(tmp_path / "image", SIZE)
    with nbdkit("file", f"dir={tmp_path}", flags=["-r"], export="nosuch") as server:
        in_one_line(copy(server.uri, tmp_path / "out"), "source", "nosuch")
    assert image.exists()
    assert not (tmp_path / "out").exists()


def test_oldstyle_nbdkit_is_refused_by_name(tmp_path: Path) -> None:
    image = images.random_image(tmp_path / "image", SIZE)
    with nbdkit("file", str(image), flags=["-r", "-o"]) as server:
        in_one_line(copy(server.uri, tmp_path / "out"), "source", "oldstyle")


def test_a_server_that_wants_tls_is_refused_and_never_downgraded(tmp_path: Path) -> None:
    psk = tmp_path / "psk"
    psk.write_text("user:00112233445566778899aabbccddeeff\n")
    with nbdkit("null", "1M", flags=["--tls=require", f"--tls-psk={psk}"]) as server:
        in_one_line(copy(server.uri, tmp_path / "out"), "source", "TLS")


def test_a_read_only_destination_is_refused(tmp_path: Path) -> None:
    source = images.random_image(tmp_path / "source", SIZE)
    destination = images.filled_image(tmp_path / "destination", SIZE)
    with nbdkit("file", str(destination), flags=["-r"]) as server:
        in_one_line(copy(source, server.uri), "destination", "read-only")
    assert destination.read_bytes() == b"\xee" * SIZE
