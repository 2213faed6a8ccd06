"""Reads the whole line: what is in the archive is read from there, and what was purged shows as holes, so nobody sees a gap."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import monotonic

from shared.folds.errors import Rejected, Unavailable
from shared.line.archive import Archive
from shared.line.event_store import Place, StoredEvent, are_there, read_holes, read_line, read_places
from shared.platform.postgres import Reads

TRIES = 5
BOXES_AT_ONCE = 8
READING_S_MAX = 2.0


async def read_through(reads: Reads, archive: Archive | None, *, after: int, limit: int) -> list[StoredEvent]:
    """Up to `limit` events with the positions after + 1, after + 2 …; none only if there is none behind `after`.

    There may be fewer than there are on the line: reading the archive ends with the boxes that are read after READING_S_MAX.
    An aggregate may be boxed, unboxed or purged between the queries, and be missed by all of them: a page ends before a gap.
    The events that are in the archive are read while no connection is held. Raises Rejected (ARCHIVE_NOT_CONFIGURED,
    ARCHIVE_DAMAGED) or Unavailable (ARCHIVE_UNAVAILABLE, LINE_CHANGING).
    """
    for _ in range(TRIES):
        async with reads.connection() as connection:
            found = await read_line(connection, after=after, limit=limit)
            # The newest event of a boxed aggregate, and of a purged tenant, stays online: none is behind the last that was found.
            if not found or found[-1].position - after == len(found):
                return found
            places = await read_places(connection, after=after, upto=found[-1].position, limit=limit)
            holes = await read_holes(connection, after=after, upto=found[-1].position, limit=limit)
        # An event may have been purged since it was found by one of the queries before. The newest of an aggregate go first, so
        # what was gone when the holes were read must show as gone, or an event could show without those before it.
        gone = {hole.position for hole in holes}
        found = [event for event in found if event.position not in gone] + holes
        here = {event.position for event in found}
        found += await read_boxed(reads, [place for place in places if place.position not in here], archive)
        # Positions are distinct, so all before a gap, and none behind one, are where they would be without gaps.
        ordered = enumerate(sorted(found, key=lambda event: event.position)[:limit], after + 1)
        if dense := [event for position, event in ordered if event.position == position]:
            return dense
    raise Unavailable("LINE_CHANGING", "aggregates are being boxed or unboxed; the same call may be made again")


async def read_boxed(reads: Reads, places: list[Place], archive: Archive | None) -> list[StoredEvent]:
    """The events that are in the archive; after READING_S_MAX only those of the boxes that the first places are in.

    Left out are those that were purged since they were found. Raises as `read_through` does.
    """
    if places and archive is None:
        raise Rejected("ARCHIVE_NOT_CONFIGURED", "events are in the archive, and this service was not told where that is")
    assert archive is not None or not places
    boxes: dict[str, list[Place]] = {}
    for place in places:
        boxes.setdefault(place.location, []).append(place)
    events: list[StoredEvent] = []
    wanted, until = list(boxes.items()), monotonic() + READING_S_MAX
    for first in range(0, len(wanted), BOXES_AT_ONCE):
        if first and monotonic() > until:
            break
        assert archive is not None
        calls = [read_box(reads, archive, inside) for _, inside in wanted[first : first + BOXES_AT_ONCE]]
        for found in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(found, BaseException):
                raise found
            events += found
    return events


async def read_box(reads: Reads, archive: Archive, places: Sequence[Place]) -> Sequence[StoredEvent]:
    """The events of places in one box; none if they were purged since they were found. Call it while no connection is held.

    The box's files go after its places: it is damaged only if the places are there.
    """
    try:
        box = places[0]
        return await archive.events(box.location, box.key, box.chain, [place.position for place in places])
    except Rejected:
        async with reads.connection() as connection:
            if await are_there(connection, places):
                raise
        return []
