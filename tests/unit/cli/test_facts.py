"""Whether a file or device is what it was when the copy began, also when the machine was started in between."""

from __future__ import annotations

import os

import msgspec
import pytest

from nbdshard.cli.facts import difference, is_same_device
from nbdshard.coordinator.journal_facts import LocalFile

FILE = LocalFile(device=2049, inode=77, mtime_ns=1000, boot="one")
DISK = LocalFile(device=5, inode=300, mtime_ns=1000, boot="one", number=os.makedev(8, 16), identity="wwid naa.1")
NAMELESS = LocalFile(device=5, inode=300, mtime_ns=1000, boot="one", number=os.makedev(8, 16))
AFTER_A_START = {"boot": "two", "device": 7, "mtime_ns": 5000}


def changed(one: LocalFile, **how: object) -> LocalFile:
    return msgspec.structs.replace(one, **how)


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (FILE, FILE),
        (FILE, changed(FILE, boot="two", device=7)),
        (DISK, DISK),
        (DISK, changed(DISK, **AFTER_A_START, inode=299)),
        (DISK, changed(DISK, **AFTER_A_START, inode=299, number=os.makedev(8, 32))),
        (NAMELESS, changed(NAMELESS, **AFTER_A_START, inode=299)),
        (NAMELESS, changed(DISK, **AFTER_A_START)),
    ],
)
def test_the_same_is_known_again(then: LocalFile, now: LocalFile) -> None:
    assert difference("source", then, now) == ""


@pytest.mark.parametrize(
    ("then", "now", "line"),
    [
        (FILE, changed(FILE, inode=78), "the source is another file than when the copy began"),
        (FILE, changed(FILE, device=7), "the source is another file than when the copy began"),
        (FILE, changed(FILE, boot="two", inode=78), "the source is another file than when the copy began"),
        (FILE, DISK, "the source is another file than when the copy began"),
        (DISK, FILE, "the source is another file than when the copy began"),
        (FILE, changed(FILE, mtime_ns=1001), "the source was changed since the copy began"),
        (
            DISK,
            changed(DISK, identity="wwid naa.2"),
            "the source is another device than when the copy began: wwid naa.2 (8:16), not wwid naa.1 (8:16)",
        ),
        (
            NAMELESS,
            changed(NAMELESS, number=os.makedev(8, 32)),
            "the source is another device than when the copy began: 8:32 (which has no identity), not 8:16 "
            "(which has no identity)",
        ),
    ],
)
def test_another_is_told(then: LocalFile, now: LocalFile, line: str) -> None:
    assert difference("source", then, now) == line


def test_a_destination_file_changes_with_the_copy() -> None:
    assert difference("destination", FILE, changed(FILE, mtime_ns=1001)) == ""


def test_a_device_may_have_another_name_only_if_it_says_who_it_is() -> None:
    assert is_same_device(DISK, changed(DISK, number=1))
    assert not is_same_device(NAMELESS, NAMELESS)
    assert not is_same_device(FILE, FILE)
    assert not is_same_device(None, DISK)
