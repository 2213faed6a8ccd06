"""Commands for later (scenario E), and the command log as its readers see it, over gRPC from running services."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from foldline.v1 import command_pb2
from shared.platform.identity import Role
from tests.e2e.conftest import Caller
from tests.support.clients.bank import Bank, deposit, new_id, refused, register, rename, start_registration
from tests.support.system.waiting import eventually

SCHEDULED = command_pb2.COMMAND_STATUS_SCHEDULED
COMPLETED = command_pb2.COMMAND_STATUS_COMPLETED
REJECTED = command_pb2.COMMAND_STATUS_REJECTED
CANCELLED = command_pb2.COMMAND_STATUS_CANCELLED


def later(**more: float) -> datetime:
    """A moment that far from now."""
    return datetime.now(UTC) + timedelta(**more)


async def ended(bank: Bank, command_id: str) -> command_pb2.CommandRecord:
    """The command's row when it has run."""

    async def has_ended() -> command_pb2.CommandRecord | None:
        record = await bank.command(command_id)
        return record if record.receipt.status != SCHEDULED else None

    found = await eventually(has_ended, 20, every_s=0.05)
    assert found is not None
    return found


async def test_scenario_e_tomorrow_is_listed_and_cancelled(bank: Bank) -> None:
    """No event yet, one scheduled entry in the log; cancelled, it never runs."""
    alice, command_id = new_id(), new_id()
    receipt = await bank.schedule(register(alice, "Alice", command_id=command_id), later(days=1))
    assert (receipt.status, receipt.aggregate_id, receipt.events_appended) == (SCHEDULED, alice, 0)
    assert (await refused(bank.stream("person", alice))).reason == "STREAM_NOT_FOUND"
    listed = await bank.list_commands(status=SCHEDULED)
    assert [record.receipt.command_id for record in listed.commands] == [command_id]
    assert listed.count == 1
    assert (await bank.cancel(command_id)).status == CANCELLED
    assert (await bank.cancel(command_id)).status == CANCELLED
    assert (await bank.list_commands(status=SCHEDULED)).count == 0
    assert (await refused(bank.reschedule(command_id, later(days=2)))).reason == "NOT_SCHEDULED"


async def test_scenario_e_a_second_from_now_runs_by_itself(bank: Bank) -> None:
    """It runs once, not before its time, for who scheduled it; the person can be read."""
    alice, command_id = new_id(), new_id()
    due = later(seconds=1)
    await bank.schedule(register(alice, "Alice", command_id=command_id), due)
    record = await ended(bank, command_id)
    assert (record.receipt.status, record.receipt.version, record.user_id) == (COMPLETED, 1, "alice")
    assert record.finished_at.ToDatetime(tzinfo=UTC) >= due
    assert (await bank.person(alice, record.receipt.consistency_token)).name == "Alice"
    assert len(await bank.stream("person", alice)) == 1
    assert (await refused(bank.cancel(command_id))).reason == "NOT_SCHEDULED"


async def test_the_past_runs_now_and_a_repeat_is_one(bank: Bank) -> None:
    """A time that has passed is now; the same id again answers with what became of it."""
    alice = new_id()
    request = register(alice, "Alice")
    command_id = request.options.command_id
    await bank.schedule(request, later(days=-3))
    record = await ended(bank, command_id)
    assert record.receipt.status == COMPLETED
    assert await bank.schedule(request, later(days=1)) == record.receipt
    other = register(alice, "Bob", command_id=command_id)
    assert (await refused(bank.schedule(other, later(days=1)))).reason == "COMMAND_ID_REUSED"


async def test_rescheduled_to_now_it_runs(bank: Bank) -> None:
    """Put from tomorrow to a moment ago."""
    alice = new_id()
    request = register(alice, "Alice")
    await bank.schedule(request, later(days=1))
    assert (await bank.reschedule(request.options.command_id, later(seconds=-1))).status == SCHEDULED
    assert (await ended(bank, request.options.command_id)).receipt.status == COMPLETED


async def test_a_refusal_is_final_and_in_the_log(bank: Bank) -> None:
    """A deposit on an account that is not there: rejected when its time comes, with the decision's reason."""
    request = deposit(new_id(), 5)
    await bank.schedule(request, later(seconds=0.2))
    record = await ended(bank, request.options.command_id)
    assert record.receipt.status == REJECTED
    listed = await bank.list_commands(status=REJECTED)
    assert [found.receipt for found in listed.commands] == [record.receipt]


async def test_a_secret_cannot_be_scheduled(bank: Bank) -> None:
    """The log does not keep the password, so there would be nothing to run."""
    refusal = await refused(bank.schedule(start_registration(new_id(), "alice", "correct horse"), later(days=1)))
    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "HOLDS_A_SECRET")


async def test_nobody_cancels_a_strangers_command(bank: Bank, caller: Caller) -> None:
    """Another user of the tenant does not even see it, nor another tenant; the tenant's administrator may cancel it."""
    request = register(new_id(), "Alice")
    command_id = request.options.command_id
    await caller(user_id="carol", roles=[Role.USER]).schedule(request, later(days=1))
    for stranger in (caller(user_id="bob", roles=[Role.USER]), caller(tenant="other", user_id="carol")):
        for call in (stranger.cancel(command_id), stranger.reschedule(command_id, later()), stranger.command(command_id)):
            assert (await refused(call)).reason == "COMMAND_NOT_FOUND"
        assert (await stranger.list_commands(status=SCHEDULED)).count == 0
    assert (await bank.cancel(command_id)).status == CANCELLED


# The log's readers


async def test_users_see_their_own_and_administrators_all(bank: Bank, caller: Caller) -> None:
    """And nobody asks for another tenant's but an operator."""
    bob = caller(user_id="bob", roles=[Role.USER])
    person, _ = await bank.register("Alice")
    await bob.rename(person, "Bob")
    assert [record.user_id for record in (await bob.list_commands()).commands] == ["bob"]
    assert [record.user_id for record in (await bank.list_commands()).commands] == ["bob", "alice"]
    assert (await refused(bob.list_commands(user_id="alice"))).reason == "ROLE_MISSING"
    assert (await refused(bank.list_commands(tenant="other"))).reason == "ROLE_MISSING"
    tenant = (await bank.list_commands()).commands[0].tenant
    olga = caller(tenant="operators", user_id="olga", roles=[Role.OPERATOR])
    assert (await olga.list_commands(tenant=tenant)).count == 2


async def test_pages_go_on_where_they_ended(bank: Bank) -> None:
    """Five commands in pages of two, newest first, none twice; a token of another filter is refused."""
    person, _ = await bank.register("Alice")
    for number in range(4):
        await bank.rename(person, f"Alice {number}")
    seen: list[int] = []
    token = ""
    for expected in (2, 2, 1):
        page = await bank.list_commands(2, token, aggregate_type="person", aggregate_id=person)
        assert (len(page.commands), page.count) == (expected, 5)
        seen += [record.receipt.version for record in page.commands]
        token = page.next_page_token
    assert (seen, token) == ([5, 4, 3, 2, 1], "")
    first = await bank.list_commands(2)
    assert (await refused(bank.list_commands(2, first.next_page_token, user_id="alice"))).reason == "PAGE_TOKEN_INVALID"


@pytest.mark.parametrize("field", ["received_from", "received_before"])
async def test_a_range_of_time_bounds_the_list(bank: Bank, field: str) -> None:
    """What was received from a moment on, and what was received before it."""
    person, _ = await bank.register("Alice")
    [first] = (await bank.list_commands()).commands
    await bank.call(bank.people.RenamePerson, rename(person, "Alice Cooper"))
    boundary = first.received_at.ToDatetime(tzinfo=UTC) + timedelta(microseconds=1)
    wanted: dict[str, Any] = {field: boundary}
    versions = [record.receipt.version for record in (await bank.list_commands(**wanted)).commands]
    assert versions == ([2] if field == "received_from" else [1])
