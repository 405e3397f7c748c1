"""Feed spoiled server streams to the connecter and the client, in random pieces, for as long as asked.

    python tests/fuzz/fuzz_client.py --seconds 600 [--seed N]

Every run of a case must end: with events, or with an error for the caller. Never with a BugError or anything else,
never beyond the read buffers, never with a target for more bytes than the limits allow. The seed of a failing run is
printed; `--seed N --runs 1` repeats it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.mutations import spoil
from fuzz.running import Outcome, a_piece, main
from fuzz.streams import CASES, GUARD, Case

from nbdshard.common.errors import BugError, NbdshardError
from nbdshard.common.limits import (
    EXTENTS_PER_REPLY_MAX,
    HEAD_BYTES_MAX,
    OPTION_REPLY_BYTES_MAX,
)
from nbdshard.common.nbd.client import Arriving, Client, Done
from nbdshard.common.nbd.connecter import Connecter
from support.nbd_feeding import scatter

TARGET_BYTES_MAX = HEAD_BYTES_MAX + 8 + 16 * EXTENTS_PER_REPLY_MAX  # a header behind the longest body


def run_case(case: Case, random: Random) -> Outcome:
    """One spoiled stream through one machine. Raises what must not come out."""
    machine, memories = case.start()
    stream = memoryview(spoil(case.stream, random))
    try:
        if isinstance(machine, Connecter):
            _negotiate(machine, stream, random)
        else:
            _transmit(machine, stream, random)
        error = ""
    except BugError:
        raise
    except NbdshardError as caught:
        error = type(caught).__name__
        str(caught).encode()
    for memory in memories:
        assert memory.startswith(GUARD), "bytes before a read buffer were touched"
        assert memory.endswith(GUARD), "bytes behind a read buffer were touched"
    return Outcome(case.name, error)


def _negotiate(connecter: Connecter, stream: memoryview, random: Random) -> None:
    while stream:
        target = connecter.receive_target()
        if not target:
            assert connecter.done, f"nothing is wanted in state {connecter.state}"
            return
        assert len(target) <= OPTION_REPLY_BYTES_MAX, f"a target of {len(target)} bytes"
        count = min(len(target), len(stream), a_piece(random))
        target[:count] = stream[:count]
        connecter.received(count)
        connecter.data_to_send()
        stream = stream[count:]
    connecter.end_of_stream()


def _transmit(client: Client, stream: memoryview, random: Random) -> None:
    open_handles = set(client.pending_handles())
    while stream:
        targets = client.receive_target()
        assert sum(map(len, targets)) <= TARGET_BYTES_MAX, f"targets of {[len(target) for target in targets]} bytes"
        count = scatter(targets, stream[: a_piece(random)])
        for event in client.received(count):
            if isinstance(event, Arriving):
                assert event.handle in open_handles, f"{event} of a request that is done"
            elif isinstance(event, Done):
                open_handles.remove(event.handle)
        assert set(client.pending_handles()) == open_handles
        stream = stream[count:]
    client.end_of_stream()


def run_seed(seed: int) -> Outcome:
    """The run that belongs to one seed."""
    random = Random(seed)
    return run_case(random.choice(CASES), random)


if __name__ == "__main__":
    sys.exit(main("Fuzz the client side of the NBD core.", run_seed))
