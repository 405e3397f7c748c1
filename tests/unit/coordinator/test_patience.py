"""How long a server is waited for: what the user says wins over what the server hints, and that over the defaults."""

from __future__ import annotations

from msgspec.structs import replace

from nbdshard.common.limits import BACKOFF_SECONDS_MAX, BACKOFF_SECONDS_MIN, LOSS_SECONDS, MIB, REQUEST_SECONDS
from nbdshard.common.messages import Side
from nbdshard.common.nbd.hints import Hints
from nbdshard.coordinator.job import Job, Verdict
from nbdshard.coordinator.patience import Patience
from support.schedules import Stage, ended, job, open_failed, opened, server, wanted

SOURCE = server(8 * MIB, hints=Hints(request=90.0, loss=20.0, backoff_min=1.0, backoff_max=40.0))
DESTINATION = server(8 * MIB, hints=Hints(request=60.0, loss=30.0))
LOST = "{} nbd://a: connection lost while waiting for 3 replies: connection reset by peer"


def asked(**changes: object) -> Job:
    """A job of which nobody has asked for any time."""
    what = job(loss_seconds=LOSS_SECONDS, loss_hinted=True, reconnect_hinted=True)
    return replace(what, options=replace(what.options, request_hinted=True), **changes)


def test_hints_count_for_their_own_side_only() -> None:
    patience = Patience(asked())
    patience.learn(SOURCE, DESTINATION)
    assert (patience.loss("source"), patience.loss("destination"), patience.loss(None)) == (20.0, 30.0, LOSS_SECONDS)
    assert patience.backoff("source") == (1.0, 40.0)
    assert patience.backoff("destination") == patience.backoff(None) == (BACKOFF_SECONDS_MIN, BACKOFF_SECONDS_MAX)
    assert patience.request == 90.0


def test_before_anything_was_opened_the_defaults_count() -> None:
    patience = Patience(asked())
    assert (patience.loss("source"), patience.request) == (LOSS_SECONDS, REQUEST_SECONDS)
    assert patience.backoff("source") == (BACKOFF_SECONDS_MIN, BACKOFF_SECONDS_MAX)


def test_what_the_user_says_counts() -> None:
    what = asked(loss_hinted=False, loss_seconds=0.0, reconnect_hinted=False, reconnect_seconds=0.5)
    patience = Patience(replace(what, options=replace(what.options, request_hinted=False, request_seconds=5.0)))
    patience.learn(SOURCE, DESTINATION)
    assert (patience.loss("source"), patience.request) == (0.0, 5.0)
    assert patience.backoff("source") == (0.5, 0.5)


def test_a_server_that_has_changed_its_mind_is_believed() -> None:
    patience = Patience(asked())
    patience.learn(SOURCE, DESTINATION)
    patience.learn(server(8 * MIB), DESTINATION)
    assert patience.loss("source") == LOSS_SECONDS


def lost(side: Side) -> Stage:
    """A job whose only worker has lost this side."""
    stage = Stage(asked())
    stage.start()
    stage.join("a", SOURCE, DESTINATION)
    stage.say("a", wanted())
    stage.say("a", open_failed(LOST.format(side), side=side))
    return stage


def test_a_job_waits_as_long_as_the_lost_side_hints() -> None:
    expected: list[tuple[Side, float]] = [("source", 20.0), ("destination", 30.0)]
    for side, seconds in expected:
        stage = lost(side)
        assert stage.scheduler.status().waiting_seconds_max == seconds
        stage.wait(seconds - 0.1, "a")
        assert stage.scheduler.status().phase == "copying"
        stage.wait(0.2, "a")
        verdict, line = ended(stage, "a")
        assert (verdict, line) == (Verdict.PAUSED, f"{LOST.format(side)}; it was waited for {seconds:.0f} s")


def test_a_worker_comes_back_after_the_pause_that_the_lost_side_hints() -> None:
    stage = lost("source")
    stage.wait(0.7, "a")
    assert stage.scheduler.status().workers == 0
    before = len(stage.sent["a"])
    stage.wait(0.4, "a")
    assert len([message for message in stage.sent["a"][before:] if type(message).__name__ == "Assign"]) == 1
    stage.say("a", opened(SOURCE, DESTINATION))
    assert stage.scheduler.status().workers == 1
