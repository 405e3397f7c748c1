"""`nbdshard serve`: many requests, several exports, errors, limits and the end."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path

import pytest

from nbdshard.common.errors import RequestError, UserError
from nbdshard.common.nbd.connecter import Wishes
from nbdshard.common.ranges import Range
from support import images
from support.command import copy, nbdshard
from support.images import MIB
from support.journals import small_disk
from support.nbd_blocking import Connection, connect
from support.served import NAME, Served, serving, still_serves, tool
from support.waiting import wait_for

DISK = Wishes(NAME)


def test_many_requests_of_one_client_are_under_way_at_once(served: Served) -> None:
    connection = Connection(served.socket, DISK, handles=64)
    for handle in range(64):
        where = Range.of(handle * 65_536, 65_536)
        connection.client.write(handle, where, [bytes([handle]) * 65_536])
    assert len(connection.run()) == 64
    into = [bytearray(65_536) for _ in range(64)]
    for handle in range(64):
        connection.client.read(handle, Range.of(handle * 65_536, 65_536), memoryview(into[handle]))
    assert len(connection.run()) == 64
    assert all(into[handle] == bytes([handle]) * 65_536 for handle in range(64))
    connection.close()


def test_several_exports_and_a_place_on_the_network(tmp_path: Path) -> None:
    image = images.filled_image(tmp_path / "image", MIB, 0x5A)
    with serving(f"file:{image}?read-only=yes", "-e", "scratch", "raw", "memory:3M", "--tcp", "127.0.0.1:0") as served:
        uri = "nbd://{}:{}/".format(*served.address)
        names = [each["export-name"] for each in json.loads(tool("nbdinfo", "--json", "--list", uri))["exports"]]
        assert names == [NAME, "scratch"]
        assert tool("nbdinfo", "--size", uri).strip() == str(MIB)  # the first is the default
        copy(uri, f"{uri}scratch").succeeded()
        with pytest.raises(UserError, match="there is no such export"):
            Connection(served.socket, Wishes("nothing"))
        copy(image, uri).failed(saying=["read-only"])
    assert image.read_bytes() == bytes([0x5A]) * MIB


# -- errors and the end


def test_a_full_disk_is_an_error_of_the_write(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk", kib=8192) as folder,
        serving(f"file:{images.empty_image(folder / 'image', 64 * MIB)}") as served,
    ):
        connection = Connection(served.socket, DISK)
        errors = []
        for handle in range(64):
            connection.client.write(0, Range.of(handle * MIB, MIB), [b"x" * MIB])
            errors += [done.error.errno_name for done in connection.run() if done.error]
        assert set(errors) == {"ENOSPC"}
        connection.close()


def test_a_file_that_became_shorter_is_an_error_of_the_read(tmp_path: Path) -> None:
    image = images.filled_image(tmp_path / "image", MIB, 1)
    with serving(f"file:{image}") as served:
        connection = Connection(served.socket, DISK)
        os.truncate(image, 1000)
        connection.client.read(0, Range(0, 4096), memoryview(bytearray(4096)))
        (done,) = connection.run()
        assert isinstance(done.error, RequestError)
        assert (done.error.errno_name, done.error.message) == ("EIO", "the file has become shorter")
        connection.close()


def test_sigterm_ends_it_and_what_was_written_is_there(tmp_path: Path) -> None:
    image = images.filled_image(tmp_path / "image", MIB, 0)
    with serving(f"file:{image}") as served:
        connection = Connection(served.socket, DISK)
        connection.client.write(0, Range(0, 4096), [b"x" * 4096])
        connection.run()
        served.run.process.send_signal(signal.SIGTERM)
        assert served.run.wait().code == 0
        assert not served.socket.exists()
        connection.socket.close()
    assert image.read_bytes()[:4096] == b"x" * 4096


# -- limits


def test_one_client_too_many_is_turned_away() -> None:
    with serving("memory:1M", "--max-connections", "1") as served:
        first = Connection(served.socket, DISK)
        with connect(served.socket) as second:
            assert second.recv(1) == b""
        first.close()

        def is_free() -> bool:
            with connect(served.socket) as peer:
                return peer.recv(1) != b""

        wait_for("the place of the first to be free", is_free)


def test_without_descriptors_it_waits_for_some() -> None:
    with serving("memory:1M") as served:
        resource.prlimit(served.run.pid, resource.RLIMIT_NOFILE, (40, 40))
        peers = [connect(served.socket) for _ in range(60)]
        wait_for("the shortage to be told twice", lambda: served.run.err().count("could not be accepted") > 1)
        assert served.run.err().count("could not be accepted") < 20
        for peer in peers:
            peer.close()

        def is_room() -> bool:  # those that have gone are in the queue too, and take a place for a moment
            with connect(served.socket) as peer:
                return peer.recv(1) != b""

        wait_for("the server to have room again", is_room)
        still_serves(served)


def test_a_socket_that_is_not_served_in_the_end_is_not_left_behind(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    words = [word for name in ("one", "taken") for word in ("--unix", tmp_path / name)]
    nbdshard("serve", "-e", NAME, "raw", "memory:1M", *words).failed(1, saying=["is there already, and no socket"])
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
