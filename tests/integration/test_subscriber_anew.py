"""The example subscriber handles the line anew from any position, over an event store in this process and without a broker."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from examples.subscriber.__main__ import add_deposit, follow, main
from examples.subscriber.inbox import Event, Inbox, Overtaken, Place
from examples.subscriber.line import Line
from tests.support.domains.gifts import WriteService
from tests.support.fakes.line import EPOCH, Store, uid
from tests.support.fakes.write_server import writing
from tests.support.system.waiting import eventually

NOWHERE = "nats://127.0.0.1:1"


@pytest.fixture
async def store() -> Store:
    """A line of five deposits: 1, 2, 4, 8 and 16."""
    store = Store()
    for number in range(5):
        store.deposit("acme", uid(1), uid(2), 2**number, 0)
    return store


@pytest.fixture
async def address(store: Store) -> AsyncIterator[str]:
    """Where the line is read."""
    async with writing(store, WriteService()) as address:
        yield address


def totals(file: Path) -> list[tuple[int, int]]:
    """How many deposits it has seen, and their sum."""
    with sqlite3.connect(file) as database:
        return database.execute("SELECT deposits, amount_minor FROM totals").fetchall()


async def followed(line: Line, inbox: Inbox, until: int) -> None:
    """Follows until the place is there."""
    task = asyncio.create_task(follow(line, inbox))
    try:
        await eventually(lambda: inbox.place().position == until, 20)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_events_are_handled_anew_from_any_position(store: Store, address: str, tmp_path: Path) -> None:
    """The effects are those of the events from there on, each once; behind them it goes on as ever."""
    file = tmp_path / "subscriber.sqlite"
    inbox = Inbox(file)
    async with grpc.aio.insecure_channel(address) as channel:
        line = Line(channel, "t0ken", NOWHERE)
        await followed(line, inbox, 5)
        assert totals(file) == [(5, 31)]
        before = await line.before(3)
        assert before == Place(EPOCH, 2, store.events[1].event_id)
        inbox.begin_anew(before)
        await followed(line, inbox, 5)
        assert totals(file) == [(3, 28)]
        store.deposit("acme", uid(1), uid(2), 32, 0)
        inbox.begin_anew(await line.before(1))
        await followed(line, inbox, 6)
        assert totals(file) == [(6, 63)]
        with pytest.raises(LookupError, match="the line ends before 7"):
            await line.before(8)
    inbox.close()


async def test_beginning_anew_forgets_dead_letters_and_overtakes_who_goes_on(address: str, tmp_path: Path) -> None:
    """A letter that is handled again is none; another subscriber on the file finds itself overtaken, and changes nothing."""
    file = tmp_path / "subscriber.sqlite"
    inbox, other = Inbox(file), Inbox(file)
    async with grpc.aio.insecure_channel(address) as channel:
        line = Line(channel, "t0ken", NOWHERE)
        for number in (1, 2):
            inbox.handle(EPOCH, await line.one(number), add_deposit)
        inbox.give_up(EPOCH, await line.one(3), ValueError("no"))
        assert inbox.dead_letters() == [3]
        fourth: Event = await line.one(4)
        inbox.begin_anew(await line.before(1))
        with pytest.raises(Overtaken):
            other.handle(EPOCH, fourth, add_deposit)
        await followed(line, inbox, 5)
        assert (inbox.dead_letters(), totals(file)) == ([], [(5, 31)])
    inbox.close()
    other.close()


@pytest.mark.parametrize("start", ["0", "-1", "x", "1.5", ""])
def test_a_position_that_is_none_is_refused(
    start: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the file is touched."""
    words = ["follow", "--write", "a:1", "--nats", NOWHERE, "--token", "t", f"--from={start}"]
    monkeypatch.setattr(sys, "argv", ["subscriber", *words])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2
    assert "a position is a number from 1 on" in capsys.readouterr().err
