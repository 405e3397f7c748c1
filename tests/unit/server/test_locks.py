"""server/locks.py: one at a time for each part, and nothing kept of parts that nobody has."""

from __future__ import annotations

import threading

import pytest

from nbdshard.server.locks import Locks
from support.waiting import wait_for


def test_a_part_is_had_by_one_at_a_time_and_others_are_not_waited_for() -> None:
    locks, order = Locks(), list[str]()

    def second() -> None:
        with locks.of(1):
            order.append("second")

    thread = threading.Thread(target=second)
    with locks.of(1):
        thread.start()
        wait_for("the second to wait", lambda: locks._taken[1].wanted == 2)
        with locks.of(2):
            order.append("another part")
        order.append("first")
    thread.join(60)
    assert order == ["another part", "first", "second"]
    assert locks._taken == {}


def test_a_part_is_free_after_an_error() -> None:
    locks = Locks()
    with pytest.raises(OSError, match="full"), locks.of(1):
        raise OSError(28, "full")
    assert locks._taken == {}


def test_many_threads_have_it_one_after_the_other() -> None:
    locks, counted = Locks(), [0]

    def count() -> None:
        for _ in range(300):
            with locks.of(7):
                before = counted[0]
                threading.Event().wait(0)  # whoever could come in between does
                counted[0] = before + 1

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert counted == [1200]
    assert locks._taken == {}
