"""A coordinator and workers that connect to it over TCP, as on several machines."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgpack
import pytest
import zmq

from support import images
from support.blkhash import blkhash_of
from support.command import Run, nbdshard, started
from support.doubles import CMD_WRITE, Double, Request, Talk, double
from support.hesitant import Hesitates
from support.servers import nbdkit
from support.sides import RINGS, serve
from support.waiting import wait_for

SIZE = 64 * images.MIB


@contextmanager
def coordinator(
    source: str, destination: str, *options: str | Path, listen: str = "tcp://127.0.0.1:0"
) -> Iterator[Run]:
    """A coordinator that listens; `address_of` says where."""
    with started("coordinator", "--listen", listen, *options, source, destination) as run:
        yield run


def address_of(run: Run) -> str:
    """The URL it says it listens on."""
    return wait_for("the coordinator's address", lambda: (re.findall(r"listening on (\S+)", run.err()) or [""])[0])


@contextmanager
def workers(address: str, ring: str, count: int = 2, *options: str | Path) -> Iterator[Sequence[Run]]:
    with ExitStack() as stack:
        command = ("worker", "--connect", address, "--ring", ring, *options)
        yield [stack.enter_context(started(*command)) for _ in range(count)]


@pytest.fixture
def source_image(tmp_path: Path) -> Path:
    return images.random_image(tmp_path / "source", SIZE)


@pytest.fixture
def destination_image(tmp_path: Path) -> Path:
    return images.filled_image(tmp_path / "destination", SIZE)


def writers(target: Double) -> set[int]:
    """The connections that have written."""
    return {request.connection for request in list(target.requests) if request.command == CMD_WRITE}


class TakesNothingFromOneAlone(Double):
    """Answers no write before two connections have asked: so both workers take part, however slowly one starts."""

    def write(self, talk: Talk, request: Request, data: bytes) -> None:
        wait_for("a write on another connection", lambda: len(writers(self)) >= 2)
        super().write(talk, request, data)


def test_workers_over_tcp_make_a_checksum_together(source_image: Path, destination_image: Path, ring: str) -> None:
    with (
        nbdkit("file", str(source_image), flags=["-r"]) as source,
        nbdkit("file", str(destination_image)) as destination,
        coordinator(source.uri, destination.uri, "--checksum", "--range-size", "4M") as job,
        workers(address_of(job), ring),
    ):
        outcome = job.wait().succeeded()
    assert outcome.out == f"{blkhash_of(source_image)}  {source.uri}\n"
    assert blkhash_of(destination_image) == blkhash_of(source_image)


def test_two_workers_over_tcp_copy_and_end_with_the_job(source_image: Path, ring: str) -> None:
    target = TakesNothingFromOneAlone(bytearray(SIZE))
    with (
        serve("nbdkit-file", source_image, transport="tcp", flags=["-r"]) as source,
        double(target, tcp=True) as destination,
        coordinator(source, destination, "-C", "2", "-T", "2") as job,
        workers(address_of(job), ring) as crew,
    ):
        outcome = job.wait().succeeded()
        for worker in crew:
            worker.wait().succeeded()
    assert target.content == source_image.read_bytes()
    assert "2 workers" in outcome.last_line
    assert ring in outcome.last_line


def test_one_worker_of_each_ring_share_a_job(source_image: Path) -> None:
    target = TakesNothingFromOneAlone(bytearray(SIZE))
    with (
        serve("nbdkit-file", source_image, flags=["-r"]) as source,
        double(target) as destination,
        coordinator(source, destination, "-C", "2", "-T", "2") as job,
        workers(address_of(job), RINGS[0], 1),
        workers(address_of(job), RINGS[1], 1),
    ):
        outcome = job.wait().succeeded()
    assert target.content == source_image.read_bytes()
    assert all(ring in outcome.last_line for ring in RINGS)


def test_a_worker_may_join_late_and_another_leave(ring: str) -> None:
    target = Hesitates(bytearray(SIZE), CMD_WRITE, first=2)
    with (
        nbdkit("pattern", str(SIZE), threads=1, tcp=True) as source,
        double(target) as destination,
        coordinator(source.uri, destination, "--range-size", "1M", "--queue-size", "2M") as job,
        workers(address_of(job), ring, 1) as early,
    ):
        wait_for("a write of the early worker", lambda: writers(target))
        connections = target.talks
        with workers(address_of(job), ring, 1):
            wait_for("a write of the late worker", lambda: max(writers(target)) > connections)
            target.released.set()
            early[0].signal_group(signal.SIGINT)
            early[0].wait().succeeded()
            job.wait().succeeded()
    assert target.content == images.pattern(0, SIZE)


def test_ctrl_c_at_the_coordinator_ends_its_workers(ring: str) -> None:
    target = TakesNothingFromOneAlone(bytearray(SIZE))
    with (
        nbdkit("pattern", str(SIZE), "rate=64M", filters=["rate"], threads=1) as source,
        double(target) as destination,
        coordinator(source.uri, destination, "-C", "2", "--queue-size", "2M") as job,
        workers(address_of(job), ring) as crew,
    ):
        wait_for("writes of both workers", lambda: len(writers(target)) >= 2)
        job.signal_group(signal.SIGINT)
        assert job.wait().code == 130
        for worker in crew:
            worker.wait().succeeded()


@contextmanager
def keys(folder: Path) -> Iterator[Path]:
    """Pairs for a coordinator, two workers and a stranger; the folder `allowed` holds the workers' public keys."""
    for name in ("coordinator", "one", "two", "stranger"):
        nbdshard("keygen", "--dir", folder, name).succeeded()
    (folder / "allowed").mkdir()
    for name in ("one", "two"):
        (folder / "allowed" / f"{name}.pub").write_bytes((folder / f"{name}.pub").read_bytes())
    yield folder


def test_workers_with_known_keys_copy_and_a_stranger_is_turned_away(
    tmp_path: Path, source_image: Path, destination_image: Path, ring: str
) -> None:
    with (
        keys(tmp_path) as folder,
        serve("nbdkit-file", source_image, flags=["-r"]) as source,
        serve("nbdkit-file", destination_image) as destination,
        coordinator(source, destination, "--key", folder / "coordinator.key", "--allow", folder / "allowed") as job,
    ):
        address, public = address_of(job), folder / "coordinator.pub"
        with workers(address, ring, 1, "--key", folder / "stranger.key", "--coordinator-key", public) as strangers:
            strangers[0].wait().failed(1, saying=["key"])
        with workers(address, ring, 1) as keyless:
            keyless[0].wait().failed(1)
        assert job.process.poll() is None
        with (
            workers(address, ring, 1, "--key", folder / "one.key", "--coordinator-key", public),
            workers(address, ring, 1, "--key", folder / "two.key", "--coordinator-key", public),
        ):
            job.wait().succeeded()
            assert "turned away" in job.err()
    images.assert_identical(source_image, destination_image)


def test_a_worker_refuses_a_coordinator_with_another_key(
    tmp_path: Path, source_image: Path, destination_image: Path
) -> None:
    with (
        keys(tmp_path) as folder,
        coordinator(
            f"nbd+unix:///?socket={tmp_path}/a",
            f"nbd+unix:///?socket={tmp_path}/b",
            "--key",
            folder / "coordinator.key",
            "--allow",
            folder / "allowed",
        ) as job,
        workers(
            address_of(job), RINGS[1], 1, "--key", folder / "one.key", "--coordinator-key", folder / "two.pub"
        ) as crew,
    ):
        crew[0].wait().failed(1, saying=["key"])
    assert source_image.exists()
    assert destination_image.read_bytes() == b"\xee" * SIZE


def test_listening_on_a_network_without_keys_is_refused_unless_insecure() -> None:
    command = ("coordinator", "--listen", "tcp://0.0.0.0:0", "null.img", "null:")
    nbdshard(*command).failed(1, saying=["--insecure"])


def test_a_worker_of_another_protocol_version_is_refused_with_both_versions(
    source_image: Path, destination_image: Path
) -> None:
    """Spoken by hand: no worker of another version exists."""
    with (
        serve("nbdkit-file", source_image, flags=["-r"]) as source,
        serve("nbdkit-file", destination_image) as destination,
        coordinator(source, destination) as job,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as dealer,
    ):
        dealer.linger = 0
        dealer.rcvtimeo = 20_000
        dealer.connect(address_of(job))
        hello = {"t": "Hello", "version": 99, "worker": "w", "machine": "m", "host": "h", "pid": 1, "ring": "epoll"}
        dealer.send(msgpack.packb(hello))
        answer = msgpack.unpackb(dealer.recv())
        assert answer["t"] == "Refused"
        assert "99" in answer["reason"]
        assert str(answer["version"]) in answer["reason"]
        dealer.send(b"\xff garbage")
        dealer.send(msgpack.packb({"t": "Written", "job": 5}))
        assert job.process.poll() is None
        with workers(address_of(job), "epoll", 1):
            job.wait().succeeded()
    images.assert_identical(source_image, destination_image)
