"""The control channel over real sockets: both ends in this process, polled as their loops poll them."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import pytest
import zmq

from nbdshard.common import limits
from nbdshard.common.channel import CoordinatorChannel, WorkerChannel
from nbdshard.common.control_url import ControlUrl, parse_control_url
from nbdshard.common.errors import ProtocolError, UserError
from nbdshard.common.keys import CoordinatorKeys, KeyPair, WorkerKeys
from nbdshard.common.machine import new_worker_name
from nbdshard.common.messages import (
    PROTOCOL_VERSION,
    Alive,
    AliveToo,
    FromCoordinator,
    FromWorker,
    Goodbye,
    Hello,
    Refused,
    Stop,
)
from support.channels import LOOPBACK, connect, error_of, heard, hello, listen, told
from support.listening import listening, wait_until_closed
from support.servers import private_folder
from support.waiting import WAIT_SECONDS, wait_for

COORDINATOR = KeyPair.generate()
WORKER = KeyPair.generate()
STRANGER = KeyPair.generate()


@pytest.fixture(params=["ipc", "tcp", "tcp6", "curve"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[CoordinatorChannel, WorkerChannel]]:
    """A coordinator and a worker that can talk."""
    with private_folder() as folder, contextlib.ExitStack() as stack:
        url = {"ipc": ControlUrl("ipc", path=str(folder / "s")), "tcp6": ControlUrl("tcp", "::1", 0)}.get(
            request.param, LOOPBACK
        )
        if request.param == "curve":
            coordinator = listen(stack, url, CoordinatorKeys(COORDINATOR, frozenset({WORKER.public})))
            worker = connect(stack, coordinator, WorkerKeys(WORKER, COORDINATOR.public))
        else:
            coordinator = listen(stack, url)
            worker = connect(stack, coordinator)
        yield coordinator, worker


def test_both_ends_hear_each_other(ends: tuple[CoordinatorChannel, WorkerChannel]) -> None:
    coordinator, worker = ends
    assert worker.send(hello(worker))
    assert heard(coordinator) == [(worker.name, hello(worker))]
    stop = Stop(job="j", epoch=3, reason="enough", now=True)
    assert coordinator.send(worker.name, stop)
    assert told(worker) == [stop]
    assert worker.answered
    worker.check(time.monotonic() + 1e6)  # once answered, nothing is wrong any more


def test_the_descriptors_wake_a_poll(ends: tuple[CoordinatorChannel, WorkerChannel]) -> None:
    coordinator, worker = ends
    poller = zmq.Poller()
    for end in coordinator.sockets:
        poller.register(end, zmq.POLLIN)
    worker.send(hello(worker))
    got: list[tuple[str, FromWorker]] = []
    deadline = time.monotonic() + WAIT_SECONDS
    while not got and time.monotonic() < deadline:
        assert poller.poll(20_000), "nothing woke the coordinator"
        got = coordinator.receive()
    assert got
    assert worker.receive() == []  # the rule: receive until nothing comes, then wait for the descriptor
    coordinator.send(worker.name, AliveToo(job="j", epoch=1, answers=7.5))
    answers: list[FromCoordinator] = []
    own = zmq.Poller()
    own.register(worker.descriptor, zmq.POLLIN)
    while not answers and time.monotonic() < deadline:
        assert own.poll(20_000), "nothing woke the worker"
        answers = worker.receive()
    assert answers == [AliveToo(job="j", epoch=1, answers=7.5)]


def test_messages_keep_their_order_and_come_in_bounded_portions(
    ends: tuple[CoordinatorChannel, WorkerChannel],
) -> None:
    coordinator, worker = ends
    sent = [Goodbye(job="j", epoch=number, reason="") for number in range(600)]
    got: list[FromWorker] = []
    waiting = list(sent)

    def all_there() -> bool:
        while waiting and worker.send(waiting[0]):
            waiting.pop(0)
        portion = coordinator.receive()
        assert len(portion) <= limits.MESSAGES_PER_TURN_MAX
        got.extend(message for _, message in portion)
        return len(got) == len(sent)

    wait_for("all messages", all_there)
    assert got == sent


def test_a_message_for_a_worker_that_is_not_there_is_told() -> None:
    with contextlib.ExitStack() as stack:
        coordinator = listen(stack)
        assert not coordinator.send(new_worker_name(), AliveToo(job="j", epoch=1, answers=7.5))


def test_a_coordinator_on_a_network_has_descriptors_for_all_the_workers_that_may_come() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
    try:
        with contextlib.ExitStack() as stack:
            listen(stack)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(limits.COORDINATOR_DESCRIPTORS, before[1]), before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_sending_never_blocks_when_the_other_side_does_not_read() -> None:
    with contextlib.ExitStack() as stack:
        coordinator = listen(stack)
        worker = connect(stack, coordinator)
        worker.send(hello(worker))
        heard(coordinator)
        big = Stop(job="j", epoch=1, reason="x" * limits.TEXT_BYTES_MAX)
        wait_for(
            "the queue to the worker to be full",
            lambda: not all(coordinator.send(worker.name, big) for _ in range(1000)),
        )
        alone = connect(stack, "tcp://127.0.0.1:1")
        alive = Alive(job="j", epoch=1, at=7.5)
        assert not all(alone.send(alive) for _ in range(limits.MESSAGES_QUEUED_MAX + 1))


def test_a_worker_of_another_version_is_told_both_versions(capfd: pytest.CaptureFixture[str]) -> None:
    with raw_worker() as (coordinator, dealer):
        dealer.send(msgpack.packb({"t": "Hello", "version": 99, "what": ["this", "version", "has"]}))

        def answer() -> bytes:
            assert coordinator.receive() == []
            return dealer.recv() if dealer.poll(0) else b""

        frame = wait_for("the refusal", answer)
        reason = f"the worker speaks control protocol 99, the coordinator {PROTOCOL_VERSION}"
        assert msgpack.unpackb(frame) == {
            "t": "Refused",
            "version": PROTOCOL_VERSION,
            "reason": reason,
        }
        assert reason in capfd.readouterr().err


def test_the_worker_understands_a_refusal_of_its_version() -> None:
    with contextlib.ExitStack() as stack:
        coordinator = listen(stack)
        worker = connect(stack, coordinator)
        worker.send(Hello(version=99, worker=worker.name, machine="m", host="h", pid=1, ring="epoll"))
        reason = f"the worker speaks control protocol 99, the coordinator {PROTOCOL_VERSION}"
        assert told(worker, coordinator) == [Refused(version=PROTOCOL_VERSION, reason=reason)]


@contextlib.contextmanager
def raw_worker() -> Iterator[tuple[CoordinatorChannel, zmq.Socket[bytes]]]:
    """A coordinator, and a peer that sends whatever it likes."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with contextlib.ExitStack() as stack:
        stack.callback(context.term)
        coordinator = listen(stack)
        dealer = context.socket(zmq.DEALER)
        stack.callback(dealer.close, 0)
        dealer.setsockopt(zmq.ROUTING_ID, b"\xab" * 16)
        dealer.connect(str(coordinator.url))
        yield coordinator, dealer


@pytest.mark.parametrize(
    ("frames", "complaint"),
    [
        ([b"\xc1"], "not msgpack"),
        ([b""], "not msgpack"),
        ([b"\x80"], r"Object missing required field `t`"),
        ([msgpack.packb([1, 2])], r"Expected `object`, got `array`"),
        ([msgpack.packb({"t": "Nonsense"})], r"Invalid value 'Nonsense' - at `\$.t`"),
        ([msgpack.packb({"t": ["Alive"]})], r"Expected `str`, got `list` - at `\$.t`"),
        ([msgpack.packb({"t": "AliveToo", "job": "j", "epoch": 1})], r"Invalid value 'AliveToo' - at `\$.t`"),
        ([msgpack.packb({"t": "Alive", "job": "j", "epoch": "1"})], r"Expected `int`, got `str` - at `\$.epoch`"),
        ([msgpack.packb({"t": "Alive", "job": "j", "epoch": -1})], r"Expected `int` >= 0 - at `\$.epoch`"),
        ([msgpack.packb({"t": "Alive", "job": "j", "epoch": 1, "at": 7.5, "x": 1})], "unknown field `x`"),
        ([msgpack.packb({"t": "Hello", "version": True})], r"Expected `int`, got `bool` - at `\$.version`"),
        ([msgpack.packb({"t": "Progress", "job": "j", "epoch": 1, "lease": 1, "done": 3})], r"at `\$.done`"),
        ([b"one", b"two"], "2 frames instead of one"),
        ([b"one", b"", b"three"], "3 frames instead of one"),
    ],
)
def test_a_malformed_message_is_dropped_with_its_sender_and_path(
    frames: list[bytes], complaint: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with raw_worker() as (coordinator, dealer):
        dealer.send_multipart(frames)
        dealer.send(msgpack.packb({"t": "Alive", "job": "j", "epoch": 1, "at": 7.5}))
        assert heard(coordinator) == [("ab" * 16, Alive(job="j", epoch=1, at=7.5))]
    line = capfd.readouterr().err
    assert line.startswith("nbdshard: dropped a message: worker abababab at ")
    assert complaint.replace("\\", "") in line
    assert len(line.splitlines()) == 1


def test_the_log_of_malformed_messages_has_an_end(capfd: pytest.CaptureFixture[str]) -> None:
    with raw_worker() as (coordinator, dealer):
        for _ in range(3 * limits.BAD_MESSAGES_LOGGED_MAX):
            dealer.send(b"\xc1")
        dealer.send(msgpack.packb({"t": "Alive", "job": "j", "epoch": 1, "at": 7.5}))
        heard(coordinator)
    assert len(capfd.readouterr().err.splitlines()) == limits.BAD_MESSAGES_LOGGED_MAX


def test_a_message_that_is_too_long_costs_the_peer_its_connection_and_nobody_else() -> None:
    with raw_worker() as (coordinator, dealer), contextlib.ExitStack() as stack:
        dealer.send(b"x" * (limits.MESSAGE_BYTES_MAX + 1))
        worker = connect(stack, coordinator)
        worker.send(hello(worker))
        assert heard(coordinator) == [(worker.name, hello(worker))]


def test_a_coordinator_that_sends_nonsense_is_not_worked_for() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with contextlib.ExitStack() as stack:
        stack.callback(context.term)
        router = context.socket(zmq.ROUTER)
        stack.callback(router.close, 0)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        worker = connect(stack, f"tcp://127.0.0.1:{port}")
        worker.send(hello(worker))
        wait_for("the hello", lambda: router.poll(0))
        router.send_multipart([router.recv_multipart()[0], msgpack.packb({"t": "Stop", "reason": 5})])
        with pytest.raises(ProtocolError, match=rf"coordinator tcp://127.0.0.1:{port}.*at `\$"):
            wait_for("the nonsense to arrive", worker.receive)


def test_a_worker_that_connects_again_keeps_its_name_and_takes_over() -> None:
    with contextlib.ExitStack() as stack:
        coordinator = listen(stack)
        old = connect(stack, coordinator)
        old.send(hello(old))
        heard(coordinator)
        new = connect(stack, coordinator, name=old.name)
        new.send(hello(new))
        assert heard(coordinator) == [(old.name, hello(new))]
        coordinator.send(old.name, AliveToo(job="j", epoch=1, answers=7.5))
        assert told(new) == [AliveToo(job="j", epoch=1, answers=7.5)]
        assert old.receive() == []


def test_the_last_message_arrives_although_the_worker_closes_at_once() -> None:
    with contextlib.ExitStack() as stack:
        coordinator = listen(stack)
        worker = WorkerChannel(str(coordinator.url), time.monotonic())
        worker.send(hello(worker))
        heard(coordinator)
        worker.send(Goodbye(job="j", epoch=1, reason="done"))
        worker.close()
        assert heard(coordinator) == [(worker.name, Goodbye(job="j", epoch=1, reason="done"))]


# -- keys --------------------------------------------------------------------------------------------------------------


def test_an_unknown_key_is_turned_away_and_both_sides_say_so(capfd: pytest.CaptureFixture[str]) -> None:
    with contextlib.ExitStack() as stack:
        coordinator = listen(stack, keys=CoordinatorKeys(COORDINATOR, frozenset({WORKER.public})))
        stranger = connect(stack, coordinator, WorkerKeys(STRANGER, COORDINATOR.public))
        stranger.send(hello(stranger))
        messages: list[object] = []
        reason = error_of(stranger, lambda: messages.extend(coordinator.receive()))
        assert reason == (
            f"coordinator {coordinator.url}: refused: this worker's key {STRANGER.public} is not on its allow-list"
        )
        assert messages == []
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"its key {STRANGER.public} is not on the allow-list" in lines[0]


def test_a_known_key_is_admitted_while_strangers_knock() -> None:
    with contextlib.ExitStack() as stack:
        coordinator = listen(stack, keys=CoordinatorKeys(COORDINATOR, frozenset({WORKER.public})))
        stranger = connect(stack, coordinator, WorkerKeys(STRANGER, COORDINATOR.public))
        stranger.send(hello(stranger))
        worker = connect(stack, coordinator, WorkerKeys(WORKER, COORDINATOR.public))
        worker.send(hello(worker))
        assert heard(coordinator) == [(worker.name, hello(worker))]


def test_a_worker_without_keys_is_told_that_keys_are_wanted() -> None:
    with contextlib.ExitStack() as stack:
        coordinator = listen(stack, keys=CoordinatorKeys(COORDINATOR, frozenset({WORKER.public})))
        worker = connect(stack, coordinator)
        worker.send(hello(worker))
        assert "refused: it wants keys; give this worker --key and --coordinator-key" in error_of(
            worker, coordinator.receive
        )


def test_a_worker_with_keys_does_not_talk_to_a_coordinator_without() -> None:
    with contextlib.ExitStack() as stack:
        coordinator = listen(stack)
        worker = connect(stack, coordinator, WorkerKeys(WORKER, COORDINATOR.public))
        worker.send(hello(worker))
        assert "it uses no keys, this worker does" in error_of(worker, coordinator.receive)


def test_a_coordinator_with_another_key_than_expected_is_named_as_a_likely_cause() -> None:
    with contextlib.ExitStack() as stack:
        coordinator = listen(stack, keys=CoordinatorKeys(COORDINATOR, frozenset({WORKER.public})))
        worker = connect(stack, coordinator, WorkerKeys(WORKER, STRANGER.public))
        over = elapsed(0.5)

        def hopeful() -> bool:
            assert coordinator.receive() == []
            worker.check(time.monotonic())
            return over()

        wait_for("some tries", hopeful)
        reason = error_of(worker, late=limits.COORDINATOR_ANSWER_SECONDS)
        assert f"wrong address, {STRANGER.public} is not its key, or this worker's key {WORKER.public}" in reason


# -- no answer ---------------------------------------------------------------------------------------------------------


def no_answer(worker: WorkerChannel, settled: Callable[[], object], *, saying: str) -> None:
    """After `settled` came true the worker, its time being over, says so; ZeroMQ may tell it a bit later."""

    def ready() -> object:
        worker.check(time.monotonic())
        return settled()

    def told() -> bool:
        with pytest.raises(UserError, match="no answer within 10 s: ") as caught:
            worker.check(time.monotonic() + limits.COORDINATOR_ANSWER_SECONDS)
        return saying in str(caught.value)

    wait_for("the connection to fail", ready)
    wait_for(f"the worker to say {saying!r}", told)


def elapsed(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def test_a_dead_address_is_named_with_its_reason() -> None:
    with contextlib.ExitStack() as stack, socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can listen there
        url = f"tcp://127.0.0.1:{holder.getsockname()[1]}"
        worker = connect(stack, url)
        said = f"coordinator {url}: no answer within 10 s: nothing accepts connections there"
        no_answer(worker, elapsed(0.3), saying=said)


def test_a_missing_unix_socket_is_named(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        worker = connect(stack, f"ipc://{tmp_path}/none")
        no_answer(worker, elapsed(0.3), saying="nothing accepts connections there")


def test_a_name_that_does_not_resolve_is_told() -> None:
    with contextlib.ExitStack() as stack:
        worker = connect(stack, "tcp://nowhere.invalid:5555")
        no_answer(worker, elapsed(0.3), saying="the host name does not resolve")


def test_somebody_who_accepts_and_says_nothing_is_no_coordinator() -> None:
    with listening(wait_until_closed, tcp=True) as silent, contextlib.ExitStack() as stack:
        url = silent.uri.replace("nbd://", "tcp://").rstrip("/")
        worker = connect(stack, url)
        no_answer(worker, lambda: silent.accepted, saying="what answers there is no coordinator")


def test_something_that_is_not_zeromq_is_no_coordinator() -> None:
    def greet(connection: socket.socket) -> None:
        connection.sendall(b"NBDMAGICIHAVEOPT\0\3" * 8)
        wait_until_closed(connection)

    with listening(greet, tcp=True) as server, contextlib.ExitStack() as stack:
        url = server.uri.replace("nbd://", "tcp://").rstrip("/")
        worker = connect(stack, url)
        no_answer(worker, lambda: server.accepted, saying="what answers there is no coordinator")


def test_a_coordinator_that_takes_the_connection_and_stays_silent_is_told() -> None:
    with contextlib.ExitStack() as stack:
        coordinator = listen(stack)
        worker = connect(stack, coordinator)
        worker.send(hello(worker))
        no_answer(worker, coordinator.receive, saying="it took the connection and says nothing")


# -- listening ---------------------------------------------------------------------------------------------------------


def test_any_free_port_becomes_a_real_one() -> None:
    with contextlib.ExitStack() as stack:
        url = listen(stack).url
        assert (url.scheme, url.host) == ("tcp", "127.0.0.1")
        assert url.port > 0


def test_a_port_in_use_is_told() -> None:
    with contextlib.ExitStack() as stack:
        taken = listen(stack).url
        with pytest.raises(UserError, match=rf"{taken}: cannot listen: Address already in use"):
            CoordinatorChannel(taken)


def test_a_unix_socket_admits_only_our_user() -> None:
    with private_folder() as folder, contextlib.ExitStack() as stack:
        before = os.umask(0)
        try:
            listen(stack, ControlUrl("ipc", path=str(folder / "s")))
        finally:
            os.umask(before)
        mode = os.stat(folder / "s").st_mode
        assert stat.S_ISSOCK(mode)
        assert mode & 0o077 == 0


def test_listening_never_removes_a_file_or_takes_a_socket_over() -> None:
    with private_folder() as folder, contextlib.ExitStack() as stack:
        (folder / "file").write_text("precious")
        with pytest.raises(UserError, match="something else than a socket is there already"):
            CoordinatorChannel(parse_control_url(f"ipc://{folder}/file"))
        assert (folder / "file").read_text() == "precious"
        url = ControlUrl("ipc", path=str(folder / "s"))
        listen(stack, url)
        with pytest.raises(UserError, match="another process listens there"):
            CoordinatorChannel(url)


def test_a_socket_that_a_dead_coordinator_left_is_no_obstacle() -> None:
    with private_folder() as folder, contextlib.ExitStack() as stack:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(folder / "s"))
        coordinator = listen(stack, ControlUrl("ipc", path=str(folder / "s")))
        worker = connect(stack, coordinator)
        worker.send(hello(worker))
        assert heard(coordinator) == [(worker.name, hello(worker))]
