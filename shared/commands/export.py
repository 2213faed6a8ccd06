"""All that is stored of a tenant, in pages, as of one position of the line: events, also those in the archive, and commands.

Password hashes are no part of it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from shared.commands.log import StoredCommand, Wanted, list_commands, read_commands
from shared.folds.errors import Rejected
from shared.line.archive import Archive
from shared.line.event_store import StoredEvent, read_tenant
from shared.platform.postgres import Reads

WINDOW_POSITIONS = 5000
"""So much of the line is looked at in one query."""
PAGE_EVENTS = 500
PAGE_BYTES = 1024 * 1024
"""A page ends behind the event that makes it longer."""
PAGE_COMMANDS = 200


async def events_of(reads: Reads, archive: Archive | None, tenant: str, upto: int) -> AsyncGenerator[Sequence[StoredEvent], None]:
    """The events of a tenant up to a position, in the order of the line.

    Raises Rejected (ARCHIVE_NOT_CONFIGURED, ARCHIVE_DAMAGED) or Unavailable (ARCHIVE_UNAVAILABLE).
    """
    for after in range(0, upto, WINDOW_POSITIONS):
        # In one snapshot, so that an event that is boxed or unboxed meanwhile is found once.
        async with reads.connection() as connection, connection.transaction():
            await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            found, places = await read_tenant(connection, tenant, after=after, upto=min(after + WINDOW_POSITIONS, upto))
        if places and archive is None:
            raise Rejected("ARCHIVE_NOT_CONFIGURED", "events are in the archive, and this service was not told where that is")
        boxes: dict[str, list[int]] = {}
        for place in places:
            boxes.setdefault(place.location, []).append(place.position)
        known = {place.location: place for place in places}
        for location, positions in boxes.items():
            assert archive is not None
            found += await archive.events(location, known[location].key, known[location].chain, positions)
        for page in _pages(sorted(found, key=lambda event: event.position)):
            yield page


def _pages(events: Sequence[StoredEvent]) -> list[list[StoredEvent]]:
    pages: list[list[StoredEvent]] = []
    size = PAGE_BYTES
    for event in events:
        if size >= PAGE_BYTES or len(pages[-1]) >= PAGE_EVENTS:
            pages.append([])
            size = 0
        pages[-1].append(event)
        size += len(event.payload) + len(event.metadata)
    return pages


async def commands_of(reads: Reads, tenant: str, upto: int) -> AsyncGenerator[Sequence[StoredCommand], None]:
    """The commands of a tenant that rest on nothing behind a position, the newest first, with whole payloads."""
    last: tuple[StoredCommand, ...] = ()
    while True:
        after = (last[0].received_at, last[0].command_id) if last else None
        async with reads.connection() as connection:
            listed = await list_commands(connection, Wanted(tenant=tenant), limit=PAGE_COMMANDS, after=after)
            keys = [(row.tenant, row.command_id) for row in listed]
            whole = await read_commands(connection, keys) if keys else {}
        if page := [whole[key] for key in keys if key in whole and whole[key].head <= upto]:
            yield page
        if len(listed) < PAGE_COMMANDS:
            return
        last = (listed[-1],)
