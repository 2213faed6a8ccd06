"""Transfers and registrations, while every process is killed in turn and the broker loses all it holds.

Each caller keeps to its command, under one id, until it is answered. Then everything has ended, money is right at every
position, each login has one user, and every table is the fold of the line (tests/support/checks/invariants.py).
"""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
import psycopg
import pytest

from bank.v1 import transfer_pb2, transfer_query_pb2, user_query_pb2
from deploy.local.system import PROJECTOR, READ, RELAY, SAGA, WRITE
from foldline.v1 import process_pb2
from tests.e2e.conftest import desk_of
from tests.support.checks.invariants import Acknowledged, all_have_ended, check, folded_login, look
from tests.support.checks.stream import published
from tests.support.clients.bank import (
    Bank,
    channels,
    freeze,
    new_id,
    read_refusal,
    start_registration,
    start_transfer,
    unfreeze,
)
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

TENANT = "storm"
TRANSFERS = REGISTRATIONS = 300
ACCOUNTS, LOGINS, FROZEN_AT_ONCE = 10, 50, 3
EACH_MINOR, AMOUNT_MAX_MINOR = 1000, 400
KILLED = (WRITE, RELAY, PROJECTOR, READ, SAGA)

ATTEMPT_TIMEOUT_S = 12.0
GIVE_UP_S = 60.0
RETRY_S = 0.05
# The latter on a machine that does much else: what became of the call is then not known either.
MAY_RETRY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
ENDS_WITHIN_S = 60.0
# One login, as six people write it.
WAYS_TO_WRITE: tuple[Callable[[int], str], ...] = (
    lambda number: f"straße-{number}",
    lambda number: f"Strasse-{number}",
    lambda number: f"STRASSE-{number}",
    lambda number: f"STRAẞE-{number}",
    lambda number: "\N{FULLWIDTH LATIN SMALL LETTER S}" + f"trasse-{number}",
    lambda number: f"\N{LATIN SMALL LIGATURE ST}raße-{number}",
)

pytestmark = pytest.mark.timeout(240)


@dataclass
class Storm:
    """Callers, and what they were told."""

    stack: Stack
    bank: Bank
    accounts: list[str]
    acknowledged: list[Acknowledged] = field(default_factory=list)
    transfers: list[str] = field(default_factory=list)
    # User to login and password.
    users: dict[str, tuple[str, str]] = field(default_factory=dict)
    random: random.Random = field(default_factory=lambda: random.Random(1))

    async def answered(self, method: Callable[[], Any], request: Any) -> None:
        """Makes a call again and again, under one command id, until it is accepted. Nobody may be told anything else."""
        give_up_at = time.monotonic() + GIVE_UP_S
        while True:
            try:
                receipt = await self.bank.call(method(), request, timeout_s=ATTEMPT_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() not in MAY_RETRY or time.monotonic() > give_up_at:
                    raise AssertionError(f"nobody may be told this: {read_refusal(error)}") from error
            else:
                self.acknowledged.append(Acknowledged(TENANT, receipt.command_id, receipt))
                return
            await asyncio.sleep(RETRY_S)

    def transfer(self) -> Awaitable[None]:
        """A transfer between two accounts; some have not got so much."""
        source, target = self.random.sample(self.accounts, 2)
        self.transfers.append(new_id())
        request = start_transfer(self.transfers[-1], source, target, self.random.randint(1, AMOUNT_MAX_MINOR))
        return self.answered(lambda: self.bank.transfers.StartTransfer, request)

    def register(self) -> Awaitable[None]:
        """A registration for a login that others want at the same time, written in another way."""
        user_id, number = new_id(), len(self.users) // (REGISTRATIONS // LOGINS)
        login = WAYS_TO_WRITE[len(self.users) % len(WAYS_TO_WRITE)](number)
        self.users[user_id] = login, f"the secret of {user_id}"
        request = start_registration(user_id, *self.users[user_id])
        return self.answered(lambda: self.bank.users.StartUserRegistration, request)

    async def freeze_on(self) -> None:
        """Some accounts are frozen for a moment, again and again; in the end all of them are open."""
        try:
            while True:
                frozen = self.random.sample(self.accounts, FROZEN_AT_ONCE)
                await asyncio.gather(*(self.answered(lambda: self.bank.accounts.FreezeAccount, freeze(it)) for it in frozen))
                await asyncio.sleep(0.2)
                await asyncio.gather(*(self.answered(lambda: self.bank.accounts.UnfreezeAccount, unfreeze(it)) for it in frozen))
        finally:
            for account in self.accounts:
                await self.answered(lambda: self.bank.accounts.UnfreezeAccount, unfreeze(account))

    async def gust(self, share: int, harm: Callable[[], Awaitable[None]]) -> None:
        """One part of all transfers and registrations, and what is done in the middle of it."""
        calls = [self.transfer() for _ in range(TRANSFERS // share)] + [self.register() for _ in range(REGISTRATIONS // share)]
        self.random.shuffle(calls)
        before = len(self.acknowledged)
        async with asyncio.TaskGroup() as callers:
            for call in calls:
                callers.create_task(_run(call))
            # A third is answered, and the rest under way; so are processes.
            await eventually(lambda: len(self.acknowledged) >= before + len(calls) // 3, GIVE_UP_S)
            await eventually(self.under_way, GIVE_UP_S)
            await harm()

    def under_way(self) -> int:
        """How many processes there are that have not ended."""
        with psycopg.connect(self.stack.databases.saga.admin) as connection:
            row = connection.execute("SELECT count(*) FROM processes WHERE status <> 'ended'").fetchone()
        assert row is not None
        return int(row[0])

    async def kill(self, name: str) -> None:
        """Kills a process, and starts it again a little later."""
        await self.stack.kill9(name)
        await asyncio.sleep(0.3)
        self.stack.start(name)

    async def wipe(self) -> None:
        """The broker dies and comes back with nothing."""
        self.stack.nats.kill()
        shutil.rmtree(self.stack.nats.folder / "streams")
        await asyncio.sleep(0.3)
        self.stack.nats.start()

    async def all_ended(self) -> dict[str, list[process_pb2.ProcessSummary]]:
        """What an operator sees, by type, when every process has ended."""

        async def ended() -> dict[str, list[process_pb2.ProcessSummary]] | None:
            try:
                async with desk_of(self.stack) as desk:
                    found = {type_: await desk.find(type=type_, tenant=TENANT) for type_ in ("transfer", "registration")}
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                return None
            statuses = Counter(it.status for summaries in found.values() for it in summaries)
            wanted = {process_pb2.PROCESS_STATUS_ENDED: len(self.transfers) + len(self.users)}
            assert statuses == wanted, {process_pb2.ProcessStatus.Name(status): count for status, count in statuses.items()}
            return found

        found = await eventually(ended, ENDS_WITHIN_S, every_s=0.2)
        assert found is not None
        return found


async def _run(call: Awaitable[None]) -> None:
    await call


@asynccontextmanager
async def storm_on(stack: Stack) -> AsyncIterator[Storm]:
    """Accounts with a little money, some of them frozen all the time."""
    async with channels(stack) as (write, read):
        bank = Bank(write, read, stack.token(TENANT))
        person, _ = await bank.register("Bill")
        accounts = [(await bank.open(person))[0] for _ in range(ACCOUNTS)]
        for account in accounts:
            await bank.deposit(account, EACH_MINOR)
        storm = Storm(stack, bank, accounts)
        freezer = asyncio.create_task(storm.freeze_on())
        try:
            yield storm
        finally:
            freezer.cancel()
            await asyncio.gather(freezer, return_exceptions=True)


async def test_everything_ends_whatever_is_killed(stack: Stack) -> None:
    """Each process killed with -9 once, and the broker wiped once, with transfers and registrations under way."""
    async with storm_on(stack) as storm:
        for name in KILLED:
            await storm.gust(len(KILLED) + 1, lambda name=name: storm.kill(name))  # type: ignore[misc]
        await storm.gust(len(KILLED) + 1, storm.wipe)
        assert (len(storm.transfers), len(storm.users)) == (TRANSFERS, REGISTRATIONS)
        assert len({folded_login(login) for login, _ in storm.users.values()}) == LOGINS
        shown = await storm.all_ended()
        await the_tables_say_so(storm)
        await the_winners_can_log_in(storm)

    picture = await look(stack)
    check(picture, storm.acknowledged)
    all_have_ended(picture.line)
    await published(stack.nats.url, picture.line, within_s=30)
    # Nothing needs an operator but money that could go nowhere else.
    suspended = {row["transfer_id"] for row in picture.tables["transfers"] if row["compensation"] == SUSPENDED}
    looked_at = {it.process_id: it.attention for it in shown["transfer"] + shown["registration"] if it.attention or it.stuck}
    assert looked_at == dict.fromkeys(suspended, "MONEY_IN_SUSPENSE")
    with psycopg.connect(stack.databases.saga.admin) as connection:
        rows = "SELECT (SELECT count(*) FROM process_commands), (SELECT count(*) FROM process_timers), max(attempts)"
        assert (left := connection.execute(f"{rows} FROM process_history").fetchone()) is not None
    assert left[:2] == (0, 0)
    # It was a storm: some transfers were refused, and some command had to be sent again.
    reasons = Counter(row["reason"] for row in picture.tables["transfers"])
    assert {"", "ACCOUNT_FROZEN", "INSUFFICIENT_FUNDS"} <= reasons.keys(), reasons
    assert left[2] > 1


SUSPENDED = transfer_pb2.COMPENSATION_SUSPENDED


async def the_tables_say_so(storm: Storm) -> None:
    """The queries show every transfer and every registration as ended."""
    bank, receipts = storm.bank, {it.receipt.aggregate_id: it.receipt for it in storm.acknowledged if it.receipt is not None}
    transfers = await asyncio.gather(*(bank.ended_transfer((it, receipts[it])) for it in storm.transfers))
    assert {it.status for it in transfers} == {
        transfer_query_pb2.TRANSFER_STATUS_COMPLETED,
        transfer_query_pb2.TRANSFER_STATUS_FAILED,
    }
    users = await asyncio.gather(*(bank.ended_registration((it, receipts[it])) for it in storm.users))
    outcomes = Counter((it.status, it.reason) for it in users)
    assert outcomes == {
        (user_query_pb2.REGISTRATION_STATUS_SUCCEEDED, ""): LOGINS,
        (user_query_pb2.REGISTRATION_STATUS_FAILED, "LOGIN_TAKEN"): REGISTRATIONS - LOGINS,
    }


async def the_winners_can_log_in(storm: Storm) -> None:
    """With the password they chose, though it was hashed anew for every try."""
    won = [user_id for user_id in storm.users if (await storm.bank.user(user_id)).reason == ""]
    assert await asyncio.gather(*(storm.bank.verify(*storm.users[user_id]) for user_id in won)) == won
