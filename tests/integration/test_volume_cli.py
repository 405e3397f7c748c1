"""`nbdshard volume`, as users run it, beside `nbdshard serve`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.command import nbdshard
from support.served import NAME, serving, tool

MIB = 1 << 20


def volume(*words: str | Path) -> str:
    return nbdshard("volume", *words).succeeded().out


def refused(*words: str | Path, code: int = 1) -> str:
    """The one line that is said."""
    outcome = nbdshard("volume", *words)
    assert (outcome.code, outcome.out) == (code, ""), str(outcome)
    (line,) = outcome.err.splitlines()
    return line.removeprefix("nbdshard: ")


def test_a_volume_is_made_served_resized_listed_and_deleted(tmp_path: Path) -> None:
    store = f"file:{tmp_path}/"
    assert volume("create", NAME, store, "--size", "100M", "--chunk", "1M") == "disk: 100 MiB in chunks of 1 MiB\n"
    with serving(store, driver="sharded") as served:
        tool("qemu-io", "-f", "raw", "-c", "write -P 1 0 3M", "-c", "write -P 1 90M 64k", served.uri())
        for words in (("resize", NAME, store, "--size=200M"), ("delete", NAME, store, "--yes")):
            assert "disk.volume: is in use by another nbdshard serve" in refused(*words)
    assert json.loads(volume("list", store, "--json")) == [
        {"name": NAME, "size": 100 * MIB, "chunk_bytes": MIB, "stored_bytes": 3 * MIB + 65_536}
    ]
    assert volume("resize", NAME, store, "--size=10M", "--shrink") == (
        "disk: 10 MiB instead of 100 MiB; chunks deleted: 1\n"
    )
    assert volume("resize", NAME, store, "--size", "1G") == "disk: 1 GiB instead of 10 MiB\n"
    assert volume("list", store) == "disk: 1 GiB in chunks of 1 MiB, 3 MiB stored\n"
    with serving(store, driver="sharded") as served:
        tool("qemu-io", "-f", "raw", "-c", "read -P 1 0 3M", "-c", "read -P 0 90M 64k", served.uri())
    assert volume("delete", NAME, store, "--yes") == "disk: deleted; chunks deleted: 3\n"
    assert volume("list", store) == ""


def test_a_description_that_cannot_be_read_is_told_and_the_others_are_listed(tmp_path: Path) -> None:
    volume("create", "good", f"file:{tmp_path}", "--size", "1M")
    (tmp_path / "bad.volume").write_text("?")
    outcome = nbdshard("volume", "list", f"file:{tmp_path}").failed(1, saying=["bad.volume: is no description"])
    assert outcome.out == "good: 1 MiB in chunks of 4 MiB, 0 B stored\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "what is to be done is missing: create or resize or delete or list; see --help"),
        (["make"], "volumes cannot be told to 'make'; known are create, resize, delete, list"),
        (["list"], "volume list takes STORE, and none given; see --help"),
        (["create", "a", "--size", "1M"], "volume create takes NAME STORE, and 1 given; see --help"),
        (["create", "a", "file:/"], "volume create needs --size; see --help"),
        (["create", "a", "file:/", "--size", "big"], "argument --size: 'big' is not a size; 100G, say"),
        (["delete", "a", "file:/"], "a and all that is in it would be deleted; --yes says that this is meant"),
        (["list", "file:/", "--yes"], "volume list does not take --yes; see --help"),
        (["create", "a", "file:/", "--nosuch"], "unrecognized arguments: --nosuch; try 'nbdshard volume --help'"),
    ],
)
def test_a_wrong_command_line_is_told_in_a_line(words: list[str], line: str) -> None:
    assert refused(*words, code=2).startswith(line)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["create", "a/b", "{store}", "--size=1"],
            "{store}: no volume can be called 'a/b'; a name is not empty and has no /",
        ),
        (["create", "a", "{store}", "--size=0"], "{store}: a.volume: a size of 0 bytes"),
        (["create", "a", "{store}", "--size=1M", "--chunk=5M"], "{store}: a.volume: chunks of 5242880 bytes; a power"),
        (["create", "disk", "{store}", "--size=1M"], "{store}: disk: there is such a volume already"),
        (["resize", "disk", "{store}", "--size=1"], "{store}: disk: has 1048576 bytes, and 1 are fewer; --shrink"),
        (["resize", "a", "{store}", "--size=1"], "{store}: a: there is no such volume"),
        (["delete", "a", "{store}", "--yes"], "{store}: a: there is no such volume"),
        (["list", "{store}?size=1"], "{store}: no parameter is called 'size'; there are none"),
        (["list", "cache:{store}"], "cache:{store}: 'cache' is neither a layer nor a store"),
        (["list", "{store}/nowhere"], "/nowhere: there is no such directory; make it first"),
        (["list", "memory:1M"], "memory:1M: 'memory' is neither a layer nor a store here; stores are file, s3, gs, az"),
        (["list", "{store}", "--credentials=/nowhere"], "/nowhere: "),
    ],
)
def test_what_cannot_be_done_is_told_in_a_line(words: list[str], line: str, tmp_path: Path) -> None:
    store = f"file:{tmp_path}"
    volume("create", "disk", store, "--size=1M")
    said = refused(*(word.format(store=store) for word in words))
    assert line.format(store=store) in said


def test_a_password_is_warned_of_and_not_shown() -> None:
    ended = nbdshard("volume", "list", "s3:http://user:secret@/b")
    ended.failed(1, saying=["a password on the command line"]).failed(1, saying=["s3:http://***@"])
    assert "secret" not in ended.err


def test_a_second_server_is_refused_and_so_is_a_second_export(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB))
    exports = {"raw": f"file:{image}", "sharded": f"file:{tmp_path}?size=1M"}
    for driver, conn in exports.items():
        words = ("serve", "-e", NAME, driver, conn, "--unix", str(tmp_path / "second"))
        with serving(conn, driver=driver):
            nbdshard(*words).failed(1, saying=["export 'disk'", "is in use by another nbdshard serve"])
            nbdshard(*words, "--read-only", NAME).failed(1, saying=["is in use by another nbdshard serve"])
    words = ("serve", "-e", "a", "raw", exports["raw"], "-e", "b", "raw", exports["raw"])
    nbdshard(*words).failed(1, saying=["export 'b'", "is in use by another nbdshard serve"])
    with serving(f"{exports['raw']}?read-only=yes"), serving(f"{exports['raw']}?read-only=yes"):
        pass
