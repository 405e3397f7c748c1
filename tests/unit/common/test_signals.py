"""Signals as events: counted, never lost, raised only while nothing else would notice them."""

from __future__ import annotations

import os
import select
import signal

import pytest

from nbdshard.common.signals import HANDLED, Interrupted, SignalWatch


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def readable(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_is_counted_wakes_the_loop_and_names_the_exit_code(number: signal.Signals, code: int) -> None:
    with SignalWatch() as watch:
        watch.counting()
        assert not readable(watch.descriptor)
        send(number)
        assert watch.received == [number]
        assert readable(watch.descriptor)
        watch.drain()
        assert not readable(watch.descriptor)
        assert watch.exit_code == code


def test_the_exit_code_is_that_of_the_first_signal() -> None:
    with SignalWatch() as watch:
        watch.counting()
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert watch.received == [signal.SIGTERM, signal.SIGINT]
        assert watch.exit_code == 143


def test_before_the_loop_the_first_signal_is_kept_for_it_and_the_second_raises() -> None:
    with SignalWatch() as watch:
        send(signal.SIGINT)
        assert watch.received == [signal.SIGINT]
        with pytest.raises(Interrupted) as caught:
            send(signal.SIGTERM)
        assert caught.value.number is signal.SIGTERM
        send(signal.SIGINT)  # the third comes while things are cleaned up, and must not disturb that


def test_once_the_loop_runs_nothing_raises() -> None:
    with SignalWatch() as watch:
        watch.counting()
        for _ in range(5):
            send(signal.SIGINT)
        assert len(watch.received) == 5


def test_everything_is_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in HANDLED]
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    with SignalWatch():
        assert [signal.getsignal(number) for number in HANDLED] != before
    assert [signal.getsignal(number) for number in HANDLED] == before
    assert signal.set_wakeup_fd(wakeup) == wakeup


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalWatch() as watch:
            watch.counting()
            send(signal.SIGHUP)
            assert watch.received == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_drain_without_a_signal_does_not_wait() -> None:
    with SignalWatch() as watch:
        watch.drain()
