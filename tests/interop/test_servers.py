"""Every kind of server on either side, over unix sockets and TCP, on both rings: the destination equals the source."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import images
from support.command import copy
from support.pairwise import Case, name_of, pairwise, product
from support.sides import KINDS, RINGS, TRANSPORTS, granularity, round_up, serve

OLD = 0xEE  # what the destination held before: where a block is forgotten, it shows

FACTORS = {
    "source": KINDS,
    "source_transport": TRANSPORTS,
    "destination": KINDS,
    "destination_transport": TRANSPORTS,
    "size": (1, 513, images.MIB + 1, 10_000_001),
    "ring": RINGS,
    "workers": (1, 2, 4),
}


def check(folder: Path, case: Case) -> None:
    source_kind, destination_kind = str(case["source"]), str(case["destination"])
    size = round_up(int(str(case["size"])), granularity(source_kind))
    source = images.sparse_image(folder / "source", size)
    destination = images.filled_image(folder / "destination", round_up(size, granularity(destination_kind)), OLD)
    with (
        serve(source_kind, source, transport=str(case["source_transport"])) as source_uri,
        serve(destination_kind, destination, transport=str(case["destination_transport"])) as destination_uri,
    ):
        command = ("--workers", str(case["workers"]), "--ring", str(case["ring"]))
        outcome = copy(*command, source_uri, destination_uri).succeeded()
    images.assert_begins_with(destination, source, rest=OLD)
    assert str(case["ring"]) in outcome.last_line


@pytest.mark.parametrize("case", pairwise(FACTORS), ids=name_of)
def test_a_copy_between_two_servers_is_identical(tmp_path: Path, case: Case) -> None:
    check(tmp_path, case)


@pytest.mark.long
@pytest.mark.parametrize("case", product(FACTORS), ids=name_of)
def test_a_copy_between_any_two_servers_is_identical(tmp_path: Path, case: Case) -> None:
    check(tmp_path, case)
