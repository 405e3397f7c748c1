"""The state tables: complete, reachable, and the only way from state to state."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

import pytest

from nbdshard.common.errors import IllegalEvent
from nbdshard.common.nbd.states import (
    CLIENT_STATES,
    CONNECTER_STATES,
    RECEIVE_STATES,
    ClientState,
    ConnecterState,
    ReceiveState,
    Row,
    advance,
)

TABLES: list[tuple[type[Enum], Mapping[Enum, Row]]] = [
    (ConnecterState, CONNECTER_STATES),  # type: ignore[list-item]
    (ClientState, CLIENT_STATES),  # type: ignore[list-item]
    (ReceiveState, RECEIVE_STATES),  # type: ignore[list-item]
]
FIRST = [ConnecterState.GREETING, ClientState.RUNNING, ReceiveState.HEADER]


@pytest.mark.parametrize(("states", "table"), TABLES)
def test_every_state_is_in_its_table_with_a_sentence_of_its_own(states: type[Enum], table: Mapping[Enum, Row]) -> None:
    assert set(table) == set(states)
    sentences = [row.sentence for row in table.values()]
    assert all(sentence.endswith(".") for sentence in sentences)
    assert len(set(sentences)) == len(sentences)


@pytest.mark.parametrize(("table", "first"), list(zip([table for _, table in TABLES], FIRST, strict=True)))
def test_every_state_can_be_reached(table: Mapping[Enum, Row], first: Enum) -> None:
    reached, frontier = {first}, [first]
    while frontier:
        new = table[frontier.pop()].after - reached
        reached |= new
        frontier += new
    assert reached == set(table)


def test_a_machine_that_failed_stays_where_it_is() -> None:
    assert CONNECTER_STATES[ConnecterState.FAILED].after == frozenset()
    assert CLIENT_STATES[ClientState.FAILED].after == frozenset()


def test_a_move_that_is_not_in_the_table_is_refused() -> None:
    assert advance(CLIENT_STATES, "client", ClientState.RUNNING, ClientState.DISCONNECTING) is ClientState.DISCONNECTING
    with pytest.raises(IllegalEvent) as caught:
        advance(CLIENT_STATES, "client", ClientState.CLOSED, ClientState.RUNNING)
    assert str(caught.value) == (
        "client has no transition for a move to RUNNING in state CLOSED "
        "(The stream has ended; pending requests will never be answered here.)"
    )
