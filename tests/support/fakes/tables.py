"""The read service's tables in tests: projectors over doubles of the line, and the rows of the tables."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import psycopg
from google.protobuf.message import Message

from deploy.bootstrap import Database
from foldline.v1.event_store_pb2 import EventEnvelope
from read_service.registry import GROUPS, RPCS
from shared.folds.errors import NotFound, Rejected
from shared.folds.projection import Event, Fold, Group, Projection
from shared.folds.table import Row
from shared.line import checkpoint
from shared.line.checkpoint import Checkpoint
from shared.line.follower import EventBatch, Feed, Follower, Line
from shared.platform.identity import Call, Identity, Role, current_call
from shared.platform.postgres import Reads, connect
from shared.projections.projector import BATCH_MAX, Projector
from shared.projections.summary import SummaryServicer
from shared.projections.tables import Tables
from tests.support.system.waiting import eventually
from tests.support.system.working import running

SHARD = 1
SUMMARIES = Group("summaries", [projection for group in GROUPS for projection in group.projections])
"""All tables as one group."""
_BY_NAME = {group.name: group for group in GROUPS}
PERSON_TABLES, ACCOUNT_TABLES, TRANSFER_TABLES = (_BY_NAME[name] for name in ("people", "accounts", "transfers"))
Id = tuple[str, str]
"""A summary's name and an id."""
TABLES = tuple(projection.table.name for projection in SUMMARIES.projections)


def folding(projection: Projection[Row], event: type[Event], fold: Fold[Row]) -> Projection[Row]:
    """The projection with another fold of an event."""
    return replace(projection, on=[*(row for row in projection.on if row[0] is not event), (event, fold)])


def projector(
    database: Database,
    line: Line,
    feed: Feed | None = None,
    *,
    batch_max: int = BATCH_MAX,
    silence_s: float = 0.02,
    group: Group = SUMMARIES,
) -> Projector:
    """A projector as the service builds it, but for where its events come from."""
    follower = Follower(line, feed, batch_max=batch_max, silence_s=silence_s)
    return Projector(Tables(group), SHARD, follower.follow, lambda: connect(database.app, application_name="foldline-projector"))


async def reached(projector: Projector, position: int) -> None:
    """Waits until the tables are there."""
    await eventually(lambda: projector.at.position >= position, 10.0)
    assert projector.stopped is None


async def filled(database: Database, line: Line, position: int) -> None:
    """Lets every group of tables follow the line up to a position."""
    async with AsyncExitStack() as stack:
        for each in [await stack.enter_async_context(running(projector(database, line, group=group))) for group in GROUPS]:
            await reached(each, position)


def dump(database: Database, tables: Sequence[str] = TABLES) -> dict[str, Any]:
    """All rows, as the projector's role sees them, by table."""
    with psycopg.connect(database.app) as connection:
        return {table: sorted(connection.execute(f"SELECT * FROM {table}").fetchall()) for table in tables}


def checkpoint_row(database: Database) -> tuple[Any, ...]:
    """Position, state and reason of the one checkpoint."""
    with psycopg.connect(database.app) as connection:
        row = connection.execute("SELECT position, state, reason FROM checkpoints").fetchone()
        assert row is not None
        return row


def folded(events: Sequence[EventEnvelope], group: Group = SUMMARIES) -> dict[str, Any]:
    """The tables as the plain fold of the line, one event after another: the result that all projectors must reach."""
    tables: dict[str, dict[Any, Any]] = {projection.table.name: {} for projection in group.projections}
    for envelope in events:
        for projection in group.projections:
            rows = tables[projection.table.name]
            for event_type, fold in projection.on:
                if event_type.DESCRIPTOR.full_name == envelope.type:
                    event = event_type.FromString(envelope.payload)
                    if (own := projection.key(event, envelope)) is not None:
                        key = (envelope.tenant, *own)
                        rows[key] = fold(rows.get(key), event, envelope)
    return {name: sorted(tuple(row) for row in rows.values() if row is not None) for name, rows in tables.items()}


@asynccontextmanager
async def stepwise(database: Database, tenant: str) -> AsyncIterator[Any]:
    """Tables that are filled event by event: a function that applies one, and one that tells what Get then shows, or its refusal.

    What is not there is None.
    """
    assert database.query
    reads = Reads(database.query, application_name="test")
    connection = await connect(database.app, application_name="test")
    await reads.open()
    current_call.set(Call(Identity(tenant=tenant, user_id="test", roles=frozenset({Role.OPERATOR})), "test", ""))
    servicers = {rpcs.summary.name: SummaryServicer(rpcs, reads, None) for rpcs in RPCS}  # type: ignore[arg-type]
    groups = [Tables(group) for group in GROUPS]
    at = Checkpoint()
    for tables in groups:
        await checkpoint.load(connection, tables.consumer, 1)

    async def apply(envelope: EventEnvelope) -> None:
        nonlocal at
        after = Checkpoint("one", envelope.position, envelope.event_id)
        for tables in groups:
            await tables.apply(connection, 1, at, EventBatch([envelope], after))
        at = after

    async def shown(which: Id) -> Message | str | None:
        try:
            found: Message = await servicers[which[0]].existing(which[1])
        except NotFound:
            return None
        except Rejected as error:
            return error.reason
        return found

    try:
        yield apply, shown
    finally:
        await connection.close()
        await reads.close()
