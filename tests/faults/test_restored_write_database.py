"""The write database is set back to an older copy while everything else has gone on: noticed, named, gone on from."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg import sql

from cli import status_calls
from cli.calls import Refused
from cli.endpoints import Endpoints
from cli.status import exit_code
from deploy.local.system import READ, SAGA, WRITE
from shared.platform.identity import Role
from tests.support.clients.bank import Bank, channels, refused
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

RELAY = "relay"

pytestmark = pytest.mark.timeout(180)

GROUPS = ("people", "accounts", "transfers", "users")


def administer(stack: Stack, *statements: str) -> None:
    """Statements of the administrator about the write database, its copy and their owner."""
    database = stack.databases.write
    names = {
        "write": sql.Identifier(database.name),
        "copy": sql.Identifier(f"{database.name}_copy"),
        "owner": sql.Identifier(urlsplit(database.owner).username or ""),
        "app": sql.Identifier(urlsplit(database.app).username or ""),
    }
    with psycopg.connect(stack.postgres.url, autocommit=True) as admin:
        for statement in statements:
            admin.execute(sql.SQL(statement).format(**names))


async def without_writers(stack: Stack, *statements: str) -> None:
    """The same, with nobody connected."""
    for name in (RELAY, WRITE):
        await stack.stop(name)
    administer(stack, *statements)
    for name in (WRITE, RELAY):
        stack.start(name)
        await stack.wait_ready(name)


async def test_a_write_database_that_was_set_back(stack: Stack) -> None:
    """Both consumers diverge and say so, tokens are refused by name, and after two words all is the fold of the line."""
    addresses = {name: stack.programs[name].address for name in (WRITE, READ, SAGA)}
    operator = stack.token("operators", "olga", [Role.OPERATOR, Role.READER])
    known = Endpoints(addresses[WRITE], addresses[READ], {"operator": operator}, addresses[SAGA])

    async def states() -> dict[str, str]:
        found = await status_calls.status(known)
        return {it["name"]: it["state"].rpartition("_")[2] for it in (*found["projections"], *found["runners"])}

    async with channels(stack) as (write, read):
        bank = Bank(write, read, stack.token())
        person, _ = await bank.register("Bill")
        blue, red = [(await bank.open(person))[0] for _ in range(2)]
        await bank.deposit(blue, 100)
        await bank.ended_transfer(await bank.transfer(blue, red, 1))
        await eventually(lambda: _running(states), 30)

    await without_writers(stack, "CREATE DATABASE {copy} TEMPLATE {write} OWNER {owner}")
    async with channels(stack) as (write, read):
        bank = Bank(write, read, stack.token())
        lost, receipt = await bank.transfer(blue, red, 10)
        await bank.ended_transfer((lost, receipt))
        token = (await bank.deposit(blue, 7)).consistency_token
        assert (await bank.account(blue, token)).balance_minor == 96
        before = await status_calls.status(known)

    # Dropped and put back from the copy, as by a dump.
    await without_writers(
        stack,
        "DROP DATABASE {write} WITH (FORCE)",
        "ALTER DATABASE {copy} RENAME TO {write}",
        "GRANT CONNECT ON DATABASE {write} TO {owner}, {app}",
    )
    async with channels(stack) as (write, read):
        bank = Bank(write, read, stack.token())
        fresh = (await bank.deposit(blue, 1)).consistency_token

        async def diverged() -> bool:
            return await states() == dict.fromkeys((*GROUPS, "processes"), "DIVERGED")

        await eventually(diverged, 30, every_s=0.2)
        found = await status_calls.status(known)
        assert exit_code(found) == 1
        assert found["line"]["epoch"] != before["line"]["epoch"]
        assert all(it["ahead"] > 0 and it["lag"] == 0 for it in (*found["projections"], *found["runners"]))
        for each in (token, fresh):
            assert (await refused(bank.account(blue, each))).reason == "HISTORY_DIVERGED"

        revision = await status_calls.accept_history(known)
        assert [(it["process_id"], it["outcome"]) for it in revision["processes"] if it["outcome"] == "undone"] == [
            (lost, "undone")
        ]
        gone = [it for it in revision["commands"] if it["certain"]]
        assert {it["type"] for it in gone} == {
            "bank.v1.WithdrawMoneyRequest",
            "bank.v1.DepositMoneyRequest",
            "bank.v1.CompleteTransferRequest",
        }
        assert revision["former_position"] == before["line"]["head_position"]
        for name in GROUPS:
            refilled = await status_calls.refill(known, name)
            assert refilled["was"]["position"] == before["line"]["head_position"]
        await eventually(lambda: _running(states), 30, every_s=0.2)
        assert (await bank.account(blue, fresh)).balance_minor == 100
        # The lost command is sent again under its id, as a caller would that never heard of it, and a new one works.
        await bank.ended_transfer(await bank.transfer(blue, red, 10, transfer_id=lost))
        token = (await bank.deposit(blue, 1)).consistency_token
        assert ((await bank.account(blue, token)).balance_minor, (await bank.account(red, token)).balance_minor) == (91, 11)
        assert exit_code(await status_calls.status(known)) == 0
        with pytest.raises(Refused) as twice:
            await status_calls.accept_history(known)
        assert twice.value.refusal.reason == "NOT_DIVERGED"
        with pytest.raises(Refused) as twice:
            await status_calls.refill(known, "accounts")
        assert twice.value.refusal.reason == "NOT_DIVERGED"


async def _running(states: Any) -> bool:
    return set((await states()).values()) == {"RUNNING"}
