"""Block sizes, missing features and odd sizes, which nbdkit's filters enforce on either side: the copy is identical.

The destination is a little larger than the source and was full of another byte: what lies behind the source's end
must be as before, also where the destination's minimum block reaches over that end.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support import images
from support.command import copy
from support.pairwise import Case, name_of, pairwise, product
from support.sides import BLOCKS, RINGS, Blocks, round_up, serve

OLD = 0xEE

SOURCE_VARIANTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    # name: filters, their parameters, nbdkit's flags
    "plain": ((), (), ("-r",)),
    "noextents": (("noextents",), (), ("-r",)),
    "nosr": ((), (), ("-r", "--no-sr")),
    "single": (("multi-conn",), ("multi-conn-mode=disable",), ("-r",)),
}
DESTINATION_VARIANTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "plain": ((), (), ()),
    "nozero": (("nozero",), (), ()),
    "emulatezero": (("nozero",), ("zeromode=emulate",), ()),
    "nosr": ((), (), ("--no-sr",)),
    "single": (("multi-conn",), ("multi-conn-mode=disable",), ()),
    "nofua": (("fua",), (), ()),
}

FACTORS = {
    "source_blocks": BLOCKS,
    "source_variant": tuple(SOURCE_VARIANTS),
    "destination_blocks": BLOCKS,
    "destination_variant": tuple(DESTINATION_VARIANTS),
    "size": (1, 511, 4097, images.MIB + 1, 10_000_001),
    "larger_by": (0, 1_000_000),
    "options": ("", "--no-extents", "-S 0", "--allocated", "--request-size 32M", "--request-size 4k", "--synchronous"),
    "ring": RINGS,
}


def check(folder: Path, case: Case) -> None:
    source_blocks, destination_blocks = case["source_blocks"], case["destination_blocks"]
    assert isinstance(source_blocks, Blocks)
    assert isinstance(destination_blocks, Blocks)
    size = round_up(int(str(case["size"])), source_blocks.minimum)
    room = round_up(size + int(str(case["larger_by"])), destination_blocks.minimum)
    source = images.sparse_image(folder / "source", size)
    destination = images.filled_image(folder / "destination", room, OLD)
    filters, args, flags = SOURCE_VARIANTS[str(case["source_variant"])]
    filters, args = (*source_blocks.filters, *filters), (*source_blocks.args, *args)
    with serve("nbdkit-file", source, filters=filters, args=args, flags=flags) as source_uri:
        filters, args, flags = DESTINATION_VARIANTS[str(case["destination_variant"])]
        filters, args = (*destination_blocks.filters, *filters), (*destination_blocks.args, *args)
        with serve("nbdkit-file", destination, filters=filters, args=args, flags=flags) as destination_uri:
            options = str(case["options"]).split()
            copy("--ring", str(case["ring"]), "--workers", "2", *options, source_uri, destination_uri).succeeded()
    images.assert_begins_with(destination, source, rest=OLD)


@pytest.mark.parametrize("case", pairwise(FACTORS), ids=name_of)
def test_a_copy_between_odd_servers_is_identical(tmp_path: Path, case: Case) -> None:
    check(tmp_path, case)


# Every combination would be 272,160 copies. The long run takes block sizes, size and ring whole, and pairs of the rest
# in turn.
LONG_FACTORS = {name: FACTORS[name] for name in ("source_blocks", "destination_blocks", "size", "ring")}
LONG_REST = pairwise({name: values for name, values in FACTORS.items() if name not in LONG_FACTORS})
LONG_CASES = [{**case, **LONG_REST[number % len(LONG_REST)]} for number, case in enumerate(product(LONG_FACTORS))]


@pytest.mark.long
@pytest.mark.parametrize("case", LONG_CASES, ids=name_of)
def test_a_copy_between_any_two_odd_servers_is_identical(tmp_path: Path, case: Case) -> None:
    check(tmp_path, case)
