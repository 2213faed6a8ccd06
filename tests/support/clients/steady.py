"""Clients that leave repeating to gRPC, as channels of `shared.rpc.client` do it: an error that reaches one fails the test.

They are for what must disturb nobody, such as replacing replicas one by one. Callers that repeat by themselves are in
`tests.support.clients.traffic`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio

from bank.v1 import account_pb2
from foldline.v1 import command_pb2
from tests.support.clients.bank import Bank, deposit, read_refusal
from tests.support.system.waiting import eventually

CALLERS = 8
TIMEOUT_S = 30.0
THINK_S = 0.04
"""The pause between an answer and the next call: processes that start beside the load get the processor."""


class Steady:
    """Deposits on one account, each followed by a query; and a transfer now and then. Use `steady`."""

    def __init__(self, bank: Bank, account: str, other: str) -> None:
        self._bank = bank
        self.account = account
        self._other = other
        self.deposited: dict[str, int] = {}
        self.transfers: list[str] = []
        self.over = False

    async def more(self, count: int, within_s: float = 60) -> None:
        """Waits until this many more deposits are answered."""
        wanted = len(self.deposited) + count
        await eventually(lambda: len(self.deposited) >= wanted, within_s)

    async def deposit_on(self) -> None:
        """One caller, until it is over: deposits, and reads its own write."""
        while not self.over:
            request = deposit(self.account, 7)
            receipt = await self._deposited(request)
            self.deposited[request.options.command_id] = request.amount_minor
            seen = await self._bank.account(self.account, receipt.consistency_token)
            assert seen.version >= receipt.version
            await asyncio.sleep(THINK_S)

    async def _deposited(self, request: account_pb2.DepositMoneyRequest) -> command_pb2.CommandReceipt:
        """The answer. gRPC calls five times, and addresses take turns; who met an older release each time asks on."""
        while True:
            try:
                return await self._bank.call(self._bank.accounts.DepositMoney, request, timeout_s=TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if read_refusal(error).reason != "RELEASE_TOO_OLD":
                    raise

    async def transfer_on(self) -> None:
        """Transfers of one cent, one after the other, each of which must complete."""
        while not self.over:
            ended = await self._bank.ended_transfer(await self._bank.transfer(self.account, self._other, 1))
            assert not ended.reason, ended
            self.transfers.append(ended.transfer_id)
            await asyncio.sleep(THINK_S)

    async def check(self) -> None:
        """Raises AssertionError if a deposit is missing or there twice, or if a transfer moved other than one cent."""
        events = await self._bank.stream("account", self.account)
        stored = [
            event.metadata.command_id
            for event in events
            if event.type.endswith(("MoneyDeposited", "MoneyPaidIn")) and event.metadata.command_id in self.deposited
        ]
        assert sorted(stored) == sorted(self.deposited)
        balances = [(await self._bank.account_now(each)).balance_minor for each in (self.account, self._other)]
        assert balances == [1000 + sum(self.deposited.values()) - len(self.transfers), len(self.transfers)]


@asynccontextmanager
async def steady(bank: Bank) -> AsyncIterator[Steady]:
    """Callers until the block ends. Then every answer is in, and has been checked."""
    owner, _ = await bank.register("Evil Knievel")
    account, _ = await bank.open(owner)
    other, _ = await bank.open(owner, name="other")
    await bank.deposit(account, 1000)
    clients = Steady(bank, account, other)
    async with asyncio.TaskGroup() as group:
        for _ in range(CALLERS):
            group.create_task(clients.deposit_on())
        group.create_task(clients.transfer_on())
        try:
            await clients.more(20)
            yield clients
        finally:
            clients.over = True
    await clients.check()
