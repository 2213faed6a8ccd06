"""Shares between tenants: of waiting items, and of the event loop."""

from __future__ import annotations

import asyncio
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from shared.platform.fairness import FairQueue, Turns


def test_one_tenant_alone_gets_everything_in_order() -> None:
    """A share is no count."""
    queue: FairQueue[int] = FairQueue(4)
    for item in range(100):
        queue.put("a", item)
    assert [queue.pop() for _ in range(100)] == list(range(100))
    assert not queue


def test_two_tenants_share_by_cost() -> None:
    """Of two that both want all, each gets half of the commands, however large their groups are."""
    queue: FairQueue[int] = FairQueue(4)
    for _ in range(1000):
        queue.put("small", 1, 1)
    for _ in range(100):
        queue.put("large", 10, 10)
    got: Counter[int] = Counter()
    for _ in range(550):
        cost = queue.pop()
        got[cost] += cost
    assert abs(got[1] - got[10]) <= 14


def test_a_newcomer_waits_for_one_quantum_of_each_other() -> None:
    """A thousand items of two others do not stand before its one."""
    queue: FairQueue[str] = FairQueue(4)
    for nth in range(1000):
        queue.put("a", f"a{nth}")
        queue.put("b", f"b{nth}")
    queue.put("c", "mine")
    assert "mine" in [queue.pop() for _ in range(9)]


def test_what_is_put_back_comes_again_in_the_same_order() -> None:
    """Taking back decisions costs no tenant its place."""
    queue: FairQueue[str] = FairQueue(2)
    for nth in range(4):
        queue.put("a", f"a{nth}", 1)
        queue.put("b", f"b{nth}", 1)
    taken = [queue.pop() for _ in range(6)]
    queue.put_back([(item[0], item, 1) for item in taken])
    rest = [queue.pop() for _ in range(8)]
    for tenant in "ab":
        assert [item for item in rest if item[0] == tenant] == [f"{tenant}{nth}" for nth in range(4)]
    assert not queue


Steps = st.lists(st.one_of(st.tuples(st.sampled_from("abc"), st.integers(1, 40)), st.integers(1, 5)), max_size=60)


@given(quantum=st.integers(1, 20), steps=Steps)
def test_nothing_is_lost_doubled_or_overtakes_within_a_tenant(quantum: int, steps: list[tuple[str, int] | int]) -> None:
    """Whatever is put, taken and put back: each tenant's items come in the order in which that tenant put them."""
    queue: FairQueue[tuple[str, int, int]] = FairQueue(quantum)
    given_, got = dict.fromkeys("abc", 0), dict.fromkeys("abc", 0)
    for step in steps:
        if isinstance(step, tuple):
            tenant, cost = step
            queue.put(tenant, (tenant, given_[tenant], cost), cost)
            given_[tenant] += 1
            continue
        taken = [queue.pop() for _ in range(step) if queue]
        keep = taken[: len(taken) // 2]
        queue.put_back([(item[0], item, item[2]) for item in taken[len(keep) :]])
        for tenant, nth, _ in keep:
            assert nth == got[tenant]
            got[tenant] += 1
    while queue:
        assert queue.first() == queue.first()
        tenant, nth, _ = queue.pop()
        assert nth == got[tenant]
        got[tenant] += 1
    assert got == given_


async def test_many_slices_of_one_tenant_delay_another_by_one_turn() -> None:
    """Sixteen callers with twenty slices each do not stand before the one slice of another tenant."""
    turns, order = Turns(), []

    async def work(tenant: str, slices: int) -> None:
        for _ in range(slices):
            await turns.next(tenant)
            order.append(tenant)

    flood = [asyncio.create_task(work("flood", 20)) for _ in range(16)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    before = len(order)
    await work("other", 1)
    assert len(order) - before <= 3
    flood[0].cancel()
    await asyncio.wait(flood)
    assert len(order) >= 15 * 20 + 1
    await asyncio.wait_for(turns.next("later"), 5)
