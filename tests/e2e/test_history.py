"""What an aggregate is and was, over gRPC."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

from deploy.demo.scenarios import NUMERALS
from foldline.v1 import history_pb2
from shared.platform.identity import Role
from tests.e2e.conftest import Caller
from tests.support.clients.bank import Bank, deposit, item, refused


async def described(bank: Bank, kind: str, key: str) -> history_pb2.DescribeAggregateResponse:
    """How an aggregate is stored."""
    request = history_pb2.DescribeAggregateRequest(aggregate_type=kind, aggregate_id=key)
    return await bank.call(bank.history.DescribeAggregate, request)


async def state(bank: Bank, kind: str, key: str, **when: Any) -> tuple[int, dict[str, Any]]:
    """An aggregate's state, and the version that it is of."""
    request = history_pb2.GetAggregateRequest(aggregate_type=kind, aggregate_id=key, **when)
    answer = await bank.call(bank.history.GetAggregate, request)
    return answer.version, json.loads(answer.state_json)


async def diff(bank: Bank, kind: str, key: str, one: int, other: int) -> list[tuple[str, str, str]]:
    """The fields that differ."""
    request = history_pb2.DiffAggregateRequest(aggregate_type=kind, aggregate_id=key, from_version=one, to_version=other)
    answer = await bank.call(bank.history.DiffAggregate, request)
    return [(change.field, change.from_json, change.to_json) for change in answer.changes]


async def test_a_king_with_twenty_one_names(bank: Bank) -> None:
    """B: 21 events, a snapshot at version 20, and Henry XXI at version 21; every earlier name can be seen."""
    henry, _ = await bank.register("Henry I")
    for numeral in NUMERALS[1:]:
        await bank.rename(henry, f"Henry {numeral}")
    found = await described(bank, "person", henry)
    assert (found.version, list(found.snapshot_versions), found.cached, found.boxed) == (21, [20], True, False)
    events = await bank.stream("person", henry)
    assert found.changed_at == events[-1].recorded_at
    version, now = await state(bank, "person", henry)
    assert (version, now) == (21, {"registered": True, "closed": False, "name": "Henry XXI", "account_ids": []})
    for nth, numeral in enumerate(NUMERALS, 1):
        assert (await state(bank, "person", henry.upper(), version=nth))[1]["name"] == f"Henry {numeral}"
    assert await diff(bank, "person", henry, 2, 21) == [("name", '"Henry II"', '"Henry XXI"')]
    assert await diff(bank, "person", henry, 21, 21) == []


async def test_a_moment_is_the_last_event_at_or_before_it(bank: Bank) -> None:
    """Between two events the first counts; at an event's own time, that event."""
    alice, _ = await bank.register("Alice")
    blue, _ = await bank.open(alice)
    await bank.deposit(blue, 5)
    await bank.deposit(blue, 7)
    stamps = [event.recorded_at for event in await bank.stream("account", blue)]
    for nth, stamp in enumerate(stamps, 1):
        assert (await state(bank, "account", blue, moment=stamp))[0] == nth
    before = stamps[2].ToDatetime() - timedelta(microseconds=1)
    stamps[0].FromDatetime(before)
    version, then = await state(bank, "account", blue, moment=stamps[0])
    assert (version, then["balance_minor"]) == (2, 5)
    stamps[0].FromDatetime(before + timedelta(days=1))
    assert (await state(bank, "account", blue, moment=stamps[0]))[1]["balance_minor"] == 12


async def test_personal_fields_are_for_administrators(bank: Bank, caller: Caller) -> None:
    """A user is told that there is a name, and that it changed, but not which."""
    alice, _ = await bank.register("Alice O'Wonderland")
    await bank.rename(alice, "Alice Cooper")
    for roles, shown in (([Role.USER], False), ([Role.TENANT_ADMIN], True), ([Role.OPERATOR], True)):
        asker = caller(user_id="bob", roles=roles)
        request = history_pb2.GetAggregateRequest(aggregate_type="person", aggregate_id=alice)
        answer = await asker.call(asker.history.GetAggregate, request)
        assert ("Cooper" in answer.state_json, list(answer.hidden_fields)) == (shown, [] if shown else ["name"])
        [change] = await diff(asker, "person", alice, 1, 2)
        assert change == (("name", '"Alice O\'Wonderland"', '"Alice Cooper"') if shown else ("name", "", ""))


async def test_an_aggregate_that_is_longer_than_a_page(bank: Bank) -> None:
    """Six hundred deposits: read in pages, at a version before the snapshot and after it."""
    alice, _ = await bank.register("Alice")
    blue, _ = await bank.open(alice)
    for _ in range(3):
        await bank.batch(*(item(deposit(blue, 1)) for _ in range(200)))
    assert list((await described(bank, "account", blue)).snapshot_versions) == [600]
    assert (await state(bank, "account", blue, version=599))[1]["balance_minor"] == 598
    assert (await state(bank, "account", blue))[1]["balance_minor"] == 600


async def test_a_state_is_read_with_the_rights_to_its_events(caller: Caller) -> None:
    """The state of the switches of overrides too: an administrator's business."""
    told = await refused(described(caller(roles=[Role.USER]), "overrides", "overrides"))
    assert told.reason == "ROLE_MISSING"
