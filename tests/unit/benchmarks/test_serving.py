"""The clients of the servers that are compared, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from benchmarks.judging import judge_server
from benchmarks.report import page
from benchmarks.results import ServedWork
from benchmarks.rows import NBDKIT, SERVED_WORKS, SERVER_RAW, SERVER_SHARDED
from benchmarks.serving import command
from support.benchmark_runs import series, whole


def work(peer: float, own: float) -> ServedWork:
    servers = {NBDKIT: peer, SERVER_RAW: own, SERVER_SHARDED: own}
    return ServedWork("read", 1 << 30, [series(name, [wall]) for name, wall in servers.items()])


def test_every_kind_of_work_has_a_client() -> None:
    for each in SERVED_WORKS:
        assert "URI" in " ".join(command(each.name, "URI", Path("source"), 1 << 20))
    with pytest.raises(ValueError, match="dance is no kind of work"):
        command("dance", "URI", Path("source"), 1)


def test_a_server_is_judged_by_the_time_beside_the_peer() -> None:
    assert work(2.0, 1.0).speed(SERVER_RAW) == 2.0
    assert judge_server(work(2.0, 1.0), SERVER_RAW, 1.0).met is True
    assert judge_server(work(0.5, 1.0), SERVER_SHARDED, 0.7).met is False
    nothing = ServedWork("read", 1, [series(NBDKIT, []), series(SERVER_RAW, [])])
    assert judge_server(nothing, SERVER_RAW, 1.0).met is None


def test_the_page_has_each_server_beside_the_peer_and_whether_it_is_fast_enough() -> None:
    text = page(msgspec.structs.replace(whole(), serving=[work(0.8, 1.0)]), "")
    raw, sharded = (line for line in text.splitlines() if " file: | 1.00" in line)
    assert raw.endswith("| 0.80 | at least 1 | **not met** |")
    assert sharded.endswith("| 0.80 | at least 0.7 | met |")
