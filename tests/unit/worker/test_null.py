"""worker/null.py: the destination that takes everything and keeps nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nbdshard.common.limits import MIB
from nbdshard.common.messages import EndpointAddress
from nbdshard.common.ranges import Range
from support.local_driver import RINGS, Driver, driver


@pytest.fixture(params=RINGS)
def null(request: pytest.FixtureRequest) -> Iterator[Driver]:
    with driver(request.param, EndpointAddress(kind="null", address=""), "destination") as one:
        one.open()
        yield one


def test_it_is_as_large_as_anything_and_can_do_all_a_destination_can(null: Driver) -> None:
    found = null.description
    assert (found.peer, found.size, found.read_only, found.is_stream) == ("null:", None, False, False)
    assert (found.can_flush, found.can_zero, found.can_multi_conn) == (True, True, True)


def test_every_request_is_done_at_the_next_pump(null: Driver) -> None:
    answers = [
        null.ask("write", Range.of(1 << 60, MIB), memoryview(bytes(MIB))),
        null.ask("zero", Range(0, 1 << 40), allocated=True),
        null.ask("flush"),
    ]
    assert [answer.done for answer in answers] == [0, 0, 0]
    null.connection.pump(null.now())
    assert [(answer.sent, answer.done, answer.error) for answer in answers] == [(1, 1, None)] * 3
    assert null.events == ["sent 0", "done 0", "sent 1", "done 1", "sent 2", "done 2"]


def test_what_a_listener_asks_while_it_is_told_waits_for_the_next_turn(null: Driver) -> None:
    class Greedy:
        """Asks for more with every answer, for ever."""

        answered = 0

        def sent(self, handle: int) -> None:
            pass

        def arriving(self, handle: int) -> None:
            pass

        def done(self, handle: int, *_: object) -> None:
            self.answered += 1
            null.connection.flush(handle)

    greedy = null.connection.listener = Greedy()
    null.connection.flush(0)
    null.connection.pump(null.now())
    assert greedy.answered == 1
    null.connection.pump(null.now())
    assert greedy.answered == 2


def test_a_soft_end_answers_what_was_asked_and_takes_no_more(null: Driver) -> None:
    asked = null.ask("flush")
    null.connection.disconnect()
    assert not null.connection.closed
    late = null.ask("flush")
    null.leave()
    assert (asked.done, late.done) == (1, 0)


def test_a_close_says_nothing_more(null: Driver) -> None:
    asked = null.ask("flush")
    null.connection.close()
    assert null.connection.closed
    null.turn(0)
    assert (asked.sent, asked.done, null.lost) == (0, 0, [])
