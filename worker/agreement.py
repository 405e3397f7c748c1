"""Whether the ends that a worker has opened are what the job's others have, and what can be done with them."""

from __future__ import annotations

from nbdshard.common.errors import ConnectionLost, UserError
from nbdshard.common.messages import Assign, DataPath, EndpointDescription, Side
from nbdshard.worker.opening import OpenConnection


def check_agreement(assign: Assign, side: Side, found: EndpointDescription) -> None:
    """Refuse to work on something else than the job does: what its first worker found. Raises UserError."""
    wanted = assign.expected_source
    if side == "destination":
        wanted = assign.expected_destinations[0] if assign.expected_destinations is not None else None
    if wanted is not None and (what := found.difference(wanted, any_size=_grows(assign, side))):
        raise UserError(f"is not what the job began with: {what}", found.peer)


def check_likeness(assign: Assign, side: Side, found: EndpointDescription, first: EndpointDescription) -> None:
    """Refuse a further connection that leads to something else than the `first` to that side. Raises UserError.

    Raises ConnectionLost where the destination's server was started again in between: what the first one wrote may be
    lost, and only who connects anew says so (coordinator/lives.py).
    """
    if what := found.difference(first, any_size=_grows(assign, side)):
        raise UserError(f"differs from one connection to the next: {what}", found.peer)
    lives = {found.hints.instance, first.hints.instance} - {""}
    if side == "destination" and len(lives) > 1:
        raise ConnectionLost(found.peer, "connecting", "the server was started again meanwhile")


def _grows(assign: Assign, side: Side) -> bool:
    # The coordinator gives a file its size after the first worker opened it.
    return side == "destination" and assign.destinations[0].kind == "file"


def may_splice(ends: tuple[OpenConnection, OpenConnection], data_path: DataPath) -> bool:
    """Whether payload goes through pipes. Raises UserError where it must and cannot."""
    if data_path == "buffer":
        return False
    unable = next((end for end in ends if not end.splices), None)
    if unable is not None and data_path == "splice":
        advice = "leave --data-path out"
        raise UserError("payload cannot be spliced to or from it", unable.description.peer, advice)
    return unable is None
