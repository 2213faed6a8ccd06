"""What queries cost beside the bare machinery: Get, List, read-your-writes and rebuilding.

The caller is this process: both sides of a row are asked by the same loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from statistics import median
from typing import Any

import grpc.aio
import psycopg
from uuid_utils import uuid7

from bank.v1 import account_pb2, account_pb2_grpc, account_query_pb2, account_query_pb2_grpc
from deploy.local.system import PROJECTOR, READ, RELAY, WRITE, System
from foldline.v1 import command_pb2, command_pb2_grpc
from read_service.registry import GROUPS
from shared.platform.identity import Role
from shared.rpc.client import bearer
from tests.bench import echo, workload
from tests.bench.row import Row, Sample, in_turn
from tests.bench.rows import CATCH_UP_EVENTS, bare_catch_up
from tests.bench.stage import Stage, head

PAGE = 50
PER_S = 200

_SELECT = "SELECT * FROM accounts WHERE tenant = %s ORDER BY opened_at, account_id LIMIT %s"
_ASK = "SELECT ask_rebuild(%s, 1, false, 'bench')"
_STEER = "SELECT steer_rebuild(%s, 1, '{switched}', 'dropping')"
_STATES = "SELECT count(*) FILTER (WHERE state = 'switched'), count(*) FROM projection_rebuilds"


class Caller:
    """A client of a system, with its token."""

    def __init__(self, system: System, write: grpc.aio.Channel, read: grpc.aio.Channel) -> None:
        self.who = bearer(system.token(workload.TENANT, workload.USER, [Role.USER]))
        self.accounts = account_pb2_grpc.AccountServiceStub(write)
        self.commands = command_pb2_grpc.CommandServiceStub(write)
        self.queries = account_query_pb2_grpc.AccountQueryServiceStub(read)
        self.names = workload.names("account", 1000)

    async def get(self, nth: int, token: str = "") -> Any:
        """An account."""
        request = account_query_pb2.GetAccountRequest(account_id=self.names[nth % 1000], consistency_token=token)
        return await self.queries.GetAccount(request, metadata=self.who, timeout=10)

    async def list(self, _: int = 0) -> Any:
        """A page of accounts."""
        return await self.queries.ListAccounts(account_query_pb2.ListAccountsRequest(), metadata=self.who, timeout=10)

    async def deposit(self, nth: int) -> Any:
        """A deposit's receipt."""
        options = command_pb2.CommandOptions(command_id=str(uuid7()))
        fields = {"account_id": self.names[nth % 1000], "amount_minor": 1, "currency": workload.CURRENCY}
        request = account_pb2.DepositMoneyRequest(options=options, **fields)  # type: ignore[arg-type]
        return await self.accounts.DepositMoney(request, metadata=self.who, timeout=10)


async def prepared(stage: Stage, stack: AsyncExitStack, **settings: str) -> tuple[System, Caller]:
    """All that a query needs, with 1,000 accounts that the tables have."""
    system = await stage.system(WRITE, RELAY, PROJECTOR, READ, settings=settings)
    await stage.order(system, "set_up", accounts=1000, batch=250)
    channels = [await stack.enter_async_context(system.channel(name)) for name in (WRITE, READ)]
    caller = Caller(system, *channels)
    token = (await caller.deposit(999)).consistency_token
    await caller.get(999, token)
    return system, caller


async def _p50_ms(seconds: float, work: Callable[[int], Awaitable[Any]]) -> float:
    took: list[float] = []
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        await work(len(took))
        took.append(time.perf_counter() - began)
    return 1000 * median(took)


def _echo_of(stack: AsyncExitStack, stage: Stage) -> tuple[grpc.aio.Channel, Callable[[bytes], Callable[[int], Awaitable[Any]]]]:
    channel = grpc.aio.insecure_channel(stage.echo_address)
    method: Any = channel.unary_unary(echo.UNARY)
    return channel, lambda content: lambda _: method(content)


async def getting(stage: Stage, scale: float) -> AsyncGenerator[Sample, None]:
    """The median time of one caller's GetAccount; the ceiling is an echo of the answer's bytes."""
    async with AsyncExitStack() as stack:
        _, caller = await prepared(stage, stack)
        channel, echoed = _echo_of(stack, stage)
        await stack.enter_async_context(channel)
        content, nth = (await caller.get(0)).SerializeToString(), 0
        while True:
            ours, bare = await in_turn(
                nth, partial(_p50_ms, 1.5 * scale, caller.get), partial(_p50_ms, 1.5 * scale, echoed(content))
            )
            yield Sample(figure=ours, ceiling=bare)
            nth += 1


async def listing(stage: Stage, scale: float) -> AsyncGenerator[Sample, None]:
    """The median time of one caller's page of 50; the ceiling is the bare SELECT and an echo of the answer's bytes."""
    async with AsyncExitStack() as stack:
        system, caller = await prepared(stage, stack)
        channel, echoed = _echo_of(stack, stage)
        await stack.enter_async_context(channel)
        content, nth = (await caller.list()).SerializeToString(), 0
        url = system.databases.read.query
        assert url
        connection = await stack.enter_async_context(await psycopg.AsyncConnection.connect(url, autocommit=True))
        connection.prepare_threshold = 0
        await connection.execute("SELECT set_config('app.tenant', %s, false)", [workload.TENANT])

        async def select(_: int) -> None:
            cursor = await connection.execute(_SELECT, (workload.TENANT, PAGE), binary=True)
            assert len(await cursor.fetchall()) == PAGE

        while True:
            seconds = 1.5 * scale
            ours, rows, bare = await in_turn(
                nth,
                partial(_p50_ms, seconds, caller.list),
                partial(_p50_ms, seconds, select),
                partial(_p50_ms, seconds, echoed(content)),
            )
            yield Sample(figure=ours, ceiling=rows + bare, notes={"select_p50_ms": rows, "echo_p50_ms": bare})
            nth += 1


async def freshness(stage: Stage, scale: float) -> AsyncGenerator[Sample, None]:
    """From a deposit's receipt until a Get with its token is answered, at 200 deposits/s; the ceiling is echo and commit."""
    async with AsyncExitStack() as stack:
        _, caller = await prepared(stage, stack)
        channel, echoed = _echo_of(stack, stage)
        await stack.enter_async_context(channel)
        writer = await stage.child("bare_write", stage.engines.clone("write").owner)
        nth = 0
        while True:
            ours, bare, commit = await in_turn(
                nth,
                partial(_visible, caller, 2.0 * scale),
                partial(_p50_ms, 1.0 * scale, echoed(b"x" * 200)),
                partial(writer.ask, {"kind": "commit", "seconds": 1.0 * scale, "batch": 1, "accounts": 1000}),
            )
            yield Sample(figure=ours, ceiling=bare + commit["p50_ms"], notes={"echo_p50_ms": bare})
            nth += 1


async def _visible(caller: Caller, seconds: float) -> float:
    took: list[float] = []

    async def one(nth: int) -> None:
        token = (await caller.deposit(nth)).consistency_token
        began = time.perf_counter()
        await caller.get(nth, token)
        took.append(time.perf_counter() - began)

    async with asyncio.TaskGroup() as tasks:
        for nth in range(int(PER_S * seconds)):
            tasks.create_task(one(nth))
            await asyncio.sleep(1 / PER_S)
    return 1000 * median(took)


async def rebuilding(stage: Stage, scale: float) -> AsyncGenerator[Sample, None]:
    """All tables rebuilt beside those that serve, compared and switched; the ceiling is a bare loop over the same line."""
    system = await stage.system(WRITE, PROJECTOR)
    await stage.order(system, "set_up", accounts=1000, batch=250)
    while await head(system.databases.write) < CATCH_UP_EVENTS * scale:
        await stage.order(system, "batch", method=workload.SEND_BATCH, callers=4, batch=250, seconds=0.3, warm_s=0.0)
    end, nth, groups = await head(system.databases.write), 0, [group.name for group in GROUPS]
    read = system.databases.read
    assert read.query
    query = await psycopg.AsyncConnection.connect(read.query, autocommit=True)
    watch = await psycopg.AsyncConnection.connect(read.admin, autocommit=True)
    async with query, watch:

        async def until(sql: str, wanted: Any) -> None:
            deadline = time.monotonic() + 120
            while await (await watch.execute(sql)).fetchone() != wanted:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"not within 120 s: {sql}")
                await watch.execute("SELECT pg_sleep(0.02)")

        async def rebuilt() -> float:
            began = time.perf_counter()
            for name in groups:
                await query.execute(_ASK, [name])
            await until(_STATES, (len(groups), len(groups)))
            took_s = time.perf_counter() - began
            for name in groups:
                await query.execute(_STEER, [name])
            await until(_STATES, (0, 0))
            return end / took_s

        await until("SELECT min(position), count(*) FROM checkpoints WHERE serves", (end, len(groups)))
        while True:
            ours, bare = await in_turn(nth, rebuilt, partial(bare_catch_up, stage, system))
            yield Sample(figure=ours, ceiling=bare["per_s"], notes={"events": end})
            nth += 1


ROWS = (
    Row(
        name="get_vs_echo",
        title="GetAccount, 1 caller, p50",
        unit=" ms",
        ceiling="echo of its bytes",
        measure=getting,
        floor=2.5,
        less_is_better=True,
    ),
    Row(
        name="list_50_vs_select",
        title="ListAccounts, a page of 50, p50",
        unit=" ms",
        ceiling="bare SELECT + echo of its bytes",
        measure=listing,
        floor=2.0,
        less_is_better=True,
    ),
    Row(
        name="freshness",
        title="from a receipt until it is seen, at 200/s, p50",
        unit=" ms",
        ceiling="echo + bare commit",
        measure=freshness,
        less_is_better=True,
    ),
    Row(
        name="rebuild_vs_raw",
        title=f"rebuild of all tables, {CATCH_UP_EVENTS:,} events",
        unit="/s",
        ceiling="bare read-fold-upsert",
        measure=rebuilding,
        floor=0.40,
    ),
)
