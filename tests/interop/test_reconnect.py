"""A server that goes away in the middle of a copy and comes back, or does not: real servers, killed and started."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdshard.common.limits import RETURNS_PER_RANGE
from support import images
from support.brakes import Brake
from support.command import Run, started
from support.doubles import CAN_MULTI_CONN, Double, double
from support.servers import Server, at_socket, private_folder

SIZE = 64 * images.MIB

# At a socket, an image, and what slows it down.
Starting = Callable[[Path, Path, Brake | None], contextlib.AbstractContextManager[Server]]


def start_nbdkit(path: Path, image: Path, brake: Brake | None) -> contextlib.AbstractContextManager[Server]:
    rate, options = (["--filter=rate"], brake.options) if brake else ([], ())
    return at_socket(path, "nbdkit", "-f", "-U", str(path), *rate, "file", str(image), *options)


def start_qemu_nbd(path: Path, image: Path, brake: Brake | None) -> contextlib.AbstractContextManager[Server]:
    del brake
    return at_socket(path, "qemu-nbd", "-t", "-f", "raw", "-e", "8", "-k", str(path), str(image))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images.random_image(tmp_path_factory.mktemp("image") / "source", SIZE)


@pytest.fixture
def sockets() -> Iterator[tuple[Path, Path]]:
    with private_folder() as folder:
        yield folder / "source", folder / "destination"


@pytest.fixture
def brake(sockets: tuple[Path, Path]) -> Brake:
    """Half of the copy goes fast, the other half when it is released."""
    return Brake(sockets[0].parent, SIZE // 2)


def in_the_middle(run: Run, copied: Path) -> None:
    """Return when some of it is copied."""
    run.until("the copy's first bytes", lambda: images.allocated_bytes(copied) > 4 * images.MIB)


def loss_is_told(run: Run) -> None:
    run.until("the loss to be told of", lambda: "waiting for it" in run.err())


@pytest.mark.parametrize("path", ["splice", "buffer"])
@pytest.mark.parametrize("lost", ["source", "destination"])
@pytest.mark.parametrize("start", [start_nbdkit, start_qemu_nbd])
def test_a_server_that_comes_back_is_waited_for(
    image: Path,
    tmp_path: Path,
    sockets: tuple[Path, Path],
    brake: Brake,
    ring: str,
    path: str,
    lost: str,
    start: Starting,
) -> None:
    copied = images.empty_image(tmp_path / "copy", SIZE)
    with contextlib.ExitStack() as stack:
        # One side is always nbdkit's, which can be slow.
        kinds = (start, start_nbdkit) if lost == "source" else (start_nbdkit, start)
        is_source_slow = lost == "destination" or start is start_nbdkit
        source = stack.enter_context(kinds[0](sockets[0], image, brake if is_source_slow else None))
        destination = stack.enter_context(kinds[1](sockets[1], copied, None if is_source_slow else brake))
        run = stack.enter_context(
            started("copy", "--ring", ring, "--data-path", path, "--range-size", "8M", source.uri, destination.uri)
        )
        in_the_middle(run, copied)
        (source if lost == "source" else destination).kill()
        loss_is_told(run)
        brake.release()
        index = 0 if lost == "source" else 1
        stack.enter_context(kinds[index](sockets[index], (image, copied)[index], None))
        outcome = run.wait().succeeded()
    assert f"{lost} nbd+unix://" in outcome.err.splitlines()[0], str(outcome)
    assert "connected again" in outcome.err
    images.assert_identical(image, copied)


@contextlib.contextmanager
def without_its_source(
    image: Path, copied: Path, sockets: tuple[Path, Path], brake: Brake, *options: str
) -> Iterator[Run]:
    """A copy whose source has been killed in the middle of it."""
    with (
        start_nbdkit(sockets[0], image, brake) as source,
        start_nbdkit(sockets[1], copied, None) as destination,
        started("copy", *options, source.uri, destination.uri) as run,
    ):
        in_the_middle(run, copied)
        source.kill()
        yield run


def test_a_server_that_does_not_come_back_in_time_pauses_the_copy(
    image: Path, tmp_path: Path, sockets: tuple[Path, Path], brake: Brake
) -> None:
    copied = images.empty_image(tmp_path / "copy", SIZE)
    with without_its_source(image, copied, sockets, brake, "--loss-timeout=1") as run:
        outcome = run.wait().failed(75, saying=["source", "it was waited for 1 s"])
    outcome.failed(75, saying=["paused at"])


def test_with_a_loss_timeout_of_0_the_copy_fails_at_once(
    image: Path, tmp_path: Path, sockets: tuple[Path, Path], brake: Brake
) -> None:
    copied = images.empty_image(tmp_path / "copy", SIZE)
    with without_its_source(image, copied, sockets, brake, "--loss-timeout", "0") as run:
        run.wait().failed(1, saying=["source nbd+unix:"])


def test_another_disk_at_the_same_address_is_not_taken_for_the_old_one(
    image: Path, tmp_path: Path, sockets: tuple[Path, Path], brake: Brake
) -> None:
    copied = images.empty_image(tmp_path / "copy", SIZE)
    other = images.random_image(tmp_path / "other", SIZE // 2)
    with without_its_source(image, copied, sockets, brake) as run, start_nbdkit(sockets[0], other, None):
        run.wait().failed(1, saying=["source", f"size {SIZE // 2} instead of {SIZE}"])


def test_ctrl_c_ends_a_copy_that_waits(image: Path, tmp_path: Path, sockets: tuple[Path, Path], brake: Brake) -> None:
    copied = images.empty_image(tmp_path / "copy", SIZE)
    with without_its_source(image, copied, sockets, brake) as run:
        loss_is_told(run)
        run.signal_group()
        run.wait().failed(130, saying=["stopped at"])


@pytest.mark.parametrize("path", ["splice", "buffer"])
@pytest.mark.parametrize("lost", ["source", "destination"])
def test_a_server_that_says_it_shuts_down_is_left_softly_and_waited_for(
    image: Path, tmp_path: Path, sockets: tuple[Path, Path], brake: Brake, ring: str, path: str, lost: str
) -> None:
    copied, trouble = images.empty_image(tmp_path / "copy", SIZE), tmp_path / "trouble"
    refusing = ("--filter=error", "--filter=rate", "--threads=1", "file")
    error = ("error=ESHUTDOWN", "error-rate=100%", f"error-file={trouble}", *brake.options)
    ends = [[str(image)], [str(copied)]]
    plugins = [["file"], ["file"]]
    index = 0 if lost == "source" else 1
    plugins[index], ends[index] = list(refusing), [*ends[index], *error]
    with contextlib.ExitStack() as stack:
        source, destination = (
            stack.enter_context(at_socket(socket, "nbdkit", "-f", "-U", str(socket), *plugin, *end))
            for socket, plugin, end in zip(sockets, plugins, ends, strict=True)
        )
        words = ("copy", "--ring", ring, "--data-path", path, "--range-size", "8M", source.uri, destination.uri)
        run = stack.enter_context(started(*words))
        in_the_middle(run, copied)
        trouble.touch()
        loss_is_told(run)
        trouble.unlink()
        brake.release()
        outcome = run.wait().succeeded()
    assert "the server is shutting down" in outcome.err
    images.assert_identical(image, copied)


class Tiring(Double):
    """Hangs up on each connection that has written `patience` bytes."""

    patience = images.MIB

    def serve(self, connection):  # type: ignore[no-untyped-def]
        self.written = 0
        super().serve(connection)

    def write(self, talk, request, data):  # type: ignore[no-untyped-def]
        self.written += request.length
        if self.written > self.patience:
            talk.hang_up()
        super().write(talk, request, data)


@pytest.mark.parametrize("path", ["splice", "buffer"])
def test_a_copy_gets_on_though_no_connection_lasts_for_one_range(ring: str, path: str) -> None:
    """Each does a quarter of one, and less than until a checkpoint: what is lost more often is leased by less, and
    flushed as soon as it is written."""
    content = images.random_bytes(8 * images.MIB)
    tiring = Tiring(bytearray(len(content)), flags=Double.flags & ~CAN_MULTI_CONN)
    words = ["--ring", ring, "--data-path", path, "--request-size", "64k", "--reconnect-delay", "0.1"]
    with (
        double(Double(bytearray(content))) as source,
        double(tiring) as destination,
        started("copy", *words, source, destination) as run,
    ):
        run.wait(60).succeeded()
    assert tiring.content == content
    assert tiring.talks > RETURNS_PER_RANGE
