"""What can stand for SOURCE and DESTINATION besides a running server: files, pipes, commands, and null:."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from support import images
from support.command import EXECUTABLE, copy, started
from support.doubles import Double, double
from support.servers import nbdkit, qemu_nbd

SIZE = 3 * images.MIB + 511


@pytest.fixture
def source_image(tmp_path: Path) -> Path:
    return images.sparse_image(tmp_path / "source", SIZE)


def test_a_file_is_copied_to_a_new_file_and_stays_sparse(tmp_path: Path, source_image: Path, ring: str) -> None:
    destination = tmp_path / "destination"
    copy("--ring", ring, source_image, destination).succeeded()
    images.assert_identical(source_image, destination)
    assert images.allocated_bytes(destination) <= images.allocated_bytes(source_image)


@pytest.mark.parametrize("old_size", [0, 10, SIZE, 2 * SIZE])
def test_a_destination_file_ends_with_the_size_of_the_source(
    tmp_path: Path, source_image: Path, ring: str, old_size: int
) -> None:
    destination = images.filled_image(tmp_path / "destination", old_size)
    copy("--ring", ring, source_image, destination).succeeded()
    images.assert_identical(source_image, destination)


def test_a_file_copied_onto_itself_by_another_name_is_refused(tmp_path: Path, source_image: Path) -> None:
    before = images.sha256(source_image)
    os.link(source_image, tmp_path / "other")
    (tmp_path / "link").symlink_to(source_image)
    for name in ("source", "other", "link"):
        copy(source_image, tmp_path / name).failed(1, saying=["same"])
    assert images.sha256(source_image) == before


def test_a_missing_source_file_is_named_and_no_destination_made(tmp_path: Path) -> None:
    copy(tmp_path / "nosuch", tmp_path / "destination").failed(1, saying=["nosuch"])
    assert list(tmp_path.iterdir()) == []


def test_null_takes_everything(source_image: Path, ring: str) -> None:
    with nbdkit("file", str(source_image), flags=["-r"]) as server:
        copy("--ring", ring, server.uri, "null:").succeeded()


def test_standard_input_goes_to_a_server(tmp_path: Path, source_image: Path, ring: str) -> None:
    destination = images.filled_image(tmp_path / "destination", SIZE)
    with nbdkit("file", str(destination)) as server:
        copy("--ring", ring, "-", server.uri, input=source_image.read_bytes()).succeeded()
    images.assert_identical(source_image, destination)


def test_a_server_goes_to_standard_output_through_a_pipe(tmp_path: Path, source_image: Path, ring: str) -> None:
    with nbdkit("file", str(source_image), flags=["-r"]) as server:
        command = f'"{EXECUTABLE}" copy --ring {ring} "{server.uri}" - | cat >"{tmp_path}/out"'
        subprocess.run(["sh", "-c", command], stdin=subprocess.DEVNULL, timeout=60, check=True)
    images.assert_identical(source_image, tmp_path / "out")


def test_a_pipe_goes_through_two_copies(tmp_path: Path, source_image: Path, ring: str) -> None:
    copying = f'"{EXECUTABLE}" copy --ring {ring}'
    command = f'cat "{source_image}" | {copying} - - | {copying} - "{tmp_path}/out"'
    subprocess.run(["sh", "-c", command], timeout=60, check=True)
    images.assert_identical(source_image, tmp_path / "out")


def test_more_requests_to_files_than_the_ring_can_hold_wait_for_room(tmp_path: Path, ring: str) -> None:
    source, destination = images.random_image(tmp_path / "source", 64 * images.MIB), tmp_path / "destination"
    options = ("--workers", "1", "-C", "16", "-R", "1024", "--request-size", "4k", "-S", "0", "--range-size", "64M")
    copy("--ring", ring, *options, source, destination).succeeded()
    images.assert_identical(source, destination)


def test_standard_input_longer_than_the_destination_fails(tmp_path: Path, ring: str) -> None:
    destination = images.filled_image(tmp_path / "destination", 65536)
    with nbdkit("file", str(destination)) as server:
        outcome = copy("--ring", ring, "-", server.uri, input=images.random_bytes(65537))
    outcome.failed(1)


@pytest.mark.parametrize(("length", "code"), [(8191, 0), (8192, 0), (8193, 1), (10_000, 1)])
def test_standard_input_goes_no_further_than_the_last_whole_block_of_the_destination(
    ring: str, length: int, code: int
) -> None:
    """A server may export a size that is no multiple of its minimum block size: its tail cannot be written."""
    target = Double(bytearray(b"\xee" * 10_000), blocks=(4096, 4096, 1 << 20))
    data = images.random_bytes(length)
    with double(target) as uri:
        outcome = copy("--ring", ring, "-", uri, input=data)
    assert outcome.code == code, str(outcome)
    if code == 0:
        assert target.content == data + b"\xee" * (10_000 - length)
    else:
        outcome.failed(1, saying=["destination", "smaller than the source"])


def test_a_reader_that_goes_away_fails_the_copy_without_noise(source_image: Path, ring: str) -> None:
    with nbdkit("file", str(source_image), flags=["-r"]) as server:
        command = f'"{EXECUTABLE}" copy --ring {ring} "{server.uri}" - | head -c 10 >/dev/null'
        ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) <= 1


@pytest.mark.parametrize("side", ["source", "destination", "both"])
def test_a_command_in_brackets_serves_a_side(tmp_path: Path, source_image: Path, ring: str, side: str) -> None:
    destination = images.filled_image(tmp_path / "destination", SIZE)
    source_words = ["[", "nbdkit", "-r", "--exit-with-parent", "file", str(source_image), "]"]
    destination_words = ["[", "nbdkit", "--exit-with-parent", "file", str(destination), "]"]
    copy(
        "--ring",
        ring,
        *(source_words if side != "destination" else [str(source_image)]),
        *(destination_words if side != "source" else [str(destination)]),
    ).succeeded()
    images.assert_identical(source_image, destination)


def test_qemu_nbd_in_brackets_serves_a_side(tmp_path: Path, source_image: Path, ring: str) -> None:
    source = images.random_image(tmp_path / "aligned", images.MIB)
    copy("--ring", ring, "[", "qemu-nbd", "-r", "-f", "raw", str(source), "]", tmp_path / "out").succeeded()
    images.assert_identical(source, tmp_path / "out")
    assert source_image.exists()


def test_a_command_that_ends_at_once_is_named(tmp_path: Path) -> None:
    copy("[", "false", "]", tmp_path / "out").failed(1, saying=["false"])
    copy("[", "/no/such/server", "]", tmp_path / "out").failed(1, saying=["/no/such/server"])
    assert not (tmp_path / "out").exists()


def test_a_command_that_ignores_its_socket_is_given_up(tmp_path: Path) -> None:
    copy("[", "sleep", "300", "]", tmp_path / "out").failed(1, saying=["source"])


def test_a_qcow2_image_behind_qemu_nbd_reads_as_its_content(tmp_path: Path, ring: str) -> None:
    raw, qcow2 = images.sparse_image(tmp_path / "raw", 4 * images.MIB), tmp_path / "qcow2"
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(qcow2)]
    subprocess.run(convert, timeout=60, check=True)
    with qemu_nbd(qcow2, "-r", image_format="qcow2") as server:
        copy("--ring", ring, "--workers", "2", server.uri, tmp_path / "out").succeeded()
        assert images.qemu_compare(server.uri, tmp_path / "out") == ""
    images.assert_identical(raw, tmp_path / "out")


def test_progress_lines_are_written_to_a_descriptor(source_image: Path, ring: str) -> None:
    reading, writing = os.pipe()
    try:
        with started("copy", "--ring", ring, f"--progress={writing}", source_image, "null:", pass_fds=[writing]) as run:
            run.wait().succeeded()
        os.close(writing)
        writing = -1
        with os.fdopen(reading, "r") as stream:
            reading = -1
            lines = stream.read().splitlines()
    finally:
        for descriptor in (reading, writing):
            if descriptor >= 0:
                os.close(descriptor)
    assert lines[-1] == "100/100"
    assert all(line.endswith("/100") for line in lines)
    numbers = [int(line.partition("/")[0]) for line in lines]
    assert numbers == sorted(numbers)
