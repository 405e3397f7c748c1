"""Spliced or through buffers: the destination comes out the same, and where splicing has its limits it says so."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from nbdshard.worker.pipes import NO_LOOK, Pipe
from nbdshard.worker.plumbing import SystemPlumbing
from support import images, processes
from support.command import EXECUTABLE, Outcome, copy
from support.doubles import Double, double
from support.pairwise import Case, name_of, pairwise, product
from support.pipes import PAGE
from support.servers import nbdkit, private_folder, running
from support.sides import RINGS, TRANSPORTS, granularity, round_up, serve
from support.unprivileged import as_lonely_user, install_for_everybody, interpreter_for_nobody, lonely_user

SIZE = 10_000_001
OLD = 0xEE  # what the destination held before
PATHS = ("splice", "buffer")
KINDS = ("nbdkit-file", "nbdkit-memory", "qemu-nbd", "nbd-server")
SPARSE: dict[str, tuple[str, ...]] = {"detected": (), "dense": ("-S", "0")}
SMALL_PIECES = "its data comes in small pieces: a pipe of "

FACTORS = {
    "source": KINDS,
    "destination": KINDS,
    "transport": TRANSPORTS,
    "ring": RINGS,
    "path": PATHS,
    "zeroes": tuple(SPARSE),
}


ZEROES = ((1_000_000, 1_500_000), (4_000_000, 4096), (5_000_001, 700_000), (9_990_000, 5_000))  # written: start, length
HOLES = ((3_000_000, 600_000), (6_000_000, 70_000))


def sparse_image(path: Path, size: int) -> Path:
    """Mostly data; in it long and short runs of written zeroes, and holes."""
    content = bytearray(images.random_bytes(size))
    for start, length in ZEROES:
        content[start : start + length] = bytes(length)
    at = 0
    with path.open("wb") as file:
        for start, length in (*HOLES, (size, 0)):
            file.seek(at)
            file.write(content[at:start])
            at = start + length
    return path


def data_path(outcome: Outcome) -> str:
    """What the summary says of the way the data went."""
    found = re.search(r"; (buffered|spliced|\d+ % spliced);", outcome.last_line)
    assert found is not None, outcome
    return found[1]


def check(folder: Path, case: Case) -> None:
    source_kind, destination_kind, path = str(case["source"]), str(case["destination"]), str(case["path"])
    size = round_up(SIZE, granularity(source_kind))
    source = sparse_image(folder / "source", size)
    destination = images.filled_image(folder / "destination", round_up(size, granularity(destination_kind)), OLD)
    transport = str(case["transport"])
    with (
        serve(source_kind, source, transport=transport) as one,
        serve(destination_kind, destination, transport=transport) as two,
    ):
        options = ("--ring", str(case["ring"]), "--data-path", path, *SPARSE[str(case["zeroes"])])
        outcome = copy(*options, one, two).succeeded()
    images.assert_begins_with(destination, source, rest=OLD)
    if path == "buffer":
        assert data_path(outcome) == "buffered"
    else:
        assert "spliced" in data_path(outcome)


@pytest.mark.parametrize("case", pairwise(FACTORS), ids=name_of)
def test_a_copy_is_identical_whichever_way_its_data_goes(tmp_path: Path, case: Case) -> None:
    check(tmp_path, case)


@pytest.mark.long
@pytest.mark.parametrize("case", product(FACTORS), ids=name_of)
def test_any_copy_is_identical_whichever_way_its_data_goes(tmp_path: Path, case: Case) -> None:
    check(tmp_path, case)


@pytest.mark.parametrize("path", PATHS)
def test_both_ways_leave_the_same_holes(tmp_path: Path, ring: str, path: str) -> None:
    source = sparse_image(tmp_path / "source", SIZE)
    destination = images.empty_image(tmp_path / "destination", SIZE)
    with serve("nbdkit-file", source) as one, serve("nbdkit-file", destination) as two:
        copy("--ring", ring, "--data-path", path, one, two).succeeded()
    images.assert_identical(source, destination)
    zeroes = sum(length for _, length in (*ZEROES, *HOLES))
    assert images.allocated_bytes(destination) <= SIZE - zeroes + 100_000  # the odd ends of each


@pytest.mark.parametrize("path", PATHS)
def test_dense_data_goes_one_way_only(tmp_path: Path, ring: str, path: str) -> None:
    image = images.random_image(tmp_path / "source", 8 * images.MIB)
    target = Double(bytearray(8 * images.MIB))
    with serve("nbdkit-file", image) as one, double(target) as two:
        outcome = copy("--ring", ring, "--data-path", path, one, two).succeeded()
    assert target.content == image.read_bytes()
    assert data_path(outcome) == {"splice": "spliced", "buffer": "buffered"}[path]


def test_data_is_spliced_unless_it_is_said_otherwise(tmp_path: Path, ring: str) -> None:
    image = images.random_image(tmp_path / "source", 8 * images.MIB)
    with serve("nbdkit-file", image) as one, nbdkit("memory", "8M") as two:
        assert data_path(copy("--ring", ring, one, two.uri).succeeded()) == "spliced"


def test_what_cannot_be_spliced_is_an_error_where_it_must_be(ring: str) -> None:
    reading, writing = os.pipe()
    os.write(writing, images.random_bytes(10_000))
    os.close(writing)
    with nbdkit("memory", "1M") as server:
        outcome = copy("--ring", ring, "--data-path", "splice", "-", server.uri, stdin=reading)
    os.close(reading)
    outcome.failed(1, saying=["standard input", "cannot be spliced", "--data-path"])


# -- data that comes in small pieces ----------------------------------------------------------------------------------


@contextlib.contextmanager
def ethernet() -> Iterator[Sequence[str]]:
    """How to run a command in a network namespace whose loopback carries 1500 bytes at a time, each by itself."""
    name = f"nbdt-{secrets.token_hex(4)}"
    inside = ["ip", "netns", "exec", name]
    _run("ip", "netns", "add", name)
    try:
        _run(*inside, "ip", "link", "set", "lo", "mtu", "1500", "gso_max_segs", "1", "up")
        yield inside
    finally:
        _run("ip", "netns", "delete", name)


def _run(*command: str) -> None:
    subprocess.run(command, timeout=20, check=True)


@contextlib.contextmanager
def nbdkit_inside(inside: Sequence[str], port: int, *plugin: str) -> Iterator[str]:
    """The URI of an nbdkit that listens on TCP in a network namespace."""
    with private_folder() as folder:
        command = [*inside, "nbdkit", "-f", "--exit-with-parent", "-i", "127.0.0.1", "-p", str(port), *plugin]
        accepts = processes.listening_tcp_ports
        with running(command, f"nbd://127.0.0.1:{port}/", lambda pid: port in accepts(pid), folder) as server:
            yield server.uri


# What a copy of SIZE takes: few requests rule a lane out, and one connection leaves none to the worker's loop.
WAYS: dict[str, tuple[str, ...]] = {
    "buffers": ("--data-path", "buffer"),
    "pipes": ("-R", "4"),
    "a lane": ("--connections", "1"),
    "a lane and pipes": (),
}


@pytest.mark.parametrize(
    ("way", "zeroes"), [*((way, "dense") for way in WAYS), ("pipes", "detected"), ("a lane", "detected")]
)
def test_a_network_of_small_packets_fills_pipes_early_and_the_copy_is_identical(
    tmp_path: Path, ring: str, way: str, zeroes: str
) -> None:
    """A packet takes a slot of the pipe or two, so 256 slots are full long before they hold a request of 1 MiB."""
    source = sparse_image(tmp_path / "source", SIZE)
    destination = images.filled_image(tmp_path / "destination", SIZE, OLD)
    with (
        ethernet() as inside,
        nbdkit_inside(inside, 10809, "-r", "file", str(source)) as one,
        nbdkit_inside(inside, 10810, "file", str(destination)) as two,
    ):
        options = ("-v", "--ring", ring, "--workers", "1", *WAYS[way], *SPARSE[zeroes])
        outcome = copy(*options, one, two, executable=[*inside, EXECUTABLE]).succeeded()
    images.assert_identical(source, destination)
    said = [line for line in outcome.err.splitlines() if SMALL_PIECES in line]
    if way == "buffers":
        assert (said, data_path(outcome)) == ([], "buffered")
        return
    assert 1 <= len(said) <= 4  # once for each connection
    assert data_path(outcome) == "buffered" or 0 <= percent_spliced(outcome) < 100
    if zeroes == "dense":
        assert percent_spliced(outcome) > 0


def percent_spliced(outcome: Outcome) -> int:
    found = re.fullmatch(r"(\d+) % spliced", data_path(outcome))
    assert found is not None, outcome
    return int(found[1])


# -- a user with limits -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def as_lonely() -> Iterator[dict[str, Any]]:
    """How `copy` runs the command as a user without privileges who has nothing else running."""
    interpreter = interpreter_for_nobody()
    assert interpreter is not None, "no Python of this version that an ordinary user can run"
    with private_folder() as folder:
        install_for_everybody(folder)
        how: dict[str, Any] = {
            "executable": [interpreter, "-P", "-m", "nbdshard.cli.main"],
            "env": {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        }
        yield {**how, "user": lonely_user()} if os.geteuid() == 0 else how


def take_pipes(bytes_left: int) -> int:
    """Use up the user's share of pipe memory but for `bytes_left`; the bytes taken."""
    limit = int(Path("/proc/sys/fs/pipe-user-pages-soft").read_text()) * PAGE
    plumbing, taken = SystemPlumbing(), 0
    while taken < limit - bytes_left:
        pipe = plumbing.open_pipe(images.MIB)
        assert isinstance(pipe, Pipe)
        if pipe.capacity < images.MIB:
            break
        taken += pipe.capacity
    return taken


@pytest.mark.parametrize("mib_left", [3, 0])
def test_a_user_whose_share_of_pipes_is_used_up_copies_through_buffers_and_is_told(
    tmp_path: Path, ring: str, as_lonely: dict[str, Any], mib_left: int
) -> None:
    source = images.random_image(tmp_path / "source", 4 * SIZE)
    destination = images.filled_image(tmp_path / "destination", 4 * SIZE, OLD)
    with (
        as_lonely_user(lambda: take_pipes(mib_left * images.MIB)) as taken,
        nbdkit("file", str(source), flags=["-r"]) as one,
        nbdkit("file", str(destination)) as two,
    ):
        assert taken > 0
        options = ("-v", "--ring", ring, "--workers", "1", "-S", "0", "-R", "4")  # too few for a lane
        outcome = copy(*options, one.uri, two.uri, **as_lonely).succeeded()
    images.assert_identical(source, destination)
    lines = [line for line in outcome.err.splitlines() if "the payload of other requests goes through buffers" in line]
    assert len(lines) == 1
    assert re.search(r"pipe \d can hold only \d+ bytes \(pipe-max-size, pipe-user-pages-soft\)", lines[0])
    assert ("spliced" in data_path(outcome)) is (mib_left > 0)


def test_without_a_pipe_for_it_there_is_no_lane_and_the_copy_is_identical(
    tmp_path: Path, ring: str, as_lonely: dict[str, Any]
) -> None:
    source = images.random_image(tmp_path / "source", SIZE)
    destination = images.filled_image(tmp_path / "destination", SIZE, OLD)
    with (
        as_lonely_user(lambda: take_pipes(0)),
        nbdkit("file", str(source), flags=["-r"]) as one,
        nbdkit("file", str(destination)) as two,
    ):
        options = ("-v", "--ring", ring, "--workers", "1", "-S", "0")
        outcome = copy(*options, one.uri, two.uri, **as_lonely).succeeded()
    images.assert_identical(source, destination)
    said = [line for line in outcome.err.splitlines() if "payload is copied without lanes" in line]
    assert len(said) == 1
    assert re.search(r"a pipe can hold only \d+ bytes \(pipe-max-size, pipe-user-pages-soft\)", said[0])
    assert data_path(outcome) == "buffered"


NO_LOOKS = {"lane": ((), "; what is searched"), "pipe": (("-R", "1"), ": the payload of other requests")}


@pytest.mark.parametrize(("options", "follows"), NO_LOOKS.values(), ids=NO_LOOKS)
def test_with_a_pipe_and_none_to_look_with_memory_is_searched_and_it_is_said(
    tmp_path: Path, ring: str, as_lonely: dict[str, Any], options: tuple[str, ...], follows: str
) -> None:
    source = sparse_image(tmp_path / "source", SIZE)
    destination = images.filled_image(tmp_path / "destination", SIZE, OLD)
    with (
        # One for the payload; what a worker needs besides leaves less than another one.
        as_lonely_user(lambda: take_pipes(2 * images.MIB)),
        nbdkit("file", str(source), flags=["-r"]) as one,
        nbdkit("file", str(destination)) as two,
    ):
        words = ("-v", "--ring", ring, "--workers", "1", "--connections", "1", "--request-size", "1M")
        outcome = copy(*words, *options, one.uri, two.uri, **as_lonely).succeeded()
    images.assert_identical(source, destination)
    assert len([line for line in outcome.err.splitlines() if NO_LOOK + follows in line]) == 1, outcome
    assert "without lanes" not in outcome.err


def test_a_user_with_a_share_of_pipes_splices(tmp_path: Path, ring: str, as_lonely: dict[str, Any]) -> None:
    source = images.random_image(tmp_path / "source", 8 * images.MIB)
    destination = images.filled_image(tmp_path / "destination", 8 * images.MIB, OLD)
    with nbdkit("file", str(source), flags=["-r"]) as one, nbdkit("file", str(destination)) as two:
        outcome = copy("-v", "--ring", ring, one.uri, two.uri, **as_lonely).succeeded()
    images.assert_identical(source, destination)
    assert data_path(outcome) == "spliced"
    assert "through buffers" not in outcome.err
