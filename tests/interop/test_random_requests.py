"""Random requests of libnbd, many at once, against a reference: every driver, store and chain."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from support.chains import CHAINS, Chain
from support.served import serving

CLIENT = Path(__file__).parents[1] / "support/libnbd_client.py"
SYSTEM_PYTHON = "/usr/bin/python3"  # has libnbd's binding
CONNECTIONS = 4
SECONDS = 200


def hammered(uri: str, seed: int, requests: int) -> None:
    """Some requests over some connections, and no answer but the right one."""
    words = (SYSTEM_PYTHON, str(CLIENT), uri, str(CONNECTIONS), str(requests), str(seed))
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    for kind in ("write", "zero", "trim", "read", "extents", "flush"):
        assert f"'{kind}'" in done.stdout, done.stdout


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_random_requests_leave_what_a_reference_holds(chain: Chain, seed: int, tmp_path: Path) -> None:
    with chain.ready(tmp_path) as conn, serving(conn, driver=chain.driver) as served:
        hammered(served.uri(), seed, requests=chain.requests)
