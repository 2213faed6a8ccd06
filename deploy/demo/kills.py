"""The scenarios that kill a process with -9 under load and check that nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from dataclasses import dataclass, field

import grpc.aio
import nats
from nats.js.errors import NotFoundError

from bank.v1 import account_pb2, transfer_query_pb2
from deploy.bank import Bank
from deploy.bank_requests import deposit
from deploy.demo.scenarios import Stage, Wrong
from deploy.local.system import SAGA, WRITE, System
from foldline.v1 import command_pb2
from shared.line.broker import stream_name

MAY_RETRY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)
LOAD_CALLERS = 16
LOAD_BEFORE_KILL_S = 1.0
LOAD_AFTER_HEALING_S = 0.5
HEALING_MAX_S = 20.0
GIVE_UP_S = 30.0
RELAY_MAX_S = 5.0
TRANSFERS = 100


class Kills:
    """What the bank does when a process is killed."""

    def __init__(self, stage: Stage, system: System, nats_url: str, bank: Bank, auditor: Bank) -> None:
        """`auditor` may read the whole line."""
        self._say = stage.say
        self._see = stage.see
        self._system = system
        self._nats_url = nats_url
        self._bank = bank
        self._auditor = auditor

    async def kill_write(self) -> None:
        """The write service is killed with -9 under load. What it acknowledged is there, once."""
        owner, _ = await self._bank.register("Evil Knievel")
        accounts = [(await self._bank.open(owner, name=name))[0] for name in ("left", "right")]
        load = Load(self._bank, accounts)
        self._say(f"{LOAD_CALLERS} callers deposit as fast as they are answered")
        async with asyncio.TaskGroup() as callers:
            for number in range(LOAD_CALLERS):
                callers.create_task(load.call_on(number))
            try:
                await self._kill_and_heal(load)
            finally:
                load.over = True
        for account in accounts:
            self._say(f"  {len(load.acknowledged[account])} deposits on {account} acknowledged")
        await self._audit(load)

    async def _kill_and_heal(self, load: Load) -> None:
        await asyncio.sleep(LOAD_BEFORE_KILL_S)
        pid = self._system.pid(WRITE)
        self._say(f"kill -9 {pid} (write_service), after {load.count} acknowledged deposits")
        killed_at = time.monotonic()
        await self._system.kill9(WRITE)
        # Only calls that begin now count: the last answers of the old process may still be under way.
        gone_at = time.monotonic()
        while load.answered_call_began_at <= gone_at:
            if time.monotonic() - killed_at > HEALING_MAX_S:
                raise Wrong(f"no deposit was acknowledged within {HEALING_MAX_S:.0f} s of the kill")
            await asyncio.sleep(0.01)
        seconds = time.monotonic() - killed_at
        self._say(f"it is back as process {self._system.pid(WRITE)} and answers, {seconds:.1f} s after the kill")
        await asyncio.sleep(LOAD_AFTER_HEALING_S)

    async def _audit(self, load: Load) -> None:
        """Compares the answers that callers got with the line of events and with the query tables."""
        line = await self._auditor.line()
        self._see(
            f"the {len(line)} positions of the line have no gap",
            [event.position for event in line] == list(range(1, len(line) + 1)),
            True,
        )
        # The query tables fill without the broker too, only later, so they would not show that it is missing.
        self._see("the broker's stream ends at position", await self._stream_end(len(line)), len(line))
        for account, acknowledged in load.acknowledged.items():
            stored = Counter(
                event.metadata.command_id
                for event in line
                if event.type.endswith("MoneyDeposited") and event.aggregate_id == account
            )
            self._see("acknowledged deposits that are lost", len(acknowledged.keys() - stored.keys()), 0)
            self._see("deposits that are stored twice", sum(count > 1 for count in stored.values()), 0)
            self._see("deposits that nobody was told of", len(stored.keys() - acknowledged.keys()), 0)
            balance = (await self._bank.account(account, load.token)).balance_minor
            self._see("the balance is the sum of what was acknowledged", balance, sum(acknowledged.values()))

    async def _stream_end(self, expected: int) -> int:
        """The last sequence of the shard's stream. Waits a little until it is the expected one."""
        client = await nats.connect(self._nats_url)
        try:
            end, give_up_at = -1, time.monotonic() + RELAY_MAX_S
            while end != expected and time.monotonic() < give_up_at:
                with contextlib.suppress(NotFoundError):
                    end = (await client.jetstream().stream_info(stream_name(1))).state.last_seq
                await asyncio.sleep(0.02)
            return end
        finally:
            await client.close()

    async def kill_saga(self) -> None:
        """The saga service is killed with -9 in the middle of a hundred transfers. All end, and the money is right."""
        owner, _ = await self._bank.register("The Duke")
        accounts = [(await self._bank.open(owner, name=f"purse {number}"))[0] for number in range(4)]
        for account in accounts:
            await self._bank.deposit(account, 1000_00)
        self._say(f"start {TRANSFERS} transfers among four accounts, one of them frozen")
        await self._bank.freeze(accounts[3])
        pairs = list(itertools.islice(itertools.cycle(itertools.permutations(accounts, 2)), TRANSFERS))
        half = TRANSFERS // 2
        started = await asyncio.gather(*(self._bank.transfer(*pair, 1_00) for pair in pairs[:half]))
        pid = self._system.pid(SAGA)
        self._say(f"kill -9 {pid} (saga_service), and start the other half")
        await self._system.kill9(SAGA)
        started += await asyncio.gather(*(self._bank.transfer(*pair, 1_00) for pair in pairs[half:]))
        ended = await asyncio.gather(*(self._bank.ended_transfer(transfer) for transfer in started))
        outcomes = Counter(transfer_query_pb2.TransferStatus.Name(transfer.status) for transfer in ended)
        frozen = sum(accounts[3] in pair for pair in pairs)
        self._see("completed", outcomes["TRANSFER_STATUS_COMPLETED"], TRANSFERS - frozen)
        self._see("failed, because one account is frozen", outcomes["TRANSFER_STATUS_FAILED"], frozen)
        balances = [(await self._bank.account_now(account)).balance_minor for account in accounts]
        self._see("on all four accounts together, in cents", sum(balances), 4 * 1000_00)
        self._see("on the frozen one", balances[3], 1000_00)


@dataclass
class Load:
    """Deposits by many callers. Each sends a command under the same id until it gets an answer."""

    bank: Bank
    accounts: list[str]
    over: bool = False
    count: int = 0
    answered_call_began_at: float = 0.0
    token: str = ""
    position: int = 0
    acknowledged: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.acknowledged = {account: {} for account in self.accounts}

    async def call_on(self, number: int) -> None:
        """One caller, until it is over."""
        account_id = self.accounts[number % len(self.accounts)]
        for turn in itertools.count():
            if self.over:
                return
            request = deposit(account_id, 1 + (turn + number) % 97)
            receipt = await self._until_answered(request)
            self.acknowledged[account_id][request.options.command_id] = request.amount_minor
            self.count += 1
            if receipt.position > self.position:
                self.position, self.token = receipt.position, receipt.consistency_token

    async def _until_answered(self, request: account_pb2.DepositMoneyRequest) -> command_pb2.CommandReceipt:
        give_up_at = time.monotonic() + GIVE_UP_S
        while True:
            began_at = time.monotonic()
            try:
                receipt = await self.bank.call(self.bank.accounts.DepositMoney, request, timeout_s=2)
            except grpc.aio.AioRpcError as error:
                if error.code() not in MAY_RETRY or time.monotonic() > give_up_at:
                    raise
            else:
                self.answered_call_began_at = max(self.answered_call_began_at, began_at)
                return receipt
            await asyncio.sleep(0.05)
