"""The example subscriber takes each event once, whatever happens to the broker and to itself."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.local.system import WRITE
from examples.subscriber.__main__ import TRIES, add_deposit, follow, replay
from examples.subscriber.inbox import Event, Inbox, Overtaken, Place
from examples.subscriber.line import HistoryDiverged, Line
from shared.platform.identity import Role
from tests.support.clients.bank import Bank, channels, deposit, new_id
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

ROOT = Path(__file__).parents[2]


@dataclass(slots=True)
class World:
    """A caller who deposits one unit at a time, and the subscriber's file."""

    stack: Stack
    tenant: str
    bank: Bank
    account_id: str
    file: Path
    line: Line
    deposits: int = 0

    async def deposit(self, times: int) -> None:
        """So many deposits."""
        for _ in range(times):
            await self.bank.call(self.bank.accounts.DepositMoney, deposit(self.account_id, 1))
        self.deposits += times

    def start(self) -> subprocess.Popen[bytes]:
        """A subscriber of its own process."""
        token = self.stack.token(self.tenant, "billing", [Role.READER])
        words = [
            "--write",
            self.stack.programs[WRITE].address,
            "--nats",
            self.stack.nats.url,
            "--token",
            token,
            "--file",
            str(self.file),
        ]
        return subprocess.Popen([sys.executable, "-m", "examples.subscriber", "follow", *words], cwd=ROOT)  # noqa: S603 (our own program)

    def totals(self) -> tuple[int, int]:
        """How many deposits the subscriber has seen, and their sum."""
        with sqlite3.connect(self.file, timeout=10) as database:
            asked = "SELECT deposits, amount_minor FROM totals WHERE tenant = ?"
            row = database.execute(asked, (self.tenant,)).fetchone()
        return row or (0, 0)

    async def sees_more(self) -> None:
        """Waits until the subscriber has seen another deposit."""
        before = self.totals()
        await eventually(lambda: self.totals() > before)

    async def agree(self) -> None:
        """Waits until the subscriber has seen every deposit, once."""
        await eventually(lambda: self.totals() == (self.deposits, self.deposits), 60)


@asynccontextmanager
async def opened(stack: Stack, file: Path) -> AsyncIterator[World]:
    """An account, and a subscriber's file that is empty."""
    tenant = f"t-{new_id()}"
    async with channels(stack) as (write, read):
        bank = Bank(write, read, stack.token(tenant))
        owner_id, _ = await bank.register("Bill")
        Inbox(file).close()
        line = Line(write, stack.token(tenant, "billing", [Role.READER]), stack.nats.url)
        yield World(stack, tenant, bank, (await bank.open(owner_id))[0], file, line)


@pytest.fixture
async def world(shared_stack: Stack, tmp_path: Path) -> AsyncIterator[World]:
    """A world beside others."""
    async with opened(shared_stack, tmp_path / "subscriber.sqlite") as world:
        yield world


@pytest.fixture
async def own_world(stack: Stack, tmp_path: Path) -> AsyncIterator[World]:
    """A world whose broker may be killed."""
    async with opened(stack, tmp_path / "subscriber.sqlite") as world:
        yield world


async def test_totals_stay_exact_through_broker_loss_and_kills(own_world: World) -> None:
    """The broker is killed and wiped, then the subscriber is killed in the middle of its work."""
    world = own_world
    subscriber = world.start()
    try:
        await world.deposit(20)
        await world.agree()
        world.stack.nats.kill()
        await world.deposit(20)
        await world.agree()
        shutil.rmtree(world.stack.nats.folder / "streams")
        world.stack.nats.start()
        await world.deposit(20)
        await world.agree()
        for _ in range(3):
            working = asyncio.create_task(world.deposit(40))
            await world.sees_more()
            subscriber.send_signal(signal.SIGKILL)
            subscriber.wait()
            subscriber = world.start()
            await working
        await world.agree()
    finally:
        subscriber.kill()
        subscriber.wait()


async def test_an_event_that_cannot_be_handled_waits_for_its_replay(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The events behind it are handled meanwhile; the replay gives it its effect, once."""
    monkeypatch.setattr("examples.subscriber.__main__.PAUSE_S", 0.0)
    await world.deposit(3)
    inbox, line, tries = Inbox(world.file), world.line, list[int]()

    def bad_moment(database: sqlite3.Connection, event: Event) -> None:
        add_deposit(database, event)
        if event.aggregate_id == world.account_id and event.version == 3:
            tries.append(event.position)
            raise ValueError("no")

    following = asyncio.create_task(follow(line, inbox, bad_moment))
    await eventually(lambda: world.totals() == (2, 2), 60)
    following.cancel()
    assert inbox.dead_letters() == tries[:1]
    assert len(tries) == TRIES
    assert await replay(line, inbox) == 0
    assert await replay(line, inbox) == 0
    assert world.totals() == (3, 3)
    inbox.close()


async def test_a_lost_history_stops_it_by_name(world: World) -> None:
    """What was handled is not what the store holds: nobody but a person can say what that means."""
    for place in (Place("e", 1, "another"), Place("e", 10**9, "later")):
        with pytest.raises(HistoryDiverged):
            await anext(world.line.after(place))


def test_of_two_on_one_file_one_is_overtaken(tmp_path: Path) -> None:
    """The second transaction for a position changes nothing."""
    first, second = Inbox(tmp_path / "file"), Inbox(tmp_path / "file")
    event = Event(1, "id", "acme", "account", "a", 1, "other.Event", b"")
    first.handle("e", event, add_deposit)
    with pytest.raises(Overtaken):
        second.handle("e", event, add_deposit)
    assert first.place() == second.place() == Place("e", 1, "id")
    first.close()
    second.close()
