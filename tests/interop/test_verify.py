"""`nbdshard verify` between real servers and files: what is the same, what differs and where, what cannot be told."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from support import images, processes
from support.brakes import Brake
from support.command import Outcome, Run, nbdshard, started
from support.servers import at_socket, nbdkit, private_folder, running
from support.sides import KINDS, Blocks, serve
from support.waiting import wait_for

SIZE = 10_000_384  # no multiple of a request, of a page or of 4096; whole sectors, for qemu
SMALL = ("--range-size", "1M", "--request-size", "256k")
DIFFERENT = 1
UNCOMPARED = 5


def verify(*args: str | Path) -> Outcome:
    return nbdshard("verify", *args)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, holes, and written zeroes."""
    return images.sparse_image(tmp_path_factory.mktemp("image") / "one", SIZE, runs=24)


def written_out(image: Path, path: Path) -> Path:
    """The same bytes without a hole."""
    path.write_bytes(image.read_bytes())
    return path


def poke(path: Path, offset: int, data: bytes = b"\x55") -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def sector(offset: int, size: int = SIZE) -> str:
    start = offset // 512 * 512
    return f"differ: offset {start}, {min(512, size - start)} bytes"


# -- the same ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("destination", KINDS)
@pytest.mark.parametrize("source", ["nbdkit-file", "qemu-nbd", "file"])
def test_the_same_bytes_are_identical_whether_holes_or_written(
    image: Path, tmp_path: Path, ring: str, source: str, destination: str
) -> None:
    other = written_out(image, tmp_path / "two")
    with serve(source, image) as one, serve(destination, other) as two:
        outcome = verify("--ring", ring, *SMALL, one, two).succeeded()
    assert outcome.out == ""
    assert outcome.last_line.startswith("nbdshard: identical: "), str(outcome)


def test_zeroes_on_both_sides_are_not_read(tmp_path: Path, ring: str) -> None:
    empty = [images.empty_image(tmp_path / name, 64 * images.MIB) for name in ("one", "two")]
    for path in empty:
        poke(path, 5 * images.MIB, b"data")
    with (
        nbdkit("file", str(empty[0]), flags=["-r"], filters=["log"], logfile=tmp_path / "log") as one,
        nbdkit("file", str(empty[1]), flags=["-r"]) as two,
    ):
        outcome = verify("--json", "--ring", ring, one.uri, two.uri).succeeded()
    answer = json.loads(outcome.out)
    assert answer["bytes_compared"] + answer["bytes_zero"] == 64 * images.MIB
    assert answer["bytes_compared"] <= images.MIB
    reads = [line for line in (tmp_path / "log").read_text().splitlines() if " Read " in line and "..." in line]
    assert 1 <= len(reads) <= 2, reads


def test_without_extents_everything_is_read(image: Path, ring: str) -> None:
    with serve("nbdkit-file", image) as one, serve("nbdkit-file", image) as two:
        outcome = verify("--json", "--no-extents", "--ring", ring, one, two).succeeded()
    assert json.loads(outcome.out)["bytes_compared"] == SIZE


@pytest.mark.parametrize("blocks", [Blocks(512), Blocks(4096), Blocks(1, 64 << 10)], ids=str)
def test_block_sizes_of_both_sides_are_honoured(tmp_path: Path, ring: str, blocks: Blocks) -> None:
    image = images.sparse_image(tmp_path / "one", 3 * images.MIB + 4096, runs=24)
    with (
        serve("nbdkit-file", image, filters=blocks.filters, args=blocks.args) as one,
        serve("nbdkit-file", written_out(image, tmp_path / "two")) as two,
    ):
        verify("--ring", ring, one, two).succeeded()
        verify("--ring", ring, two, one).succeeded()
        poke(tmp_path / "two", 3 * images.MIB + 4095)
        outcome = verify("--ring", ring, one, two).failed(DIFFERENT)
    assert outcome.out.splitlines() == [sector(3 * images.MIB + 4095, 3 * images.MIB + 4096)]


def test_empty_ends_are_identical(tmp_path: Path) -> None:
    paths = [images.empty_image(tmp_path / name, 0) for name in ("one", "two")]
    verify(*paths).succeeded()


def test_servers_that_are_started_for_it_and_leave_with_their_last_client(image: Path, tmp_path: Path) -> None:
    other = written_out(image, tmp_path / "two")
    one, two = (["[", "qemu-nbd", "-r", "-f", "raw", str(path), "]"] for path in (image, other))
    verify(*one, *two).succeeded()
    poke(other, 1000)
    assert verify(*one, *two).failed(DIFFERENT).out.splitlines() == [sector(1000)]


def test_neither_side_is_written_to_flushed_or_changed(image: Path, tmp_path: Path) -> None:
    other = written_out(image, tmp_path / "two")
    poke(other, 77)
    facts = [path.stat().st_mtime_ns for path in (image, other)]
    log = tmp_path / "log"
    with nbdkit("file", str(other), filters=["log"], logfile=log) as two:
        verify(image, two.uri).failed(DIFFERENT)
        verify(two.uri, image).failed(DIFFERENT)
    verify(other, image).failed(DIFFERENT)
    assert [path.stat().st_mtime_ns for path in (image, other)] == facts
    requests = [word for word in ("Write", "Zero", "Trim", "Flush") if f" {word} " in log.read_text()]
    assert not requests
    assert " Read " in log.read_text()


def test_a_file_that_nobody_may_write_now_is_compared(tmp_path: Path) -> None:
    program = written_out(Path(shutil.which("sleep") or ""), tmp_path / "sleep")
    program.chmod(0o755)
    other = written_out(program, tmp_path / "two")
    with running([str(program), "60"], "", lambda pid: processes.command_line(pid).startswith(str(program)), tmp_path):
        with pytest.raises(OSError, match="Text file busy"):
            program.open("r+b")
        verify(program, other).succeeded()
        verify(other, program).succeeded()


# -- different ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kinds", [("nbdkit-file", "qemu-nbd"), ("file", "nbdkit-file"), ("file", "file")], ids="-".join
)
@pytest.mark.parametrize("offset", [0, 5_000_000, SIZE - 1], ids=["beginning", "middle", "end"])
def test_one_byte_is_found(image: Path, tmp_path: Path, ring: str, kinds: tuple[str, str], offset: int) -> None:
    other = written_out(image, tmp_path / "two")
    poke(other, offset, bytes([image.read_bytes()[offset] ^ 1]))
    with serve(kinds[0], image) as one, serve(kinds[1], other) as two:
        for ends in ((one, two), (two, one)):
            outcome = verify("--ring", ring, *SMALL, *ends).failed(DIFFERENT, saying=["different: 512 bytes"])
            assert outcome.out.splitlines() == [sector(offset)]


@pytest.mark.parametrize("size", [1, 511, 4097, 1_000_001])
def test_the_last_byte_of_an_odd_size_is_found(tmp_path: Path, ring: str, size: int) -> None:
    one = images.random_image(tmp_path / "one", size)
    two = written_out(one, tmp_path / "two")
    poke(two, size - 1, bytes([one.read_bytes()[-1] ^ 1]))
    with serve("nbdkit-file", one) as server:
        outcome = verify("--ring", ring, server, two).failed(DIFFERENT)
    assert outcome.out.splitlines() == [sector(size - 1, size)]


@pytest.mark.parametrize("swapped", [False, True], ids=["zero-data", "data-zero"])
@pytest.mark.parametrize("options", [(), ("--no-extents",)], ids=["extents", "no-extents"])
def test_zeroes_against_data_are_found_in_both_directions(
    tmp_path: Path, ring: str, swapped: bool, options: Sequence[str]
) -> None:
    one = images.empty_image(tmp_path / "one", 32 * images.MIB)
    two = images.empty_image(tmp_path / "two", 32 * images.MIB)
    poke(two, 20 * images.MIB, b"\xff" * 1024)
    poke(two, 30 * images.MIB, bytes(64 * 1024))  # zeroes that are written are zeroes
    with serve("nbdkit-file", one) as first, serve("nbdkit-file", two) as second:
        ends = (second, first) if swapped else (first, second)
        outcome = verify("--ring", ring, *options, *ends).failed(DIFFERENT)
    assert outcome.out.splitlines() == [f"differ: offset {20 * images.MIB}, 1024 bytes"]


def test_ranges_that_touch_are_one_also_across_requests_and_leases(tmp_path: Path) -> None:
    one = images.random_image(tmp_path / "one", 4 * images.MIB)
    two = written_out(one, tmp_path / "two")
    start, end = 700_000 // 512 * 512, 3_500_000 // 512 * 512
    poke(two, start, bytes(byte ^ 0xFF for byte in one.read_bytes()[start:end]))
    outcome = verify("--range-size", "64k", "--request-size", "4k", one, two).failed(DIFFERENT)
    assert outcome.out.splitlines() == [f"differ: offset {start}, {end - start} bytes"]


def test_of_many_differences_the_first_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    one = images.random_image(tmp_path / "one", 16 * images.MIB)
    two = written_out(one, tmp_path / "two")
    data = one.read_bytes()
    offsets = range(3 * images.MIB, 13 * images.MIB, 64 * 1024)
    with two.open("r+b") as file:
        for offset in offsets:
            file.seek(offset)
            file.write(bytes([data[offset] ^ 1]))
    outcome = verify("--range-size", "1M", one, two).failed(DIFFERENT)
    lines = outcome.out.splitlines()
    assert lines[:10] == [f"differ: offset {offset}, 512 bytes" for offset in offsets[:10]]
    assert lines[10:] == [f"differ: and more behind these, {512 * len(offsets)} bytes in all"]
    answer = json.loads(verify("--json", "--range-size", "1M", one, two).failed(DIFFERENT).out)
    assert [entry["offset"] for entry in answer["differences"]] == list(offsets[:64])
    assert answer["differences_cut"] is True
    assert answer["bytes_differing"] == 512 * len(offsets)


def test_json_holds_the_answer_and_nothing_else_is_on_standard_output(image: Path, tmp_path: Path) -> None:
    other = written_out(image, tmp_path / "two")
    outcome = verify("--json", image, other).succeeded()
    answer = json.loads(outcome.out)
    assert outcome.err == ""
    assert answer.pop("seconds") > 0
    assert answer.pop("bytes_compared") + answer.pop("bytes_zero") == SIZE
    assert answer == {
        "identical": True,
        "source": {"name": str(image), "size": SIZE},
        "destination": {"name": str(other), "size": SIZE},
        "bytes_differing": 0,
        "block_bytes": 512,
        "differences": [],
        "differences_cut": False,
    }
    poke(other, 4096)
    answer = json.loads(verify("--json", image, other).failed(DIFFERENT).out)
    assert answer["identical"] is False
    assert answer["differences"] == [{"offset": 4096, "length": 512}]


# -- sizes that differ -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("longer", ["source", "destination"])
@pytest.mark.parametrize("sizes", [(1_000_001, 3 * images.MIB), (images.MIB, 200 * images.MIB), (0, 8192)])
def test_what_only_the_longer_side_has_must_be_zeroes(
    tmp_path: Path, ring: str, longer: str, sizes: tuple[int, int]
) -> None:
    short = images.random_image(tmp_path / "short", sizes[0])
    long = written_out(short, tmp_path / "long")
    os.truncate(long, sizes[1])
    with serve("nbdkit-file", short) as one, serve("nbdkit-file", long) as two:
        ends = (two, one) if longer == "source" else (one, two)
        outcome = verify("--ring", ring, *ends).succeeded()
        assert "the sizes differ: " in outcome.err
        assert f"{sizes[0]} bytes" in outcome.err or f", {one}" in outcome.err or f" {sizes[0]};" in outcome.err
        for offset in (sizes[0], sizes[1] - 1):
            poke(long, offset)
            outcome = verify("--ring", ring, *ends).failed(DIFFERENT, saying=["the sizes differ"])
            assert outcome.out.splitlines() == [sector(offset, sizes[1])]
            poke(long, offset, b"\0")


def test_a_short_side_with_odd_size_against_blocks_of_4096(tmp_path: Path) -> None:
    short = images.random_image(tmp_path / "short", 1_000_001)
    long = written_out(short, tmp_path / "long")
    os.truncate(long, 2 * images.MIB)
    blocks = Blocks(4096)
    with serve("nbdkit-file", long, filters=blocks.filters, args=blocks.args) as two:
        verify(short, two).succeeded()
        poke(long, 1_000_001)
        assert verify(two, short).failed(DIFFERENT).out.splitlines() == [sector(1_000_001, 2 * images.MIB)]


# -- what cannot be compared is no difference --------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_side_that_cannot_be_read_is_no_difference(image: Path, ring: str, side: str) -> None:
    with (
        nbdkit("file", str(image), "error-pread-rate=100%", filters=["error"], flags=["-r"]) as bad,
        nbdkit("file", str(image), flags=["-r"]) as good,
    ):
        ends = (bad.uri, good.uri) if side == "source" else (good.uri, bad.uri)
        outcome = verify("--ring", ring, "--retries", "1", *ends)
    outcome.failed(UNCOMPARED, saying=[f"{side} ", "read of", "failed 2 times", "EIO"])
    assert outcome.out == ""
    assert len(outcome.err.splitlines()) == 1


def test_a_server_that_refuses_some_requests_is_asked_again(image: Path, tmp_path: Path, ring: str) -> None:
    other = written_out(image, tmp_path / "two")
    with (
        nbdkit("file", str(image), "error-pread-rate=2%", filters=["error"], flags=["-r"]) as one,
        nbdkit("file", str(other), "error-rate=2%", filters=["error"], flags=["-r"]) as two,
    ):
        verify("--ring", ring, "--request-size", "4k", "--range-size", "64k", one.uri, two.uri).succeeded()
        assert "injecting EIO" in one.stderr()
        assert "injecting EIO" in two.stderr()


def test_block_status_that_fails_says_nothing(image: Path, tmp_path: Path, ring: str) -> None:
    other = written_out(image, tmp_path / "two")
    poke(other, 5_000_000)
    with (
        nbdkit("file", str(image), "error-extents-rate=100%", filters=["error"], flags=["-r"]) as one,
        nbdkit("file", str(other), flags=["-r"]) as two,
    ):
        outcome = verify("--ring", ring, one.uri, two.uri).failed(DIFFERENT)
    assert outcome.out.splitlines() == [sector(5_000_000)]


@pytest.mark.parametrize(
    ("operands", "code", "words"),
    [
        (("{image}",), 2, ["the destination is missing"]),
        (("-", "{image}"), 2, ["'-' cannot be compared"]),
        (("{image}", "null:"), 2, ["'null:' cannot be compared"]),
        (("--verify", "{image}", "{image}"), 2, ["--verify"]),
        (("{image}", "{image}.missing"), UNCOMPARED, ["destination", "No such file"]),
        (("{image}.missing", "{image}"), UNCOMPARED, ["source", "No such file"]),
        (("{image}", "/"), UNCOMPARED, ["is a directory"]),
        (("{image}", "nbd+unix:///?socket=/nonexistent"), UNCOMPARED, ["destination", "/nonexistent"]),
    ],
)
def test_what_is_wrong_is_told_in_one_line_and_never_by_1(
    image: Path, operands: Sequence[str], code: int, words: Sequence[str]
) -> None:
    outcome = verify(*(word.format(image=image) for word in operands)).failed(code, saying=words)
    assert outcome.out == ""
    assert len(outcome.err.splitlines()) == 1, str(outcome)


# -- over a bad night --------------------------------------------------------------------------------------------------

SLOW_SIZE = 48 * images.MIB
HALF = SLOW_SIZE // 2
STEPS = ("--range-size", "1M", "--request-size", "64k")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images.random_image(tmp_path_factory.mktemp("large") / "one", SLOW_SIZE)


@pytest.fixture(scope="module")
def changed(large: Path) -> Path:
    """Differs in two bytes from `large`: near its beginning and near its end."""
    path = written_out(large, large.parent / "two")
    for offset in (70_000, SLOW_SIZE - 70_000):
        poke(path, offset, bytes([large.read_bytes()[offset] ^ 1]))
    return path


FOUND = [sector(70_000, SLOW_SIZE), sector(SLOW_SIZE - 70_000, SLOW_SIZE)]


@pytest.fixture
def brake() -> Iterator[Brake]:
    """Half of what is compared goes fast, the other half when it is released."""
    with private_folder() as folder:
        yield Brake(folder, HALF)


def in_the_middle(run: Run) -> None:
    """Return when some of it is compared, but by no means all."""
    run.until("the middle", lambda: max(percents(run.out()), default=0) > 40)


def percents(text: str) -> list[int]:
    return [int(line.partition("/")[0]) for line in text.splitlines() if line.endswith("/100")]


@pytest.mark.parametrize("lost", ["source", "destination"])
def test_a_server_that_comes_back_is_waited_for(large: Path, changed: Path, brake: Brake, ring: str, lost: str) -> None:
    image, other = (large, changed) if lost == "source" else (changed, large)
    with private_folder() as folder, nbdkit("file", str(other), *brake.options, filters=["rate"], flags=["-r"]) as slow:
        path = folder / "s"
        words = ("nbdkit", "-f", "-r", "-U", str(path), "file", str(image))
        with at_socket(path, *words) as server:
            ends = (server.uri, slow.uri) if lost == "source" else (slow.uri, server.uri)
            with started("verify", "--progress=1", "--ring", ring, *STEPS, *ends) as run:
                in_the_middle(run)
                server.kill()
                wait_for("the loss", lambda: "waiting for it" in run.err() or run.process.poll() is not None)
                brake.release()
                with at_socket(path, *words):
                    outcome = run.wait().failed(DIFFERENT, saying=["different: 1024 bytes"])
    assert [line for line in outcome.out.splitlines() if "differ" in line] == FOUND
    assert "connected again" in outcome.err


def test_a_worker_that_is_killed_is_replaced_and_nothing_is_told_twice(
    large: Path, changed: Path, brake: Brake, ring: str
) -> None:
    with (
        nbdkit("file", str(large), *brake.options, filters=["rate"], flags=["-r"], threads=1) as one,
        nbdkit("file", str(changed), flags=["-r"], threads=1) as two,
        started("verify", "--progress=1", "--ring", ring, "--workers", "2", *STEPS, one.uri, two.uri) as run,
    ):
        in_the_middle(run)
        os.kill(run.workers()[0], signal.SIGKILL)
        brake.release()
        outcome = run.wait().failed(DIFFERENT, saying=["different: 1024 bytes"])
    assert [line for line in outcome.out.splitlines() if "differ" in line] == FOUND


def test_a_server_that_stays_away_is_no_difference(large: Path, changed: Path, brake: Brake) -> None:
    with (
        nbdkit("file", str(large), *brake.options, filters=["rate"], flags=["-r"]) as one,
        nbdkit("file", str(changed), flags=["-r"]) as two,
        started("verify", "--progress=1", "--loss-timeout", "0.5", *STEPS, one.uri, two.uri) as run,
    ):
        in_the_middle(run)
        two.kill()
        outcome = run.wait().failed(75, saying=["destination", "was waited for"])
    # What was found until then is told, but the answer is not known.
    assert "given up before the end: 512 bytes" in outcome.last_line
    assert "to go on" not in outcome.err


def test_an_interrupt_ends_it_softly_and_is_no_difference(large: Path, changed: Path, brake: Brake) -> None:
    with (
        nbdkit("file", str(large), *brake.options, filters=["rate"], flags=["-r"]) as one,
        nbdkit("file", str(changed), flags=["-r"]) as two,
        started("verify", "--progress=1", *STEPS, one.uri, two.uri) as run,
    ):
        in_the_middle(run)
        run.signal_group(signal.SIGINT)
        brake.release()
        outcome = run.wait().failed(130, saying=["stopped before the end"])
    assert percents(outcome.out)[-1] < 100
