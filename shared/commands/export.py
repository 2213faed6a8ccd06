"""All that is stored of a tenant, in pages: events, also those in the archive, commands, and recurring schedules.

Events and commands are those of one position of the line. Password hashes are no part of it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from datetime import datetime
from typing import Generic, TypeVar

from shared.commands.log import StoredCommand, Wanted, list_commands, read_commands
from shared.commands.recurring import StoredSchedule, list_tenant, read_schedule
from shared.folds.errors import NotFound, Rejected
from shared.line.archive import Archive
from shared.line.event_store import Place, StoredEvent, read_tenant
from shared.line.read_through import read_box
from shared.platform.postgres import Reads

WINDOW_POSITIONS = 5000
"""So much of the line is looked at in one query."""
PAGE_EVENTS = 500
PAGE_BYTES = 1024 * 1024
"""No page is longer, in payloads and metadata, unless it is of a single row."""
PAGE_ROWS = 200
"""Of commands or schedules."""

RowT = TypeVar("RowT")


async def events_of(reads: Reads, archive: Archive | None, tenant: str, upto: int) -> AsyncGenerator[Sequence[StoredEvent], None]:
    """The events of a tenant up to a position, in the order of the line.

    Raises Rejected (ARCHIVE_NOT_CONFIGURED, ARCHIVE_DAMAGED) or Unavailable (ARCHIVE_UNAVAILABLE).
    """
    for after in range(0, upto, WINDOW_POSITIONS):
        for page in _pages(await _window(reads, archive, tenant, after, min(after + WINDOW_POSITIONS, upto))):
            yield page


async def _window(reads: Reads, archive: Archive | None, tenant: str, after: int, upto: int) -> list[StoredEvent]:
    """The events of a tenant behind a position and up to another, in order."""
    while True:
        # In one snapshot, so that an event that is boxed or unboxed meanwhile is found once.
        async with reads.connection() as connection, connection.transaction():
            await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            # A plan for any window would read all of a tenant's index for each.
            await connection.execute("SET LOCAL plan_cache_mode = force_custom_plan")
            found, places = await read_tenant(connection, tenant, after=after, upto=upto)
        if places and archive is None:
            raise Rejected("ARCHIVE_NOT_CONFIGURED", "events are in the archive, and this service was not told where that is")
        boxes: dict[str, list[Place]] = {}
        for place in places:
            boxes.setdefault(place.location, []).append(place)
        for inside in boxes.values():
            assert archive is not None
            if not (boxed := await read_box(reads, archive, inside)):
                break  # purged meanwhile; what is left is found by the next look
            found += boxed
        else:
            return sorted(found, key=lambda event: event.position)


def _pages(events: Sequence[StoredEvent]) -> Iterator[list[StoredEvent]]:
    page = _Page[StoredEvent](PAGE_EVENTS)
    for event in events:
        if full := page.add(event, len(event.payload) + len(event.metadata)):
            yield full
    if page.rows:
        yield page.rows


async def commands_of(reads: Reads, tenant: str, upto: int) -> AsyncGenerator[Sequence[StoredCommand], None]:
    """The commands of a tenant that rest on nothing behind a position, the newest first, with whole payloads."""
    after: tuple[datetime, str] | None = None
    while True:
        async with reads.connection() as connection:
            listed = await list_commands(connection, Wanted(tenant=tenant), limit=PAGE_ROWS, after=after)
        page = _Page[StoredCommand](PAGE_ROWS)
        for row in listed:
            if row.head > upto or (whole := await _whole_command(reads, row)) is None or whole.head > upto:
                continue
            if full := page.add(whole, len(whole.payload) + len(whole.error or b"")):
                yield full
        if page.rows:
            yield page.rows
        if len(listed) < PAGE_ROWS:
            return
        after = listed[-1].received_at, listed[-1].command_id


async def schedules_of(reads: Reads, tenant: str) -> AsyncGenerator[Sequence[StoredSchedule], None]:
    """The schedules of a tenant as they are when each is read, also those that have ended, by id, with whole payloads."""
    after = ""
    while True:
        async with reads.connection() as connection:
            listed = await list_tenant(connection, tenant, after=after, limit=PAGE_ROWS)
        page = _Page[StoredSchedule](PAGE_ROWS)
        for row in listed:
            if (whole := await _whole_schedule(reads, row)) is None:
                continue
            if full := page.add(whole, len(whole.payload)):
                yield full
        if page.rows:
            yield page.rows
        if len(listed) < PAGE_ROWS:
            return
        after = listed[-1].schedule_id


async def _whole_command(reads: Reads, row: StoredCommand) -> StoredCommand | None:
    """The row with its payload, which a list leaves out if it is large. None if it was swept since."""
    if row.payload:
        return row
    key = row.tenant, row.command_id
    async with reads.connection() as connection:
        return (await read_commands(connection, [key])).get(key)


async def _whole_schedule(reads: Reads, row: StoredSchedule) -> StoredSchedule | None:
    if row.payload:
        return row
    async with reads.connection() as connection:
        try:
            return await read_schedule(connection, (row.tenant, row.schedule_id))
        except NotFound:
            return None


class _Page(Generic[RowT]):
    """Rows that are sent in one message."""

    def __init__(self, rows_max: int) -> None:
        self.rows: list[RowT] = []
        self._rows_max = rows_max
        self._bytes = 0

    def add(self, row: RowT, size: int) -> list[RowT]:
        """Adds a row of so many bytes; returns the rows before it if it had no room beside them, else none."""
        full: list[RowT] = []
        if self.rows and (self._bytes + size > PAGE_BYTES or len(self.rows) >= self._rows_max):
            full, self.rows, self._bytes = self.rows, [], 0
        self.rows.append(row)
        self._bytes += size
        return full
