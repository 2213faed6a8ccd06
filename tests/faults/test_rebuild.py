"""A rebuild in the running system, over kill -9 of the projector: queries and watches of a row and of a list notice nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest

from cli import rebuild_calls, watch_calls
from cli.calls import Refused
from cli.endpoints import Endpoints
from deploy.local.system import PROJECTOR, READ, WRITE
from shared.platform.identity import Role
from tests.support.clients.bank import Bank, channels
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually


async def test_a_rebuild_is_invisible_over_kills(stack: Stack) -> None:
    """Under load, the projector killed again and again: no query fails or goes back, watches go on, the new tables serve."""
    await stack.start_all()
    known = Endpoints(
        write=stack.programs[WRITE].address,
        read=stack.programs[READ].address,
        tokens={"acme": stack.token(), "operator": stack.token("operators", "olga", [Role.OPERATOR])},
    )
    async with channels(stack) as (write, read):
        bank = Bank(write, read, stack.token())
        person_id, _ = await bank.register("Alice")
        account_id, receipt = await bank.open(person_id)
        await bank.account(account_id, receipt.consistency_token)
        for _ in range(20):
            receipt = await bank.deposit(account_id, 5)
        shown: list[int] = []
        watched: list[int] = []
        listed: list[tuple[str, int]] = []
        done, deposits = asyncio.Event(), 20

        async def load() -> None:
            nonlocal deposits
            while not done.is_set():
                await bank.deposit(account_id, 5)
                deposits += 1
                await asyncio.sleep(0.005)

        async def ask() -> None:
            last = 0
            while not done.is_set():
                answer = await bank.account(account_id)
                assert answer.balance_minor == 5 * (answer.version - 1)
                assert answer.version >= last
                last = answer.version
                shown.append(last)

        async def follow() -> None:
            async for change in watch_calls.watch(known, "acme", "account", account_id, ""):
                watched.append(change["account"]["version"])
                if done.is_set() and watched[-1] == deposits + 1:
                    return

        async def follow_list() -> None:
            async for change in watch_calls.watch_list(known, "acme", "account", {"owner": person_id}, ""):
                listed.append((change["change"], change["account"]["version"]))
                if done.is_set() and listed[-1][1] == deposits + 1:
                    return

        tasks = [asyncio.create_task(each) for each in (load(), ask(), ask())]
        following = asyncio.gather(follow(), follow_list())
        await rebuild_calls.start(known, "accounts", only_if_same=True)
        with pytest.raises(Refused) as twice:
            await rebuild_calls.start(known, "accounts", only_if_same=True)
        assert twice.value.refusal.reason == "REBUILD_THERE_ALREADY"
        for pause_s in (0.1, 0.4, 0.2):
            await asyncio.sleep(pause_s)
            await stack.kill9(PROJECTOR)
            stack.start(PROJECTOR)
            await stack.wait_ready(PROJECTOR, 30)
        last: dict[str, Any] = {}
        async with asyncio.timeout(60):
            async for last in rebuild_calls.follow(known, "accounts"):
                assert last["position"] >= 0
        assert (last["state"], last["diff"]["rows_differing"]) == ("REBUILD_STATE_SWITCHED", 0)
        done.set()
        await asyncio.gather(*tasks)
        deposits += 1
        token = (await bank.deposit(account_id, 5)).consistency_token
        account = await bank.account(account_id, token)
        assert (account.version, account.balance_minor) == (deposits + 1, 5 * deposits)
        await asyncio.wait_for(following, 30)
        assert watched == sorted(set(watched))
        versions = [version for _, version in listed]
        assert versions == sorted(set(versions))
        assert {change for change, _ in listed[1:]} == {"changed"}
        assert len(shown) > 20
        await rebuild_calls.steer(known, "drop", "accounts")

        def dropped() -> bool:
            with psycopg.connect(stack.databases.read.owner) as owner:
                return owner.execute("SELECT count(*) FROM pg_class WHERE relname LIKE '%\\_\\_%old'").fetchone() == (0,)

        await eventually(dropped, 20)
