"""May this worker take part? Pure questions about a `Hello` and about what an `Opened` found."""

from __future__ import annotations

from nbdshard.common.endpoints import is_remote_reachable
from nbdshard.common.errors import UserError
from nbdshard.common.messages import PROTOCOL_VERSION, EndpointAddress, EndpointDescription, Hello
from nbdshard.coordinator.job import Job


def refusal(job: Job, hello: Hello) -> str | None:
    """Why the worker cannot be taken, in one line; None if it can."""
    if hello.version != PROTOCOL_VERSION:
        return (
            f"the worker speaks version {hello.version} of the control protocol, "
            f"the coordinator version {PROTOCOL_VERSION}"
        )
    if hello.machine == job.machine:
        return None
    ends = [("source", job.source), *(("destination", destination) for destination in job.destinations)]
    for side, address in ends:
        if not _means_the_same_everywhere(address):
            return (
                f"a worker on another machine cannot take part: the {side} {address.address} "
                "is not an NBD server at a TCP address other than loopback"
            )
    return None


def _means_the_same_everywhere(address: EndpointAddress) -> bool:
    try:
        return is_remote_reachable(address)
    except UserError:  # a malformed URI, which no worker can open either
        return False


def disagreement(
    expected: EndpointDescription, found: EndpointDescription, side: str, *, size_matters: bool
) -> str | None:
    """How what a worker `found` differs from what the job is about, in one line; None if it does not."""
    what = found.difference(expected, any_size=not size_matters)
    return f"another {side} was found: {what}" if what else None
