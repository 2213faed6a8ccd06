"""What is done to the broker and the relay while the whole system works. The projector follows the line regardless.

Each test ends with what is always true: positions dense, every acknowledged command kept, every table the fold of the
line (tests/support/checks/invariants.py), and the stream a faithful copy again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import nats.errors
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from deploy.local.system import PROJECTOR, RELAY
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.line import broker
from shared.line.broker_access import Broker, connect
from tests.support.checks.invariants import Acknowledged, check, look
from tests.support.clients.bank import Bank, channels, deposit, new_id
from tests.support.fakes.relaying import STREAM, in_step
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

TENANT = "acme"
CALLERS = 8


@dataclass(slots=True)
class Load:
    """Callers that deposit all the time, and what they were told."""

    bank: Bank
    account_ids: list[str]
    acknowledged: list[Acknowledged] = field(default_factory=list)
    callers: list[asyncio.Task[None]] = field(default_factory=list)

    async def deposit(self, account_id: str) -> str:
        """One deposit; returns its consistency token."""
        command_id = new_id()
        request = deposit(account_id, 1, command_id=command_id)
        receipt = await self.bank.call(self.bank.accounts.DepositMoney, request)
        self.acknowledged.append(Acknowledged(TENANT, command_id, receipt))
        token: str = receipt.consistency_token
        return token

    async def seen(self) -> None:
        """A deposit, read back at the token of its receipt."""
        token = await self.deposit(self.account_ids[0])
        await self.bank.account(self.account_ids[0], token)

    async def more(self, commands: int, within_s: float = 20) -> None:
        """Waits until so many more commands were acknowledged."""
        goal = len(self.acknowledged) + commands
        await eventually(lambda: len(self.acknowledged) >= goal, within_s)

    def begin(self) -> None:
        """Each caller deposits on an account of its own. A call that fails ends its caller."""

        async def call(account_id: str) -> None:
            while True:
                await self.deposit(account_id)

        self.callers = [asyncio.create_task(call(account_id)) for account_id in self.account_ids]

    async def end(self) -> None:
        """No caller begins another call. Raises what a caller has met: commands do not depend on the broker at all."""
        for caller in self.callers:
            caller.cancel()
        for met in await asyncio.gather(*self.callers, return_exceptions=True):
            if not isinstance(met, asyncio.CancelledError) and met is not None:
                raise met
        self.callers = []


@pytest.fixture
async def load(stack: Stack) -> AsyncIterator[Load]:
    """Eight callers at work on the stack."""
    async with channels(stack) as (write, read):
        bank = Bank(write, read, stack.token(TENANT))
        owner_id, _ = await bank.register("Bill")
        load = Load(bank, [(await bank.open(owner_id))[0] for _ in range(CALLERS)])
        await load.seen()
        load.begin()
        await load.more(100)
        yield load
        for caller in load.callers:
            caller.cancel()
        await asyncio.gather(*load.callers, return_exceptions=True)


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[Client]:
    """A connection of somebody who can do anything to the broker."""
    client = await connect(Broker(stack.nats.url), "somebody")
    yield client
    await client.close()


async def settle(stack: Stack, client: Client, load: Load) -> None:
    """Ends the load and checks everything."""
    await load.more(200)
    await load.seen()
    await load.end()
    check(await look(stack), load.acknowledged)
    await in_step(client.jetstream(), stack.databases.write, 30)
    assert stack.alive(PROJECTOR)
    assert stack.alive(RELAY)


@pytest.mark.long
async def test_a_relay_stopped_past_its_lease_and_woken(stack: Stack, client: Client, load: Load) -> None:
    """Another takes over, readers see their writes, and the sleeper's last words change nothing."""
    other = stack.replica(RELAY)
    stack.start(other)
    await eventually(lambda: "lease_stands_by" in stack.log(other).read_text(), 30)
    stack.sigstop(RELAY)
    await eventually(lambda: "lease_gained" in stack.log(other).read_text(), 30)
    await load.more(300)
    await load.seen()
    stack.sigcont(RELAY)
    await eventually(lambda: "lease_lost" in stack.log(RELAY).read_text(), 30)
    await settle(stack, client, load)


@pytest.mark.parametrize(
    "what", [pytest.param("purged", marks=pytest.mark.long), pytest.param("deleted", marks=pytest.mark.long), "recreated"]
)
async def test_the_stream_is_taken_away_again_and_again(stack: Stack, client: Client, load: Load, what: str) -> None:
    """What the consumer was owed is read from the event store."""
    streams = client.jetstream()
    for _ in range(5):
        await load.more(100)
        with contextlib.suppress(nats.errors.Error):  # the relay is making it anew at this moment
            if what == "purged":
                await streams.purge_stream(STREAM)
            else:
                await streams.delete_stream(STREAM)
            if what == "recreated":
                await streams.add_stream(name=STREAM, subjects=[broker.stream_subjects(1)])
        await load.seen()
    await settle(stack, client, load)


@pytest.mark.long
async def test_messages_doubled_and_out_of_order(stack: Stack, client: Client, load: Load) -> None:
    """Copies of events further down the stream are not taken for events, wherever they push in; nor are pages said twice."""
    streams = client.jetstream()
    copied = 0
    pages: list[bytes] = []

    async def hear(message: Msg) -> None:
        pages.append(message.data)

    listening = await client.subscribe(broker.pages_subject(1), cb=hear)
    for nth in itertools.count():
        if nth >= 10 and copied > 20:
            break
        await load.more(50)
        with contextlib.suppress(nats.errors.Error):  # the relay is making the stream anew at this moment
            state = (await streams.stream_info(STREAM)).state
            for sequence in random.sample(range(state.first_seq, state.last_seq + 1), min(20, state.messages)):
                message = await streams.get_msg(STREAM, sequence)
                headers = {name: value for name, value in (message.headers or {}).items() if not name.startswith("Nats-")}
                await streams.publish(message.subject or "", message.data or b"", headers=headers)
                copied += 1
        for page in random.sample(pages, min(20, len(pages))):
            await client.publish(broker.pages_subject(1), page)
    await listening.unsubscribe()
    await settle(stack, client, load)


async def test_messages_that_no_relay_published(stack: Stack, client: Client, load: Load) -> None:
    """Garbage, events of no history, and an event far ahead, in the stream and as pages: readers see their writes.

    The stream is made anew.
    """
    streams = client.jetstream()
    subject = broker.stream_subjects(1).replace(">", "acme.account.Forged")
    for nth in range(10):
        await load.more(50)
        with contextlib.suppress(nats.errors.Error):  # the relay is making the stream anew at this moment
            info = await streams.stream_info(STREAM)
            last = await streams.get_msg(STREAM, info.state.last_seq)
            headers = {name: value for name, value in (last.headers or {}).items() if not name.startswith("Nats-")}
            for forged in (None, headers, headers | {broker.ID: new_id()}):
                await streams.publish(subject, b"\xff", headers=forged)
            own, next_one = (info.config.metadata or {})[broker.STREAM_EPOCH], info.state.last_seq + 1
            for epoch, position in (("another/1", next_one), (own, 10**9 + nth), (own, 1)):
                event = EventEnvelope(position=position, event_id=new_id(), tenant=TENANT, type="bank.v1.MoneyDeposited")
                await client.publish(broker.pages_subject(1), broker.to_pages(1, epoch, [event], client.max_payload)[0])
            await client.publish(broker.pages_subject(1), b"\xff")
        await load.seen()
    await settle(stack, client, load)


@pytest.mark.long
async def test_a_stream_that_holds_too_little(stack: Stack, client: Client, load: Load) -> None:
    """Somebody lets it keep five messages: what consumers miss they read from the event store."""
    streams = client.jetstream()
    for _ in range(5):
        with contextlib.suppress(nats.errors.Error):
            config = (await streams.stream_info(STREAM)).config
            config.max_msgs = 5
            await streams.update_stream(config)
        await load.more(100)
        await load.seen()
    await load.end()
    check(await look(stack), load.acknowledged)


@pytest.mark.parametrize(
    "kept", [pytest.param(True, marks=pytest.mark.long, id="store kept"), pytest.param(False, id="store wiped")]
)
async def test_nats_is_away_under_load(stack: Stack, client: Client, load: Load, kept: bool) -> None:
    """Commands go on as if nothing were; reads lag at most by the interval at which the store is polled."""
    stack.nats.kill()
    await load.more(500)
    await load.seen()
    if not kept:
        shutil.rmtree(stack.nats.folder / "streams")
    stack.nats.start()
    await load.more(500)
    await settle(stack, client, load)


@pytest.mark.long
async def test_the_relay_is_killed_under_load(stack: Stack, client: Client, load: Load) -> None:
    """Commands and reads go on without it; started again it goes on where the stream ends."""
    for _ in range(3):
        await load.more(100)
        await stack.kill9(RELAY)
        await load.more(100)
        await load.seen()
        stack.start(RELAY)
    await settle(stack, client, load)
