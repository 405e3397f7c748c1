"""`nbdshard coordinator`, `nbdshard worker` and `nbdshard keygen`, as users run them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import processes
from support.command import Run, nbdshard, started
from support.gates import Gate
from support.servers import Server, free_port, nbdkit, private_folder
from support.waiting import WAIT_SECONDS, wait_for

MIB = 1 << 20


def key(folder: Path, name: str) -> Path:
    """The path of NAME.key, made together with NAME.pub."""
    nbdshard("keygen", "--dir", folder, name).succeeded()
    return folder / f"{name}.key"


def listening_at(coordinator: Run) -> str:
    """The address that the coordinator says it listens at, for workers of this machine."""

    def said() -> str:
        found = re.search(r"listening on (\S+)", coordinator.err())
        return found[1] if found else ""

    return wait_for("the coordinator to listen", said).replace("[::]", "127.0.0.1").replace("0.0.0.0", "127.0.0.1")


@contextlib.contextmanager
def servers(size: str = "64M") -> Iterator[tuple[str, str]]:
    """A source and a destination over TCP."""
    with (
        nbdkit("pattern", size=size, tcp=True, threads=1) as source,
        nbdkit("memory", size=size, tcp=True, threads=1) as destination,
    ):
        yield source.uri, destination.uri


@contextlib.contextmanager
def gated(plugin: str, size: str) -> Iterator[tuple[Gate, Server]]:
    """A server over TCP that carries nothing out until its gate is opened."""
    with private_folder() as folder:
        gate = Gate(folder)
        with nbdkit(plugin, gate.option, size=size, tcp=True, filters=["pause"], threads=1) as server:
            gate.shut()
            yield gate, server


def test_keygen_writes_two_files_and_never_overwrites_them(tmp_path: Path) -> None:
    made = nbdshard("keygen", "--dir", tmp_path, "alpha").succeeded()
    secret = (tmp_path / "alpha.key").read_text().split()[1]
    public = (tmp_path / "alpha.pub").read_text().split()[1]
    assert (tmp_path / "alpha.key").stat().st_mode & 0o777 == 0o600
    assert public in made.out
    assert secret not in made.out + made.err
    nbdshard("keygen", "--dir", tmp_path, "alpha").failed(
        saying=["alpha.key: exists already; keys are never overwritten"]
    )
    assert (tmp_path / "alpha.key").read_text().split()[1] == secret


def test_two_workers_copy_for_a_coordinator_on_loopback() -> None:
    with (
        gated("sparse-random", "1G") as (gate, server),
        started(
            *("coordinator", server.uri, server.uri, "--listen", "tcp://127.0.0.1:0"),
            *("--workers", "2", "--range-size", "1M", "--request-size", "256k", "--progress=json"),
        ) as coordinator,
    ):
        url = listening_at(coordinator)
        with started("worker", "--connect", url) as one, started("worker", "--connect", url) as two:
            wait_for("all connections of both", lambda: '"workers": 2, "connections": 4,' in coordinator.err())
            gate.open()
            outcome = coordinator.wait().succeeded()
            one.wait().succeeded()
            two.wait().succeeded()
        assert "; 2 workers; 4+4 connections; " in outcome.last_line
        assert outcome.last_line.endswith("; flushed")


def test_a_unix_socket_can_be_listened_at() -> None:
    with servers() as (source, destination), private_folder() as folder:
        url = f"ipc://{folder}/control"
        with started("coordinator", source, destination, "--listen", url) as coordinator:
            assert listening_at(coordinator) == url
            with started("worker", "--connect", url) as worker:
                coordinator.wait().succeeded()
                worker.wait().succeeded()
        assert not (folder / "control").exists()


def test_a_worker_that_joins_and_leaves_in_between_does_no_harm() -> None:
    with (
        gated("pattern", "512M") as (gate, source),
        started(
            *("coordinator", source.uri, "null:", "--listen", "tcp://127.0.0.1:0"),
            *("--workers", "2", "--range-size", "1M", "--progress=json"),
        ) as coordinator,
    ):
        url = listening_at(coordinator)
        with started("worker", "--connect", url) as one, started("worker", "--connect", url) as two:
            wait_for("both to take part", lambda: '"workers": 2' in coordinator.err())
            one.process.send_signal(signal.SIGINT)
            gate.open()
            one.wait()
            coordinator.wait().succeeded()
            two.wait().succeeded()


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder with the keys of a coordinator, a worker and a stranger, and a folder `allow` with the worker's."""
    for name in ("coordinator", "worker", "stranger"):
        key(tmp_path, name)
    (tmp_path / "allow").mkdir()
    (tmp_path / "allow" / "worker.pub").write_text((tmp_path / "worker.pub").read_text())
    return tmp_path


def test_only_a_worker_whose_key_is_allowed_takes_part(keys: Path) -> None:
    with (
        servers() as (source, destination),
        started(
            *("coordinator", source, destination, "--listen", "tcp://*:0"),
            *("--key", keys / "coordinator.key", "--allow", keys / "allow"),
        ) as coordinator,
    ):
        url = listening_at(coordinator)
        to = ("worker", "--connect", url, "--coordinator-key", keys / "coordinator.pub")
        stranger = (keys / "stranger.pub").read_text().split()[1]
        nbdshard(*to, "--key", keys / "stranger.key").failed(saying=["refused", stranger, "not on its allow-list"])
        nbdshard("worker", "--connect", url).failed(saying=["it wants keys"])
        assert f"its key {stranger} is not on the allow-list" in coordinator.err()
        with started(*to, "--key", keys / "worker.key") as worker:
            coordinator.wait().succeeded()
            worker.wait().succeeded()


def test_secrets_are_on_no_command_line(keys: Path) -> None:
    secret = (keys / "coordinator.key").read_text().split()[1]
    with started(
        *("coordinator", "nbd://127.0.0.1:1", "null:", "--listen", "tcp://127.0.0.1:0"),
        *("--key", keys / "coordinator.key", "--allow", keys / "allow"),
    ) as coordinator:
        listening_at(coordinator)
        assert all(secret not in processes.command_line(pid) for pid in coordinator.processes())
        coordinator.process.send_signal(signal.SIGINT)
        coordinator.wait().failed(130)


@pytest.mark.parametrize("listen", ["tcp://*:0", "tcp://0.0.0.0:0", "tcp://[::]:0"])
def test_a_network_wants_keys_or_an_explicit_insecure(listen: str) -> None:
    with servers() as (source, destination):
        words = ("coordinator", source, destination, "--listen", listen)
        nbdshard(*words).failed(saying=["wants keys", "--key and --allow", "--insecure"])
        with (
            started(*words, "--insecure") as coordinator,
            started("worker", "--connect", listening_at(coordinator)) as worker,
        ):
            coordinator.wait().succeeded()
            worker.wait().succeeded()


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (["--listen", "tcp://127.0.0.1:0", "--key", "KEYS/coordinator.key"], 2, "--allow is missing"),
        (["--listen", "tcp://127.0.0.1:0", "--allow", "KEYS/allow"], 2, "--key is missing"),
        (["--key", "KEYS/coordinator.key", "--allow", "KEYS/allow"], 2, "--listen"),
        (
            ["--listen", "tcp://*:0", "--insecure", "--key", "KEYS/coordinator.key", "--allow", "KEYS/allow"],
            2,
            "--insecure contradicts",
        ),
        (["--listen", "here:5"], 1, "not an address of the control channel"),
        (["--listen", "tcp://192.0.2.1:0", "--insecure"], 1, "cannot listen"),
        (["--listen", "tcp://*:0", "--key", "KEYS/coordinator.pub", "--allow", "KEYS/allow"], 1, "is a public key"),
        (["--listen", "tcp://*:0", "--key", "KEYS/none", "--allow", "KEYS/allow"], 1, "cannot be read"),
        (["--listen", "tcp://*:0", "--key", "KEYS/coordinator.key", "--allow", "KEYS/none"], 1, "cannot be read"),
    ],
)
def test_a_coordinators_mistakes_are_told_in_a_line(keys: Path, words: list[str], code: int, what: str) -> None:
    filled = [word.replace("KEYS", str(keys)) for word in words]
    nbdshard("coordinator", "nbd://127.0.0.1:1", "null:", *filled).failed(code, saying=[what])


def test_a_secret_key_that_others_can_read_is_refused(keys: Path) -> None:
    os.chmod(keys / "worker.key", 0o644)
    nbdshard(
        *("worker", "--connect", "tcp://127.0.0.1:1", "--coordinator-key", keys / "coordinator.pub"),
        *("--key", keys / "worker.key"),
    ).failed(saying=["worker.key", "its mode is 0644", "chmod 600"])


def test_streams_are_not_for_workers_of_other_processes() -> None:
    nbdshard("coordinator", "-", "null:", "--listen", "tcp://127.0.0.1:0").failed(saying=["cannot share '-'"])


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        ([], 2, "--connect"),
        (["--connect", "nowhere"], 1, "not an address of the control channel"),
        (["--connect", "tcp://h:1", "--key", "x"], 2, "--coordinator-key is missing"),
        (["--connect", "tcp://h:1", "--name", "zz"], 2, "is not 32 hexadecimal digits"),
    ],
)
def test_a_workers_mistakes_are_told_in_a_line(words: list[str], code: int, what: str) -> None:
    nbdshard("worker", *words).failed(code, saying=[what])


def test_a_worker_without_a_coordinator_gives_up_and_says_why() -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    nbdshard("worker", "--connect", url).failed(saying=[url, "no answer within 10 s", "nothing accepts connections"])


def test_a_coordinator_without_workers_can_be_stopped() -> None:
    with started("coordinator", "nbd://127.0.0.1:1", "null:", "--listen", "tcp://127.0.0.1:0") as coordinator:
        listening_at(coordinator)
        coordinator.process.send_signal(signal.SIGTERM)
        coordinator.wait().failed(143, saying=["stopped at 0 B"])


def test_local_workers_never_outlive_a_killed_coordinator() -> None:
    with (
        nbdkit("pattern", "delay-read=10ms", size="1G", filters=["delay"], threads=1) as source,
        started("copy", source.uri, "null:", "--workers", "2") as run,
    ):
        wait_for("both workers to run", lambda: len(run.workers()) == 2)
        run.process.kill()
        run.process.wait(WAIT_SECONDS)
        wait_for("the workers to die with their coordinator", lambda: not run.processes())


def test_a_local_worker_told_of_another_parent_does_not_start() -> None:
    nbdshard("worker", "--connect", "ipc:///x", "--parent", "1").failed(
        saying=["the coordinator, process 1, has ended"]
    )
