"""`foldline process pause|resume|skip|retry-all|acknowledge|parked`, as an operator types them, and what others see of it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest

from bank.v1 import account_pb2, transfer_pb2
from deploy.local.system import SAGA
from foldline.v1 import process_pb2
from shared.platform.identity import Role
from tests.e2e.conftest import Foldline, desk_of, foldline_of
from tests.e2e.test_probes import says
from tests.support.clients.bank import Bank, channels, item, options
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually


@pytest.fixture
async def bank(stack: Stack) -> AsyncIterator[Bank]:
    """A caller of a system of its own: a type of process is paused for all tenants."""
    async with channels(stack) as (write, read):
        yield Bank(write, read, stack.token("acme", "alice"))


@pytest.fixture
def foldline(stack: Stack, tmp_path: Path) -> Foldline:
    """Runs the command as an operator, or as another one: `foldline(..., user="otto")`."""
    return foldline_of(stack, "acme", tmp_path)


async def two_accounts(bank: Bank) -> tuple[str, str]:
    """Two accounts with 100 each."""
    owner, _ = await bank.register("Bill")
    blue, _ = await bank.open(owner)
    red, _ = await bank.open(owner)
    await bank.deposit(blue, 100_00)
    await bank.deposit(red, 100_00)
    return blue, red


@pytest.mark.long
async def test_a_paused_type_is_seen_everywhere_and_goes_on_when_it_is_resumed(
    stack: Stack, bank: Bank, foldline: Foldline
) -> None:
    """The transfer waits; `foldline status` exits with 1, readiness says why; then the path that it took is drawn."""
    accounts = await two_accounts(bank)
    code, paused = foldline("process", "pause", "transfer", "--reason", "wrong amounts")
    assert (code, paused["type"], paused["reason"], paused["paused_by"]) == (0, "transfer", "wrong amounts", "olga")
    transfer = await bank.transfer(*accounts, 69_00)
    name = ("transfer", transfer[0])
    async with desk_of(stack) as desk:

        async def waits() -> bool:
            found = await desk.find(tenant="acme", status=process_pb2.PROCESS_STATUS_RUNNING)
            return [it.phase for it in found] == ["debiting"]

        await eventually(waits)
    code, text = foldline("status", output="text")
    assert (code, "transfer is paused by olga: wrong amounts" in text) == (1, True)
    await eventually(lambda: says(stack, SAGA, {"ready": False, "waits_for": {"processes": "processes: paused transfer"}}))
    code, shown = foldline("process", "show", *name)
    assert [(it["step"], it["tries"]) for it in shown["commands"]] == [("debit", 0)]
    code, checked = foldline("process", "check")
    assert (code, checked["checked"], checked["replayed"], checked["mismatches"]) == (0, 1, 1, [])
    code, text = foldline("process", "check", "--histories", "0", output="text")
    assert (code, text.startswith("1 processes in flight, 0 histories replayed, 0 with a mismatch")) == (0, True)
    code, refused = foldline("process", "pause", "transfer", "--reason", "again")
    assert (code, refused["error"]["reason"]) == (1, "ALREADY_PAUSED")

    code, was = foldline("process", "resume", "transfer")
    assert (code, was["paused_by"]) == (0, "olga")
    summary = await bank.ended_transfer(transfer)
    assert [step.name for step in summary.steps] == ["started", "debited", "credited", "completed"]
    async with desk_of(stack) as desk:
        await desk.ended("acme", *name)
    assert foldline("status")[0] == 0
    code, text = foldline("process", "show", *name, output="text")
    assert re.findall(r"\w+(?: \w+)? ━━▶ ● \w+", text) == [
        "TransferStarted ━━▶ ● debiting",
        "debit accepted ━━▶ ● crediting",
        "credit accepted ━━▶ ● completing",
        "complete accepted ━━▶ ● completed",
    ]


@pytest.mark.long
async def test_money_in_suspense_is_acknowledged_by_two_people(stack: Stack, bank: Bank, foldline: Foldline) -> None:
    """Both accounts are frozen in the middle: one says how it was settled, another confirms, and nobody need look any more."""
    blue, red = await two_accounts(bank)
    transfer = await stranded(stack, foldline, bank, blue, red)
    name = ("transfer", transfer)
    code, listed = foldline("process", "list", "--attention")
    assert (code, [(it["process_id"], it["attention"]) for it in listed]) == (0, [(transfer, "MONEY_IN_SUSPENSE")])
    code, refused = foldline("process", "skip", *name, "fail", "--reason", "late")
    assert (code, refused["error"]["reason"]) == (1, "PROCESS_ENDED")
    words = ("process", "acknowledge", "ask", *name, "MONEY_IN_SUSPENSE", "--resolution", "paid out by cheque 17")
    code, asked = foldline(*words)
    assert (code, asked["asked_by"], asked["resolution"]) == (0, "olga", "paid out by cheque 17")
    for user, again, reason in (
        ("olga", ("process", "acknowledge", "confirm", *name), "SAME_PERSON"),
        ("otto", words, "ALREADY_ASKED"),
    ):
        code, refused = foldline(*again, user=user)
        assert (code, refused["error"]["reason"]) == (1, reason)
    code, text = foldline("process", "show", *name, output="text")
    assert (code, "olga asks to acknowledge MONEY_IN_SUSPENSE: paid out by cheque 17" in text) == (0, True)
    code, process = foldline("process", "acknowledge", "confirm", *name, user="otto")
    assert (code, process["attention"]) == (0, "")
    assert foldline("process", "list", "--attention") == (0, [])
    last: tuple[tuple[tuple[str, ...], str], ...] = (
        (("process", "acknowledge", "confirm", *name), "NOT_ASKED"),
        (("process", "acknowledge", "reject", *name, "--reason", "no"), "NOT_ASKED"),
        (words, "NOTHING_TO_ACKNOWLEDGE"),
    )
    for more, reason in last:
        code, refused = foldline(*more, user="otto")
        assert (code, refused["error"]["reason"]) == (1, reason)
    code, shown = foldline("process", "show", *name)
    assert [(it["name"], it["id"], it["note"]) for it in shown["history"] if it["kind"] == "operator"] == [
        ("ask", "olga", "MONEY_IN_SUSPENSE: paid out by cheque 17"),
        ("confirm", "otto", "MONEY_IN_SUSPENSE: paid out by cheque 17"),
    ]


async def stranded(stack: Stack, foldline: Foldline, bank: Bank, blue: str, red: str) -> str:
    """A transfer whose money nobody takes: both accounts are frozen while it is paused behind its debit."""
    foldline("process", "pause", "transfer", "--reason", "to freeze in the middle")
    transfer_id, receipt = await bank.transfer(blue, red, 69_00)
    [first] = await bank.stream("transfer", transfer_id)
    started = transfer_pb2.TransferStarted.FromString(first.payload)
    debit = account_pb2.WithdrawMoneyRequest(
        options=options(started.debit_command_id, correlation_id=receipt.command_id),
        account_id=blue,
        amount_minor=69_00,
        currency="USD",
        transfer_id=transfer_id,
        counterparty_account_id=red,
        not_after_ms=started.debit_not_after_ms,
    )
    async with channels(stack) as (write, read):
        process = Bank(write, read, stack.token("foldline", "saga", [Role.READER, Role.PROCESS]))
        await process.batch(item(debit, tenant="acme", on_behalf_of="alice", causation_id=first.event_id))
    await bank.freeze(blue)
    await bank.freeze(red)
    foldline("process", "resume", "transfer")
    await bank.ended_transfer((transfer_id, receipt), 60)
    async with desk_of(stack) as desk:
        await desk.ended("acme", "transfer", transfer_id)
    return transfer_id


async def test_nothing_is_parked_and_nothing_to_retry(foldline: Foldline) -> None:
    """Empty lists and totals; what is not there is refused by name."""
    assert foldline("process", "parked", "list") == (0, [])
    assert foldline("process", "retry-all", "--type", "transfer") == (0, {"retried": 0, "parked_again": 0})
    code, refused = foldline("process", "parked", "retry", "account", str(uuid4()))
    assert (code, refused["error"]["reason"]) == (1, "PARKED_NOT_FOUND")
    code, refused = foldline("process", "parked", "discard", "account", str(uuid4()), "--position", "1")
    assert (code, refused["error"]["reason"]) == (1, "PARKED_NOT_FOUND")
