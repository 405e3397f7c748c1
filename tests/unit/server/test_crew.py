"""The threads of an export: side by side, flushes beside the rest, and what happens where there are none."""

from __future__ import annotations

import threading

import pytest

from nbdshard.server.crew import Crew
from support.threads import no_threads


def test_calls_are_made_side_by_side() -> None:
    crew, together = Crew(calls_max=3), threading.Barrier(4)
    for _ in range(3):
        crew.carry_out(lambda: together.wait(30) and None, is_flush=False)
    together.wait(30)


def test_no_more_threads_than_allowed_and_the_rest_waits() -> None:
    crew, may_end, done = Crew(calls_max=2), threading.Event(), threading.Semaphore(0)
    before = threading.active_count()

    def call() -> None:
        may_end.wait(30)
        done.release()

    for _ in range(5):
        crew.carry_out(call, is_flush=False)
    assert threading.active_count() == before + 2
    may_end.set()
    assert all(done.acquire(timeout=30) for _ in range(5))


def test_who_is_done_is_used_again() -> None:
    crew, before = Crew(), threading.active_count()
    for _ in range(10):
        done = threading.Event()
        crew.carry_out(done.set, is_flush=False)
        assert done.wait(30)
    assert threading.active_count() - before <= 2  # one may not have noticed yet that it is free


def test_flushes_that_wait_do_not_stand_in_the_way_of_others() -> None:
    crew, may_end, done = Crew(1, 1), threading.Event(), threading.Event()
    for _ in range(4):
        crew.carry_out(lambda: may_end.wait(30) and None, is_flush=True)
    crew.carry_out(done.set, is_flush=False)
    assert done.wait(30)
    may_end.set()


def test_changes_that_wait_do_not_stand_in_the_way_of_reads() -> None:
    crew, may_end, done = Crew(1, 1), threading.Event(), threading.Event()
    for _ in range(4):
        crew.carry_out(lambda: may_end.wait(30) and None, is_flush=False, is_change=True)
    crew.carry_out(done.set, is_flush=False)
    assert done.wait(30)
    may_end.set()


def test_without_any_thread_it_is_done_here(capfd: pytest.CaptureFixture[str]) -> None:
    found: list[int] = []
    with no_threads():
        Crew().carry_out(lambda: found.append(threading.get_ident()), is_flush=False)
    assert found == [threading.get_ident()]
    assert "0 threads carry out requests, and there is no further one" in capfd.readouterr().err


def test_with_one_thread_and_no_other_it_waits_for_that(capfd: pytest.CaptureFixture[str]) -> None:
    crew, may_end, begun, done = Crew(), threading.Event(), threading.Event(), threading.Event()

    def call() -> None:
        begun.set()
        may_end.wait(30)

    crew.carry_out(call, is_flush=False)
    assert begun.wait(30)
    with no_threads():
        crew.carry_out(done.set, is_flush=False)
    assert not done.is_set()
    may_end.set()
    assert done.wait(30)
    assert "1 threads carry out requests" in capfd.readouterr().err
