"""The order of starting does not matter: each process, started before what it needs, waits, says for what, and then works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from deploy.engines.nats import Nats
from deploy.local.system import PROJECTOR, READ, RELAY, SAGA, WRITE
from tests.support.checks.invariants import check, look
from tests.support.checks.stream import published
from tests.support.clients.bank import Bank, channels
from tests.support.system.engines import Engines
from tests.support.system.mail import Mailbox
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

POSTGRES, NATS = "postgres", "nats"

# What a process says of what is not there; any one of these.
WAITS_FOR: dict[str, dict[str, tuple[str, ...]]] = {
    WRITE: {POSTGRES: ("waiting_for_database",)},
    RELAY: {POSTGRES: ("lease_waits_for_database", "relay_waits_for_database"), NATS: ("broker_awaited",)},
    READ: {POSTGRES: ("waiting_for_database",)},
    PROJECTOR: {
        POSTGRES: ("lease_waits_for_database", "consumer_awaits_database"),
        NATS: ("broker_awaited",),
        WRITE: ("event_store_awaited",),
    },
    SAGA: {POSTGRES: ("waiting_for_database",), NATS: ("broker_awaited",), WRITE: ("event_store_awaited",)},
}

# In each of them every process is once started before something that it needs.
ORDERS = [
    (PROJECTOR, READ, SAGA, RELAY, WRITE, NATS, POSTGRES),
    (WRITE, READ, PROJECTOR, RELAY, SAGA, POSTGRES, NATS),
    (POSTGRES, PROJECTOR, RELAY, SAGA, NATS, READ, WRITE),
    (NATS, RELAY, PROJECTOR, POSTGRES, READ, SAGA, WRITE),
]


@pytest.mark.parametrize(
    "order", [pytest.param(order, marks=[pytest.mark.long] * (order != ORDERS[0]), id=" ".join(order)) for order in ORDERS]
)
async def test_the_order_of_starting_does_not_matter(
    private_engines: Engines, mailbox: Mailbox, tmp_path: Path, order: tuple[str, ...]
) -> None:
    """Each waits and says for what; none ends; when the last is there, a command is answered and seen by a query."""
    stack = Stack(tmp_path / "stack", private_engines.databases(), private_engines.postgres, private_engines.nats, mailbox)
    private_engines.postgres.stop()
    private_engines.nats.stop()
    engines: dict[str, Callable[[], object]] = {POSTGRES: private_engines.postgres.start, NATS: private_engines.nats.start}
    there: set[str] = set()
    try:
        for name in order:
            if name in engines:
                engines[name]()
            else:
                stack.start(name)
                await says_what_it_waits_for(stack, name, there)
            there.add(name)
        await works(stack)
        assert all(stack.alive(name) for name in stack.programs)
    finally:
        await stack.stop_all()


async def says_what_it_waits_for(stack: Stack, name: str, there: set[str]) -> None:
    """Returns when the log names the first thing that the process needs and has not got."""
    missing = [words for needed, words in WAITS_FOR[name].items() if needed not in there]
    if missing:
        await eventually(lambda: any(word in stack.log(name).read_text() for words in missing for word in words), 30)


async def works(stack: Stack) -> None:
    """A command is answered and seen by a query, and what is published is the line."""
    await stack.wait_ready(WRITE)
    await stack.wait_ready(READ)
    async with channels(stack) as (write, read):
        bank = Bank(write, read, stack.token())
        alice, receipt = await bank.register("Alice")
        assert (await bank.person(alice, receipt.consistency_token)).name == "Alice"
    picture = await look(stack)
    check(picture)
    await published(stack.nats.url, picture.line)


async def test_the_databases_are_made_last(engines: Engines, nats_server: Nats, mailbox: Mailbox, tmp_path: Path) -> None:
    """PostgreSQL is there and the databases are not, as before a bootstrap: all wait for that, too."""
    databases = engines.databases()
    # With a broker of its own: a stream has one line, and on the common one it may be another's.
    stack = Stack(tmp_path / "stack", databases, engines.postgres, nats_server, mailbox)
    made = {databases.write.name: engines.templates.write, databases.read.name: engines.templates.read}
    made[databases.saga.name] = engines.templates.saga
    with psycopg.connect(engines.admin_url, autocommit=True) as admin:
        for name, template in made.items():
            rename = sql.SQL("ALTER DATABASE {} RENAME TO {}")
            admin.execute(rename.format(sql.Identifier(name), sql.Identifier(f"{name}_later")))
            assert template.name != name
        try:
            for name in stack.programs:
                stack.start(name)
            for name in stack.programs:
                await says_what_it_waits_for(stack, name, {NATS})
            for name in made:
                admin.execute(rename.format(sql.Identifier(f"{name}_later"), sql.Identifier(name)))
            await works(stack)
        finally:
            await stack.stop_all()
