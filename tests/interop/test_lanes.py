"""Copies that are large enough for lanes, through the real command: whatever ends a loan, the copy is identical."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import images
from support.brakes import Brake
from support.command import Outcome, copy, started
from support.servers import at_socket, nbdkit, private_folder, qemu_nbd

SIZE = 64 * images.MIB
OLD = 0xEE
ONE_WORKER = ("--workers", "1")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and some runs of zeroes that a lane finds."""
    path = images.random_image(tmp_path_factory.mktemp("image") / "source", SIZE)
    with path.open("r+b") as file:
        for start, end in ((images.MIB, 2 * images.MIB), (17_000_000, 17_100_000), (SIZE - 9000, SIZE - 100)):
            file.seek(start)
            file.write(bytes(end - start))
    return path


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return images.filled_image(tmp_path / "copy", SIZE, OLD)


def is_spliced(outcome: Outcome) -> bool:
    """Lanes, or what they left to the copier, had most of it."""
    return "spliced" in outcome.last_line


# 256 requests, of which 4 in 100 fail: none does once in 30,000 runs, and one ten times in a row never. A lane comes to
# a few MiB between two of them.
REFUSING = (*ONE_WORKER, "--request-size", "256k", "--retries", "9")


@pytest.mark.parametrize(("side", "operation"), [("source", "pread"), ("destination", "pwrite"), ("both", "")])
def test_requests_that_are_refused_now_and_then(
    image: Path, copied: Path, ring: str, side: str, operation: str
) -> None:
    rate = f"error-{operation}-rate=4%" if operation else "error-rate=4%"
    faults = {each: ([rate], ["error"]) if side in (each, "both") else ([], []) for each in ("source", "destination")}
    with (
        nbdkit("file", str(image), *faults["source"][0], filters=faults["source"][1], flags=["-r"]) as source,
        nbdkit("file", str(copied), *faults["destination"][0], filters=faults["destination"][1]) as destination,
    ):
        outcome = copy("--ring", ring, *REFUSING, source.uri, destination.uri).succeeded()
        assert "injecting EIO" in source.stderr() + destination.stderr()
    images.assert_identical(image, copied)
    assert is_spliced(outcome)


@pytest.mark.parametrize("file", ["source", "destination"])
def test_a_file_at_one_end_and_refusals_at_the_other(image: Path, copied: Path, ring: str, file: str) -> None:
    served, fault = (copied, "pwrite") if file == "source" else (image, "pread")
    with nbdkit("file", str(served), f"error-{fault}-rate=4%", filters=["error"]) as server:
        ends = (image, server.uri) if file == "source" else (server.uri, copied)
        outcome = copy("--ring", ring, *REFUSING, *ends).succeeded()
        assert "injecting EIO" in server.stderr()
    images.assert_identical(image, copied)
    assert is_spliced(outcome)


@pytest.mark.parametrize("error", ["EIO", "EINVAL"])
def test_zeroes_between_data_that_are_refused_now_and_then(tmp_path: Path, copied: Path, ring: str, error: str) -> None:
    """256 runs of each kind: in some of these every lane meets a refusal among a payload's requests."""
    image = images.random_image(tmp_path / "fragments", SIZE)
    with image.open("r+b") as file:
        for start in range(0, SIZE, 256 * images.KIB):
            file.seek(start + 96 * images.KIB)
            file.write(bytes(128 * images.KIB))
    faults = ("error-zero-rate=4%", f"error={error}")
    with (
        nbdkit("file", str(image), flags=["-r"]) as source,
        nbdkit("file", str(copied), *faults, filters=["error"]) as destination,
    ):
        copy("--ring", ring, *REFUSING, source.uri, destination.uri).succeeded()
        assert f"injecting {error}" in destination.stderr()
    images.assert_identical(image, copied)


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_side_that_refuses_everything_is_told_of_in_one_line(image: Path, copied: Path, ring: str, side: str) -> None:
    operation = {"source": "pread", "destination": "pwrite"}[side]
    fault = [f"error-{operation}-rate=100%", "error=EIO"]
    with (
        nbdkit("file", str(image), *(fault if side == "source" else []), filters=["error"], flags=["-r"]) as source,
        nbdkit("file", str(copied), *(fault if side == "destination" else []), filters=["error"]) as destination,
    ):
        outcome = copy("--ring", ring, *ONE_WORKER, source.uri, destination.uri)
    outcome.failed(1, saying=[side, "EIO", "bytes at offset", "failed"])


def test_a_destination_that_takes_its_time(image: Path, copied: Path, ring: str) -> None:
    with (
        nbdkit("file", str(image), flags=["-r"]) as source,
        nbdkit("file", str(copied), "wdelay=20ms", filters=["delay"]) as destination,
    ):
        outcome = copy("--ring", ring, *ONE_WORKER, source.uri, destination.uri).succeeded()
    images.assert_identical(image, copied)
    assert is_spliced(outcome)


def test_a_source_that_takes_its_time(image: Path, copied: Path, ring: str) -> None:
    with (
        nbdkit("file", str(image), "rdelay=20ms", filters=["delay"], flags=["-r"]) as source,
        nbdkit("file", str(copied)) as destination,
    ):
        copy("--ring", ring, *ONE_WORKER, source.uri, destination.uri).succeeded()
    images.assert_identical(image, copied)


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
@pytest.mark.parametrize("connections", [1, 4])
def test_qemu_nbd_at_both_ends(image: Path, copied: Path, ring: str, tcp: bool, connections: int) -> None:
    with qemu_nbd(image, "-r", clients=8, tcp=tcp) as source, qemu_nbd(copied, clients=8, tcp=tcp) as destination:
        words = ("--ring", ring, "--connections", str(connections), "--checkpoint", "1")
        copy(*words, source.uri, destination.uri).succeeded()
    images.assert_identical(image, copied)


def test_a_file_to_a_file(image: Path, copied: Path, ring: str) -> None:
    outcome = copy("--ring", ring, *ONE_WORKER, image, copied).succeeded()
    images.assert_identical(image, copied)
    assert is_spliced(outcome)


@pytest.fixture
def sockets() -> Iterator[tuple[Path, Path]]:
    with private_folder() as folder:
        yield folder / "source", folder / "destination"


@pytest.mark.parametrize("lost", ["source", "destination"])
def test_a_server_that_is_killed_in_the_middle_and_comes_back(
    tmp_path: Path, sockets: tuple[Path, Path], ring: str, lost: str
) -> None:
    image = images.random_image(tmp_path / "source", SIZE)
    copied = images.empty_image(tmp_path / "copy", SIZE)
    files = (image, copied)
    index = 0 if lost == "source" else 1
    brake = Brake(sockets[0].parent, SIZE // 2)
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(at_socket(sockets[0], *nbdkit_words(sockets[0], image, brake))),
            stack.enter_context(at_socket(sockets[1], *nbdkit_words(sockets[1], copied, None))),
        ]
        words = ("copy", "--ring", ring, "--range-size", "8M", "--checkpoint", "1")
        run = stack.enter_context(started(*words, servers[0].uri, servers[1].uri))
        run.until("the copy's first bytes", lambda: images.allocated_bytes(copied) > 8 * images.MIB)
        servers[index].kill()
        run.until("the loss to be told of", lambda: "waiting for it" in run.err())
        brake.release()
        again = nbdkit_words(sockets[index], files[index], None)
        stack.enter_context(at_socket(sockets[index], *again))
        outcome = run.wait().succeeded()
    assert "connected again" in outcome.err
    images.assert_identical(image, copied)


def nbdkit_words(socket: Path, image: Path, brake: Brake | None) -> list[str]:
    """How nbdkit is started at `socket`."""
    filters, options = (["--filter=rate"], brake.options) if brake else ([], ())
    return ["nbdkit", "-f", "-U", str(socket), *filters, "file", str(image), *options]
