"""The memory of all connections: nobody takes it all, everybody's turn comes, and who does nothing with it is cut."""

from __future__ import annotations

import pytest

from nbdshard.common.errors import BugError
from nbdshard.common.limits import SERVED_BYTES_PER_SECOND_MIN, SERVED_STALL_SECONDS
from nbdshard.server.budget import Budget, Share


class Party:
    """A share, and what it was told."""

    def __init__(self, budget: Budget) -> None:
        self.told: list[str] = []
        self.share: Share = budget.join(lambda: self.told.append("wake"), lambda: self.told.append("cut"))


def taken(share: Share, each: int) -> int:
    """What it gets if it takes as much as it can, `each` bytes at a time."""
    while share.take(each):
        pass
    return share.held


def test_who_takes_all_it_can_leaves_as_much_for_others() -> None:
    budget = Budget(1024, 0)
    assert [taken(Party(budget).share, 1) for _ in range(3)] == [512, 256, 128]
    assert budget.free == 128


def test_a_large_request_waits_for_its_turn_and_nobody_gets_in_between() -> None:
    budget = Budget(1000, 0)
    small, large, late = Party(budget), Party(budget), Party(budget)
    assert small.share.take(100)
    assert not large.share.take(1000)
    assert not small.share.take(1)
    assert not late.share.take(1)
    small.share.give(100)
    assert (small.told, large.told, late.told) == (["wake"], ["wake"], ["wake"])
    assert not late.share.take(1)
    assert large.share.take(1000)
    large.share.give(1000)
    assert late.share.take(1)


def test_turns_come_in_order() -> None:
    budget = Budget(1000, 0)
    holder, first, second = Party(budget), Party(budget), Party(budget)
    assert holder.share.take(500)
    assert not first.share.take(900)
    assert not second.share.take(800)
    holder.share.give(500)
    assert not second.share.take(800)
    assert first.share.take(900)
    first.share.give(900)
    assert second.share.take(800)


def test_who_leaves_gives_its_turn_and_its_memory_to_others() -> None:
    budget = Budget(1000, 0)
    holder, first, second = Party(budget), Party(budget), Party(budget)
    assert holder.share.take(400)
    assert not first.share.take(900)
    assert not second.share.take(900)
    first.share.leave()
    holder.share.leave()
    assert second.told[-1] == "wake"
    assert second.share.take(900)


def test_small_requests_go_on_out_of_the_reserve_while_a_large_one_waits() -> None:
    budget = Budget(1000, 64)
    holder, large, small = Party(budget), Party(budget), Party(budget)
    assert holder.share.take(500)
    assert not large.share.take(1000)
    assert small.share.take(4)
    assert small.share.take(20)
    assert not small.share.take(20)  # which would be more than what is left of it
    small.share.give(24)
    assert small.share.take(20)
    small.share.leave()
    holder.share.leave()
    assert large.share.take(1000)
    large.share.give(1000)
    assert budget.free == 1064


def test_who_holds_memory_and_does_nothing_is_cut_off_where_others_wait() -> None:
    budget = Budget(1000, 0)
    idle, busy, idle_without, waits = Party(budget), Party(budget), Party(budget), Party(budget)
    assert idle.share.take(100)
    assert busy.share.take(100)
    busy.share.moved_at = busy.share.got_on_at = 10.0
    waits.share.cut_stalled(SERVED_STALL_SECONDS + 5)
    assert idle.told == []  # nobody waits
    assert not waits.share.take(1000)
    waits.share.cut_stalled(SERVED_STALL_SECONDS - 1)
    assert idle.told == []
    waits.share.cut_stalled(SERVED_STALL_SECONDS + 5)
    assert (idle.told, busy.told, idle_without.told, waits.told) == (["cut"], [], [], [])


def test_who_moves_a_byte_now_and_then_is_cut_off_all_the_same() -> None:
    budget = Budget(100 * SERVED_BYTES_PER_SECOND_MIN, 0)
    trickling, waits = Party(budget), Party(budget)
    assert trickling.share.take(20 * SERVED_BYTES_PER_SECOND_MIN)
    assert not waits.share.take(90 * SERVED_BYTES_PER_SECOND_MIN)
    trickling.share.moved_at = SERVED_STALL_SECONDS + 20
    waits.share.cut_stalled(SERVED_STALL_SECONDS + 20)
    assert trickling.told == []  # it may have so long for so much
    waits.share.cut_stalled(SERVED_STALL_SECONDS + 21)
    assert trickling.told == ["cut"]


def test_more_given_back_than_taken_is_a_fault_of_ours() -> None:
    share = Party(Budget()).share
    assert share.take(1)
    with pytest.raises(BugError, match="2 bytes given back of 1"):
        share.give(2)
