"""What a change costs the read service for each who watches: of one row, of one list, and of many rows.

It must not grow with their number: each row compares the processor time of a delivered change at 1,000 watchers with that at 100.
The caller is this process, which reads all streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from bank.v1 import account_query_pb2
from deploy.local.system import READ, System
from foldline.v1 import command_pb2
from tests.bench import workload
from tests.bench.children import Meter
from tests.bench.queries import Caller, prepared
from tests.bench.row import Measure, Row, Sample, in_turn
from tests.bench.stage import Stage
from tests.bench.workload import Ids, Template

WATCHERS = (100, 1000)
DELIVERED = 20_000
"""At each number of watchers; fewer changes with more watchers."""
FLATNESS = 1.5
BATCH = 250

Watch = Callable[[Caller, int], Any]
"""The call of a watcher by its number."""


def one_row(caller: Caller, _: int) -> Any:
    """All watch one account."""
    request = account_query_pb2.WatchAccountRequest(account_id=caller.names[0])
    return caller.queries.WatchAccount(request, metadata=caller.who)


def one_list(caller: Caller, _: int) -> Any:
    """All watch the accounts of one person."""
    owner = workload.names("person", 1)[0]
    request = account_query_pb2.WatchAccountsRequest(filter=account_query_pb2.AccountFilter(owner_id=owner))
    return caller.queries.WatchAccounts(request, metadata=caller.who)


def many_rows(caller: Caller, nth: int) -> Any:
    """Each watches another account."""
    request = account_query_pb2.WatchAccountRequest(account_id=caller.names[nth])
    return caller.queries.WatchAccount(request, metadata=caller.who)


class Changes:
    """Deposits of one cent on the first accounts, each time on all of them."""

    def __init__(self, caller: Caller, accounts: int) -> None:
        self._caller = caller
        items = [workload.batch_item(workload.deposit(name)) for name in caller.names[:accounts]]
        parts = [items[begin : begin + BATCH] for begin in range(0, accounts, BATCH)]
        self._templates = [Template(command_pb2.SendBatchRequest(items=part)) for part in parts]
        self._ids = Ids()

    async def make(self) -> None:
        """Deposits once."""
        for template in self._templates:
            request = command_pb2.SendBatchRequest.FromString(template.fill(self._ids))
            await self._caller.commands.SendBatch(request, metadata=self._caller.who, timeout=20)


def fanning_out(watch: Watch, *, accounts_each: int = 0) -> Measure:
    """Processor time for each change that is delivered. `accounts_each`: how many accounts change for each watcher; else one."""

    async def measure(stage: Stage, scale: float) -> AsyncGenerator[Sample, None]:
        async with AsyncExitStack() as stack:
            most = 2 * max(WATCHERS)
            limits = {
                "FOLDLINE_WATCHES_PER_TENANT_MAX": most,
                "FOLDLINE_WATCHES_MAX": most,
                "FOLDLINE_CALLS_AT_ONCE_MAX": 2 * most,
            }
            system, caller = await prepared(stage, stack, **{name: str(limit) for name, limit in limits.items()})
            few, many = WATCHERS
            changes = {count: Changes(caller, accounts_each * count or 1) for count in WATCHERS}
            nth = 0
            while True:
                cost = partial(_cost_us, system, caller, watch, scale)
                at_few, at_many = await in_turn(
                    nth, partial(cost, few, changes[few].make), partial(cost, many, changes[many].make)
                )
                yield Sample(figure=at_many, ceiling=at_few)
                nth += 1

    return measure


async def _cost_us(
    system: System, caller: Caller, watch: Watch, scale: float, watchers: int, change: Callable[[], Awaitable[None]]
) -> float:
    calls = [watch(caller, nth) for nth in range(watchers)]
    try:
        await asyncio.gather(*(call.read() for call in calls))
        rounds = max(round(DELIVERED * scale / watchers), 1)
        meter = Meter({READ: system.pid(READ)})
        for _ in range(rounds):
            await change()
            await asyncio.gather(*(call.read() for call in calls))
        return meter.per_command_us(watchers * rounds)[READ]
    finally:
        for call in calls:
            call.cancel()
        # The next ones may be as many as a connection has room for: first all of these are gone.
        await caller.get(0)


def _row(name: str, title: str, measure: Measure) -> Row:
    return Row(
        name=name,
        title=title,
        unit=" µs",
        ceiling="to 100",
        measure=measure,
        floor=FLATNESS,
        less_is_better=True,
    )


ROWS = (
    _row("watch_fanout", "a change delivered to 1,000 watchers of a row", fanning_out(one_row)),
    _row("watch_list_fanout", "a change delivered to 1,000 watchers of a list", fanning_out(one_list)),
    _row(
        "watch_rows_fanout", "a change delivered to each of 1,000 watchers of other rows", fanning_out(many_rows, accounts_each=1)
    ),
)
