"""The controls of tests.support.checks.invariants: each check must fail on a picture in which one thing is wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from bank.v1 import account_pb2, transfer_pb2, user_pb2
from tests.support.checks.invariants import Acknowledged, Picture, all_have_ended, check, look
from tests.support.clients.bank import Bank, refused, withdraw
from tests.support.system.stack import Stack


@pytest.fixture
async def told(insider: Bank, tenant: str) -> list[Acknowledged]:
    """What a caller was told of a little of everything, at the end of the line."""
    alice, _ = await insider.register("Alice")
    blue, _ = await insider.open(alice)
    red, _ = await insider.open(alice, name="red")
    ice, _ = await insider.open(alice, name="ice")
    await insider.deposit(red, 9)
    await insider.freeze(ice)
    for target in (blue, ice):
        await insider.ended_transfer(await insider.transfer(red, target, 4))
    for login in ("Bill", "bill"):
        await insider.ended_registration(await insider.register_user(login, "the secret of Bill"))
    await insider.freeze(blue)
    await insider.unfreeze(blue)
    receipts = [await insider.deposit(blue, 7), await insider.withdraw(blue, 3), await insider.rename(alice, "Alice Cooper")]
    too_much = withdraw(blue, 100)
    assert (await refused(insider.call(insider.accounts.WithdrawMoney, too_much))).reason == "INSUFFICIENT_FUNDS"
    refusal = Acknowledged(tenant, too_much.options.command_id, reason="INSUFFICIENT_FUNDS")
    return [*(Acknowledged(tenant, receipt.command_id, receipt) for receipt in receipts), refusal]


def lose_the_last_event(picture: Picture) -> None:
    """The line is shorter than what is stored."""
    picture.line.pop()


def lose_an_event(picture: Picture) -> None:
    """The line has a gap."""
    del picture.line[-3]


def hide_an_event_from_read_all(picture: Picture) -> None:
    """ReadAll does not give what is stored."""
    picture.stored.append(picture.stored[-1] + 1)


def repeat_an_event(picture: Picture) -> None:
    """An event comes twice."""
    picture.line.append(picture.line[-1])


def swap_two_events(picture: Picture) -> None:
    """Positions are not in order."""
    picture.line[-1], picture.line[-2] = picture.line[-2], picture.line[-1]


def jump_a_version(picture: Picture) -> None:
    """A stream has a gap."""
    picture.line[-1].version += 1


def make_money(picture: Picture) -> None:
    """A balance is more than what came in."""
    event = account_pb2.MoneyWithdrawn.FromString(picture.line[-2].payload)
    event.balance_after_minor += 1
    picture.line[-2].payload = event.SerializeToString()


def lose_a_command(picture: Picture) -> None:
    """A row of the log is gone."""
    del picture.commands[-1]


def log_a_command_twice(picture: Picture) -> None:
    """A command has two rows."""
    picture.commands.append(picture.commands[-1])


def log_another_position(picture: Picture) -> None:
    """The log says another position than the event has."""
    next(row for row in picture.commands if row["position"] == len(picture.line))["position"] -= 1


def log_a_refusal_with_events(picture: Picture) -> None:
    """A refused command has events."""
    next(row for row in picture.commands if row["position"] == len(picture.line))["status"] = "rejected"


def lose_a_row(picture: Picture) -> None:
    """A movement is not in the tables."""
    picture.tables["movements"].pop()


def show_another_tenants_row(picture: Picture) -> None:
    """An account shows up in a tenant that has no event of it."""
    picture.tables["accounts"].append({**picture.tables["accounts"][-1], "tenant": "somebody-else"})


def show_another_balance(picture: Picture) -> None:
    """A table shows what no event says."""
    picture.tables["accounts"][-1]["balance_minor"] += 1


def show_an_old_name(picture: Picture) -> None:
    """A name is not the last one."""
    picture.tables["people"][-1]["name"] += "?"


def change(picture: Picture, kind: type[Any], change: Callable[[Any], None], which: int = -1) -> None:
    """Changes the content of an event of a kind: the last one, if no other is named."""
    envelope = [event for event in picture.line if event.type == kind.DESCRIPTOR.full_name][which]
    event = kind.FromString(envelope.payload)
    change(event)
    envelope.payload = event.SerializeToString()


def lose_money_under_way(picture: Picture) -> None:
    """Less arrives than left."""

    def less(event: account_pb2.MoneyDeposited) -> None:
        event.amount_minor -= 1
        event.balance_after_minor -= 1

    moved = [event for event in picture.line if event.type == "bank.v1.MoneyDeposited"]
    refund = max(at for at, it in enumerate(moved) if account_pb2.MoneyDeposited.FromString(it.payload).transfer_id)
    change(picture, account_pb2.MoneyDeposited, less, refund)


def refund_nothing(picture: Picture) -> None:
    """A transfer says that its money never left."""

    def say(event: transfer_pb2.TransferFailed) -> None:
        event.compensation = transfer_pb2.COMPENSATION_NOT_NEEDED

    change(picture, transfer_pb2.TransferFailed, say)


def give_a_login_twice(picture: Picture) -> None:
    """Who was refused the login becomes a user all the same."""
    last = [event for event in picture.line if event.type == "bank.v1.UserRegistrationFailed"][-1]
    last.type = "bank.v1.UserRegistrationSucceeded"


def show_a_transfer_as_completed(picture: Picture) -> None:
    """A table shows another end than it had."""
    next(row for row in picture.tables["transfers"] if row["status"] == "failed")["status"] = "completed"


def show_another_login(picture: Picture) -> None:
    """A table shows another login."""
    picture.tables["users"][-1]["login"] += "?"


WRONGS = [
    lose_money_under_way,
    refund_nothing,
    give_a_login_twice,
    show_a_transfer_as_completed,
    show_another_login,
    lose_the_last_event,
    lose_an_event,
    hide_an_event_from_read_all,
    repeat_an_event,
    swap_two_events,
    jump_a_version,
    make_money,
    lose_a_command,
    log_a_command_twice,
    log_another_position,
    log_a_refusal_with_events,
    lose_a_row,
    show_another_tenants_row,
    show_another_balance,
    show_an_old_name,
]


async def test_the_invariants_hold_and_every_wrong_is_seen(shared_stack: Stack, told: list[Acknowledged]) -> None:
    """What a healthy system holds passes; with any one thing wrong it does not."""
    picture = await look(shared_stack)
    check(picture, told)
    unseen = [wrong.__name__ for wrong in WRONGS if not fails(picture, told, wrong)]
    assert unseen == []


async def test_a_lost_or_changed_answer_is_seen(shared_stack: Stack, told: list[Acknowledged]) -> None:
    """An acknowledged command that is not in the log, under another version, or accepted where it was refused."""
    picture = await look(shared_stack)
    first = told[0]
    assert first.receipt is not None
    changed = copy.deepcopy(first.receipt)
    changed.version += 1
    for wrong in (
        Acknowledged(first.tenant, "00000000-0000-4000-8000-000000000000", first.receipt),
        Acknowledged("somebody-else", first.command_id, first.receipt),
        Acknowledged(first.tenant, first.command_id, changed),
        Acknowledged(first.tenant, first.command_id, None, "INSUFFICIENT_FUNDS"),
    ):
        with pytest.raises(AssertionError):
            check(picture, [wrong])


async def test_what_has_not_ended_is_seen(shared_stack: Stack, tenant: str, told: list[Acknowledged]) -> None:
    """A transfer or a registration without an end, and a login that nobody got."""
    line = [event for event in (await look(shared_stack)).line if event.tenant == tenant]
    all_have_ended(line)
    ends = (transfer_pb2.TransferCompleted, transfer_pb2.TransferFailed, user_pb2.UserRegistrationSucceeded)
    for kind in ends:
        with pytest.raises(AssertionError):
            all_have_ended([event for event in line if event.type != kind.DESCRIPTOR.full_name])
    for event in line:
        event.type = event.type.replace("UserRegistrationSucceeded", "UserRegistrationFailed")
    with pytest.raises(AssertionError, match="not exactly one"):
        all_have_ended(line)


def fails(picture: Picture, told: list[Acknowledged], wrong: Callable[[Picture], None]) -> bool:
    """Whether the invariants see what is wrong."""
    doctored = copy.deepcopy(picture)
    wrong(doctored)
    try:
        check(doctored, told)
    except AssertionError:
        return True
    return False
