"""Checks that hold for every line of events, whichever program wrote it and whichever faults happened meanwhile."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deploy.bootstrap import Database
from foldline.v1 import event_store_pb2
from shared.commands.log import CommandKey, StoredCommand, read_commands
from shared.line.event_store import Head, StoredEvent, read_head, read_line
from shared.platform import postgres
from shared.platform.postgres import Connection


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Connection]:
    """A connection like those of the services."""
    connection = await postgres.connect(url, application_name="test")
    try:
        yield connection
    finally:
        await connection.close()


async def events_of(database: Database) -> list[StoredEvent]:
    """The whole line."""
    async with connected(database.app) as connection:
        return await read_line(connection, after=0, limit=1_000_000)


async def head_of(database: Database) -> Head:
    """Where the line ends, and its epoch."""
    async with connected(database.app) as connection:
        return await read_head(connection)


async def commands_of(database: Database) -> dict[CommandKey, StoredCommand]:
    """The whole command log."""
    async with connected(database.app) as connection:
        cursor = await connection.execute("SELECT tenant, command_id::text FROM commands")
        return dict(await read_commands(connection, [(tenant, id_) for tenant, id_ in await cursor.fetchall()]))


async def somebody_waits(connection: Connection) -> bool:
    """Whether a session waits for the shard's lock."""
    cursor = await connection.execute(
        """SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted
           AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""
    )
    return bool(await cursor.fetchall())


async def somebody_waits_for_a_row(connection: Connection) -> bool:
    """Whether a session waits for a row that another transaction has changed. `connection` is the administrator's."""
    cursor = await connection.execute(
        """SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND wait_event IN ('transactionid', 'tuple')
           AND datname = current_database()"""
    )
    return bool(await cursor.fetchall())


async def check_line(database: Database) -> list[StoredEvent]:
    """Commands are in the log once with their events, versions and positions are dense; returns the line.

    Positions are 1…n and times never decrease along them. Versions of each stream are 1…n in the order of positions.
    Every event has one command that was accepted, and every accepted command has exactly the events it says it has.
    """
    events = await events_of(database)
    assert [event.position for event in events] == list(range(1, len(events) + 1))
    times = [event.recorded_at for event in events]
    assert times == sorted(times)
    assert len({event.event_id for event in events}) == len(events)
    versions: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    by_command: dict[CommandKey, list[int]] = defaultdict(list)
    for event in events:
        versions[event.tenant, event.category, event.aggregate_id].append(event.version)
        metadata = event_store_pb2.EventMetadata.FromString(event.metadata)
        by_command[event.tenant, metadata.command_id].append(event.position)
    for key, numbers in versions.items():
        assert numbers == list(range(1, len(numbers) + 1)), key
    commands = await commands_of(database)
    for id_, command in commands.items():
        positions = by_command.pop(id_, [])
        assert command.events_appended == len(positions), command
        assert command.position == (positions[-1] if positions else 0), command
        assert not positions or command.status == "completed", command
        assert positions == list(range(command.position - len(positions) + 1, command.position + 1)) or not positions, command
    assert not by_command, "events without a command"
    return events
