"""Callers that move money with short pauses while processes are killed, and that remember the answers.

Each caller repeats a command under the same id until it gets an answer. So when the traffic has ended, every command that was
sent has an answer, and `tests.support.checks.invariants` can check all of them.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from bank.v1 import account_pb2
from deploy.local.system import READ, WRITE, System
from tests.support.checks.invariants import Acknowledged
from tests.support.clients.bank import Bank, Refused, deposit, read_refusal, withdraw
from tests.support.system.waiting import eventually

ATTEMPT_TIMEOUT_S = 12.0
GIVE_UP_S = 40.0
RETRY_S = 0.05
THINK_S = 0.04
"""The pause between an answer and the next command: enough load, but processes that are started again get the processor."""


class Traffic:
    """Callers over one or several replicas of the write service. Use `running`."""

    def __init__(self, banks: Sequence[Bank], tenant: str, *, everywhere: bool, seed: int = 1) -> None:
        self.banks = banks
        self.tenant = tenant
        self.everywhere = everywhere
        self.accounts: list[str] = []
        self.acknowledged: list[Acknowledged] = []
        # The answers after which the command was sent again, in order.
        self.unavailable: list[Refused] = []
        self._random = random.Random(seed)
        self._over = False

    async def open(self, count: int) -> None:
        """Opens the accounts that the money is moved on, with a little on each."""
        owner, registered = await self.banks[0].register("Evil Knievel")
        self._remember(registered)
        for _ in range(count):
            account_id, opened = await self.banks[0].open(owner)
            self._remember(opened)
            self.accounts.append(account_id)
            self._remember(await self.banks[0].deposit(account_id, 50))

    async def more(self, count: int, within_s: float = 20) -> None:
        """Waits until this many more commands are answered."""
        wanted = len(self.acknowledged) + count
        await eventually(lambda: len(self.acknowledged) >= wanted, within_s)

    async def call_on(self, number: int) -> None:
        """One caller, until the traffic ends."""
        while not self._over:
            account_id, amount = self._random.choice(self.accounts), self._random.randint(1, 97)
            out = self._random.random() < 0.45
            await self._until_answered((withdraw if out else deposit)(account_id, amount), number)
            await asyncio.sleep(THINK_S)

    async def read_on(self) -> None:
        """One caller who deposits and then reads it: what was read is never older than what was written."""
        bank = self.banks[0]
        while not self._over:
            account_id = self.accounts[0]
            receipt = await self._until_answered(deposit(account_id, 1), 0)
            assert receipt is not None
            give_up_at = time.monotonic() + GIVE_UP_S
            while True:
                try:
                    seen = await bank.account(account_id, receipt.consistency_token)
                except grpc.aio.AioRpcError as error:
                    told = read_refusal(error)
                    # CANCELLED is what gRPC says, and not we, to a call that reaches a server in the moment it stops.
                    away = told.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED") or told.reason == "NOT_YET_CONSISTENT"
                    if not away or time.monotonic() > give_up_at:
                        raise
                    self.unavailable.append(told)
                    await asyncio.sleep(RETRY_S)
                else:
                    assert seen.version >= receipt.version
                    break
            await asyncio.sleep(THINK_S)

    async def _until_answered(
        self, command: account_pb2.DepositMoneyRequest | account_pb2.WithdrawMoneyRequest, number: int
    ) -> Any:
        give_up_at = time.monotonic() + GIVE_UP_S
        attempt = number
        while True:
            banks = self.banks if self.everywhere else [self.banks[attempt % len(self.banks)]]
            answers = await asyncio.gather(*(self._attempt(bank, command) for bank in banks))
            final = [answer for answer in answers if answer is not None]
            if final:
                assert all(one == final[0] for one in final), f"two answers to one command: {final}"
                self.acknowledged.append(final[0])
                return final[0].receipt
            if time.monotonic() > give_up_at:
                raise AssertionError(f"not answered within {GIVE_UP_S} s; last told {self.unavailable[-1]}")
            attempt += 1
            await asyncio.sleep(RETRY_S)

    async def _attempt(self, bank: Bank, command: Any) -> Acknowledged | None:
        """The answer, or None if the command must be sent again."""
        stub = bank.accounts
        method = stub.WithdrawMoney if isinstance(command, account_pb2.WithdrawMoneyRequest) else stub.DepositMoney
        try:
            receipt = await bank.call(method, command, timeout_s=ATTEMPT_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            told = read_refusal(error)
            if told.code == "UNAVAILABLE":
                self.unavailable.append(told)
                if told.reason == "SHUTTING_DOWN":
                    await asyncio.sleep(told.retry_after_s or 0)  # as it was asked to
                return None
            if told.reason != "INSUFFICIENT_FUNDS":
                raise AssertionError(f"nobody may be told this: {told}") from error
            return Acknowledged(self.tenant, command.options.command_id, reason=told.reason)
        return Acknowledged(self.tenant, command.options.command_id, receipt)

    def _remember(self, receipt: Any) -> None:
        self.acknowledged.append(Acknowledged(self.tenant, receipt.command_id, receipt))

    def end(self) -> None:
        """Lets every caller finish its present command."""
        self._over = True


@asynccontextmanager
async def running(
    system: System,
    services: Sequence[str] = (WRITE,),
    *,
    tenant: str = "load",
    callers: int = 16,
    accounts: int = 4,
    everywhere: bool = False,
) -> AsyncIterator[Traffic]:
    """Traffic until the block ends and every command is answered. With `everywhere` each command goes to all replicas."""
    async with AsyncExitStack() as stack:
        read = await stack.enter_async_context(system.channel(READ))
        writes = [await stack.enter_async_context(system.channel(name)) for name in services]
        traffic = Traffic([Bank(write, read, system.token(tenant)) for write in writes], tenant, everywhere=everywhere)
        await traffic.open(accounts)
        async with asyncio.TaskGroup() as group:
            for number in range(callers):
                group.create_task(traffic.call_on(number))
            group.create_task(traffic.read_on())
            try:
                await traffic.more(50)
                yield traffic
            finally:
                traffic.end()
