"""Bad input through the real command: the exit code, exactly one line, nothing on standard output, nothing written."""

from __future__ import annotations

import os
import pty
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.command import nbdshard, started
from support.servers import free_port, nbd_server, nbdkit, private_folder, qemu_nbd

MIB = 1 << 20


def fails(*argv: str | Path, code: int = 1, line: str, **how: object) -> None:
    """The command ends with `code` and says `line` and nothing else."""
    outcome = nbdshard(*argv, **how)  # type: ignore[arg-type]
    assert (outcome.code, outcome.out) == (code, ""), str(outcome)
    assert outcome.err.splitlines() == [f"nbdshard: {line}"], str(outcome)


def fails_saying(*argv: str | Path, code: int = 1, words: Sequence[str]) -> None:
    """The command ends with `code` and says one line in which all of `words` occur."""
    outcome = nbdshard(*argv)
    assert (outcome.code, outcome.out) == (code, ""), str(outcome)
    (said,) = outcome.err.splitlines()
    assert said.startswith("nbdshard: "), str(outcome)
    assert [word for word in words if word not in said] == [], str(outcome)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "no subcommand; try 'nbdshard --help'"),
        (
            ["cp"],
            "unknown subcommand 'cp'; "
            "known are copy, coordinator, worker, verify, serve, volume, info, map, checksum, ctl, jobs, keygen",
        ),
        (["copy"], "source and destination are missing; see --help for what can stand there"),
        (["copy", "a"], "the destination is missing; see --help for what can stand there"),
        (["copy", "a", "b", "c"], "one word too many: 'c'; a copy has one source and one destination"),
        (["copy", "--nosuch", "a", "b"], "unrecognized arguments: --nosuch; try 'nbdshard copy --help'"),
        (
            ["copy", "[", "nbdkit", "memory", "1M"],
            "'[' without a ']' after it; brackets are words of their own: [ CMD ARGS ... ]",
        ),
        (["copy", "nbdkit", "]", "null:"], "']' without a '[' before it"),
        (
            ["copy", "-C", "0", "a", "b"],
            "argument -C/--connections: '0' is not a whole number from 1 to 1024; try 'nbdshard copy --help'",
        ),
        (
            ["copy", "a", "b", "--request-size=3k"],
            "argument --request-size: '3k' is not a power of two from 4k to 32M; try 'nbdshard copy --help'",
        ),
        (
            ["copy", "--progress=77", "a", "b"],
            "argument --progress: '77' is not an open descriptor; try 'nbdshard copy --help'",
        ),
        (["copy", "--flush", "--no-flush", "a", "b"], "--flush and --no-flush contradict each other"),
        (["info"], "the URI is missing; see --help"),
        (["map", "--totals"], "the URI is missing; see --help"),
    ],
)
def test_a_wrong_command_line_exits_with_2(argv: list[str], line: str) -> None:
    fails(*argv, code=2, line=line)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("http://host/disk", ["http://host/disk: ", "unknown scheme 'http'", "./http://host/disk"]),
        ("null:", ["null: can only be a destination"]),
        ("", ["the source is an empty word"]),
        ("nbds://host/disk", ["nbds://host/disk: nbds asks for TLS", "not support yet"]),
        ("nbds+unix:///disk?socket=/s", ["nbds+unix asks for TLS", "not support yet"]),
        ("nbd+vsock://3/", ["nbd+vsock", "not supported"]),
        ("nbd://host:port/", ["not a port: 'port'"]),
        ("nbd://host:70000/", ["not a port: '70000'"]),
        ("nbd://host/%zz", ["'%zz' is no percent-encoding"]),
        ("nbd://[::1/", ["write an IPv6 address in brackets"]),
        ("nbd://host/x?sockt=/s", ["unknown parameter 'sockt'"]),
        ("nbd+unix:///disk", ["no socket parameter"]),
        ("nbd:host", ["no // after the scheme"]),
    ],
)
@pytest.mark.parametrize("subcommand", ["copy", "info"])
def test_a_malformed_uri_is_told_before_anything_is_opened(
    subcommand: str, source: str, words: list[str], tmp_path: Path
) -> None:
    destination = [tmp_path / "out"] if subcommand == "copy" else []
    fails_saying(subcommand, source, *destination, words=words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("subcommand", ["info", "map"])
def test_a_server_that_cannot_be_reached_is_told_with_its_reason(subcommand: str, tmp_path: Path) -> None:
    port = free_port()
    fails(
        subcommand,
        f"nbd://127.0.0.1:{port}/",
        line=f"nbd://127.0.0.1:{port}/: connection refused: nobody listens there",
    )
    uri = f"nbd+unix:///?socket={tmp_path}/s"
    fails(subcommand, uri, line=f"{uri}: there is no socket {tmp_path}/s")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    fails(subcommand, uri, line=f"{uri}: nobody listens on the socket {tmp_path}/s")
    uri = "nbd://nosuch.invalid/"
    fails_saying(subcommand, uri, words=[uri, "the host name 'nosuch.invalid' does not resolve"])


def test_a_copy_from_a_server_that_cannot_be_reached_fails(tmp_path: Path) -> None:
    port = free_port()
    uri = f"nbd://127.0.0.1:{port}/x"
    fails("copy", uri, tmp_path / "out", line=f"source {uri}: connection refused: nobody listens there")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    uri = f"nbd+unix:///?socket={tmp_path}/s"
    fails("copy", uri, tmp_path / "out", line=f"source {uri}: nobody listens on the socket {tmp_path}/s")
    uri = f"nbd+unix:///?socket={tmp_path}/none"
    fails("copy", uri, tmp_path / "out", line=f"source {uri}: there is no socket {tmp_path}/none")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("subcommand", ["copy", "info", "map"])
def test_an_export_that_does_not_exist_is_named(subcommand: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB))
    destination = ["null:"] if subcommand == "copy" else []
    with qemu_nbd(image, "-r", export="disk") as server:
        uri = server.uri.replace("/disk?", "/nosuch?")
        fails_saying(subcommand, uri, *destination, words=[uri, "no such export: 'nosuch'"])
    with nbd_server(image, export="disk") as server:
        uri = server.uri.replace("/disk?", "/nosuch?")
        fails_saying(subcommand, uri, *destination, words=[uri, "no such export: 'nosuch'"])
    with nbdkit("file", dir=tmp_path, export="nosuch") as server:
        fails_saying(subcommand, server.uri, *destination, words=[server.uri])


@pytest.mark.parametrize("subcommand", ["copy", "info", "map"])
def test_an_oldstyle_server_is_recognised(subcommand: str) -> None:
    destination = ["null:"] if subcommand == "copy" else []
    with nbdkit("memory", "1M", flags=["-o"]) as server:
        fails_saying(subcommand, server.uri, *destination, words=[server.uri, "oldstyle"])


@pytest.mark.parametrize("subcommand", ["copy", "info", "map"])
def test_a_peer_that_is_no_nbd_server_is_recognised(subcommand: str) -> None:
    destination = ["null:"] if subcommand == "copy" else []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                with peer:
                    peer.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        try:
            uri = f"nbd://127.0.0.1:{server.getsockname()[1]}/"
            fails_saying(subcommand, uri, *destination, words=[uri, "not an NBD server", "SSH-2.0-"])
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def test_a_server_that_insists_on_tls_is_never_talked_to_in_the_clear() -> None:
    with private_folder() as certificates:
        flags = ["--tls=require", f"--tls-psk={certificates}/keys"]
        (certificates / "keys").write_text("user:00112233445566778899aabbccddeeff\n")
        with nbdkit("memory", "1M", flags=flags) as server:
            fails_saying("info", server.uri, words=[server.uri, "insists on TLS"])
            fails_saying("copy", server.uri, "null:", words=[server.uri, "insists on TLS"])


def test_a_terminal_is_neither_read_nor_written() -> None:
    control, terminal = pty.openpty()
    try:
        with nbdkit("memory", "1M") as server:
            with started("copy", server.uri, "-", stdout=terminal) as run:
                outcome = run.wait()
            assert outcome.code == 1
            assert outcome.err == (
                "nbdshard: -: standard output is a terminal; an image is not for people to read; "
                "redirect it to a file or a pipe\n"
            )
            with started("copy", "-", server.uri, stdin=terminal) as run:
                outcome = run.wait()
            assert outcome.code == 1
            assert outcome.err == (
                "nbdshard: -: standard input is a terminal; an image is not for people to type; "
                "redirect it from a file or a pipe\n"
            )
    finally:
        os.close(control)
        os.close(terminal)


def test_a_copy_of_something_onto_itself_is_refused_and_leaves_it_alone(tmp_path: Path) -> None:
    image, link = tmp_path / "image", tmp_path / "link"
    image.write_bytes(b"precious")
    link.symlink_to(image)
    (tmp_path / "hard").hardlink_to(image)
    for other in (image, link, tmp_path / "hard", f"{tmp_path}/../{tmp_path.name}/image"):
        fails("copy", image, other, line=f"{os.path.abspath(other)}: source and destination are the same")
    assert image.read_bytes() == b"precious"


def test_what_is_no_file_and_no_device_is_refused(tmp_path: Path) -> None:
    fails_saying("copy", tmp_path / "none", "null:", words=[f"{tmp_path}/none: ", "No such file"])
    fails_saying("copy", tmp_path, "null:", words=[f"{tmp_path}: the source is a directory"])
    fails_saying("copy", "/dev/zero", tmp_path, words=["/dev/zero: the source is neither a file nor a block device"])
    (tmp_path / "image").write_bytes(bytes(512))
    fails_saying("copy", tmp_path / "image", tmp_path, words=[f"{tmp_path}: the destination is a directory"])
    fails_saying("copy", tmp_path / "image", tmp_path / "no" / "file", words=[f"{tmp_path}/no/file: ", "No such file"])


def test_a_destination_smaller_than_the_source_is_refused_before_it_is_written() -> None:
    with nbdkit("pattern", "2M") as source, nbdkit("memory", "1M", flags=["-v"]) as destination:
        words = [str(2 * MIB), str(MIB)]
        fails_saying("copy", source.uri, destination.uri, words=words)
        assert "memory: pwrite" not in destination.stderr()


def test_a_read_only_destination_is_refused() -> None:
    with nbdkit("pattern", "1M") as source, nbdkit("memory", "1M", flags=["-r"]) as destination:
        fails_saying("copy", source.uri, destination.uri, words=[destination.uri, "read-only"])


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_command_that_cannot_serve_is_told(side: str) -> None:
    def both(*command: str) -> list[str]:
        ours = ["[", *command, "]"]
        return [*ours, "null:"] if side == "source" else ["[", "nbdkit", "memory", "1M", "]", *ours]

    fails_saying("copy", *both(), words=[f"the {side} [ ] holds no command"])
    fails_saying("copy", *both("no-such-command"), words=["[ no-such-command ]: no such command: no-such-command"])
    fails_saying("copy", *both("false"), words=["[ false ]", f"the {side} server ended with exit status 1"])


def test_a_server_of_ours_is_called_by_its_command() -> None:
    """Its socket is in a directory that is gone by the time its name is read."""
    small, large = ["[", "nbdkit", "memory", "1M", "]"], ["[", "nbdkit", "memory", "2M", "]"]
    line = "[ nbdkit memory 1M ]: the destination is smaller than the source: 1048576 bytes, 2097152 are needed"
    fails("copy", *large, *small, line=line)
