"""The saga service as a process, beside all the others: killed, frozen, doubled, while money is on its way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from bank.v1 import account_pb2, transfer_pb2
from deploy.local.system import SAGA
from foldline.v1 import command_pb2, process_pb2, process_pb2_grpc
from shared.platform.identity import Role
from tests.support.checks.history import connected
from tests.support.clients.bank import Bank, channels, item, new_id, options
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

ACCOUNTS, EACH = 6, 10_000

pytestmark = pytest.mark.timeout(180)


@dataclass
class Money:
    """Accounts of one tenant, with transfers among them."""

    stack: Stack
    bank: Bank
    accounts: list[str]
    transfers: list[str]

    async def start(self, count: int) -> None:
        """Starts transfers, in one call."""
        items = []
        for number in range(count):
            transfer_id = new_id()
            self.transfers.append(transfer_id)
            source, target = self.accounts[number % ACCOUNTS], self.accounts[(number + 1 + number % 4) % ACCOUNTS]
            request = transfer_pb2.StartTransferRequest(
                options=options(),
                transfer_id=transfer_id,
                from_account_id=source,
                to_account_id=target,
                amount_minor=1 + number,
                currency="USD",
            )
            items.append(item(request))
        for receipt in await self.bank.batch(*items):
            assert receipt.status == command_pb2.COMMAND_STATUS_COMPLETED, receipt

    async def all_ended(self, deadline_s: float = 60) -> None:
        """Waits for every transfer's process to have ended."""

        async def ended() -> bool:
            async with connected(self.stack.databases.saga.app) as connection:
                cursor = await connection.execute("SELECT count(*) FROM processes WHERE status = 'ended'")
                row = await cursor.fetchone()
                return row is not None and row[0] == len(self.transfers)

        await eventually(ended, deadline_s, every_s=0.1)

    async def is_right(self) -> None:
        """Each transfer took its amount once and gave it once: debits and credits on the line, and the sum of all."""
        seen: dict[str, list[str]] = {transfer_id: [] for transfer_id in self.transfers}
        for account in self.accounts:
            for event in await self.bank.stream("account", account):
                kind = event.type.rpartition(".")[2]
                if kind in ("MoneyWithdrawn", "MoneyDeposited") and (moved := _transfer_of(event)):
                    seen[moved].append(kind)
        assert all(sorted(kinds) == ["MoneyDeposited", "MoneyWithdrawn"] for kinds in seen.values())
        for transfer_id in self.transfers:
            events = await self.bank.stream("transfer", transfer_id)
            assert [event.type for event in events] == ["bank.v1.TransferStarted", "bank.v1.TransferCompleted"]


def _transfer_of(event: Any) -> str:
    kind = account_pb2.MoneyWithdrawn if event.type == "bank.v1.MoneyWithdrawn" else account_pb2.MoneyDeposited
    transfer_id: str = kind.FromString(event.payload).transfer_id
    return transfer_id


@asynccontextmanager
async def money(stack: Stack) -> AsyncIterator[Money]:
    """Accounts with money."""
    async with channels(stack) as (write, read):
        bank = Bank(write, read, stack.token())
        person, _ = await bank.register("Bill")
        accounts = [(await bank.open(person))[0] for _ in range(ACCOUNTS)]
        for account in accounts:
            await bank.deposit(account, EACH)
        yield Money(stack, bank, accounts, [])


async def leader_has(stack: Stack, name: str) -> None:
    """Waits until an instance leads."""
    await eventually(lambda: "lease_gained" in stack.log(name).read_text(), 30)


async def test_killed_again_and_again_in_the_middle(stack: Stack) -> None:
    """Whatever was half done is done by the next life: every transfer ends, and takes and gives its money once."""
    async with money(stack) as it:
        for _ in range(4):
            await it.start(40)
            await asyncio.sleep(0.1)
            await stack.kill9(SAGA)
            stack.start(SAGA)
        await it.all_ended()
        await it.is_right()


async def test_a_frozen_leader_is_replaced_and_harms_nothing_when_it_wakes_up(stack: Stack) -> None:
    """The stand-by leads after the lease's 3 s; the old one wakes up with answers in its hands, and is fenced."""
    async with money(stack) as it:
        await leader_has(stack, SAGA)
        other = stack.replica(SAGA)
        stack.start(other)
        await stack.wait_ready(other)
        await it.start(60)
        await asyncio.sleep(0.05)
        stack.sigstop(SAGA)
        await leader_has(stack, other)
        await it.all_ended()
        await it.start(60)
        stack.sigcont(SAGA)
        await it.start(60)
        await it.all_ended()
        await it.is_right()


async def test_any_instance_answers_operators(stack: Stack) -> None:
    """A stand-by shows and steers what the leader runs."""
    async with money(stack) as it:
        await leader_has(stack, SAGA)
        other = stack.replica(SAGA)
        stack.start(other)
        await stack.wait_ready(other)
        await it.start(3)
        await it.all_ended()
        operator = (("authorization", f"Bearer {stack.token('operators', 'olga', [Role.OPERATOR])}"),)
        for name in (SAGA, other):
            async with stack.channel(name) as channel:
                stub = process_pb2_grpc.ProcessServiceStub(channel)
                answer = await stub.ListProcesses(process_pb2.ListProcessesRequest(), metadata=operator, timeout=10)
                assert {process.process_id for process in answer.processes} == set(it.transfers)
                request = process_pb2.GetProcessRequest(tenant="acme", type="transfer", process_id=it.transfers[0])
                history = (await stub.GetProcess(request, metadata=operator, timeout=10)).history
                assert [entry.step for entry in history if entry.kind == "answer"] == ["debit", "credit", "complete"]


async def test_it_starts_before_everything_it_needs(stack: Stack) -> None:
    """Without the write service, the relay and the broker it waits; transfers that were started meanwhile all end."""
    async with money(stack) as it:
        await stack.stop(SAGA)
        await it.start(20)
        await stack.stop("relay")
        await stack.stop("write_service")
        stack.nats.kill()
        stack.start(SAGA)
        await stack.wait_ready(SAGA)
        stack.start("write_service")
        await it.all_ended()
        await it.is_right()
