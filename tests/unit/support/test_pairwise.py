"""The choice of combinations that stands for a whole matrix."""

from __future__ import annotations

import itertools

from support.pairwise import name_of, pairwise, product

FACTORS = {"side": ["left", "right", "both"], "size": [1, 511, 4096], "tcp": [True, False], "ring": ["a", "b", "c"]}


def test_every_pair_of_values_of_two_factors_is_met() -> None:
    cases = pairwise(FACTORS)
    for one, two in itertools.combinations(FACTORS, 2):
        met = {(case[one], case[two]) for case in cases}
        assert met == set(itertools.product(FACTORS[one], FACTORS[two]))


def test_it_is_much_smaller_than_the_product() -> None:
    assert len(product(FACTORS)) == 54
    assert len(pairwise(FACTORS)) <= 15


def test_the_same_factors_give_the_same_cases_in_the_same_order() -> None:
    assert pairwise(FACTORS) == pairwise(FACTORS)


def test_one_factor_alone_gives_no_case_because_it_has_no_pair() -> None:
    assert pairwise({"size": [1, 2]}) == []


def test_a_case_is_named_by_its_values() -> None:
    assert name_of({"side": "left", "size": 511}) == "left-511"
