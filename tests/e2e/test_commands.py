"""Commands as their senders see them: repeated, packed, in batches, in streams, and looked up in the log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from bank.v1 import account_pb2, person_pb2
from foldline.v1 import command_pb2
from shared.platform.identity import Role
from tests.e2e.conftest import Caller
from tests.support.clients.bank import Bank, deposit, freeze, item, new_id, packed, read_status, refused, register, withdraw

COMPLETED = command_pb2.COMMAND_STATUS_COMPLETED
REJECTED = command_pb2.COMMAND_STATUS_REJECTED


async def blue_account(bank: Bank, balance_minor: int = 0) -> str:
    """An account in dollars, with money on it."""
    alice, _ = await bank.register("Alice")
    blue, _ = await bank.open(alice)
    if balance_minor:
        await bank.deposit(blue, balance_minor)
    return blue


def reasons(receipts: list[command_pb2.CommandReceipt]) -> list[str]:
    """Why each was refused; empty for what was accepted."""
    return [read_status(receipt.error).reason if receipt.HasField("error") else "" for receipt in receipts]


# The same command id again (B4)


async def test_a_repeat_gets_the_first_receipt_and_changes_nothing(bank: Bank) -> None:
    """Same id, same content: the very same receipt, whatever happened since."""
    blue = await blue_account(bank)
    request = deposit(blue, 5)
    first = await bank.call(bank.accounts.DepositMoney, request)
    await bank.deposit(blue, 1)
    again = await bank.call(bank.accounts.DepositMoney, request)
    [in_a_batch] = await bank.batch(item(request))
    sent = await bank.call(bank.commands.Send, command_pb2.SendRequest(command=packed(request)))
    assert (first.version, first.status) == (2, COMPLETED)
    assert again == in_a_batch == sent.receipt == first
    assert len(await bank.stream("account", blue)) == 3


async def test_a_repeat_in_capitals_is_a_repeat(bank: Bank) -> None:
    """A command id is a UUID too: its case means nothing."""
    blue = await blue_account(bank)
    command_id = new_id()
    first = await bank.call(bank.accounts.DepositMoney, deposit(blue, 5, command_id=command_id))
    again = await bank.call(bank.accounts.DepositMoney, deposit(blue, 5, command_id=command_id.upper()))
    assert again == first
    assert (await bank.command(command_id.upper())).receipt == first


async def test_a_repeat_with_other_letters_is_a_repeat(bank: Bank) -> None:
    """An id's case is no part of a command."""
    blue = await blue_account(bank)
    request = deposit(blue, 5)
    first = await bank.call(bank.accounts.DepositMoney, request)
    request.account_id = blue.upper()
    assert await bank.call(bank.accounts.DepositMoney, request) == first


async def test_a_field_of_a_newer_contract_is_refused_and_not_stored(bank: Bank) -> None:
    """It may change what the command means, and it may be a secret, which only the newer contract says."""
    blue = await blue_account(bank)
    request = deposit(blue, 5)
    request.MergeFromString(b"\xa2\x1f\x06secret")  # field 500
    assert (await refused(bank.call(bank.accounts.DepositMoney, request))).reason == "UNKNOWN_FIELD"
    assert (await refused(bank.command(request.options.command_id))).reason == "COMMAND_NOT_FOUND"
    plain = deposit(blue, 5, command_id=request.options.command_id)
    receipt = await bank.call(bank.accounts.DepositMoney, plain)
    record = await bank.command(receipt.command_id)
    kept = account_pb2.DepositMoneyRequest(account_id=blue, amount_minor=5, currency="USD")
    assert record.command.value == kept.SerializeToString()


async def test_a_refusal_is_repeated_too(bank: Bank) -> None:
    """A refused command stays refused under its id, even when it would be accepted now; a new id is a new try."""
    blue = await blue_account(bank)
    request = withdraw(blue, 5)
    assert (await refused(bank.call(bank.accounts.WithdrawMoney, request))).reason == "INSUFFICIENT_FUNDS"
    await bank.deposit(blue, 5)
    again = await refused(bank.call(bank.accounts.WithdrawMoney, request))
    assert (again.code, again.reason, again.facts["balance_minor"]) == ("FAILED_PRECONDITION", "INSUFFICIENT_FUNDS", "0")
    assert (await bank.withdraw(blue, 5)).status == COMPLETED


async def test_a_repeat_of_a_no_op_is_one(bank: Bank) -> None:
    """A command that was accepted without an event is in the log like any other."""
    blue = await blue_account(bank)
    request = account_pb2.UnfreezeAccountRequest(options=command_pb2.CommandOptions(command_id=new_id()), account_id=blue)
    first = await bank.call(bank.accounts.UnfreezeAccount, request)
    await bank.freeze(blue)
    assert await bank.call(bank.accounts.UnfreezeAccount, request) == first
    assert (first.status, first.events_appended, first.position) == (COMPLETED, 0, 0)


async def test_a_hundred_at_once_with_one_id_are_one(bank: Bank) -> None:
    """However impatient the caller: one deposit, one receipt, a hundred times."""
    blue = await blue_account(bank)
    request = deposit(blue, 5)
    receipts = await asyncio.gather(*(bank.call(bank.accounts.DepositMoney, request) for _ in range(100)))
    assert all(receipt == receipts[0] for receipt in receipts)
    assert len(await bank.stream("account", blue)) == 2


async def test_the_options_are_no_part_of_the_content(bank: Bank) -> None:
    """Expected version and correlation id may differ in a repeat: the answer is the first one's."""
    blue = await blue_account(bank)
    first = await bank.call(bank.accounts.DepositMoney, deposit(blue, 5, command_id=(command_id := new_id())))
    repeat = deposit(blue, 5, command_id=command_id, expected_version=99, correlation_id=new_id())
    assert await bank.call(bank.accounts.DepositMoney, repeat) == first


async def test_a_command_id_is_the_tenants_own(caller: Caller) -> None:
    """The same id in two tenants is two commands."""
    one, other = caller(tenant="one-" + new_id()[:8]), caller(tenant="two-" + new_id()[:8])
    command_id = new_id()
    for bank, name in ((one, "Alice"), (other, "Bob")):
        receipt = await bank.call(bank.people.RegisterPerson, register(new_id(), name, command_id=command_id))
        assert receipt.version == 1
        record = await bank.command(command_id)
        kept = person_pb2.RegisterPersonRequest()
        assert record.command.Unpack(kept)
        assert kept.name == name


# Expected versions (B5)


async def test_expected_version(bank: Bank) -> None:
    """0 means that it must not exist, n that it is at n; of two that expect the same, one is refused."""
    alice = new_id()
    request = register(alice, "Alice", expected_version=0)
    assert (await bank.call(bank.people.RegisterPerson, request)).version == 1
    blue, _ = await bank.open(alice)

    async def deposit_at(version: int) -> str:
        try:
            await bank.call(bank.accounts.DepositMoney, deposit(blue, 1, expected_version=version))
        except Exception as error:  # noqa: BLE001 (told below)
            return type(error).__name__
        return ""

    outcomes = await asyncio.gather(*(deposit_at(1) for _ in range(8)))
    assert sorted(outcomes) == ["", *["AioRpcError"] * 7]
    told = await refused(bank.call(bank.accounts.FreezeAccount, freeze(blue, expected_version=0)))
    assert (told.reason, told.facts["expected"], told.facts["actual"]) == ("VERSION_MISMATCH", "0", "2")


# Batches


async def test_a_batch_is_answered_in_order_and_each_item_sees_those_before(bank: Bank) -> None:
    """Register, open, deposit and withdraw in one call: one batch, four receipts, one refusal that stands alone."""
    alice, blue = new_id(), new_id()
    receipts = await bank.batch(
        item(register(alice, "Alice")),
        item(
            account_pb2.OpenAccountRequest(
                options=command_pb2.CommandOptions(command_id=new_id()), account_id=blue, owner_id=alice, currency="EUR"
            )
        ),
        item(deposit(blue, 10, "EUR")),
        item(withdraw(blue, 11, "EUR")),
        item(withdraw(blue, 10, "EUR")),
    )
    assert reasons(receipts) == ["", "", "", "INSUFFICIENT_FUNDS", ""]
    assert [receipt.version for receipt in receipts if receipt.status == COMPLETED] == [1, 1, 2, 3]
    assert (await bank.account(blue, receipts[-1].consistency_token)).balance_minor == 0


async def test_duplicates_in_one_batch(bank: Bank) -> None:
    """The same id twice in a batch: the second gets the first's receipt, or is refused if it asks for something else."""
    blue = await blue_account(bank)
    once = deposit(blue, 5)
    other = deposit(blue, 6, command_id=once.options.command_id)
    first, repeat, reused, last = await bank.batch(item(once), item(once), item(other), item(deposit(blue, 1)))
    assert (first.status, first.version) == (COMPLETED, 2)
    assert repeat == first
    assert read_status(reused.error).reason == "COMMAND_ID_REUSED"
    assert last.version == 3
    assert (await bank.account(blue, last.consistency_token)).balance_minor == 6


async def test_256_in_a_batch(bank: Bank) -> None:
    """The most that a batch may hold, with a refusal in the middle, which is the only one."""
    blue = await blue_account(bank)
    items = [item(deposit(blue, 1)) for _ in range(256)]
    items[128] = item(withdraw(blue, 1_000_000))
    receipts = await bank.batch(*items)
    assert [nth for nth, reason in enumerate(reasons(receipts)) if reason] == [128]
    assert (await bank.account(blue, receipts[-1].consistency_token)).balance_minor == 255


async def test_an_atomic_batch_is_accepted_as_a_whole(insider: Bank) -> None:
    """All receipts are completed and their events are neighbours on the line."""
    blue, red = await blue_account(insider, 10), await blue_account(insider)
    out, back = await insider.batch(item(withdraw(blue, 4)), item(deposit(red, 4)), atomic=True)
    assert (out.status, back.status, back.position) == (COMPLETED, COMPLETED, out.position + 1)
    assert (await insider.account(red, back.consistency_token)).balance_minor == 4


@pytest.mark.parametrize(
    "culprit",
    [lambda blue: withdraw(blue, 11), lambda blue: deposit(blue, 0), lambda blue: deposit(new_id(), 1)],
    ids=["a rule", "a bad field", "an absent account"],
)
async def test_an_atomic_batch_is_refused_as_a_whole(bank: Bank, culprit: object) -> None:
    """The culprit says why, the others that they were undone; no event is stored; the others may be sent again."""
    assert callable(culprit)
    blue, red = await blue_account(bank, 10), await blue_account(bank)
    before, after = deposit(red, 4), deposit(red, 5)
    receipts = await bank.batch(item(before), item(culprit(blue)), item(after), atomic=True)
    first, second, third = reasons(receipts)
    assert (first, third) == ("ATOMIC_BATCH_REFUSED", "ATOMIC_BATCH_REFUSED")
    assert second in ("INSUFFICIENT_FUNDS", "INVALID_REQUEST", "ACCOUNT_NOT_FOUND")
    assert [len(await bank.stream("account", account)) for account in (blue, red)] == [2, 1]
    assert (await refused(bank.command(before.options.command_id))).reason == "COMMAND_NOT_FOUND"
    again = await bank.batch(item(before), item(after), atomic=True)
    assert [receipt.status for receipt in again] == [COMPLETED, COMPLETED]


async def test_an_atomic_batch_again_gets_its_receipts_again(bank: Bank) -> None:
    """A repeated atomic batch changes nothing; with a stranger in it, it is refused or completed, never half."""
    blue = await blue_account(bank)
    items = [item(deposit(blue, 1)), item(deposit(blue, 2))]
    first = await bank.batch(*items, atomic=True)
    assert await bank.batch(*items, atomic=True) == first
    assert len(await bank.stream("account", blue)) == 3


# Streams


async def test_a_stream_answers_in_the_order_of_its_commands(bank: Bank) -> None:
    """Receipts come while commands are still being sent, each in its turn, refusals among them."""
    blue = await blue_account(bank)
    sent: list[str] = []
    answered = asyncio.Event()

    async def commands() -> AsyncIterator[command_pb2.SendStreamRequest]:
        for nth in range(20):
            command = withdraw(blue, 10_000) if nth == 7 else deposit(blue, 1)
            sent.append(command.options.command_id)
            yield command_pb2.SendStreamRequest(item=item(command))
            if nth == 9:
                await asyncio.wait_for(answered.wait(), 30)  # the half of it is answered before the rest is sent

    receipts: list[command_pb2.CommandReceipt] = []
    async for answer in bank.commands.SendStream(commands(), metadata=bank.who, timeout=20):
        receipts.append(answer.receipt)
        if len(receipts) == 10:
            answered.set()
    assert [receipt.command_id for receipt in receipts] == sent
    assert [nth for nth, reason in enumerate(reasons(receipts)) if reason] == [7]
    assert (await bank.account(blue, receipts[-1].consistency_token)).balance_minor == 19


async def test_a_command_that_breaks_its_rules_is_refused_in_its_turn_and_the_stream_goes_on(bank: Bank) -> None:
    """Its receipt says which field, as a caller of the stream knows it."""
    blue = await blue_account(bank)
    items = [item(deposit(blue, 5)), item(deposit(blue, 0)), item(deposit(blue, 2))]
    requests = iter([command_pb2.SendStreamRequest(item=each) for each in items])
    receipts = [answer.receipt async for answer in bank.commands.SendStream(requests, metadata=bank.who, timeout=20)]
    assert reasons(receipts) == ["", "INVALID_REQUEST", ""]
    assert read_status(receipts[1].error).fields == ("item.command.amount_minor",)
    assert (await bank.account(blue, receipts[-1].consistency_token)).balance_minor == 7


async def test_a_stream_that_is_refused_answers_what_came_before(bank: Bank) -> None:
    """The items before the one that ends it are carried out and answered, in order; those behind it are not answered."""
    got: list[command_pb2.CommandReceipt] = []

    async def read(blue: str) -> None:
        forbidden = item(deposit(blue, 7), on_behalf_of="somebody")
        items = [item(deposit(blue, 5)), item(withdraw(blue, 6)), forbidden, item(deposit(blue, 1))]
        requests = iter([command_pb2.SendStreamRequest(item=each) for each in items])
        got.clear()
        async for answer in bank.commands.SendStream(requests, metadata=bank.who, timeout=20):
            got.append(answer.receipt)  # noqa: PERF401 - those before the end count, too

    for _ in range(20):
        told = await refused(read(blue := await blue_account(bank)))
        # grpc.aio fails by itself, before it has read the end, if it writes in the moment in which the stream has ended.
        if "from Core" not in told.text:
            break
    assert told.reason == "ROLE_MISSING"
    assert reasons(got) == ["", "INSUFFICIENT_FUNDS"]
    _, *deposits = await bank.stream("account", blue)
    amounts = [account_pb2.MoneyDeposited.FromString(event.payload).amount_minor for event in deposits]
    assert amounts[0] == 5
    assert 7 not in amounts


# The log (B3)


async def test_the_log_tells_what_became_of_a_command(bank: Bank) -> None:
    """Completed, without effect, and rejected: receipt, content without options, who, when, and why not."""
    blue = await blue_account(bank)
    correlation = new_id()
    request = deposit(blue, 5, correlation_id=correlation)
    receipt = await bank.call(bank.accounts.DepositMoney, request)
    record = await bank.command(receipt.command_id)
    kept = account_pb2.DepositMoneyRequest()
    assert record.receipt == receipt
    assert record.command.Unpack(kept)
    assert kept == account_pb2.DepositMoneyRequest(account_id=blue, amount_minor=5, currency="USD")
    assert (record.user_id, record.on_behalf_of, record.correlation_id, record.causation_id) == ("alice", "", correlation, "")
    assert record.received_at.ToNanoseconds() <= record.finished_at.ToNanoseconds()

    idle = await bank.command((await bank.unfreeze(blue)).command_id)
    assert (idle.receipt.status, idle.receipt.events_appended, idle.receipt.version) == (COMPLETED, 0, 2)

    no = withdraw(blue, 6)
    told = await refused(bank.call(bank.accounts.WithdrawMoney, no))
    rejected = await bank.command(no.options.command_id)
    assert (rejected.receipt.status, rejected.receipt.events_appended) == (REJECTED, 0)
    assert read_status(rejected.receipt.error).reason == told.reason == "INSUFFICIENT_FUNDS"
    assert rejected.correlation_id == no.options.command_id, "the command's own id, if none was given"


async def test_what_is_malformed_or_forbidden_is_not_in_the_log(caller: Caller, bank: Bank) -> None:
    """Only authenticated, permitted, valid commands are logged."""
    blue = await blue_account(bank)
    zero, not_allowed = deposit(blue, 0), freeze(blue)
    user = caller(roles=[Role.USER])
    await refused(bank.call(bank.accounts.DepositMoney, zero))
    await refused(user.call(user.accounts.FreezeAccount, not_allowed))
    for request in (zero, not_allowed):
        assert (await refused(bank.command(request.options.command_id))).reason == "COMMAND_NOT_FOUND"


async def test_a_stale_version_is_in_the_log(bank: Bank) -> None:
    """The caller's mistake is an outcome like any other, and is repeated under the same id."""
    blue = await blue_account(bank)
    request = deposit(blue, 1, expected_version=7)
    await refused(bank.call(bank.accounts.DepositMoney, request))
    record = await bank.command(request.options.command_id)
    assert (record.receipt.status, read_status(record.receipt.error).reason) == (REJECTED, "VERSION_MISMATCH")
    assert (await refused(bank.call(bank.accounts.DepositMoney, request))).reason == "VERSION_MISMATCH"
