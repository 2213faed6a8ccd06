"""Prometheus of the profile `observe`: it reads every process, takes the rules, and has an answer to what the dashboard asks."""

from __future__ import annotations

import asyncio
import json
from urllib.parse import quote

import pytest
from grpc.aio import AioRpcError

from deploy.bank import Bank
from tests.containers.composed import SERVING, Composed
from tests.containers.engine import Failed
from tests.containers.images import ROOT
from tests.containers.test_compose import channels
from tests.support.system.waiting import eventually

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1200)]
# Of each kind one: gauges with a unit and without, of all processes and of one, a histogram's two parts.
ASKED = {
    "up",
    "foldline_head",
    "foldline_relay_position",
    "foldline_consumer_position",
    "foldline_process_overdue_seconds",
    "foldline_event_loop_delay_seconds_bucket",
    "rpc_server_call_duration_seconds_count",
}
PANELS = json.loads((ROOT / "deploy/observe/dashboard.json").read_text())["panels"]
# What compose has none of: certificates, and tenants that metrics tell apart.
NOT_THERE = {"foldline_tls_certificate_expiry_timestamp_seconds", "foldline_tenant_commands_waiting"}


async def test_prometheus_finds_every_process_and_takes_the_rules(composed: Composed) -> None:
    """The profile `observe`: each process is scraped, what the rules ask for is there by name, and none fails when evaluated."""
    await composed.ready()
    await asyncio.to_thread(composed.watch)
    async with channels(composed) as (write, read):  # a write service tells of the line's end once it has committed
        await Bank(write, read, composed.tokens()["acme"], timeout_s=60).register("Ada")

    async def scraped() -> bool:
        try:
            [targets] = await asyncio.to_thread(composed.asked, "/api/v1/targets")
        except Failed:  # it is starting
            return False
        return [target["health"] for target in targets["activeTargets"]] == ["up"] * len(SERVING)

    await eventually(scraped, 120, every_s=1)

    async def known() -> bool:
        [names] = await asyncio.to_thread(composed.asked, "/api/v1/label/__name__/values")
        return set(names) >= ASKED

    await eventually(known, 120, every_s=1)

    async def evaluated() -> bool:
        [found] = await asyncio.to_thread(composed.asked, "/api/v1/rules")
        rules = [rule for group in found["groups"] for rule in group["rules"]]
        assert not [rule for rule in rules if rule["health"] == "err"]
        return len(rules) > 5 and all(rule["health"] == "ok" for rule in rules)

    await eventually(evaluated, 120, every_s=1)


async def test_every_query_of_the_dashboard_has_an_answer(composed: Composed) -> None:
    """After calls of which some are refused, and a transfer, no panel is empty that has something to show on compose."""
    async with channels(composed) as (write, read):
        await asyncio.to_thread(composed.watch)
        bank = Bank(write, read, composed.tokens()["acme"], timeout_s=60)
        owner, _ = await bank.register("Ada")
        (account, _), (other, _) = await bank.open(owner), await bank.open(owner)
        queries = [target["expr"] for panel in PANELS for target in panel["targets"]]
        paths = [f"/api/v1/query?query={quote(query)}" for query in queries]

        async def answered() -> bool:
            await bank.deposit(account, 10)
            await bank.ended_transfer(await bank.transfer(account, other, 1))
            with pytest.raises(AioRpcError):
                await bank.withdraw(account, 1_000_000)
            try:
                answers = await asyncio.to_thread(composed.asked, *paths)
            except Failed as starting:
                raise AssertionError(str(starting)) from starting
            empty = {query for query, answer in zip(queries, answers, strict=True) if not answer["result"]}
            assert not {query for query in empty if not any(name in query for name in NOT_THERE)}
            return True

        await eventually(answered, 300, every_s=2)
