"""`nbdshard info` and `nbdshard map` against real servers, through the real command."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from support.command import EXECUTABLE, nbdshard
from support.doubles import Double, Request, Talk, double
from support.servers import nbd_server, nbdkit, qemu_nbd

KIB = 1024
MIB = 1024 * KIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """4 MiB: data in the second MiB, else holes. Readable by servers of any user."""
    tmp_path.chmod(0o755)
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(4 * MIB)
        file.seek(MIB)
        file.write(b"data" * (MIB // 4))
    return path


def info(uri: str) -> dict[str, object]:
    found = json.loads(nbdshard("info", "--json", uri).succeeded().out)
    assert isinstance(found, dict)
    return found


def map_of(uri: str, *options: str) -> list[tuple[int, int, int]]:
    entries = json.loads(nbdshard("map", "--json", *options, uri).succeeded().out)
    return [(entry["offset"], entry["length"], entry["type"]) for entry in entries]


def test_info_shows_every_property_on_a_line_of_its_own() -> None:
    with nbdkit("memory", "1M", filters=["blocksize-policy"], **{"blocksize-minimum": "512"}) as server:
        lines = nbdshard("info", server.uri).succeeded().out.splitlines()
    assert lines == [
        f"uri: {server.uri}",
        "export: ",
        "size: 1048576 (1 MiB)",
        "protocol: fixed newstyle, structured replies",
        "read-only: no",
        "rotational: no",
        "flush: yes",
        "fua: yes",
        "trim: yes",
        "zeroes: yes",
        "fast-zero: yes",
        "multi-conn: yes",
        "df: yes",
        "cache: yes",
        "resize: no",
        "block-status-payload: no",
        "block sizes: minimum 512, preferred 4096, maximum 4294967295",
        "contexts: base:allocation",
        "hints: none",
    ]


def test_info_json_tells_what_nbdinfo_tells(image: Path) -> None:
    with qemu_nbd(image, "-r", export="disk", tcp=True) as server:
        found = info(server.uri)
        theirs = json.loads(subprocess.check_output(["nbdinfo", "--json", "--no-content", server.uri]))["exports"][0]
    assert found["size"] == theirs["export-size"] == 4 * MIB
    assert found["export"] == theirs["export-name"] == "disk"
    assert found["contexts"] == theirs["contexts"] == ["base:allocation"]
    assert found["protocol"] == {"go": True, "structured": True, "extended": False}
    assert found["block_sizes"] == {
        "minimum": theirs["block_size_minimum"],
        "preferred": theirs["block_size_preferred"],
        "maximum": theirs["block_size_maximum"],
        "advertised": True,
    }
    flags = found["flags"]
    assert isinstance(flags, dict)
    for ours, name in [
        ("read-only", "is_read_only"),
        ("rotational", "is_rotational"),
        ("flush", "can_flush"),
        ("fua", "can_fua"),
        ("trim", "can_trim"),
        ("zeroes", "can_zero"),
        ("fast-zero", "can_fast_zero"),
        ("multi-conn", "can_multi_conn"),
        ("df", "can_df"),
        ("cache", "can_cache"),
    ]:
        assert flags[ours] == theirs[name], name


def test_a_server_without_structured_replies_is_described_so() -> None:
    with nbdkit("memory", "1M", flags=["--no-sr"]) as server:
        found = info(server.uri)
    assert found["protocol"] == {"go": True, "structured": False, "extended": False}
    assert found["contexts"] == []


def test_a_server_without_go_is_described_so() -> None:
    """A handshake without fixed newstyle knows no options at all."""
    with nbdkit("memory", "1M", flags=["--mask-handshake=0"]) as server:
        text = nbdshard("info", server.uri).succeeded().out
        found = info(server.uri)
    assert found["protocol"] == {"go": False, "structured": False, "extended": False}
    assert "\nprotocol: newstyle without NBD_OPT_GO, simple replies\n" in text
    assert "maximum 33554432 (assumed: the server named none)\n" in text


def test_nbd_servers_size_comes_from_go(image: Path) -> None:
    with nbd_server(image) as server:
        assert info(server.uri)["size"] == 4 * MIB


def test_exports_are_listed_with_their_descriptions(image: Path) -> None:
    with qemu_nbd(image, "-D", "the system disk", export="disk") as server:
        assert nbdshard("info", "--list", server.uri).succeeded().out == "disk\tthe system disk\n"
        listed = json.loads(nbdshard("info", "-L", "--json", server.uri).succeeded().out)
    assert listed == {"uri": server.uri, "exports": [{"name": "disk", "description": "the system disk"}]}


def test_the_folder_of_nbdkits_file_plugin_is_listed(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for name in ("a", "b c"):
        (tmp_path / name).write_bytes(b"x" * 512)
    with nbdkit("file", dir=tmp_path) as server:
        assert sorted(nbdshard("info", "-L", server.uri).succeeded().out.splitlines()) == ["a", "b c"]


def test_the_map_shows_data_and_holes_as_nbdinfo_does(image: Path) -> None:
    with qemu_nbd(image, "-r") as server:
        assert map_of(server.uri) == [(0, MIB, 3), (MIB, MIB, 0), (2 * MIB, 2 * MIB, 3)]
        ours = nbdshard("map", server.uri).succeeded().out
        theirs = subprocess.check_output(["nbdinfo", "--map", server.uri], text=True)
    assert ours.split() == theirs.split()


def test_the_totals_add_up_to_the_export(image: Path) -> None:
    with qemu_nbd(image, "-r") as server:
        entries = json.loads(nbdshard("map", "--totals", "--json", server.uri).succeeded().out)
    assert entries == [
        {"size": MIB, "percent": 25.0, "type": 0, "description": "data"},
        {"size": 3 * MIB, "percent": 75.0, "type": 3, "description": "hole,zero"},
    ]


def test_an_export_larger_than_one_query_is_one_extent() -> None:
    with nbdkit("memory", "100G") as server:
        assert map_of(server.uri) == [(0, 100 << 30, 3)]


def test_what_is_a_hole_but_not_zero_is_shown_as_such() -> None:
    with nbdkit(
        "eval", get_size="echo 65536", pread="false", can_extents="exit 0", extents="echo 0 65536 hole"
    ) as server:
        assert nbdshard("map", server.uri).succeeded().out == "         0       65536    1  hole\n"


def test_a_server_without_block_status_is_shown_as_data() -> None:
    with nbdkit("memory", "1M", flags=["--no-sr"]) as server:
        outcome = nbdshard("map", server.uri).succeeded()
    assert outcome.out == "         0     1048576    0  data\n"
    assert outcome.err == f"nbdshard: {server.uri}: no block status: all is shown as data\n"


def test_a_failing_block_status_is_shown_as_data() -> None:
    with nbdkit("memory", "1M", "error-extents-rate=1", filters=["error"]) as server:
        outcome = nbdshard("map", "--json", server.uri).succeeded()
    assert json.loads(outcome.out) == [{"offset": 0, "length": MIB, "type": 0, "description": "data"}]
    (line,) = outcome.err.splitlines()
    assert line.startswith(f"nbdshard: {server.uri}: no block status from offset 0 on: EIO")
    assert line.endswith(": the rest is shown as data")


@pytest.mark.parametrize("minimum", [512, 4096, 65536])
def test_a_tail_that_cannot_be_asked_about_is_data(minimum: int) -> None:
    with nbdkit(
        "memory",
        str(2 * MIB + 100),
        f"blocksize-minimum={minimum}",
        "blocksize-preferred=64k",
        filters=["blocksize-policy"],
    ) as server:
        assert map_of(server.uri) == [(0, 2 * MIB, 3), (2 * MIB, 100, 0)]


def test_an_empty_export_has_an_empty_map() -> None:
    with nbdkit("memory", "0") as server:
        assert map_of(server.uri) == []


def test_a_reader_that_leaves_early_ends_the_map_quietly() -> None:
    """Blocks alternate, so that the map is far longer than what a pipe holds."""
    extents = (
        "i=$4; n=$(($4+$3)); [ $n -gt 67108864 ] && n=67108864; while [ $i -lt $n ]; do "
        "echo $i 4096; echo $((i+4096)) 4096 hole,zero; i=$((i+8192)); done"
    )
    with nbdkit("eval", "get_size=echo 67108864", "pread=false", f"extents={extents}", "can_extents=exit 0") as server:
        ended = subprocess.run(
            ["bash", "-c", f"{EXECUTABLE} map '{server.uri}' | head -n 1; echo ${{PIPESTATUS[0]}}"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    assert ended.stdout.splitlines() == ["         0        4096    0  data", "141"]
    assert ended.stderr == ""


class _Inside(Double):
    """Extents that end inside of blocks, against the rules; `step` bytes are told at a time."""

    step = 5000

    def block_status(self, talk: Talk, request: Request) -> None:
        self.send_extents(talk, request, [(min(self.step, request.length), request.offset // 4096 % 2 * 3)])


def test_extents_that_end_inside_a_block_leave_no_gap() -> None:
    with double(_Inside(bytearray(16384), blocks=(4096, 4096, 1 << 25))) as uri:
        assert map_of(uri) == [(0, 5000, 0), (5000, 4096, 3), (9096, 4096, 0), (13192, 3192, 3)]


def test_a_server_that_tells_nothing_new_ends_the_asking() -> None:
    class Standing(_Inside):
        step = 100

    with double(Standing(bytearray(16384), blocks=(4096, 4096, 1 << 25))) as uri:
        outcome = nbdshard("map", uri).succeeded()
    assert outcome.out == "         0       16384    0  data\n"
    assert outcome.err == f"nbdshard: {uri}: no block status from offset 100 on: the rest is shown as data\n"
