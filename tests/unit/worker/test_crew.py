"""worker/crew.py on a real ring, with `null:` at both ends: which connections are opened, and that all of them end."""

from __future__ import annotations

from nbdshard.common.errors import NbdshardError
from nbdshard.common.messages import Assign, EndpointAddress, JobOptions, Side
from nbdshard.common.ring import Ring, open_ring
from nbdshard.worker.crew import Crew
from nbdshard.worker.opening import OpenConnection
from support.waiting import wait_for

NULL = EndpointAddress(kind="null", address="null:")
OPTIONS = JobOptions(request_size=65_536, requests=4, queue_size=1 << 20, sparse_unit=None)
ASSIGN = Assign(
    "job",
    1,
    source=NULL,
    destinations=[NULL],
    options=OPTIONS,
    source_connections=3,
    destination_connections=2,
    heartbeat_seconds=2.0,
    lease_seconds=10.0,
)


class Story:
    """A crew, and what it told."""

    def __init__(self, ring: Ring, *, leave_at: int = 0) -> None:
        self.ring = ring
        self.opened: list[Side] = []
        self.lost: list[NbdshardError] = []
        self.leave_at = leave_at
        self.crew = Crew(ring, ASSIGN, self._opened, self._lost)

    def _opened(self, side: Side, connection: OpenConnection) -> None:
        del connection
        self.opened.append(side)
        if len(self.opened) == self.leave_at:
            self.crew.disconnect(at_once=True)

    def _lost(self, side: Side, connection: OpenConnection, error: NbdshardError) -> None:
        del side, connection
        self.lost.append(error)

    def turn(self) -> None:
        self.crew.pump(0.0)
        for operation in self.ring.wait(0.01):
            if operation.owner is not None:
                operation.owner(operation)


def is_closed(story: Story) -> bool:
    story.turn()
    return story.crew.closed


def test_the_rest_is_opened_when_both_sides_are_up() -> None:
    ring, _ = open_ring("epoll")
    story = Story(ring)
    story.crew.want(ASSIGN, 0.0)
    for _ in range(10):
        story.turn()
    assert story.opened[:2] == ["source", "destination"]
    assert (story.crew.count("source"), story.crew.count("destination")) == (3, 2)
    story.crew.disconnect(at_once=False)
    wait_for("the crew to be closed", lambda: is_closed(story))
    assert not story.lost
    ring.close()


def test_nothing_more_is_opened_by_a_crew_that_was_told_to_end_when_the_first_pair_was_up() -> None:
    ring, _ = open_ring("epoll")
    story = Story(ring, leave_at=2)
    story.crew.want(ASSIGN, 0.0)
    wait_for("the crew to be closed", lambda: is_closed(story))
    assert story.opened == ["source", "destination"]
    ring.close()
