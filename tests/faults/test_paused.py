"""A process that is stopped and woken, or gone for long: the others go on meanwhile, and it harms nothing when it is back."""

from __future__ import annotations

import time

import pytest

from deploy.bootstrap import Databases
from deploy.engines.nats import Nats
from deploy.local.system import PROJECTOR, RELAY, WRITE
from tests.support.checks.invariants import check, look
from tests.support.clients.bank import Bank, channels, deposit, item, refused
from tests.support.clients.traffic import running
from tests.support.system.engines import Engines
from tests.support.system.mail import Mailbox
from tests.support.system.stack import Stack

pytestmark = pytest.mark.long

PAUSE_S = 5.0
"""Longer than a database lets a transaction wait for its client, shorter than a caller waits for its answer."""
BATCHES, SIZE = 1200, 100


async def test_a_write_service_that_is_stopped_and_woken(stack: Stack) -> None:
    """It may hold the shard's lock: then the database ends its transaction, and the other replica goes on. Four times."""
    second = stack.replica(WRITE)
    stack.start(second)
    await stack.wait_ready(second)
    async with running(stack, (WRITE, second), accounts=2) as traffic:
        for victim in (second, WRITE) * 2:
            await traffic.more(50)
            stopped_at = time.monotonic()
            stack.sigstop(victim)
            await traffic.more(50, within_s=30)
            while time.monotonic() - stopped_at < PAUSE_S:
                await traffic.more(1, within_s=30)
            stack.sigcont(victim)
    check(await look(stack, within_s=60), traffic.acknowledged)


async def test_a_projector_that_is_gone_while_the_stream_forgets(
    engines: Engines, nats_server: Nats, databases: Databases, mailbox: Mailbox, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """120,000 events later, of which the stream holds a part: queries answer as before, tokens are refused in time.

    Nobody else is held up: the line grows, transfers end. Back again, the projector reads the store up to where the stream
    begins, and the tables are the fold of the line.
    """
    folder = tmp_path_factory.mktemp("stack")
    settings = {"FOLDLINE_STREAM_BYTES_MAX": str(4 * 1024 * 1024)}
    stack = Stack(folder, databases, engines.postgres, nats_server, mailbox, settings=settings)
    try:
        await stack.start_all()
        async with channels(stack) as (write, read):
            bank = Bank(write, read, stack.token("acme"))
            alice, _ = await bank.register("Alice")
            blue, _ = await bank.open(alice)
            red, opened = await bank.open(alice, name="red")
            assert (await bank.account(red, opened.consistency_token)).version == 1
            await stack.kill9(PROJECTOR)
            before = {name: rss(stack.pid(name)) for name in (WRITE, RELAY)}
            for _ in range(BATCHES):
                receipts = await bank.batch(*(item(deposit(blue, 1)) for _ in range(SIZE)))
            assert (await bank.account(red)).balance_minor == 0
            told = await refused(bank.account(blue, receipts[-1].consistency_token))
            assert told.reason == "NOT_YET_CONSISTENT"
            assert int(told.facts["lag"]) >= BATCHES * SIZE
            started, _ = await bank.transfer(blue, red, 7)
            grown = {name: rss(stack.pid(name)) - was for name, was in before.items()}
            assert all(more < 150 * 1024 * 1024 for more in grown.values()), grown

            stack.start(PROJECTOR)
            await stack.wait_ready(PROJECTOR)
        picture = await look(stack, within_s=180)
        check(picture)
        assert {row["status"] for row in picture.tables["transfers"] if str(row["transfer_id"]) == started} == {"completed"}
    finally:
        await stack.stop_all()


def rss(pid: int) -> int:
    """The bytes of memory that a process holds."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096
