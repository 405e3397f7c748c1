"""server/backends/acknowledged.py"""

from __future__ import annotations

from nbdshard.server.backends.acknowledged import Acknowledged


def written(acknowledged: Acknowledged, length: int = 4096) -> int:
    number = acknowledged.begin(length)
    assert acknowledged.answered(number, acknowledged.life)
    acknowledged.end(number)
    return number


def flush(acknowledged: Acknowledged) -> None:
    acknowledged.flushed(acknowledged.covered())


def test_what_was_flushed_survives_another_life() -> None:
    found = Acknowledged()
    written(found)
    flush(found)
    found.connected(is_same_life=False)
    assert (found.lost, found.life, found.bytes_unflushed) == ("", 1, 0)


def test_what_was_acknowledged_and_not_flushed_does_not() -> None:
    found = Acknowledged()
    written(found)
    flush(found)
    written(found)
    found.connected(is_same_life=False)
    assert found.lost == "it was started again, or does not say that it was not"


def test_what_was_not_acknowledged_is_nobodys_loss() -> None:
    found = Acknowledged()
    number = found.begin(4096)
    found.connected(is_same_life=False)
    assert not found.lost
    assert not found.answered(number, 0), "an answer of the life before is worth nothing"
    assert found.answered(number, 1)


def test_a_life_that_goes_on_has_lost_nothing() -> None:
    found = Acknowledged()
    written(found)
    found.flush_failed("no answer", has_lives=True)
    assert found.is_in_doubt
    found.connected(is_same_life=True)
    assert (found.lost, found.life, found.is_in_doubt) == ("", 0, False)


def test_a_flush_covers_nothing_that_was_under_way_when_it_was_sent() -> None:
    found = Acknowledged()
    slow = found.begin(4096)
    covered = found.covered()
    assert found.answered(slow, 0)
    found.end(slow)
    found.flushed(covered)
    assert found.bytes_unflushed == 4096
    found.connected(is_same_life=False)
    assert found.lost


def test_an_older_flush_takes_nothing_back() -> None:
    found = Acknowledged()
    older = found.covered()
    written(found)
    flush(found)
    found.flushed(older)
    found.connected(is_same_life=False)
    assert not found.lost


def test_a_flush_that_fails_loses_only_what_there_was_to_lose() -> None:
    found = Acknowledged()
    written(found)
    flush(found)
    found.flush_failed("EIO", has_lives=False)
    assert not found.lost
    written(found)
    found.flush_failed("EIO", has_lives=False)
    found.flush_failed("ENOSPC", has_lives=False)
    assert found.lost == "a flush failed (EIO)"


def test_a_failed_flush_in_doubt_is_a_loss_in_another_life_although_all_was_flushed_since() -> None:
    found = Acknowledged()
    number = found.begin(4096)
    found.flush_failed("EIO", has_lives=True)  # it may have told of this write, which is answered only now
    assert found.answered(number, 0)
    found.end(number)
    flush(found)
    found.connected(is_same_life=False)
    assert found.lost
