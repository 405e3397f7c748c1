"""The table of options, its order, and the rules for block sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdshard.common.errors import BugError
from nbdshard.common.nbd.constants import Option
from nbdshard.common.nbd.export import BlockSizes
from nbdshard.common.nbd.options import (
    HINTS_KEY,
    OPTIONS,
    Goal,
    Negotiation,
    OptionHandler,
    Wishes,
    checked_block_sizes,
    wanted_options,
    with_option,
)
from nbdshard.common.nbd.wire import Malformed


def order(wishes: Wishes, *, structured: bool = True) -> list[int]:
    """The options that would be sent, if the server agreed to structured replies or not."""
    negotiation = Negotiation(wishes)
    sent: list[int] = []
    while (option := wanted_options(OPTIONS, negotiation, sent)) is not None:
        sent.append(option)
        negotiation.structured = structured and Option.STRUCTURED_REPLY in sent
    return sent


def test_options_are_sent_in_the_order_of_the_table() -> None:
    assert order(Wishes()) == [11, 8, 10, 7]
    assert order(Wishes(), structured=False) == [11, 8, 7]
    assert order(Wishes(extended=False, contexts=())) == [8, 7]
    assert order(Wishes(structured=False)) == [7]
    assert order(Wishes(goal=Goal.INFO)) == [11, 8, 10, 6]
    assert order(Wishes(goal=Goal.LIST)) == [3]
    assert order(Wishes(hints=True)) == [11, 8, HINTS_KEY, 10, 7]
    assert order(Wishes(hints=True), structured=False) == [11, 8, 7]


def test_an_option_from_outside_takes_its_place_and_may_replace_one() -> None:
    mine = OptionHandler(Option.LIST_META_CONTEXT, wanted=lambda _: True)
    assert list(with_option(OPTIONS, mine, before=Option.GO)) == [11, 8, HINTS_KEY, 10, 6, 3, 9, 7]
    assert list(with_option(OPTIONS, OptionHandler(3, wanted=lambda _: False), before=Option.GO)) == [
        11,
        8,
        HINTS_KEY,
        10,
        6,
        3,
        7,
    ]
    with pytest.raises(BugError, match="option 99 is not in the table"):
        with_option(OPTIONS, mine, before=99)


POWERS = st.integers(0, 17).map(lambda exponent: 1 << exponent)


@given(POWERS, POWERS, st.integers(1, 1 << 20))
def test_block_sizes_that_keep_the_rules_of_the_spec_are_taken(minimum: int, preferred: int, factor: int) -> None:
    lawful = minimum <= 1 << 16 and preferred >= max(512, minimum)
    try:
        sizes = checked_block_sizes(minimum, preferred, minimum * factor)
    except Malformed:
        assert not lawful
    else:
        assert lawful
        assert sizes == BlockSizes(minimum, preferred, minimum * factor, advertised=True)


def test_no_limit_is_a_limit_that_need_not_be_a_multiple() -> None:
    assert checked_block_sizes(4096, 4096, 0xFFFFFFFF).maximum == 0xFFFFFFFF


def test_the_result_cannot_be_changed() -> None:
    negotiation = Negotiation(Wishes(), contexts={"base:allocation": 1})
    negotiation.set_export(512, 1)
    export = negotiation.export()
    with pytest.raises(TypeError):
        export.contexts["x:y"] = 2  # type: ignore[index]
