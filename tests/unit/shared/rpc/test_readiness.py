"""Whether a process can do its work."""

from __future__ import annotations

import asyncio

from shared.rpc.readiness import Readiness
from tests.support.system.waiting import eventually


async def fine() -> str:
    """A check that passes."""
    return ""


async def test_it_is_not_ready_before_it_was_asked_and_ready_when_all_checks_pass() -> None:
    """A process that has just begun is not sent any work."""
    readiness = Readiness()
    readiness.add("database", fine)
    assert not readiness.ready
    assert await readiness.ask() == {}
    assert readiness.ready


async def test_each_check_that_fails_is_named_and_what_it_raised_is_not_told() -> None:
    """The reasons go to anybody who asks, so an exception's text, which may hold anything, is no reason."""

    async def away() -> str:
        return "the database is away"

    async def broken() -> str:
        raise RuntimeError("password=secret")

    readiness = Readiness()
    for name, check in (("database", away), ("broker", broken), ("other", fine)):
        readiness.add(name, check)
    assert await readiness.ask() == {"database": "the database is away", "broker": "RuntimeError"}
    assert not readiness.ready


async def test_a_check_that_does_not_end_holds_up_nothing_and_is_not_asked_twice() -> None:
    """A frozen database makes the process not ready within the time, and does not gather one statement a second."""
    asked, release = 0, asyncio.Event()

    async def frozen() -> str:
        nonlocal asked
        asked += 1
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:  # as a driver that waits for its cancel request
                continue
        return ""

    readiness = Readiness(within_s=0.01)
    readiness.add("database", frozen)
    assert await readiness.ask() == {"database": "no answer within 0.01 s"}
    assert await readiness.ask() == {"database": "no answer within 0.01 s"}
    assert asked == 1
    release.set()
    await eventually(lambda: all(task.done() for task in readiness._under_way.values()))
    assert await readiness.ask() == {}
    assert asked == 2


async def test_an_answer_that_nobody_renews_says_nothing() -> None:
    """If the asking itself has come to an end, the last answer does not stand for ever."""
    readiness = Readiness()
    await readiness.ask()
    readiness._asked_at -= 60
    assert list(readiness.failures) == ["checks"]


async def test_a_process_that_drains_is_never_ready_again() -> None:
    """Whatever the checks say."""
    readiness = Readiness()
    readiness.drain()
    assert list(await readiness.ask()) == ["drain"]
