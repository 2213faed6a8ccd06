"""Transfers: from start to end through all services, whatever their ends allow; and what an operator sees of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import pytest

from bank.v1 import account_pb2, account_query_pb2, transfer_pb2, transfer_query_pb2
from deploy.local.system import SAGA
from foldline.v1 import command_pb2, process_pb2
from shared.folds.ids import step_id
from shared.platform.identity import Role
from tests.e2e.conftest import Caller, ProcessAdmin, desk_of
from tests.support.clients.bank import (
    Bank,
    channels,
    close,
    deposit,
    item,
    new_id,
    options,
    packed,
    read_status,
    refused,
    start_transfer,
    withdraw,
)
from tests.support.system.stack import Stack

COMPLETED = transfer_query_pb2.TRANSFER_STATUS_COMPLETED
FAILED = transfer_query_pb2.TRANSFER_STATUS_FAILED


async def blue_and_red(bank: Bank, blue_minor: int = 100_00, red_minor: int = 100_00) -> tuple[str, str]:
    """Bill's blue account and Ted's red one."""
    (bill, _), (ted, _) = await bank.register("Bill"), await bank.register("Ted")
    (blue, _), (red, _) = await bank.open(bill, name="blue"), await bank.open(ted, name="red")
    for account, amount_minor in ((blue, blue_minor), (red, red_minor)):
        if amount_minor:
            await bank.deposit(account, amount_minor)
    return blue, red


def steps(transfer: transfer_query_pb2.TransferSummary) -> list[str]:
    """The steps of a transfer, when each has its time and they are in order."""
    moments = [step.happened_at.ToNanoseconds() for step in transfer.steps]
    assert all(moments)
    assert moments == sorted(moments)
    assert (moments[0], moments[-1]) == (transfer.started_at.ToNanoseconds(), transfer.ended_at.ToNanoseconds())
    return [step.name for step in transfer.steps]


def ended(transfer: transfer_query_pb2.TransferSummary) -> tuple[str, str, str]:
    """How it ended: status, reason, compensation."""
    status = transfer_query_pb2.TransferStatus.Name(transfer.status).removeprefix("TRANSFER_STATUS_")
    return status, transfer.reason, transfer_pb2.Compensation.Name(transfer.compensation).removeprefix("COMPENSATION_")


async def balances(bank: Bank, *accounts: str) -> list[int]:
    """What is on accounts, by their tables."""
    return [(await bank.account_now(account)).balance_minor for account in accounts]


# How it ends


async def test_money_is_transferred(bank: Bank) -> None:
    """F: blue 31, red 169, `Completed`, four steps in their order; both statements name the transfer and the other end."""
    blue, red = await blue_and_red(bank)
    transfer_id, receipt = await bank.transfer(blue, red, 69_00)
    assert (receipt.aggregate_type, receipt.aggregate_id, receipt.version, receipt.events_appended) == (
        "transfer", transfer_id, 1, 1,
    )  # fmt: skip
    transfer = await bank.ended_transfer((transfer_id, receipt))
    assert ended(transfer) == ("COMPLETED", "", "UNSPECIFIED")
    assert steps(transfer) == ["started", "debited", "credited", "completed"]
    assert (transfer.from_account_id, transfer.to_account_id, transfer.amount_minor, transfer.currency) == (
        blue, red, 69_00, "USD",
    )  # fmt: skip
    assert await balances(bank, blue, red) == [31_00, 169_00]
    for account, other, amount_minor in ((blue, red, -69_00), (red, blue, 69_00)):
        request = account_query_pb2.ListMovementsRequest(account_id=account, page_size=1)
        [movement] = (await bank.call(bank.account_queries.ListMovements, request)).movements
        assert (movement.amount_minor, movement.transfer_id, movement.counterparty_account_id) == (
            amount_minor, transfer_id, other,
        )  # fmt: skip


Prepare = Callable[[Bank, str, str], Awaitable[object]]


async def _nothing(bank: Bank, blue: str, red: str) -> None: ...


# (what is done before, what is on blue, reason, compensation, steps after `started`)
REFUSED: dict[str, tuple[Prepare, int, str, str, list[str]]] = {
    "a frozen target": (
        lambda bank, _, red: bank.freeze(red), 100_00, "ACCOUNT_FROZEN", "REFUNDED", ["debited", "refunded", "failed"],
    ),
    "a closed target": (
        lambda bank, _, red: bank.close(red), 100_00, "ACCOUNT_CLOSED", "REFUNDED", ["debited", "refunded", "failed"],
    ),
    "a target that is full": (
        lambda bank, _, red: bank.deposit(red, 2**63 - 1), 100_00, "BALANCE_OVERFLOW", "REFUNDED",
        ["debited", "refunded", "failed"],
    ),
    "a frozen source": (lambda bank, blue, _: bank.freeze(blue), 100_00, "ACCOUNT_FROZEN", "NOT_NEEDED", ["failed"]),
    "a closed source": (lambda bank, blue, _: bank.close(blue), 0, "ACCOUNT_CLOSED", "NOT_NEEDED", ["failed"]),
    "a source with less": (_nothing, 68_99, "INSUFFICIENT_FUNDS", "NOT_NEEDED", ["failed"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
async def test_a_transfer_that_cannot_be_made_fails_and_leaves_the_money(bank: Bank, name: str) -> None:
    """I: `Failed` with the reason and what became of the money, the money where it was, and nothing on the target."""
    prepare, blue_minor, reason, compensation, later = REFUSED[name]
    blue, red = await blue_and_red(bank, blue_minor, 0)
    await prepare(bank, blue, red)
    before = (await bank.stream("account", red))[-1].version
    transfer = await bank.ended_transfer(await bank.transfer(blue, red, 69_00))
    assert ended(transfer) == ("FAILED", reason, compensation)
    assert steps(transfer) == ["started", *later]
    assert await balances(bank, blue) == [blue_minor]
    assert (await bank.stream("account", red))[-1].version == before


@pytest.mark.timeout(240)
async def test_money_that_nobody_takes_waits_on_the_suspense_account(stack: Stack) -> None:
    """The refund is refused too: the money is on the tenant's suspense account, and the process on the operators' list.

    How it comes to that: the saga service dies when its debit was carried out, and before it is back, both ends are frozen.
    The debit that it sends again, under the id that the transfer's first event fixed, is answered as the first was.
    """
    async with channels(stack) as (write, read):
        bank = Bank(write, read, stack.token("acme"))
        process = Bank(write, read, stack.token("foldline", "saga", [Role.READER, Role.PROCESS]))
        blue, red = await blue_and_red(bank, red_minor=0)
        await stack.kill9(SAGA)
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
        [debited] = await process.batch(item(debit, tenant="acme", on_behalf_of="alice", causation_id=first.event_id))
        assert debited.status == command_pb2.COMMAND_STATUS_COMPLETED, debited
        await bank.freeze(blue)
        await bank.freeze(red)
        stack.start(SAGA)
        await stack.wait_ready(SAGA)

        transfer = await bank.ended_transfer((transfer_id, receipt), 60)
        assert ended(transfer) == ("FAILED", "ACCOUNT_FROZEN", "SUSPENDED")
        assert steps(transfer) == ["started", "debited", "suspended", "failed"]
        assert await balances(bank, blue, red) == [31_00, 0]
        [waiting] = await bank.stream("suspense", started.suspense_id)
        suspended = account_pb2.MoneySuspended.FromString(waiting.payload)
        assert (suspended.transfer_id, suspended.amount_minor, suspended.balance_after_minor) == (transfer_id, 69_00, 69_00)
        async with desk_of(stack) as desk:
            told = await desk.ended("acme", "transfer", transfer_id)
            assert (told.process.attention, told.process.phase) == ("MONEY_IN_SUSPENSE", "failed")
            assert [entry.step for entry in told.history if entry.kind == "answer"] == [
                "debit", "credit", "refund", "suspend", "fail",
            ]  # fmt: skip
            assert [process.process_id for process in await desk.find(attention=True)] == [transfer_id]


# How it is refused at once


async def test_refusals_of_the_start(caller: Caller, bank: Bank) -> None:
    """Each named; nothing is left of the transfer, and the ends keep their money."""
    blue, red = await blue_and_red(bank)
    owner = (await bank.account(blue, (await bank.deposit(blue, 1)).consistency_token)).owner_id
    euros, _ = await bank.open(owner, "EUR", name="euros")
    other = caller(tenant=f"other-{new_id()[:8]}")
    _, theirs = await blue_and_red(other)
    transfer_id = new_id()

    async def told(source: str, target: str, amount_minor: int = 1, currency: str = "USD") -> tuple[str, str, tuple[str, ...]]:
        answer = await refused(bank.transfer(source, target, amount_minor, currency, transfer_id))
        return answer.code, answer.reason, answer.fields

    not_found, mismatch = ("NOT_FOUND", "ACCOUNT_NOT_FOUND", ()), ("FAILED_PRECONDITION", "CURRENCY_MISMATCH", ())
    assert await told(blue, blue) == ("FAILED_PRECONDITION", "SAME_ACCOUNT", ())
    assert await told(blue, blue.upper()) == ("FAILED_PRECONDITION", "SAME_ACCOUNT", ())
    assert await told(blue, theirs) == not_found
    assert await told(theirs, blue) == not_found
    assert await told(blue, new_id()) == not_found
    assert await told(blue, euros) == mismatch
    assert await told(euros, blue) == mismatch
    assert await told(blue, red, 1, "EUR") == mismatch
    for wrong in (0, -1, -(2**63)):
        assert await told(blue, red, wrong) == ("INVALID_ARGUMENT", "INVALID_REQUEST", ("amount_minor",))
    assert await told("blue", red) == ("INVALID_ARGUMENT", "INVALID_REQUEST", ("from_account_id",))
    assert await told(blue, red, 1, "DOLLARS") == ("INVALID_ARGUMENT", "INVALID_REQUEST", ("currency",))
    assert (await refused(bank.stream("transfer", transfer_id))).reason == "STREAM_NOT_FOUND"

    transfer = await bank.ended_transfer(await bank.transfer(blue, red, 1, transfer_id=transfer_id))
    assert transfer.status == COMPLETED
    assert await told(blue, blue) == ("ALREADY_EXISTS", "TRANSFER_ALREADY_STARTED", ())
    assert await balances(bank, blue, red) == [100_00, 100_01]


async def test_a_transfer_is_started_once(bank: Bank) -> None:
    """The same command again is answered with the same receipt, and moves nothing."""
    blue, red = await blue_and_red(bank)
    transfer_id, command_id = new_id(), new_id()
    request = start_transfer(transfer_id, blue, red, 69_00, command_id=command_id)
    receipts = [await bank.call(bank.transfers.StartTransfer, request) for _ in range(3)]
    assert {(one.command_id, one.position, one.version) for one in receipts} == {(command_id, receipts[0].position, 1)}
    await bank.ended_transfer((transfer_id, receipts[0]))
    receipts.append(await bank.call(bank.transfers.StartTransfer, request))
    assert receipts[-1].position == receipts[0].position
    assert await balances(bank, blue, red) == [31_00, 169_00]


# Who may do what


async def test_only_a_process_moves_money_for_a_transfer(caller: Caller) -> None:
    """Whoever else names a transfer, another end or a time limit is refused, and no money moves."""
    bank = caller(roles=[Role.USER, Role.TENANT_ADMIN, Role.OPERATOR])
    blue, red = await blue_and_red(bank)
    for more in ({"transfer_id": new_id()}, {"counterparty_account_id": red}, {"not_after_ms": 2**60}):
        calls: tuple[tuple[Any, Any], ...] = (
            (bank.accounts.DepositMoney, deposit(blue, 1)),
            (bank.accounts.WithdrawMoney, withdraw(blue, 1)),
        )
        for method, request in calls:
            for name, value in more.items():
                setattr(request, name, value)
            told = await refused(bank.call(method, request))
            assert (told.code, told.reason) == ("FAILED_PRECONDITION", "ONLY_A_PROCESS")
            [receipt] = await bank.batch(item(_anew(request)))
            assert read_status(receipt.error).reason == "ONLY_A_PROCESS"
    assert len(await bank.stream("account", blue)) == 2


async def test_only_a_process_ends_a_transfer(caller: Caller) -> None:
    """Packed, alone or in a batch; nor does anybody else put money on the suspense account."""
    bank = caller(roles=[Role.USER, Role.TENANT_ADMIN, Role.OPERATOR])
    transfer_id = new_id()
    requests: list[Any] = [
        transfer_pb2.CompleteTransferRequest(options=options(), transfer_id=transfer_id),
        transfer_pb2.FailTransferRequest(options=options(), transfer_id=transfer_id, reason="NO", compensation=2),  # type: ignore[arg-type]
        account_pb2.SuspendMoneyRequest(
            options=options(), suspense_id=new_id(), transfer_id=transfer_id, amount_minor=1, currency="USD"
        ),
    ]
    for request in requests:
        told = await refused(bank.call(bank.commands.Send, command_pb2.SendRequest(command=packed(request))))
        assert (told.code, told.reason, told.facts["roles"]) == ("PERMISSION_DENIED", "ROLE_MISSING", "process")
        [receipt] = await bank.batch(item(_anew(request)))
        assert read_status(receipt.error).code == "PERMISSION_DENIED"


async def test_who_closes_accounts(caller: Caller, bank: Bank) -> None:
    """A tenant's administrator, an empty one, once; the owner has one account less. A user may not."""
    blue, red = await blue_and_red(bank, red_minor=0)
    user = caller(roles=[Role.USER])
    assert (await refused(user.close(red))).code == "PERMISSION_DENIED"
    told = await refused(bank.close(blue))
    assert (told.code, told.reason, told.facts["balance_minor"]) == ("FAILED_PRECONDITION", "ACCOUNT_NOT_EMPTY", "10000")
    closed = await bank.close(red)
    assert closed.events_appended == 2
    assert (await bank.close(red)).events_appended == 0
    summary = await bank.account(red, closed.consistency_token)
    assert summary.status == account_query_pb2.ACCOUNT_STATUS_CLOSED
    assert (await bank.person(summary.owner_id, closed.consistency_token)).open_account_count == 0
    assert (await refused(bank.deposit(red, 1))).reason == "ACCOUNT_CLOSED"
    missing = await refused(bank.call(bank.accounts.CloseAccount, close(new_id())))
    assert (missing.code, missing.reason) == ("NOT_FOUND", "ACCOUNT_NOT_FOUND")


def _anew(request: Any) -> Any:
    """The same under another command id."""
    request.options.command_id = new_id()
    return request


# Lists


async def test_transfers_by_account_and_status(bank: Bank) -> None:
    """Each filter alone and together, from or to the account, in both directions, page by page."""
    blue, red = await blue_and_red(bank)
    owner = (await bank.account(red, (await bank.deposit(red, 1)).consistency_token)).owner_id
    green, _ = await bank.open(owner, name="green")
    ids: list[str] = []
    for source, target, amount_minor in ((blue, red, 1), (red, blue, 2), (red, green, 3), (green, red, 10_000), (blue, red, 5)):
        transfer = await bank.ended_transfer(await bank.transfer(source, target, amount_minor))
        ids.append(transfer.transfer_id)

    async def pages(size: int = 0, order_by: str = "", **wanted: Any) -> list[list[int]]:
        found: list[list[int]] = []
        token = ""
        while token or not found:
            request = transfer_query_pb2.ListTransfersRequest(
                page_size=size, page_token=token, order_by=order_by, filter=transfer_query_pb2.TransferFilter(**wanted)
            )
            answer = await bank.call(bank.transfer_queries.ListTransfers, request)
            found.append([ids.index(transfer.transfer_id) + 1 for transfer in answer.transfers])
            token = answer.next_page_token
        return found

    assert await pages() == [[1, 2, 3, 4, 5]]
    assert await pages(order_by="started_at desc") == [[5, 4, 3, 2, 1]]
    assert await pages(2) == [[1, 2], [3, 4], [5]]
    assert await pages(2, "started_at desc") == [[5, 4], [3, 2], [1]]
    assert await pages(account_id=blue.upper()) == [[1, 2, 5]]
    assert await pages(2, account_id=red) == [[1, 2], [3, 4], [5]]
    assert await pages(1, account_id=green) == [[3], [4]]
    assert await pages(status=FAILED) == [[4]]
    assert await pages(status=COMPLETED, account_id=green) == [[3]]
    assert await pages(status=transfer_query_pb2.TRANSFER_STATUS_STARTED) == [[]]
    assert await pages(account_id=new_id()) == [[]]


async def test_a_page_token_belongs_to_its_question_and_its_tenant(caller: Caller, bank: Bank) -> None:
    """With another filter, order or tenant it is refused; and a tenant sees its own transfers alone."""
    blue, red = await blue_and_red(bank)
    for _ in range(2):
        transfer = await bank.ended_transfer(await bank.transfer(blue, red, 1))
    request = transfer_query_pb2.ListTransfersRequest(page_size=1)
    token = (await bank.call(bank.transfer_queries.ListTransfers, request)).next_page_token
    other = caller(tenant=f"other-{new_id()[:8]}")
    blue_only = transfer_query_pb2.TransferFilter(account_id=blue)
    for who, wrong in (
        (bank, transfer_query_pb2.ListTransfersRequest(page_size=1, page_token=token, filter=blue_only)),
        (bank, transfer_query_pb2.ListTransfersRequest(page_size=1, page_token=token, order_by="started_at desc")),
        (other, transfer_query_pb2.ListTransfersRequest(page_size=1, page_token=token)),
    ):
        assert (await refused(who.call(who.transfer_queries.ListTransfers, wrong))).fields == ("page_token",)
    assert not (await other.call(other.transfer_queries.ListTransfers, request)).transfers
    assert (await refused(other.transfer_summary(transfer.transfer_id))).reason == "TRANSFER_NOT_FOUND"


# Operators


async def test_an_operator_sees_every_event_command_and_answer(desk: ProcessAdmin, bank: Bank, tenant: str) -> None:
    """Of a transfer that was refunded: ids as its first event fixed them, the refusal in the answer, times in order."""
    blue, red = await blue_and_red(bank)
    await bank.freeze(red)
    transfer_id, _ = await bank.transfer(blue, red, 69_00)
    told = await desk.ended(tenant, "transfer", transfer_id.upper())
    first, last = await bank.stream("transfer", transfer_id)
    started = transfer_pb2.TransferStarted.FromString(first.payload)
    assert started.debit_command_id == str(step_id("transfer", transfer_id, "debit"))
    move, give = "bank.v1.WithdrawMoneyRequest", "bank.v1.DepositMoneyRequest"
    fail = "bank.v1.FailTransferRequest"
    assert [(entry.kind, entry.name, entry.step, entry.id, entry.phase) for entry in told.history] == [
        ("event", "bank.v1.TransferStarted", "", first.event_id, "debiting"),
        ("command", move, "debit", started.debit_command_id, "debiting"),
        ("timer_set", "overdue", "", "", "debiting"),
        ("answer", move, "debit", started.debit_command_id, "crediting"),
        ("command", give, "credit", started.credit_command_id, "crediting"),
        ("answer", give, "credit", started.credit_command_id, "refunding"),
        ("command", give, "refund", started.refund_command_id, "refunding"),
        ("answer", give, "refund", started.refund_command_id, "failing"),
        ("command", fail, "fail", started.fail_command_id, "failing"),
        ("answer", fail, "fail", started.fail_command_id, "failed"),
    ]
    refusals = {entry.step: read_status(entry.error).reason for entry in told.history if entry.HasField("error")}
    assert refusals == {"credit": "ACCOUNT_FROZEN"}
    moments = [entry.happened_at.ToNanoseconds() for entry in told.history]
    assert moments == sorted(moments)
    assert last.metadata.command_id == started.fail_command_id
    assert (told.process.type, told.process.tenant, told.process.process_id) == ("transfer", tenant, transfer_id)
    assert (told.process.attention, told.process.stuck, list(told.commands), list(told.timers)) == ("", False, [], [])
    state = orjson.loads(told.state_json)
    assert (state["phase"], state["reason"], state["amount_minor"]) == ("failed", "ACCOUNT_FROZEN", 6900)

    [listed] = await desk.find(tenant=tenant)
    assert listed == told.process
    assert await desk.find(tenant=tenant, attention=True) == []
    assert await desk.find(tenant=tenant, type="registration") == []
    assert await desk.find(tenant=tenant, status=process_pb2.PROCESS_STATUS_RUNNING) == []


async def test_a_transfers_steps_are_one_story(bank: Bank) -> None:
    """Every event of it carries the correlation and the trace of its start, and was made on the caller's behalf."""
    blue, red = await blue_and_red(bank)
    transfer_id, receipt = await bank.transfer(blue, red, 69_00)
    await bank.ended_transfer((transfer_id, receipt))
    first, completed = await bank.stream("transfer", transfer_id)
    taken, given = (await bank.stream("account", blue))[-1], (await bank.stream("account", red))[-1]
    assert {event.metadata.correlation_id for event in (first, taken, given, completed)} == {receipt.command_id}
    traces = {event.metadata.traceparent.split("-")[1] for event in (first, taken, given, completed)}
    assert len(traces) == 1
    for event in (taken, given, completed):
        assert (event.metadata.user_id, event.metadata.on_behalf_of) == ("saga", "alice")


@pytest.mark.parametrize("roles", [[Role.USER, Role.TENANT_ADMIN], [Role.READER], [Role.PROCESS]], ids=str)
async def test_processes_are_for_operators(shared_stack: Stack, roles: list[Role]) -> None:
    """Nobody else sees, retries or cancels one."""
    async with desk_of(shared_stack, roles) as desk:
        name = {"tenant": "acme", "type": "transfer", "process_id": new_id()}
        stub = desk.stub
        for method, request in (
            (stub.GetProcess, process_pb2.GetProcessRequest(**name)),
            (stub.ListProcesses, process_pb2.ListProcessesRequest()),
            (stub.RetryProcess, process_pb2.RetryProcessRequest(**name)),
            (stub.CancelProcess, process_pb2.CancelProcessRequest(**name)),
        ):
            call: Any = method
            told = await refused(call(request, metadata=desk.who, timeout=20))
            assert (told.code, told.reason) == ("PERMISSION_DENIED", "ROLE_MISSING")


async def test_what_an_operator_cannot_do(desk: ProcessAdmin, bank: Bank, tenant: str) -> None:
    """A process that has ended is neither retried nor cancelled; one that is not there is not found."""
    blue, red = await blue_and_red(bank)
    transfer_id, _ = await bank.transfer(blue, red, 1)
    await desk.ended(tenant, "transfer", transfer_id)
    retry, cancel = process_pb2.RetryProcessRequest, process_pb2.CancelProcessRequest
    name = {"tenant": tenant, "type": "transfer", "process_id": transfer_id}
    nobody = {**name, "process_id": new_id()}
    stub: Any = desk.stub
    for method, request, code, reason in (
        (stub.RetryProcess, retry(**name), "FAILED_PRECONDITION", "NOTHING_TO_RETRY"),
        (stub.CancelProcess, cancel(**name), "FAILED_PRECONDITION", "PROCESS_ENDED"),
        (stub.RetryProcess, retry(**nobody), "NOT_FOUND", "PROCESS_NOT_FOUND"),
        (stub.CancelProcess, cancel(**nobody), "NOT_FOUND", "PROCESS_NOT_FOUND"),
    ):
        told = await refused(method(request, metadata=desk.who, timeout=20))
        assert (told.code, told.reason) == (code, reason)
