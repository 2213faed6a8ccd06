"""The example subscribers take each event once, whatever happens to the broker and to themselves: the contract is neutral."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from deploy.local.system import WRITE
from examples.subscriber.__main__ import TRIES
from shared.platform.identity import Role
from tests.support.clients.bank import Bank, channels, deposit, new_id
from tests.support.clients.subscribers import BROKEN, PYTHON_AND_NODE, NodeSubscriber, PythonSubscriber, Subscriber, installed
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

Made = Callable[..., Subscriber]


@dataclass(slots=True)
class World:
    """A caller who deposits one unit at a time, on an account of each currency, and a subscriber."""

    stack: Stack
    bank: Bank
    accounts: dict[str, str]
    it: Subscriber
    deposits: dict[str, int] = field(default_factory=lambda: {"USD": 0, BROKEN: 0})

    async def deposit(self, times: int, currency: str = "USD") -> None:
        """So many deposits."""
        for _ in range(times):
            await self.bank.call(self.bank.accounts.DepositMoney, deposit(self.accounts[currency], 1, currency))
        self.deposits[currency] += times

    async def sees_more(self) -> None:
        """Waits until the subscriber has seen another deposit."""
        before = self.it.totals()
        await eventually(lambda: self.it.totals() > before, 60, every_s=0.05)

    async def agrees(self) -> None:
        """Waits until it has seen every deposit once, and has put aside each that its handler cannot take."""

        def seen() -> bool:
            usd, broken = self.deposits["USD"], self.deposits[BROKEN]
            return self.it.totals() == (usd, usd) and len(self.it.dead_letters()) == broken

        await eventually(seen, 60, every_s=0.1)


@pytest.fixture(params=PYTHON_AND_NODE)
def subscriber(request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Makes a subscriber in each language."""
    if request.param == "python":
        return lambda **where: PythonSubscriber(tmp_path, **where)
    program = installed(tmp_path_factory.mktemp("node") / "program")
    return lambda **where: NodeSubscriber(program, tmp_path, **where)


@asynccontextmanager
async def opened(stack: Stack, made: Made) -> AsyncIterator[World]:
    """Two accounts, and a subscriber that has seen nothing."""
    tenant = f"t-{new_id()}"
    async with channels(stack) as (write, read):
        bank = Bank(write, read, stack.token(tenant))
        owner_id, _ = await bank.register("Bill")
        accounts = {currency: (await bank.open(owner_id, currency))[0] for currency in ("USD", BROKEN)}
        token = stack.token(tenant, "billing", [Role.READER])
        it = made(write=stack.programs[WRITE].address, nats=stack.nats.url, token=token, tenant=tenant)
        yield World(stack, bank, accounts, it)


@pytest.fixture
async def world(stack: Stack, subscriber: Made) -> AsyncIterator[World]:
    """A world whose broker may be killed."""
    async with opened(stack, subscriber) as world:
        yield world


async def test_totals_stay_exact_through_broker_loss_and_kills(world: World) -> None:
    """The broker is killed and wiped, then the subscriber is killed in the middle of its work; some events it cannot handle.

    Each of those is tried three times and put aside, and the events behind it are handled; the replay gives it its effect, once.
    """
    it = world.it
    it.break_handler()
    process = it.start()
    try:
        await world.deposit(20)
        await world.agrees()
        assert it.log.read_text() == "", "it did without JetStream"
        await world.deposit(1, BROKEN)
        await world.agrees()
        world.stack.nats.kill()
        await world.deposit(10)
        await world.deposit(1, BROKEN)
        await world.deposit(10)
        await world.agrees()
        assert [it.tries(position) for position in it.dead_letters()] == [TRIES, TRIES]
        shutil.rmtree(world.stack.nats.folder / "streams")
        world.stack.nats.start()
        await world.deposit(20)
        await world.agrees()
        for _ in range(3):
            working = asyncio.create_task(world.deposit(40))
            await world.sees_more()
            process.send_signal(signal.SIGKILL)
            process.wait()
            process = it.start()
            await working
        await world.deposit(1, BROKEN)
        await eventually(lambda: it.log.read_text().count("try 2") == 3, 60)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = it.start()
        await world.agrees()
    finally:
        process.kill()
        process.wait()
    await replayed(world)


async def replayed(world: World) -> None:
    """Dead letters stay while the handler fails; then each takes effect once, also if the replay is killed and repeated."""
    it, letters = world.it, world.it.dead_letters()
    assert await it.run("replay") == 1
    assert (it.dead_letters(), it.totals(BROKEN)) == (letters, (0, 0))
    it.mend_handler()
    world.stack.nats.kill()
    replaying = it.start("replay")
    await eventually(lambda: it.totals(BROKEN) != (0, 0), 60)
    replaying.kill()
    replaying.wait()
    for _ in range(2):
        assert await it.run("replay") == 0
        assert (it.dead_letters(), it.totals(BROKEN)) == ([], (3, 3))
    process = it.start()
    try:
        await world.deposit(1, BROKEN)
        await eventually(lambda: it.totals(BROKEN) == (4, 4), 60)
        assert it.totals() == (world.deposits["USD"], world.deposits["USD"])
    finally:
        process.kill()
        process.wait()
