"""Data and names are on the disk before a flush, or a write with FUA, is answered: by the system calls that are made.

A server that is killed leaves the page cache behind (test_killed.py), a machine that stops does not.
"""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest

from nbdshard.common.nbd.connecter import Wishes
from nbdshard.common.ranges import Range
from support.chains import SIZE, Chain
from support.killing import KEEPING_SHORT
from support.nbd_blocking import Connection
from support.served import NAME, serving
from support.syncs import Trace, traced

REQUESTS = 60
ELSEWHERE = ("nbd:", "{s3}")  # what is kept there is synced there
HERE = {name: each for name, each in KEEPING_SHORT.items() if not any(place in each.conn for place in ELSEWHERE)}


def done(connection: Connection) -> None:
    (answer,) = connection.run()
    assert answer.error is None


def unsynced(trace: Trace, folder: Path) -> set[str]:
    """Without what a cache on disk holds: a flush goes through it, to where everything belongs. Its index counts."""
    return trace.read() - {str(folder / "cache" / name) for name in ("data", "lock")}


@pytest.mark.parametrize("chain", HERE.values(), ids=HERE)
def test_nothing_is_left_to_be_synced_when_a_flush_is_answered(chain: Chain, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    calls = tmp_path.with_name(tmp_path.name + ".calls")
    calls.touch()
    with (
        contextlib.closing(Trace(calls, tmp_path, besides=("log", "stats"))) as trace,
        chain.ready(tmp_path) as conn,
        serving(conn, driver=chain.driver, executable=traced(calls)) as served,
        Connection(served.socket, Wishes(NAME)) as writing,
        Connection(served.socket, Wishes(NAME)) as flushing,
    ):
        for _ in range(REQUESTS):
            kind = chance.choice(["write", "write", "zero", "trim", "flush", "fua"])
            length = chance.choice([4096, 65_536, 131_072])
            where = Range.of(chance.randrange(0, SIZE - length + 1, 4096), length)
            if kind in ("flush", "fua"):
                flushing.client.flush(0)
                done(flushing)
                assert not unsynced(trace, tmp_path)
            match kind:
                case "write":
                    writing.client.write(0, where, [chance.randbytes(length)])
                case "fua":
                    writing.client.write(0, where, [chance.randbytes(length)], fua=True)
                case "zero":
                    writing.client.write_zeroes(0, where)
                case "trim":
                    writing.client.trim(0, where)
                case _:
                    continue
            done(writing)
            if kind == "fua":
                assert not unsynced(trace, tmp_path)
        assert trace.synced
