"""What loading an aggregate costs beside the bare queries: at 1,000 events and at 100,000, each with its newest snapshot.

The snapshot is as old as it may get: one event more, and there would be a new one. So what is loaded, and how long it takes,
must not depend on how long the aggregate has lived.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from uuid import uuid4

import psycopg

from bank.v1 import account_pb2
from deploy.local.system import WRITE
from shared.commands.registry import CommandRegistry
from shared.commands.states import load
from shared.line.event_store import AggregateKey
from shared.platform.postgres import Connection, connect
from tests.bench.row import Row, Sample
from tests.bench.stage import Stage
from write_service.domain.account import ACCOUNT, Account
from write_service.passwords import Passwords
from write_service.registry import build_registry

SECONDS = 2.0
LIVES = (1_000, 100_000)

_DEPOSITS = """
INSERT INTO events (position, event_id, tenant, category, aggregate_id, version, type, payload, recorded_at, metadata)
SELECT (SELECT coalesce(max(position), 0) FROM events) + n, gen_random_uuid(), 'acme', 'account', %s, n, %s, %s, now(), ''
FROM generate_series(1, %s) AS n
"""
_SNAPSHOT = """SELECT version, state FROM snapshots
WHERE tenant = %s AND category = %s AND aggregate_id = %s ORDER BY version DESC LIMIT 1"""
_EVENTS = """SELECT version, type, payload FROM events
WHERE tenant = %s AND category = %s AND aggregate_id = %s AND version > %s ORDER BY version"""


async def aggregate_load(stage: Stage, scale: float) -> AsyncGenerator[Sample, None]:
    """Medians of as many turns as fit in the time; the figure is that of the longer life."""
    system = await stage.system(WRITE)
    registry = build_registry(Passwords())
    keys = [("acme", ACCOUNT.category, str(uuid4())) for _ in LIVES]
    with psycopg.connect(system.databases.write.admin) as admin:
        for key, events in zip(keys, LIVES, strict=True):
            _live(admin, registry, key, events)
    async with await connect(system.databases.write.app, application_name="bench") as connection:

        async def ours(key: AggregateKey) -> int:
            return (await load(connection, registry, [key]))[key].version

        async def bare(key: AggregateKey) -> int:
            return await _bare(connection, key)

        while True:
            took: dict[tuple[int, str], list[float]] = {}
            end = time.perf_counter() + SECONDS * scale
            while time.perf_counter() < end:
                for key, events in zip(keys, LIVES, strict=True):
                    for name, measure in (("ours", ours), ("bare", bare)):
                        took.setdefault((events, name), []).append(await _took_ms(measure, key, events))
            medians = {which: statistics.median(each) for which, each in took.items()}
            short, long = LIVES
            yield Sample(
                figure=medians[long, "ours"],
                ceiling=medians[long, "bare"],
                notes={"short_ms": medians[short, "ours"], "short_ratio": medians[short, "ours"] / medians[short, "bare"]},
            )


def _live(admin: psycopg.Connection, registry: CommandRegistry, key: AggregateKey, events: int) -> None:
    """Deposits, and the snapshot before the last of them, by an administrator: through the service it would take minutes."""
    deposited = account_pb2.MoneyDeposited(account_id=key[2], amount_minor=1, currency="USD")
    type_name = deposited.DESCRIPTOR.full_name
    every = registry.snapshot_every[key[1]]
    at = events - every
    admin.execute(_DEPOSITS, (key[2], type_name, deposited.SerializeToString(), events - 1))
    state = registry.dump_state(Account(opened=True, owner_id=str(uuid4()), currency="USD", balance_minor=at))
    admin.execute("INSERT INTO snapshots VALUES (%s, %s, %s, %s, %s, %s)", (*key, at, ACCOUNT.schema, state))
    admin.commit()
    admin.autocommit = True
    admin.execute("VACUUM ANALYZE events, snapshots")
    admin.autocommit = False


async def _bare(connection: Connection, key: AggregateKey) -> int:
    """The snapshot, then the events after it, without a look at what they are."""
    async with connection.pipeline():
        snapshot = await connection.execute(_SNAPSHOT, key)
        [(at, _)] = await snapshot.fetchall()
        events = await connection.execute(_EVENTS, (*key, at))
        rows = await events.fetchall()
    return int(rows[-1][0])


async def _took_ms(measure: Callable[[AggregateKey], Awaitable[int]], key: AggregateKey, events: int) -> float:
    began = time.perf_counter()
    version = await measure(key)
    took_ms = 1000 * (time.perf_counter() - began)
    if version != events - 1:
        raise RuntimeError(f"version {version} was loaded instead of {events - 1}")
    return took_ms


ROW = Row(
    name="aggregate_load",
    title="an account of 100,000 events loaded",
    unit=" ms",
    ceiling="its snapshot and 99 events, bare",
    measure=aggregate_load,
    floor=2.5,
    less_is_better=True,
)
