"""A watch that is resumed over kill -9 of everything that serves it."""

from __future__ import annotations

import asyncio

from cli import watch_calls
from cli.endpoints import Endpoints
from deploy.local.system import PROJECTOR, READ, WRITE
from tests.support.clients.bank import Bank, channels
from tests.support.system.stack import Stack


async def test_a_watch_misses_nothing_and_repeats_nothing_over_kills(stack: Stack) -> None:
    """Projector and read service are killed under load: versions only grow, each state is the fold's, the last is the last."""
    await stack.start_all()
    known = Endpoints(write=stack.programs[WRITE].address, read=stack.programs[READ].address, tokens={"acme": stack.token()})
    async with channels(stack) as (write, read):
        bank = Bank(write, read, stack.token())
        person_id, _ = await bank.register("Alice")
        account_id, receipt = await bank.open(person_id)
        await bank.account(account_id, receipt.consistency_token)
        seen: list[tuple[int, int]] = []
        deposits = 0
        done = asyncio.Event()

        async def follow() -> None:
            async for change in watch_calls.watch(known, "acme", "account", account_id, ""):
                shown = change["account"]
                seen.append((shown["version"], shown["balance_minor"]))
                if done.is_set() and shown["version"] == deposits + 1:
                    return

        async def load() -> None:
            nonlocal deposits
            while not done.is_set():
                await bank.deposit(account_id, 5)
                deposits += 1
                await asyncio.sleep(0.002)

        following, loading = asyncio.create_task(follow()), asyncio.create_task(load())
        for name in (PROJECTOR, READ, PROJECTOR, READ):
            before = len(seen)
            async with asyncio.timeout(30):
                while len(seen) < before + 5:  # noqa: ASYNC110 (a count, of what comes over the network)
                    await asyncio.sleep(0.01)
            await stack.kill9(name)
            stack.start(name)
            await stack.wait_ready(name, 30)
        done.set()
        await loading
        await bank.deposit(account_id, 5)
        deposits += 1
        await asyncio.wait_for(following, 30)
    versions = [version for version, _ in seen]
    assert versions == sorted(set(versions))
    assert all(balance == 5 * (version - 1) for version, balance in seen)
    assert seen[-1] == (deposits + 1, 5 * deposits)
