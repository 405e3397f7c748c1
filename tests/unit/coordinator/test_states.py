"""The state tables: complete, with a sentence for each state, and strict."""

from __future__ import annotations

from typing import get_args

import pytest

from nbdshard.common.errors import IllegalEvent
from nbdshard.common.messages import FromWorker, Hello
from nbdshard.coordinator.states import (
    JOBS,
    RANGES,
    RECEPTION,
    WORKERS,
    JobEvent,
    Phase,
    RangeEvent,
    RangeState,
    WorkerEvent,
    WorkerState,
)


@pytest.mark.parametrize(
    ("sentences", "states"),
    [(RANGES.sentences, RangeState), (WORKERS.sentences, WorkerState), (JOBS.sentences, Phase)],
    ids=["range", "worker", "job"],
)
def test_every_state_has_a_sentence(sentences: dict[object, str], states: type[RangeState]) -> None:
    assert set(sentences) == set(states)
    assert all(sentence.endswith(".") for sentence in sentences.values())


def test_a_range_goes_from_pending_to_durable_by_way_of_a_lease() -> None:
    state = RangeState.PENDING
    for event in (RangeEvent.GRANT, RangeEvent.WRITTEN, RangeEvent.SETTLED):
        state = RANGES.step(state, event)
    assert state is RangeState.DURABLE


@pytest.mark.parametrize("state", [RangeState.LEASED, RangeState.WRITTEN, RangeState.DURABLE])
def test_a_range_comes_back_while_it_is_not_settled(state: RangeState) -> None:
    assert RANGES.step(state, RangeEvent.GIVEN_BACK) is RangeState.PENDING


@pytest.mark.parametrize("event", RangeEvent)
def test_a_range_that_has_failed_stays_so(event: RangeEvent) -> None:
    with pytest.raises(IllegalEvent):
        RANGES.step(RangeState.FAILED, event)


@pytest.mark.parametrize("event", [RangeEvent.GRANT, RangeEvent.WRITTEN, RangeEvent.SETTLED])
def test_a_range_that_is_durable_is_not_copied_again_for_nothing(event: RangeEvent) -> None:
    with pytest.raises(IllegalEvent):
        RANGES.step(RangeState.DURABLE, event)


@pytest.mark.parametrize("event", WorkerEvent)
def test_a_worker_that_is_gone_stays_gone(event: WorkerEvent) -> None:
    with pytest.raises(IllegalEvent):
        WORKERS.step(WorkerState.GONE, event)


@pytest.mark.parametrize("event", JobEvent)
def test_a_job_that_is_done_stays_done(event: JobEvent) -> None:
    with pytest.raises(IllegalEvent):
        JOBS.step(Phase.DONE, event)


def test_an_illegal_event_tells_the_story() -> None:
    with pytest.raises(IllegalEvent) as caught:
        RANGES.step(RangeState.PENDING, RangeEvent.WRITTEN, "lease 7")
    assert str(caught.value) == "range has no transition for WRITTEN in state PENDING (lease 7)"


def test_the_reception_of_every_message_is_settled_for_every_state_of_a_worker_that_is_there() -> None:
    kinds = set(get_args(FromWorker)) - {Hello}
    assert set(RECEPTION) == set(WorkerState) - {WorkerState.GONE}
    assert all(set(by_type) == kinds for by_type in RECEPTION.values())
