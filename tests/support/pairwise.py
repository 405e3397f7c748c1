"""A small choice of combinations in which every pair of values of any two factors is met at least once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

Case = dict[str, object]
Pair = tuple[tuple[str, int], tuple[str, int]]

CANDIDATES = 40  # cases drawn for each one taken; more make the choice a little smaller, and slower to find


def pairwise(factors: Mapping[str, Sequence[object]], seed: int = 1) -> list[Case]:
    """Cases (one value for each factor), the same for the same factors and seed. Greedy, so not the fewest possible."""
    drawing = random.Random(seed)
    names = list(factors)
    missing = _all_pairs(factors)
    chosen: list[Case] = []
    while missing:
        best = max(
            (_candidate(factors, names, missing, drawing) for _ in range(CANDIDATES)),
            key=lambda indexes: len(_pairs_of(indexes) & missing),
        )
        missing -= _pairs_of(best)
        chosen.append({name: factors[name][best[name]] for name in names})
    return chosen


def product(factors: Mapping[str, Sequence[object]]) -> list[Case]:
    """Every combination."""
    names = list(factors)
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*factors.values())]


def name_of(case: Case) -> str:
    """A readable test id: the values, joined by dashes."""
    return "-".join(str(value) for value in case.values())


def _all_pairs(factors: Mapping[str, Sequence[object]]) -> set[Pair]:
    pairs: set[Pair] = set()
    for one, two in itertools.combinations(factors, 2):
        for i, j in itertools.product(range(len(factors[one])), range(len(factors[two]))):
            pairs.add(((one, i), (two, j)))
    return pairs


def _pairs_of(indexes: Mapping[str, int]) -> set[Pair]:
    return set(itertools.combinations(indexes.items(), 2))


def _candidate(
    factors: Mapping[str, Sequence[object]], names: list[str], missing: set[Pair], drawing: random.Random
) -> dict[str, int]:
    """A case that holds one missing pair, the rest drawn. In the order of `names`, as pairs are."""
    seed_pair = dict(drawing.choice(sorted(missing)))
    return {name: seed_pair.get(name, drawing.randrange(len(factors[name]))) for name in names}
