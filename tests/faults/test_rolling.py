"""Replicas of this release are replaced one by one by those of the next, under load: no error reaches a client that repeats.

The next release (`tests/support/next_release/changes.py`) brings something new of every kind.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import psycopg
import pytest

from bank.v1 import account_pb2
from deploy.local.system import PROJECTOR, READ, RELAY, SAGA, WRITE
from foldline.v1 import archive_pb2
from shared.platform.migrate import SchemaTooNew, migrate
from shared.rpc.client import channel
from tests.support.checks.invariants import check, look
from tests.support.checks.kinds import KINDS
from tests.support.clients.bank import Bank, channels, deposit, refused
from tests.support.clients.steady import Steady, steady
from tests.support.next_release import ROOT, Release, next_release
from tests.support.next_release.changes import MIGRATIONS, NOTED, PAID_IN, REFERENCE_FIELD
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

# The services end themselves within 10 s of work; a machine that stands still meanwhile is given more.
DRAINS_WITHIN_S = 30.0
READY_WITHIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Upgrade:
    """The system of this release, and of each program a replica of the next one, which does not run yet."""

    stack: Stack
    release: Release
    newer: dict[str, str]

    async def add(self, name: str) -> None:
        """Starts the replica of the next release."""
        self.stack.start(self.newer[name])
        await self.stack.wait_ready(self.newer[name], READY_WITHIN_S)

    async def end(self, name: str) -> None:
        """Ends the program of this release."""
        assert await self.stack.stop(name, DRAINS_WITHIN_S) == 0, name

    async def restart_as_newer(self, name: str) -> None:
        """Starts a program that has ended as one of the next release, at its address."""
        program = self.stack.programs[name]
        self.stack.add(replace(program, settings={**program.settings, **self.release.settings}))
        self.stack.start(name)
        await self.stack.wait_ready(name, READY_WITHIN_S)

    def addresses(self, name: str) -> str:
        """Those of both releases, as a name that resolves to several gives them."""
        return "ipv4:" + ",".join(self.stack.programs[each].address for each in (name, self.newer[name]))

    @asynccontextmanager
    async def load(self) -> AsyncIterator[Steady]:
        """Clients that know the addresses of both releases."""
        async with (
            channel(self.addresses(WRITE)) as write,
            channel(self.addresses(READ)) as read,
            steady(Bank(write, read, self.stack.token("load"))) as clients,
        ):
            yield clients

    def rows(self, service: str, query: str) -> list[tuple[object, ...]]:
        """What a query finds in a service's database."""
        with psycopg.connect(getattr(self.stack.databases, service).admin) as connection:
            return connection.execute(query.encode()).fetchall()


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    """The release after this one."""
    with next_release(tmp_path_factory.mktemp("next") / "release") as release:
        yield release


@pytest.fixture
def upgrade(stack: Stack, release: Release, monkeypatch: pytest.MonkeyPatch) -> Upgrade:
    """Both releases; the invariants know the new events, which have the fields of others."""
    monkeypatch.setitem(KINDS, PAID_IN, account_pb2.MoneyDeposited)
    monkeypatch.setitem(KINDS, NOTED, archive_pb2.AggregateUnboxed)
    newer = {name: stack.replica(name, settings=release.settings) for name in (WRITE, RELAY, READ, PROJECTOR, SAGA)}
    return Upgrade(stack, release, newer)


@pytest.mark.timeout(300)
async def test_the_next_release_takes_over_under_load(upgrade: Upgrade) -> None:
    """In the order that operations.md gives: nothing but answers comes back, nothing is parked, and all that is new is there."""
    stack = upgrade.stack
    async with upgrade.load() as clients:
        upgrade.release.migrate(stack.databases)
        await clients.more(10)
        for name in (PROJECTOR, SAGA, READ, RELAY):
            await upgrade.add(name)
            await upgrade.end(name)
            await clients.more(10)
        await upgrade.add(WRITE)
        await clients.more(20)
        await eventually(lambda: upgrade.rows("write", f"SELECT FROM events WHERE type = '{PAID_IN}'"))
        await older_and_newer_write_service(upgrade, clients)
        await upgrade.end(WRITE)
        await clients.more(10)
        await upgrade.restart_as_newer(WRITE)
        await clients.more(10)
    assert clients.transfers
    check(await look(stack))
    assert upgrade.rows("read", "SELECT FROM parked_keys") == []
    assert upgrade.rows("saga", "SELECT FROM parked_events") == []
    assert upgrade.rows("saga", "SELECT FROM processes WHERE status <> 'ended'") == []
    assert upgrade.rows("saga", "SELECT FROM processes WHERE schema = 2 AND state::jsonb @> '{\"noted\": true}'")
    assert upgrade.rows("read", "SELECT DISTINCT reference FROM accounts ORDER BY 1") == [("",), ("rent",)]
    assert upgrade.rows("read", "SELECT folds FROM checkpoints WHERE group_name = 'accounts' AND serves") == [(3,)]
    for service in MIGRATIONS:
        with pytest.raises(SchemaTooNew):
            migrate(ROOT / f"{service}_service/migrations", getattr(stack.databases, service).owner, {})


async def older_and_newer_write_service(upgrade: Upgrade, clients: Steady) -> None:
    """The older replica refuses what it does not know, that alone and by name; the same command is then the newer one's."""
    stack, token = upgrade.stack, upgrade.stack.token("load")
    async with channels(stack) as (write, read), channels(stack, upgrade.newer[WRITE]) as (newer_write, _):
        older, newer = Bank(write, read, token), Bank(newer_write, read, token)
        request = deposit(clients.account, 1)
        reference = account_pb2.DepositMoneyRequest.FromString(
            request.SerializeToString() + bytes([REFERENCE_FIELD << 3 | 2, 4]) + b"rent"
        )
        refusal = await refused(older.call(older.accounts.DepositMoney, reference))
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "UNKNOWN_FIELD")
        refusal = await refused(older.call(older.accounts.DepositMoney, request))
        assert (refusal.code, refusal.reason) == ("UNAVAILABLE", "RELEASE_TOO_OLD")
        receipt = await newer.call(newer.accounts.DepositMoney, reference)
        assert receipt.events_appended == 1
        clients.deposited[request.options.command_id] = 1
        await older.register("Umberto")
