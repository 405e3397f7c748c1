"""`copy --verify`: what was written is read back; a destination that lies is caught, over the same connections."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
from pathlib import Path

import pytest

from support import images
from support.command import EXECUTABLE, copy, started
from support.servers import at_socket, nbdkit, private_folder, qemu_nbd
from support.sides import EVAL, KINDS, Blocks, eval_methods, serve
from support.waiting import wait_for

SIZE = 10_000_384
SMALL = ("--range-size", "1M", "--request-size", "256k")
DROPPED = 5 * images.MIB  # the offset of the request that a lying destination does not write


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images.sparse_image(tmp_path_factory.mktemp("image") / "one", SIZE, runs=24)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images.random_image(tmp_path_factory.mktemp("dense") / "one", 8 * images.MIB)


@pytest.mark.parametrize("destination", KINDS)
@pytest.mark.parametrize("path", ["auto", "buffer"])
def test_a_good_copy_is_verified(image: Path, tmp_path: Path, ring: str, path: str, destination: str) -> None:
    copied = images.filled_image(tmp_path / "copy", SIZE)
    with serve("nbdkit-file", image) as one, serve(destination, copied) as two:
        outcome = copy("--verify", "--ring", ring, "--data-path", path, *SMALL, one, two).succeeded()
    assert outcome.last_line.endswith("; flushed; verified"), str(outcome)
    images.assert_identical(image, copied)


def test_lanes_are_over_before_what_they_wrote_is_read(tmp_path: Path, ring: str) -> None:
    large = images.random_image(tmp_path / "one", 96 * images.MIB)
    copied = images.empty_image(tmp_path / "copy", 96 * images.MIB)
    with serve("nbdkit-file", large) as one, serve("nbdkit-file", copied) as two:
        outcome = copy("--verify", "--ring", ring, one, two).succeeded()
    assert "verified" in outcome.last_line
    assert "spliced" in outcome.last_line
    images.assert_identical(large, copied)


def test_a_new_file_and_a_server_that_leaves_with_its_last_client(image: Path, tmp_path: Path) -> None:
    outcome = copy("--verify", "[", "qemu-nbd", "-r", "-f", "raw", str(image), "]", tmp_path / "copy").succeeded()
    assert outcome.last_line.endswith("; verified")
    images.assert_identical(image, tmp_path / "copy")


def test_a_larger_destination_is_read_no_further_than_it_was_written(image: Path, tmp_path: Path, ring: str) -> None:
    copied = images.filled_image(tmp_path / "copy", SIZE + 3 * images.MIB)
    with serve("nbdkit-file", image) as one, serve("nbdkit-file", copied) as two:
        outcome = copy("--verify", "--ring", ring, one, two).succeeded()
    assert outcome.last_line.endswith("; verified")
    images.assert_begins_with(copied, image, rest=0xEE)


def test_a_tail_that_ends_inside_a_block_of_the_destination(tmp_path: Path, ring: str) -> None:
    odd = images.random_image(tmp_path / "one", images.MIB + 777)
    copied = images.filled_image(tmp_path / "copy", images.MIB + 4096)
    blocks = Blocks(4096)
    with (
        serve("nbdkit-file", odd) as one,
        serve("nbdkit-file", copied, filters=blocks.filters, args=blocks.args) as two,
    ):
        outcome = copy("--verify", "--ring", ring, one, two).succeeded()
    assert outcome.last_line.endswith("; verified")
    images.assert_begins_with(copied, odd, rest=0xEE)


def test_an_empty_source_is_verified(tmp_path: Path) -> None:
    outcome = copy("--verify", images.empty_image(tmp_path / "one", 0), tmp_path / "copy").succeeded()
    assert outcome.last_line.endswith("; verified")


def test_the_last_progress_object_says_verified(image: Path, tmp_path: Path) -> None:
    outcome = copy("--verify", "--progress=json", image, tmp_path / "copy").succeeded()
    last = [json.loads(line) for line in outcome.err.splitlines() if line.startswith("{")][-1]
    assert last["phase"] == "done"
    assert last["verified"] is True
    assert last["bytes_verified"] == last["bytes_total"] == SIZE
    plain = copy("--progress=json", image, tmp_path / "other").succeeded()
    last = [json.loads(line) for line in plain.err.splitlines() if line.startswith("{")][-1]
    assert (last["verified"], last["bytes_verified"]) == (None, None)


def test_percent_goes_to_50_for_the_copy_and_on_for_what_is_read_back(dense: Path, tmp_path: Path) -> None:
    outcome = copy("--verify", "--progress=1", *SMALL, "--workers", "1", dense, tmp_path / "copy").succeeded()
    percents = [int(line.partition("/")[0]) for line in outcome.out.splitlines()]
    assert percents == sorted(percents)
    assert percents[-1] == 100


# -- destinations that lie ---------------------------------------------------------------------------------------------


def test_a_destination_that_keeps_nothing_is_caught(dense: Path, ring: str) -> None:
    with serve("nbdkit-file", dense) as one, nbdkit("null", size=dense.stat().st_size) as two:
        outcome = copy("--verify", "--progress=json", "--ring", ring, one, two.uri)
    outcome.failed(1, saying=["differ: offset 0, 8388608 bytes"])
    outcome.failed(1, saying=["different: ", "8388608 bytes (in blocks of 512) differ from the source"])
    last = [json.loads(line) for line in outcome.err.splitlines() if line.startswith("{")][-1]
    assert (last["phase"], last["verified"]) == ("different", False)


def lying(image: Path) -> list[str]:
    """nbdkit's eval plugin that acknowledges one request's write and throws it away."""
    write = f"dd bs=256k of={image} seek=$4 oflag=seek_bytes conv=notrunc status=none"
    return eval_methods(image, pwrite=f"if [ $4 = {DROPPED} ]; then cat >/dev/null; else {write}; fi")


def test_a_write_that_is_acknowledged_and_dropped_is_found_and_copied_again_when_resumed(
    dense: Path, tmp_path: Path, ring: str
) -> None:
    copied = images.filled_image(tmp_path / "copy", dense.stat().st_size)
    with private_folder() as folder:
        path, journal = folder / "s", tmp_path / "journal"
        words = ("--verify", "--ring", ring, *SMALL, str(dense), f"nbd+unix:///?socket={path}")
        with at_socket(path, "nbdkit", "-f", "-U", str(path), "eval", *lying(copied)):
            outcome = copy("--journal", journal, *words)
        outcome.failed(1, saying=[f"differ: offset {DROPPED}, 262144 bytes"])
        resume = re.search(rf"^nbdshard: to go on: {re.escape(EXECUTABLE)} copy (.*)$", outcome.err, re.MULTILINE)
        assert resume is not None, str(outcome)
        assert images.difference(dense, copied) == DROPPED
        with at_socket(path, "nbdkit", "-f", "-U", str(path), "eval", *eval_methods(copied)):
            again = copy(*shlex.split(resume[1])).succeeded()
    # The range of the lease alone: its megabyte.
    assert "1 MiB copied" in again.last_line
    assert "7 MiB resumed" in again.last_line
    assert again.last_line.endswith("; verified")
    images.assert_identical(dense, copied)
    assert not journal.exists()


def test_zeroes_that_are_acknowledged_and_not_made_are_found(tmp_path: Path, ring: str) -> None:
    one = images.empty_image(tmp_path / "one", 4 * images.MIB)
    copied = images.filled_image(tmp_path / "copy", 4 * images.MIB)
    methods = (*eval_methods(copied), "zero=exit 0", "can_zero=exit 0")
    with nbdkit("eval", *methods) as two:
        outcome = copy("--verify", "--ring", ring, one, two.uri)
    outcome.failed(1, saying=["differ: offset 0, 4194304 bytes"])


def test_a_destination_that_is_trusted_to_be_zero_and_is_not_is_found(tmp_path: Path) -> None:
    one = images.empty_image(tmp_path / "one", 4 * images.MIB)
    copied = images.empty_image(tmp_path / "copy", 4 * images.MIB)
    with copied.open("r+b") as file:
        file.seek(images.MIB)
        file.write(b"old")
    with nbdkit("file", str(copied)) as two:
        copy("--destination-is-zero", one, two.uri).succeeded()
        outcome = copy("--verify", "--destination-is-zero", one, two.uri)
    outcome.failed(1, saying=["differ: offset 1048576, 512 bytes"])


# -- what cannot be verified -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (("--no-flush",), 2, "--verify and --no-flush contradict each other"),
        (("--salvage",), 2, "--verify and --salvage contradict each other"),
    ],
)
def test_options_that_contradict_it_are_refused(image: Path, words: tuple[str], code: int, line: str) -> None:
    copy("--verify", *words, image, "/nonexistent/copy").failed(code, saying=[line])


@pytest.mark.parametrize("operand", ["null:", "-"])
def test_what_keeps_nothing_cannot_be_read_back(dense: Path, operand: str) -> None:
    with open(os.devnull, "wb") as nothing:
        outcome = copy("--verify", dense, operand, stdout=nothing.fileno())
    outcome.failed(1, saying=["cannot be read back", "leave --verify out"])


def test_a_copy_that_cannot_be_read_back_says_that_it_is_copied(dense: Path, tmp_path: Path) -> None:
    copied = images.filled_image(tmp_path / "copy", dense.stat().st_size)
    with nbdkit("file", str(copied), "error-pread-rate=100%", filters=["error"]) as two:
        outcome = copy("--verify", "--retries", "0", dense, two.uri)
    outcome.failed(1, saying=["everything is copied, but could not be verified", "destination", "read of", "EIO"])
    assert "differ" not in outcome.err
    images.assert_identical(dense, copied)


# -- over a bad night --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["worker", "server"])
def test_what_is_lost_while_it_is_read_back_is_made_up_for(tmp_path: Path, ring: str, what: str) -> None:
    large = images.random_image(tmp_path / "one", 8 * images.MIB)
    copied = images.empty_image(tmp_path / "copy", 8 * images.MIB)
    with private_folder() as folder, qemu_nbd(large, "-r") as one:
        path, asked, answers = folder / "s", folder / "asked", folder / "answers"
        pread = f": > {asked}; until [ -e {answers} ]; do sleep 0.02; done; {EVAL['pread']}"
        words = ("nbdkit", "-f", "-U", str(path), "--threads=1", "eval", *eval_methods(copied, pread=pread))
        with at_socket(path, *words) as two:
            options = ("--verify", "--ring", ring, "--workers", "2", "--request-size", "256k", "--range-size", "1M")
            with started("copy", *options, one.uri, two.uri) as run:
                run.until("a read of what was written", asked.exists)
                if what == "worker":
                    os.kill(run.workers()[0], signal.SIGKILL)
                    answers.touch()
                    outcome = run.wait()
                else:
                    two.kill()
                    run.until("the loss to be told of", lambda: "waiting for it" in run.err())
                    answers.touch()
                    with at_socket(path, *words):
                        outcome = run.wait()
    outcome.succeeded()
    assert outcome.last_line.endswith("; verified"), str(outcome)
    images.assert_identical(large, copied)


def test_workers_of_a_coordinator_read_back_what_they_wrote(dense: Path, tmp_path: Path, ring: str) -> None:
    copied = images.filled_image(tmp_path / "copy", dense.stat().st_size)
    with (
        serve("nbdkit-file", dense, transport="tcp") as one,
        nbdkit("eval", *lying(copied), tcp=True) as two,
        started("coordinator", "--listen", "tcp://127.0.0.1:0", "--verify", *SMALL, one, two.uri) as coordinator,
    ):
        address = wait_for("the address", lambda: (re.findall(r"listening on (\S+)", coordinator.err()) or [""])[0])
        with started("worker", "--ring", ring, "--connect", address) as worker:
            worker.wait().succeeded()
            outcome = coordinator.wait()
    outcome.failed(1, saying=[f"differ: offset {DROPPED}, 262144 bytes"])
