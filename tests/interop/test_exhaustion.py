"""What runs out in the middle of a copy: room at the destination, room for the journal, descriptors."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import images
from support.command import EXECUTABLE, copy, nbdshard, started
from support.journals import durable_bytes, fill, small_disk
from support.servers import Server, at_socket, nbdkit, private_folder, qemu_nbd
from support.waiting import wait_for

SIZE = 48 * images.MIB
ROOM_KIB = 32 << 10
SECONDS = 60.0
OPTIONS = ("--range-size", "1M", "--checkpoint", "0.2", "-T", "2")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images.random_image(tmp_path_factory.mktemp("image") / "source", SIZE)


@pytest.fixture
def source(image: Path) -> Iterator[Server]:
    """Slow: a copy has a middle."""
    with nbdkit("file", str(image), "rate=128M", "burstiness=0.2", filters=["rate"], threads=1) as server:
        yield server


def more_room(folder: Path) -> None:
    subprocess.run(["mount", "-o", f"remount,size={2 * SIZE}", folder], check=True, timeout=SECONDS)


# -- the destination's disk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nbdkit", "qemu-nbd"])
def test_a_full_disk_behind_a_server_fails_the_copy_and_with_more_room_it_is_resumed(
    tmp_path: Path, image: Path, source: Server, ring: str, kind: str
) -> None:
    journal = tmp_path / "journal"
    with small_disk(tmp_path / "disk", ROOM_KIB) as folder:
        copied = images.empty_image(folder / "copy", SIZE)
        with nbdkit("file", str(copied)) if kind == "nbdkit" else qemu_nbd(copied) as server:
            words = ("--ring", ring, *OPTIONS, "--journal", str(journal))
            outcome = copy(*words, source.uri, server.uri, timeout=SECONDS)
            outcome.failed(1, saying=["destination", "ENOSPC", "at offset"])
            assert f"to go on: {EXECUTABLE} copy --resume" in outcome.err, str(outcome)
            kept = durable_bytes(journal)
            assert kept > 0
            more_room(folder)
            again = copy(*words, "--resume", source.uri, server.uri, timeout=SECONDS).succeeded()
            assert "MiB resumed" in again.last_line, str(again)
        images.assert_identical(image, copied)


def test_a_full_disk_under_a_local_file_fails_the_copy_and_with_more_room_it_is_resumed(
    tmp_path: Path, image: Path, source: Server, ring: str
) -> None:
    journal = tmp_path / "journal"
    with small_disk(tmp_path / "disk", ROOM_KIB) as folder:
        copied = folder / "copy"
        words = ("--ring", ring, *OPTIONS, "--journal", str(journal))
        outcome = copy(*words, source.uri, copied, timeout=SECONDS)
        outcome.failed(1, saying=["destination", "ENOSPC", "at offset"])
        assert durable_bytes(journal) > 0
        more_room(folder)
        copy(*words, "--resume", source.uri, copied, timeout=SECONDS).succeeded()
        images.assert_identical(image, copied)


# -- the journal's disk ------------------------------------------------------------------------------------------------


def test_a_full_disk_under_the_journal_is_told_and_the_copy_goes_on(
    tmp_path: Path, image: Path, source: Server
) -> None:
    copied = images.empty_image(tmp_path / "copy", SIZE)
    with small_disk(tmp_path / "disk") as folder, nbdkit("file", str(copied)) as server:
        journal = folder / "journal"
        words = ("copy", *OPTIONS, "--keep-journal", "--journal", str(journal), source.uri, server.uri)
        with started(*words) as run:
            run.until("something to be durable", lambda: durable_bytes(journal))
            fill(folder / "filler")
            outcome = run.wait(SECONDS).succeeded()
    images.assert_identical(image, copied)
    meanwhile, *at_the_end = [
        line for line in outcome.err.splitlines() if "there is no room left for the journal" in line
    ]
    assert meanwhile.endswith("the copy goes on, but if it is resumed, what is copied now is copied again"), meanwhile
    assert len(at_the_end) <= 1, outcome.err  # that it is complete could not be written down either


def test_what_a_journal_had_before_its_disk_was_full_is_resumed_from(
    tmp_path: Path, image: Path, source: Server
) -> None:
    copied = images.empty_image(tmp_path / "copy", SIZE)
    with small_disk(tmp_path / "disk") as folder, nbdkit("file", str(copied), threads=1) as server:
        journal = folder / "journal"
        words = ("copy", *OPTIONS, "--journal", str(journal), source.uri, server.uri)
        with started(*words) as run:
            run.until("something to be durable", lambda: durable_bytes(journal))
            fill(folder / "filler")
            run.until("the line", lambda: "no room left for the journal" in run.err())
            run.process.kill()
            run.process.wait(SECONDS)
            wait_for("the workers to end", lambda: not run.workers())
        (folder / "filler").unlink()
        kept = durable_bytes(journal)
        outcome = nbdshard(*words, "--resume", timeout=SECONDS).succeeded()
    assert 0 < kept < SIZE
    assert "resumed" in outcome.last_line
    images.assert_identical(image, copied)


def test_a_journal_that_is_wanted_and_finds_no_room_ends_the_copy_at_its_first_checkpoint(
    tmp_path: Path, source: Server
) -> None:
    copied = images.empty_image(tmp_path / "copy", SIZE)
    with small_disk(tmp_path / "disk") as folder, nbdkit("file", str(copied)) as server:
        fill(folder / "filler")
        journal = folder / "journal"
        outcome = copy(*OPTIONS, "--journal", str(journal), source.uri, server.uri, timeout=SECONDS)
        outcome.failed(1, saying=[str(journal), "there is no room left for the journal; make room"])
        assert "to go on" not in outcome.err
        assert not journal.exists()


# -- descriptors -------------------------------------------------------------------------------------------------------


def limited(files: int) -> list[str]:
    return ["prlimit", f"--nofile={files}:{files}", EXECUTABLE]


@pytest.mark.parametrize("files", [8, 16, 39])
@pytest.mark.parametrize("words", [("copy", "/dev/null", "null:"), ("worker", "--connect", "ipc:///nowhere")])
def test_too_few_descriptors_are_told_before_anything_is_begun(words: tuple[str, ...], files: int) -> None:
    outcome = nbdshard(*words, executable=limited(files))
    outcome.failed(1, saying=[f"only {files} files may be open at a time", "ulimit -n"])
    assert len(outcome.err.splitlines()) == 1, str(outcome)


@pytest.mark.parametrize("files", [40, 52, 64])
def test_with_few_descriptors_connections_are_done_without(tmp_path: Path, ring: str, image: Path, files: int) -> None:
    copied = images.empty_image(tmp_path / "copy", SIZE)
    with nbdkit("file", str(image), flags=["-r"]) as one, nbdkit("file", str(copied)) as two:
        words = ("--ring", ring, "-T", "1", "-C", "64", "--range-size", "1M", one.uri, two.uri)
        copy(*words, executable=limited(files), timeout=SECONDS).succeeded()
    images.assert_identical(image, copied)


def test_a_lost_server_for_which_there_is_no_descriptor_any_more_pauses_the_copy(
    tmp_path: Path, image: Path, ring: str
) -> None:
    copied = images.empty_image(tmp_path / "copy", SIZE)
    slow = ("--threads=1", "--filter=rate", "file", str(image), "rate=96M", "burstiness=0.2")
    with private_folder() as folder, nbdkit("file", str(copied), threads=1) as destination:
        socket = folder / "s"
        command = ("nbdkit", "-f", "-U", str(socket), *slow)
        with at_socket(socket, *command) as source:
            words = ("copy", "--ring", ring, "-T", "1", "--loss-timeout", "2", source.uri, destination.uri)
            with started(*words) as run:
                run.until("a beginning", lambda: images.allocated_bytes(copied) > images.MIB)
                for pid in run.workers():
                    subprocess.run(["prlimit", "--nofile=3:3", "--pid", str(pid)], check=True, timeout=SECONDS)
                source.kill()
                with at_socket(socket, *command):
                    run.wait(SECONDS).failed(75, saying=["too many open files", "it was waited for 2 s"])


def test_a_server_without_descriptors_takes_fewer_connections(tmp_path: Path, image: Path) -> None:
    copied = images.empty_image(tmp_path / "copy", SIZE)
    with nbdkit("file", str(image), flags=["-r"]) as one, nbdkit("file", str(copied)) as two:
        for server in (one, two):
            here = len(os.listdir(f"/proc/{server.pid}/fd"))
            subprocess.run(["prlimit", f"--nofile={here + 6}", "--pid", str(server.pid)], check=True, timeout=SECONDS)
        copy("-T", "2", "-C", "8", "--connect-timeout", "2", "--handshake-timeout", "2", one.uri, two.uri).succeeded()
    images.assert_identical(image, copied)
