"""Resuming from and to what is not quite as it was: devices with other numbers, servers that leave with a client."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from support import images
from support.command import copy, started
from support.devices import loop_device
from support.journals import durable_bytes
from support.servers import Server, at_socket, nbdkit, private_folder
from support.waiting import wait_for

SIZE = 64 * images.MIB
SECONDS = 60.0
OPTIONS = ("--range-size", "4M", "--checkpoint", "0.2", "--rate", "16M")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images.random_image(tmp_path_factory.mktemp("image") / "source", SIZE)


@pytest.fixture
def sockets() -> Iterator[Path]:
    with private_folder() as folder:
        yield folder


def begin(journal: Path, *ends: str | Path) -> None:
    """Copy some of it, and die."""
    with started("copy", *OPTIONS, "--journal", journal, *ends) as run:
        run.until("something to be durable", lambda: durable_bytes(journal))
        run.process.kill()
        run.process.wait(SECONDS)
        wait_for("the workers to end", lambda: not run.workers())


# -- devices -----------------------------------------------------------------------------------------------------------


def test_a_device_with_another_name_and_number_is_the_same(image: Path, tmp_path: Path) -> None:
    copied, other = (images.empty_image(tmp_path / name, SIZE) for name in ("copied", "other"))
    journal = tmp_path / "journal"
    node = tmp_path / "node"
    # The first one is kept until the end, so that the second is another one whoever else makes some on this machine.
    with nbdkit("file", str(image), threads=1) as source, loop_device(copied) as first, loop_device(other) as wrong:
        node.symlink_to(first)
        begin(journal, source.uri, node)
        node.unlink()
        node.symlink_to(wrong)
        outcome = copy("--resume", "--journal", journal, source.uri, node, timeout=SECONDS)
        outcome.failed(1, saying=["another device", f"loop {other}", f"not loop {copied}", "--force-resume"])
        with loop_device(copied) as second:
            copy("--resume", "--journal", journal, source.uri, second, timeout=SECONDS).succeeded()
    images.assert_identical(image, copied)
    assert images.allocated_bytes(other) == 0


def test_a_node_that_was_made_anew_is_the_same_device(image: Path, tmp_path: Path) -> None:
    """As /dev is at each start: with other inodes and times, also those of a source."""
    copied, journal, node = tmp_path / "copied", tmp_path / "journal", tmp_path / "node"
    with loop_device(image) as device:
        node.symlink_to(device)
        begin(journal, node, copied)
        node.unlink()
        os.mknod(node, stat.S_IFBLK | 0o600, device.stat().st_rdev)
        copy("--resume", "--journal", journal, node, copied, timeout=SECONDS).succeeded()
    images.assert_identical(image, copied)


# -- servers that leave with their last client -------------------------------------------------------------------------


def qemu_nbd(path: Path, image: Path, *more: str) -> contextlib.AbstractContextManager[Server]:
    """One that leaves with its last client, unless `-t` is among `more`."""
    return at_socket(path, "qemu-nbd", "-f", "raw", *more, "-k", str(path), str(image))


def begin_with_qemu_nbd(image: Path, copied: Path, sockets: Path, journal: Path, clients: str) -> Sequence[str]:
    """Copy some of it between servers that stay, and serve so many clients at a time; the URIs."""
    uris = [f"nbd+unix:///?socket={sockets / name}" for name in "sd"]
    more = ("-t", "-e", clients)
    with qemu_nbd(sockets / "s", image, "-r", *more), qemu_nbd(sockets / "d", copied, *more):
        begin(journal, *uris)
    for name in "sd":
        (sockets / name).unlink(missing_ok=True)
    return uris


def test_servers_that_leave_with_their_last_client_are_held_until_the_workers_are_there(
    image: Path, tmp_path: Path, sockets: Path
) -> None:
    copied, journal = images.empty_image(tmp_path / "copied", SIZE), tmp_path / "journal"
    uris = begin_with_qemu_nbd(image, copied, sockets, journal, "5")
    with qemu_nbd(sockets / "s", image, "-r", "-e", "5"), qemu_nbd(sockets / "d", copied, "-e", "5"):
        copy("--resume", "--journal", journal, *uris, timeout=SECONDS).succeeded()
    images.assert_identical(image, copied)


def test_one_that_leaves_and_admits_nobody_else_has_to_be_told_to_stay(
    image: Path, tmp_path: Path, sockets: Path
) -> None:
    copied, journal = images.empty_image(tmp_path / "copied", SIZE), tmp_path / "journal"
    uris = begin_with_qemu_nbd(image, copied, sockets, journal, "1")
    with qemu_nbd(sockets / "s", image, "-t", "-r"), qemu_nbd(sockets / "d", copied):
        outcome = copy("--resume", "--journal", journal, *uris, timeout=SECONDS)
        outcome.failed(1, saying=["destination", "qemu-nbd without -t", "must be told to stay"])
    with qemu_nbd(sockets / "s", image, "-t", "-r"), qemu_nbd(sockets / "d", copied, "-t"):
        copy("--resume", "--journal", journal, *uris, timeout=SECONDS).succeeded()
    images.assert_identical(image, copied)


def test_one_that_admits_less_than_it_says_is_not_held(image: Path, tmp_path: Path, sockets: Path) -> None:
    copied, journal = images.empty_image(tmp_path / "copied", SIZE), tmp_path / "journal"
    words = ["nbdkit", "-f", "--threads=1", "-U", str(sockets / "s"), "--filter=limit", "file", str(image), "limit=1"]
    with at_socket(sockets / "s", *words) as source, nbdkit("file", str(copied), threads=1) as target:
        begin(journal, "-C", "1", source.uri, target.uri)
        copy("-C", "1", "--resume", "--journal", journal, source.uri, target.uri, timeout=SECONDS).succeeded()
    images.assert_identical(image, copied)


# -- servers of something else -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words", "what"),
    [
        (images.MIB, (), f"size {SIZE + images.MIB} instead of {SIZE}"),
        (0, ("--filter=nozero",), "zero no instead of yes"),
    ],
)
def test_a_destination_that_is_not_what_it_was_is_told_with_what_differs(
    image: Path, tmp_path: Path, sockets: Path, more: int, words: Sequence[str], what: str
) -> None:
    copied, journal, socket = images.empty_image(tmp_path / "copied", SIZE), tmp_path / "journal", sockets / "copied"
    uri = f"nbd+unix:///?socket={socket}"
    command = ("nbdkit", "-f", "-U", str(socket), "file", str(copied))
    with at_socket(socket, *command):
        copy("--journal", journal, "--keep-journal", image, uri, timeout=SECONDS).succeeded()
    os.truncate(copied, SIZE + more)
    with at_socket(socket, *command, *words):
        resumed = copy("--resume", "--journal", journal, image, uri, timeout=SECONDS)
        resumed.failed(1, saying=[uri, "is not what the journal is about", what, "--force-resume"])
        copy("--force-resume", "--journal", journal, image, uri, timeout=SECONDS).succeeded()
