"""worker/link.py on real sockets and a clock of the test's: servers that are slow to take a connection."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nbdshard.common.errors import NbdshardError
from nbdshard.common.nbd.uri import parse_uri
from nbdshard.common.ring import Ring, open_ring
from nbdshard.worker.deadlines import Timeouts
from nbdshard.worker.dialing import LinkState
from nbdshard.worker.link import NbdLink
from nbdshard.worker.sockets import SYSTEM_SOCKETS, Address, Sockets
from support.waiting import wait_for

TIMEOUTS = Timeouts(connect=4.0, handshake=10.0, request=30.0)


class Resolving(Sockets):
    """The system's sockets, and a name that stands for the addresses given."""

    def __init__(self, *addresses: tuple[str, int]) -> None:
        self._addresses = addresses

    def resolve(self, host: str, port: int) -> Sequence[Address]:
        del host, port
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", address) for address in self._addresses]


class Story:
    """A link on a ring of its own, and what it told."""

    def __init__(self, ring: Ring, uri: str, connector: Sockets = SYSTEM_SOCKETS) -> None:
        self.ring = ring
        self.lost: list[NbdshardError] = []
        self.link = NbdLink(
            ring,
            parse_uri(uri),
            "source",
            TIMEOUTS,
            on_ready=lambda _: None,
            on_lost=lambda _, error: self.lost.append(error),
            connector=connector,
        )
        self.link.start(0.0, 4)

    def turn(self, now: float) -> None:
        self.link.pump(now)
        for operation in self.ring.wait(0.01):
            if operation.owner is not None:
                operation.owner(operation)

    def until(self, condition: Callable[[], bool], now: float) -> None:
        def turned() -> bool:
            self.turn(now)
            return condition()

        wait_for("the link", turned)

    def end(self) -> None:
        self.link.close()
        self.until(lambda: self.link.closed, 0.0)


@contextlib.contextmanager
def story_of(uri: str, connector: Sockets = SYSTEM_SOCKETS) -> Iterator[Story]:
    ring, _ = open_ring("epoll")
    story = Story(ring, uri, connector)
    try:
        yield story
        story.end()
    finally:
        ring.close()


@contextlib.contextmanager
def silent_address() -> Iterator[tuple[str, int]]:
    """A TCP address that answers no SYN: its backlog is full, and nobody accepts."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(server.getsockname())
        yield server.getsockname()


def test_an_address_that_does_not_answer_leaves_time_for_the_next() -> None:
    with (
        silent_address() as silent,
        socket.create_server(("127.0.0.1", 0)) as server,
        story_of("nbd://two-addresses/", Resolving(silent, server.getsockname())) as story,
    ):
        story.until(lambda: story.link.state is LinkState.CONNECTING, 0.0)
        story.link.tick(1.9)
        story.turn(1.9)
        assert story.link.state is LinkState.CONNECTING
        story.link.tick(2.0)  # half of the time, for there are two addresses
        story.until(lambda: story.link.state is LinkState.NEGOTIATING, 2.0)
        assert story.lost == []


def test_addresses_that_do_not_answer_take_no_longer_together_than_one() -> None:
    with (
        silent_address() as one,
        silent_address() as two,
        story_of("nbd://two-addresses/", Resolving(one, two)) as story,
    ):
        story.until(lambda: story.link.state is LinkState.CONNECTING, 0.0)
        story.link.tick(2.0)
        story.turn(2.0)
        story.link.tick(4.0)
        assert [str(error) for error in story.lost] == [
            "nbd://two-addresses/: timed out while connecting: no answer within 4 s"
        ]


def test_a_unix_socket_whose_backlog_is_full_is_tried_again(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as before:
        server.bind(path)
        server.listen(0)
        before.connect(path)
        with story_of(f"nbd+unix:///?socket={path}") as story:
            story.turn(0.0)
            story.link.tick(0.5)
            assert story.link.state is LinkState.CONNECTING
            server.accept()[0].close()
            story.link.tick(1.0)
            story.until(lambda: story.link.state is LinkState.NEGOTIATING, 1.0)
            assert story.lost == []


def test_a_unix_socket_whose_backlog_stays_full_is_given_up(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as before:
        server.bind(path)
        server.listen(0)
        before.connect(path)
        with story_of(f"nbd+unix:///?socket={path}") as story:
            story.link.tick(0.5)
            story.link.tick(4.0)
            assert [str(error) for error in story.lost] == [
                f"nbd+unix:///?socket={path}: timed out while connecting: no answer within 4 s"
            ]
