"""Groups of query tables in projector processes of their own: what happens to one group holds up no other."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import psycopg
import pytest

from cli import parked_calls, rebuild_calls, tenant_calls
from cli.endpoints import Endpoints
from cli.status_calls import status
from deploy.local.system import PROJECTOR, READ, SAGA, WRITE
from foldline.v1 import projection_pb2, projection_pb2_grpc
from shared.platform.identity import Role
from shared.rpc.client import bearer
from tests.support.checks.invariants import check, look
from tests.support.clients.bank import Bank, channels, refused
from tests.support.clients.traffic import running
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

pytestmark = pytest.mark.long

EVERY = ("accounts", "people", "transfers", "users")
OTHERS = "people,transfers,users"
LEADERS = """
SELECT count(*)::int FROM pg_locks WHERE locktype = 'advisory' AND classid = 6 AND mode = 'ExclusiveLock' AND granted
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) GROUP BY pid ORDER BY 1
"""
RUNNING, AWAY = "PROJECTION_STATE_RUNNING", "PROJECTION_STATE_AWAY"


def leaders(stack: Stack) -> list[int]:
    """How many groups each projector leads that leads any."""
    with psycopg.connect(stack.databases.read.admin) as admin:
        return [groups for (groups,) in admin.execute(LEADERS).fetchall()]


def projector_of(stack: Stack, groups: str) -> str:
    """Another projector, which may lead these groups."""
    return stack.replica(PROJECTOR, settings={"FOLDLINE_PROJECTOR_GROUPS": groups})


async def does_not_come(query: Awaitable[object]) -> None:
    """Fails unless the tables are not there in time, whether the service says so first or the caller's patience ends."""
    told = await refused(query)
    assert told.reason == "NOT_YET_CONSISTENT" or told.code == "DEADLINE_EXCEEDED", told


async def begin(stack: Stack, *names: str) -> None:
    """Starts projectors; each leads or stands by when this returns."""
    for name in names:
        stack.start(name)
    await eventually(lambda: all('"parts_led"' in stack.log(name).read_text() for name in names))


@asynccontextmanager
async def operator_and_bank(stack: Stack) -> AsyncIterator[tuple[Endpoints, Bank]]:
    """An operator's endpoints, and a client of a tenant."""
    known = Endpoints(
        write=stack.programs[WRITE].address,
        read=stack.programs[READ].address,
        saga=stack.programs[SAGA].address,
        tokens={"operator": stack.token("operators", "olga", [Role.OPERATOR])},
    )
    async with channels(stack) as (write, read):
        yield known, Bank(write, read, stack.token())


async def states(known: Endpoints) -> dict[str, str]:
    """What `foldline status` says of each group."""
    return {it["name"]: it["state"] for it in (await status(known))["projections"]}


async def test_a_fold_that_hangs_holds_up_its_own_process_alone(stack: Stack, tmp_path: Path) -> None:
    """In one process it holds up every group. In a process of its own none: they are as fresh as ever, and its group is away."""
    await stack.stop(PROJECTOR)
    released, held = tmp_path / "released", tmp_path / "released.held"

    def holds(name: str) -> None:
        program = stack.programs[name]
        settings = {**program.settings, "HELD_UNTIL": str(released)}
        stack.add(replace(program, module="tests.support.system.held_projector", settings=settings))
        stack.start(name)

    every, accounts, others = stack.replica(PROJECTOR), projector_of(stack, "accounts"), projector_of(stack, OTHERS)
    async with operator_and_bank(stack) as (known, bank):
        impatient = Bank(bank.write, bank.read, bank.token, timeout_s=3)
        alice, _ = await bank.register("Alice")
        blue, _ = await bank.open(alice)
        deposited = await bank.deposit(blue, 100)
        holds(every)
        await eventually(held.exists)
        token = (await bank.rename(alice, "Alice Cooper")).consistency_token
        await does_not_come(impatient.person(alice, token))
        await stack.kill9(every)
        held.unlink()

        holds(accounts)
        stack.start(others)
        await eventually(held.exists)
        for nth in range(20):
            token = (await bank.rename(alice, f"Alice {nth}")).consistency_token
            person = await bank.person(alice, token)
            assert (person.name, person.total_balances[0].total_minor) == (f"Alice {nth}", "100")
        await does_not_come(impatient.account(blue, deposited.consistency_token))

        async def shown(of_accounts: str) -> bool:
            return await states(known) == {**dict.fromkeys(EVERY, RUNNING), "accounts": of_accounts}

        await eventually(partial(shown, AWAY))
        released.touch()
        assert (await bank.account(blue, deposited.consistency_token)).balance_minor == 100
        # Its session was ended while it hung, so it may lead again only after the tables were seen.
        await eventually(partial(shown, RUNNING))


@pytest.mark.timeout(300)
async def test_a_setting_that_changes_under_load(stack: Stack) -> None:
    """Projectors of the old and the new setting run beside each other, are stopped, woken and killed: each event counts once."""
    standby = stack.replica(PROJECTOR)
    accounts, again = projector_of(stack, "accounts,users"), projector_of(stack, "users,accounts")
    others = projector_of(stack, OTHERS)
    async with running(stack, (WRITE,), accounts=3) as traffic:
        await begin(stack, standby)
        await traffic.more(30)
        assert sum(leaders(stack)) == 4
        await begin(stack, accounts, others)
        await traffic.more(30)
        for name in (PROJECTOR, standby):
            assert await stack.stop(name, 30) == 0
            await traffic.more(30, within_s=60)
        await eventually(lambda: leaders(stack) in ([1, 3], [2, 2]))

        await begin(stack, again)
        stack.sigstop(accounts)
        await traffic.more(60, within_s=60)
        stack.sigcont(accounts)
        await traffic.more(30, within_s=60)
        await stack.kill9(again)
        await traffic.more(30, within_s=60)
        await stack.kill9(others)
        stack.start(others)
        await traffic.more(30, within_s=60)
        await eventually(lambda: sum(leaders(stack)) == 4)
    check(await look(stack, within_s=60), traffic.acknowledged)


async def test_what_operators_ask_is_done_by_the_process_of_the_group(stack: Stack) -> None:
    """A retry, a rebuild and the end of a tenant, while nobody leads one of the groups: it waits, the others do not."""
    await stack.stop(PROJECTOR)
    accounts, others = projector_of(stack, "accounts"), projector_of(stack, OTHERS)
    async with operator_and_bank(stack) as (known, bank):
        alice, _ = await bank.register("Alice")
        blue, _ = await bank.open(alice)
        token = (await bank.deposit(blue, 100)).consistency_token
        for name in (accounts, others):
            stack.start(name)
        await bank.person(alice, token)
        await bank.account(blue, token)
        assert leaders(stack) == [1, 3]
        for name in (accounts, others):
            await stack.kill9(name)
        lost: dict[str, tuple[object, ...]] = {}
        with psycopg.connect(stack.databases.read.app) as tables:
            for table in ("accounts", "person_totals"):
                lost[table] = tables.execute(f"DELETE FROM {table} RETURNING *".encode()).fetchall()[0]
        for name in (accounts, others):
            stack.start(name)
        token = (await bank.deposit(blue, 5)).consistency_token
        assert (await bank.person(alice, token)).stale
        assert (await refused(bank.account(blue, token))).reason == "ROW_PARKED"
        with psycopg.connect(stack.databases.read.app) as tables:
            for table, row in lost.items():
                tables.execute(f"INSERT INTO {table} VALUES ({', '.join(['%s'] * len(row))})".encode(), row)
        found, _ = await parked_calls.find(known, "", "", 50)
        ids = {it["table"]: it["parked_id"] for it in found}

        await stack.kill9(accounts)
        assert (await parked_calls.retry(known, ids["person_totals"]))["released"]
        assert (await bank.person(alice, token)).total_balances[0].total_minor == "105"
        async with channels(stack) as (_, read):
            stub = projection_pb2_grpc.ProjectionServiceStub(read)
            request = projection_pb2.RetryParkedRequest(parked_id=ids["accounts"])
            told = await refused(stub.RetryParked(request, metadata=bearer(known.token("operator")), timeout=3))
        assert told.reason == "PROJECTOR_AWAY"
        for name in ("people", "accounts"):
            await rebuild_calls.start(known, name, only_if_same=False)
        assert [it["state"] async for it in rebuild_calls.follow(known, "people")][-1] == "REBUILD_STATE_SWITCHED"
        asked = await anext(rebuild_calls.follow(known, "accounts"))
        assert asked["state"] == "REBUILD_STATE_ASKED"
        assert (await states(known))["accounts"] == AWAY

        stack.start(accounts)
        assert [it["state"] async for it in rebuild_calls.follow(known, "accounts")][-1] == "REBUILD_STATE_SWITCHED"
        assert (await bank.account(blue, token)).balance_minor == 105
        assert (await parked_calls.find(known, "", "", 50))[0] == []

        await stack.kill9(accounts)
        await tenant_calls.purge(known, "acme")

        async def waits_for_accounts() -> bool:
            return set((await tenant_calls.purged(known, "acme")).get("consumers", ())) == {"read accounts"}

        await eventually(waits_for_accounts, every_s=0.2)
        stack.start(accounts)
        gone = (await tenant_calls.until_purged(known, "acme"))["gone_read"]
        assert (gone["people"], gone["person_totals"], gone["accounts"], gone["movements"]) == (1, 1, 1, 2)
