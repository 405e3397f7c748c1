"""A source with unreadable blocks: without --salvage it fails the copy, with it everything else arrives."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from pathlib import Path

import pytest

from nbdshard.coordinator.journal import Journal
from support import images
from support.command import EXECUTABLE, copy, nbdshard
from support.devices import loop_device
from support.servers import Server, at_socket, nbdkit, private_folder

SIZE = 16 * images.MIB
BLOCK = 4096
BAD_SECTORS = (256 * BLOCK, 1281 * BLOCK, 1282 * BLOCK + 1024, SIZE - 512)  # of 512 bytes each
LOST = ((256 * BLOCK, BLOCK), (1281 * BLOCK, 2 * BLOCK), (SIZE - BLOCK, BLOCK))
SUMMARY = (
    f"16384 bytes unreadable in 3 places, zeroes instead (4096 at offset {256 * BLOCK}, 8192 at offset {1281 * BLOCK}, "
    f"4096 at offset {SIZE - BLOCK})"
)
LITTLE_PATIENCE = ("--retries", "1")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return images.random_image(tmp_path / "source", SIZE)


def failing_words(image: Path, *sectors: int, forbidden: int = SIZE) -> list[str]:
    """A server of `image`: EIO for every read that touches one of `sectors`, EPERM from `forbidden` on."""
    tests = " || ".join(f"[ $(($4 + $3)) -gt {sector} -a $4 -lt {sector + 512} ]" for sector in sectors)
    pread = f"if {tests or 'false'}; then echo EIO medium error >&2; exit 1; fi; "
    pread += f"if [ $4 -ge {forbidden} ]; then echo EPERM not yours >&2; exit 1; fi; "
    pread += f"dd if={shlex.quote(str(image))} iflag=skip_bytes,count_bytes skip=$4 count=$3 bs=1M status=none"
    return [
        f"get_size=echo {image.stat().st_size}",
        f"pread={pread}",
        "can_multi_conn=exit 0",
        "thread_model=echo parallel",
    ]


def failing(image: Path, *sectors: int) -> contextlib.AbstractContextManager[Server]:
    return nbdkit("eval", *failing_words(image, *sectors), flags=["-r"])


def expected(image: Path, folder: Path) -> Path:
    """`image` with zeroes where it is lost."""
    there = folder / "expected"
    there.write_bytes(image.read_bytes())
    with there.open("r+b") as file:
        for offset, length in LOST:
            file.seek(offset)
            file.write(bytes(length))
    return there


def mapfile(journal: Path) -> list[str]:
    text = nbdshard("jobs", "export", str(journal)).succeeded().out
    return [line for line in text.splitlines() if not line.startswith("#")][1:]


@pytest.mark.parametrize("options", [(), ("--data-path=buffer",), ("--synchronous",), ("--allocated",)])
def test_all_but_the_bad_blocks_is_copied(tmp_path: Path, image: Path, ring: str, options: tuple[str, ...]) -> None:
    target = tmp_path / "copy"
    with failing(image, *BAD_SECTORS) as source:
        outcome = copy("--salvage", *LITTLE_PATIENCE, "--ring", ring, *options, source.uri, target)
    assert outcome.code == 3, str(outcome)
    images.assert_identical(expected(image, tmp_path), target)
    summary = next(line for line in outcome.err.splitlines() if "copied" in line)
    assert SUMMARY in summary
    assert summary.endswith("flushed")
    assert f"what could not be read is listed by: {EXECUTABLE} jobs export /" in outcome.last_line


def test_without_the_option_the_copy_fails(tmp_path: Path, image: Path, ring: str) -> None:
    with failing(image, BAD_SECTORS[0]) as source:
        outcome = copy(*LITTLE_PATIENCE, "--ring", ring, source.uri, tmp_path / "copy")
    outcome.failed(1, saying=["source", source.uri, "EIO", "failed 2 times"])


def test_the_lost_places_are_told_in_json_and_listed_in_the_journal(tmp_path: Path, image: Path) -> None:
    journal = tmp_path / "journal"
    with failing(image, *BAD_SECTORS) as source:
        words = ("--salvage", *LITTLE_PATIENCE, "--journal", journal, "--progress=json", source.uri, tmp_path / "copy")
        outcome = copy(*words)
    assert outcome.code == 3, str(outcome)
    last = json.loads([line for line in outcome.err.splitlines() if line.startswith("{")][-1])
    assert (last["phase"], last["bytes_unreadable"], last["unreadable_places"]) == ("done", 16384, 3)
    assert [(each["offset"], each["length"]) for each in last["unreadable"]] == list(LOST)
    with Journal.open(str(journal)) as kept:
        assert [(piece.start, piece.length) for piece in kept.unreadable] == list(LOST)
    assert mapfile(journal) == [
        f"0x{0:08X}  0x{256 * BLOCK:08X}  +",
        f"0x{256 * BLOCK:08X}  0x{BLOCK:08X}  -",
        f"0x{257 * BLOCK:08X}  0x{1024 * BLOCK:08X}  +",
        f"0x{1281 * BLOCK:08X}  0x{2 * BLOCK:08X}  -",
        f"0x{1283 * BLOCK:08X}  0x{SIZE - 1284 * BLOCK:08X}  +",
        f"0x{SIZE - BLOCK:08X}  0x{BLOCK:08X}  -",
    ]
    (listed,) = json.loads(nbdshard("jobs", "--json", str(journal)).succeeded().out)
    assert (listed["state"], listed["bytes_durable"], listed["bytes_unreadable"]) == ("complete", SIZE, 16384)
    assert "16 KiB unreadable in 3 places" in nbdshard("jobs", str(journal)).succeeded().out


def test_what_is_not_flushed_is_listed_all_the_same(tmp_path: Path, image: Path) -> None:
    journal = tmp_path / "journal"
    with failing(image, *BAD_SECTORS) as source:
        words = ("--salvage", *LITTLE_PATIENCE, "--no-flush", "--journal", journal, source.uri, tmp_path / "copy")
        outcome = copy(*words)
    assert outcome.code == 3, str(outcome)
    assert f"0x{256 * BLOCK:08X}  0x{BLOCK:08X}  -" in mapfile(journal)


def test_a_copy_that_failed_is_gone_on_with_and_the_list_is_kept(tmp_path: Path, image: Path) -> None:
    """What the first run could not read is readable by then, and not read again."""
    journal, target = tmp_path / "journal", tmp_path / "copy"
    one_by_one = ("--checkpoint", "0", "--range-size", "1M", "-C", "1", "-T", "1", "--synchronous")
    with private_folder() as folder:
        words = ["copy", *LITTLE_PATIENCE, *one_by_one, "--journal", journal, "--salvage"]
        ends = [f"nbd+unix:///?socket={folder / 's'}", target]
        command = ["nbdkit", "-f", "-r", "-U", str(folder / "s"), "eval"]
        with at_socket(folder / "s", *command, *failing_words(image, *BAD_SECTORS[:3], forbidden=SIZE - images.MIB)):
            nbdshard(*words, *ends).failed(1, saying=["source", "EPERM", f"at offset {SIZE - images.MIB}"])
        assert f"0x{1281 * BLOCK:08X}  0x{2 * BLOCK:08X}  -" in mapfile(journal)
        with at_socket(folder / "s", *command, *failing_words(image, BAD_SECTORS[3])):
            again = nbdshard(*words, "--resume", *ends)
    assert again.code == 3, str(again)
    assert SUMMARY in again.err
    assert " resumed" in again.err
    images.assert_identical(expected(image, tmp_path), target)
    assert f"0x{256 * BLOCK:08X}  0x{BLOCK:08X}  -" in mapfile(journal)


def test_what_has_become_unreadable_meanwhile_is_not_compared(tmp_path: Path, image: Path) -> None:
    journal, target = tmp_path / "journal", tmp_path / "copy"
    with private_folder() as folder:
        words = ["copy", *LITTLE_PATIENCE, "--journal", journal, "--keep-journal"]
        ends = [f"nbd+unix:///?socket={folder / 's'}", target]
        command = ["nbdkit", "-f", "-r", "-U", str(folder / "s"), "eval"]
        with at_socket(folder / "s", *command, *failing_words(image)):
            nbdshard(*words, *ends).succeeded()
        nowhere = failing_words(image)
        unreadable = [word if "pread" not in word else "pread=echo EIO >&2; exit 1" for word in nowhere]
        with at_socket(folder / "s", *command, *unreadable):
            nbdshard(*words, "--resume", *ends).failed(1, saying=[ends[0], "cannot be read at offset", "EIO"])
            nbdshard(*words, "--resume", "--salvage", *ends).succeeded()
    images.assert_identical(image, target)


@pytest.mark.parametrize("path", ["splice", "buffer"])
def test_a_block_device_is_salvaged_too(tmp_path: Path, image: Path, ring: str, path: str) -> None:
    """A loop device whose file has become shorter: what is not there any more cannot be read."""
    lost = 64 * images.KIB
    with loop_device(image) as device:
        os.truncate(image, SIZE - lost)
        outcome = copy("--salvage", "--retries", "0", "--ring", ring, "--data-path", path, device, tmp_path / "copy")
    assert outcome.code == 3, str(outcome)
    assert f"{lost} bytes unreadable in 1 place, zeroes instead ({lost} at offset {SIZE - lost})" in outcome.err
    assert (tmp_path / "copy").read_bytes() == image.read_bytes() + bytes(lost)


def test_a_stream_cannot_be_salvaged(tmp_path: Path) -> None:
    copy("--salvage", "-", tmp_path / "copy", input=b"bytes").failed(
        1, saying=["--salvage needs a source with offsets"]
    )


def test_a_server_that_is_lost_is_no_bad_block(tmp_path: Path) -> None:
    with nbdkit("eval", f"get_size=echo {SIZE}", "pread=kill -9 $PPID; sleep 10", flags=["-r"]) as source:
        outcome = copy("--salvage", "--loss-timeout", "0", source.uri, tmp_path / "copy")
    outcome.failed(1, saying=["source", "connection lost"])
