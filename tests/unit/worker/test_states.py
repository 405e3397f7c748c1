"""worker/states.py: the table of an operation's states, looked at as data."""

from __future__ import annotations

import pytest

from nbdshard.common.errors import IllegalEvent
from nbdshard.common.ranges import Range
from nbdshard.worker.lease import LeaseWork
from nbdshard.worker.operation import Operation
from nbdshard.worker.states import MEANING, TRANSITIONS, OperationEvent, OperationState

S, E = OperationState, OperationEvent


def an_operation(state: OperationState) -> Operation:
    """An operation that is in `state`."""
    lease = LeaseWork(3, Range(0, 4096), expires=1.0, alignment=1)
    operation = Operation(lease, lease.where)
    operation.state = state
    return operation


def reachable(start: OperationState) -> set[OperationState]:
    """Every state that some sequence of events leads to from `start`."""
    seen, new = {start}, [start]
    while new:
        here = new.pop()
        for (state, _), after in TRANSITIONS.items():
            if state is here and after not in seen:
                seen.add(after)
                new.append(after)
    return seen


def follow(*events: OperationEvent) -> OperationState:
    """Where `events` lead from EMPTY."""
    operation = an_operation(S.EMPTY)
    for event in events:
        operation.advance(event)
    return operation.state


def test_every_state_has_its_sentence() -> None:
    assert set(MEANING) == set(S)
    assert all(sentence.endswith(".") and sentence[0].isupper() for sentence in MEANING.values())
    assert len(set(MEANING.values())) == len(S)


def test_every_state_can_be_reached_and_left_for_good() -> None:
    assert reachable(S.EMPTY) == set(S)
    assert all(S.EMPTY in reachable(state) for state in S)


def test_every_event_has_a_place() -> None:
    assert {event for _, event in TRANSITIONS} == set(E)


def test_an_operation_can_be_dropped_wherever_it_is() -> None:
    for state in set(S) - {S.EMPTY}:
        operation = an_operation(state)
        operation.advance(E.DROPPED)
        assert operation.state is S.EMPTY


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ((E.BEGIN_READ,), S.REQUESTING),
        ((E.BEGIN_READ, E.REQUEST_SENT), S.WAITING),
        ((E.BEGIN_READ, E.REQUEST_SENT, E.REPLY_ARRIVING), S.READING),
        ((E.BEGIN_READ, E.REQUEST_SENT, E.REPLY_ARRIVING, E.READ_DONE), S.WRITING),
        ((E.BEGIN_READ, E.REQUEST_SENT, E.REPLY_ARRIVING, E.READ_DONE, E.WRITES_SENT), S.CONFIRMING),
        ((E.BEGIN_READ, E.REQUEST_SENT, E.REPLY_ARRIVING, E.READ_DONE, E.WRITES_SENT, E.CONFIRMED), S.EMPTY),
        # a reply without payload
        ((E.BEGIN_READ, E.REQUEST_SENT, E.READ_DONE), S.WRITING),
        # failures go back to where the data still is
        ((E.BEGIN_READ, E.REQUEST_SENT, E.READ_FAILED), S.REQUESTING),
        ((E.BEGIN_READ, E.REQUEST_SENT, E.REPLY_ARRIVING, E.READ_FAILED), S.REQUESTING),
        ((E.BEGIN_READ, E.REQUEST_SENT, E.READ_DONE, E.WRITES_SENT, E.WRITE_FAILED), S.WRITING),
        # the destination's own last block
        ((E.BEGIN_READ, E.REQUEST_SENT, E.READ_DONE, E.MERGE), S.MERGING),
        ((E.BEGIN_READ, E.REQUEST_SENT, E.READ_DONE, E.MERGE, E.READ_FAILED), S.MERGING),
        ((E.BEGIN_READ, E.REQUEST_SENT, E.READ_DONE, E.MERGE, E.READ_DONE), S.WRITING),
        # zeroes
        ((E.BEGIN_ZERO,), S.ZEROING),
        ((E.BEGIN_ZERO, E.WRITES_SENT, E.CONFIRMED), S.EMPTY),
        ((E.BEGIN_ZERO, E.WRITES_SENT, E.ZERO_FAILED), S.ZEROING),
        ((E.BEGIN_ZERO, E.WRITE_FAILED), S.WRITING),
    ],
    ids=lambda value: "-".join(event.name.lower() for event in value) if isinstance(value, tuple) else value.name,
)
def test_the_ways_through_the_table(events: tuple[OperationEvent, ...], state: OperationState) -> None:
    assert follow(*events) is state


def test_nothing_is_written_before_the_read_is_done() -> None:
    """The rule that keeps a padded, failed reply from being written: only READ_DONE leads from a read to WRITING."""
    reads = {S.REQUESTING, S.WAITING, S.READING, S.MERGING}
    into_writing = {event for (state, event), after in TRANSITIONS.items() if state in reads and after is S.WRITING}
    assert into_writing == {E.READ_DONE}
    assert not any(after is S.CONFIRMING for (state, _), after in TRANSITIONS.items() if state in reads)


def test_nothing_is_confirmed_that_was_not_sent() -> None:
    assert {state for (state, event) in TRANSITIONS if event is E.CONFIRMED} == {S.CONFIRMING}
    assert {event for (_, event), after in TRANSITIONS.items() if after is S.CONFIRMING} == {E.WRITES_SENT}


def test_every_other_event_is_illegal_and_says_the_whole_story() -> None:
    illegal = [(state, event) for state in S for event in E if (state, event) not in TRANSITIONS]
    assert len(illegal) == len(S) * len(E) - len(TRANSITIONS)
    for state, event in illegal:
        with pytest.raises(IllegalEvent) as raised:
            an_operation(state).advance(event)
        assert (raised.value.machine, raised.value.state, raised.value.event) == ("operation", state.name, event.name)
    with pytest.raises(IllegalEvent) as raised:
        an_operation(S.EMPTY).advance(E.READ_DONE)
    assert str(raised.value) == "operation has no transition for READ_DONE in state EMPTY (lease 3, [0, 4096))"
