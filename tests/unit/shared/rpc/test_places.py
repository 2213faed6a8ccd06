"""Places of calls: tenants share, processes have their own."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.folds.errors import OverLimit
from shared.platform.identity import Identity, Role
from shared.rpc.places import OpenPlaces, Place, Places

USER, PROCESS = frozenset({Role.USER}), frozenset({Role.PROCESS})


def of(tenant: str, roles: frozenset[Role] = USER) -> Identity:
    """A caller of a tenant."""
    return Identity(tenant=tenant, user_id="alice", roles=roles)


async def hold(places: Places, identity: Identity) -> tuple[asyncio.Task[str], Place]:
    """A call that holds a place until it is ended; its result is the reason."""
    taken: asyncio.Future[Place] = asyncio.get_running_loop().create_future()

    async def call() -> str:
        try:
            place = places.take(identity)
        except OverLimit as refusal:
            taken.set_exception(refusal)
            return ""
        taken.set_result(place)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as error:
            places.give_back(place)
            refused = place.answer(error)
            if refused is None:
                raise
            return refused.reason
        return "not reached"

    task = asyncio.create_task(call())
    return task, await taken


async def end(*tasks: asyncio.Task[str]) -> None:
    """Cancels what is left, as callers do who go away."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_one_tenant_alone_may_use_all_places() -> None:
    """And is refused by name when it has them all."""
    places = Places(4)
    held = [await hold(places, of("acme")) for _ in range(4)]
    with pytest.raises(OverLimit, match="as many of your calls") as refused:
        await hold(places, of("acme"))
    assert refused.value.reason == "TOO_MANY_CALLS"
    await end(*[task for task, _ in held])
    task, _ = await hold(places, of("acme"))
    await end(task)


async def test_a_tenant_below_its_share_gets_the_oldest_place_of_the_greediest() -> None:
    """Two of four each; the third of the newcomer is refused."""
    places = Places(4)
    greedy = [await hold(places, of("acme")) for _ in range(4)]
    modest = [await hold(places, of("umbrella")) for _ in range(2)]
    assert [await task for task, _ in greedy[:2]] == ["CALL_GAVE_WAY"] * 2
    assert not any(task.done() for task, _ in (*greedy[2:], *modest))
    for tenant in ("acme", "umbrella"):
        with pytest.raises(OverLimit):
            await hold(places, of(tenant))
    third = await hold(places, of("initech"))
    await end(*[task for task, _ in (*greedy, *modest, third)])


async def test_processes_have_places_that_no_tenant_can_take() -> None:
    """And they cannot take those of tenants, nor be sent away."""
    places = Places(2)
    held = [await hold(places, of("acme")) for _ in range(2)]
    ours = [await hold(places, of("foldline", PROCESS)) for _ in range(10)]
    with pytest.raises(OverLimit):
        await hold(places, of("foldline", PROCESS))
    assert not any(task.done() for task, _ in (*held, *ours))
    await end(*[task for task, _ in (*held, *ours)])


async def test_a_caller_who_left_meanwhile_is_not_answered() -> None:
    """Cancelled by us and by gRPC at the same moment: the call ends as cancelled."""
    places = Places(1)
    task, _ = await hold(places, of("acme"))
    places.take(of("umbrella"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_call_whose_request_does_not_come_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only that one: a call whose request has come may take longer."""
    monkeypatch.setattr("shared.rpc.places.REQUEST_WITHIN_S", 0.2)
    places = Places(4)
    ending = asyncio.create_task(places.end_overdue())
    silent, its_place = await hold(places, of("acme"))
    places.awaits_request(its_place)
    served, other_place = await hold(places, of("acme"))
    places.awaits_request(other_place)
    places.has_request(other_place)
    async with asyncio.timeout(30):
        assert await silent == "REQUEST_OVERDUE"
    assert not served.done()
    ending.cancel()
    await end(served)


async def test_of_calls_without_a_token_the_oldest_gives_way() -> None:
    """A new check of health is always served."""
    places = OpenPlaces(2)
    reasons: list[str] = []

    async def watch() -> None:
        place = places.take()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as error:
            refusal = place.answer(error)
            reasons.append(refusal.reason if refusal else "")
        finally:
            places.give_back(place)

    watching = []
    for _ in range(3):
        watching.append(asyncio.create_task(watch()))
        await asyncio.sleep(0)
    await watching[0]
    assert reasons == ["CALL_GAVE_WAY"]
    for task in watching[1:]:
        task.cancel()
    await asyncio.gather(*watching)
    assert reasons == ["CALL_GAVE_WAY", "", ""]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=40), st.integers(1, 9))
def test_places_are_never_more_than_there_are(steps: list[tuple[str, bool]], total: int) -> None:
    """Whatever is taken and given back: no tenant below its share is refused, and none holds more than all."""

    async def play() -> None:
        places, held = Places(total), dict[str, list[tuple[asyncio.Task[str], Place]]]()
        for tenant, takes in steps:
            mine = held.setdefault(tenant, [])
            if not takes:
                if mine:
                    await end(mine.pop()[0])
                continue
            before = Counter({name: sum(not task.done() for task, _ in calls) for name, calls in held.items()})
            try:
                mine.append(await hold(places, of(tenant)))
            except OverLimit:
                present = len({name for name, count in before.items() if count} | {tenant})
                assert before[tenant] >= max(total // present, 1)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert sum(not task.done() for calls in held.values() for task, _ in calls) <= total
        await end(*[task for calls in held.values() for task, _ in calls])
        for _ in range(total):
            with suppress(OverLimit):
                task, _place = await hold(places, of("last"))
                held.setdefault("last", []).append((task, _place))
        assert len(held.get("last", ())) == total, "all places are free again"
        await end(*[task for task, _ in held["last"]])

    asyncio.run(play())
