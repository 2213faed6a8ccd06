"""Reads the streams of several aggregates of a tenant in the order of the line, whether their events are in the tables or boxed.

First the positions of all events are read, from one snapshot, then the events by their positions, a page at a time, each page on
a connection of its own. Events never change their positions, so what is boxed or unboxed between two pages is found all the same.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from shared.folds.errors import OverLimit, Unavailable
from shared.line.archive import Archive
from shared.line.event_store import StoredEvent, read_places_of, read_positions
from shared.line.read_through import TRIES, read_boxed
from shared.platform.packing import int8s, texts
from shared.platform.postgres import Connection, Reads

PAGE_EVENTS = 200
NEAR_VERSIONS = 1000
"""So many versions of a stream are read through to find the first behind a position; of a longer stream it is searched for."""

LOOKED_AT_MAX = 1_000_000
"""So many events are looked at for the positions of one call: as many as those in 500 streams that are two NEAR_VERSIONS long."""
STATEMENT_TIMEOUT = "5s"
"""For each statement that looks for positions."""

Names = Sequence[tuple[str, str]]
"""Aggregates of a tenant: category and id."""

# A position plus 0 fits no index, so that PostgreSQL cannot choose to read the line between two positions for one stream of it.
_POSITIONS = """
SELECT position FROM (
  SELECT e.position
  FROM unnest(%(categories)s::text[], %(ids)s::text[], %(lows)s::bigint[], %(highs)s::bigint[])
    AS k(category, aggregate_id, low, high)
  CROSS JOIN LATERAL (
    SELECT position FROM events
    WHERE tenant = %(tenant)s AND category = k.category AND aggregate_id = k.aggregate_id
      AND version >= k.low AND version < k.high AND position + 0 > %(after)s AND position + 0 <= %(upto)s
    ORDER BY version LIMIT %(limit)s) e
  UNION ALL
  SELECT b.position FROM unnest(%(categories)s::text[], %(ids)s::text[], %(gone)s::bigint[]) AS k(category, aggregate_id, gone)
  JOIN boxes x ON x.tenant = %(tenant)s AND x.category = k.category AND x.aggregate_id = k.aggregate_id
  JOIN boxed_events b USING (box_id) WHERE x.version > k.gone AND b.position + 0 > %(after)s AND b.position + 0 <= %(upto)s) p
ORDER BY position LIMIT %(limit)s
"""
# The newest version, and that of the last event that is gone or, once the aggregate is marked as purged, about to go.
_VERSIONS = """
SELECT
  coalesce((SELECT version FROM events WHERE tenant = %s AND category = k.category AND aggregate_id = k.aggregate_id
            ORDER BY version DESC LIMIT 1), 0),
  coalesce((SELECT max(version) FROM boxes WHERE tenant = %s AND category = k.category AND aggregate_id = k.aggregate_id
            AND location = ''), 0)
FROM unnest(%s::text[], %s::text[]) WITH ORDINALITY AS k(category, aggregate_id, nth) ORDER BY nth
"""
_FROM_VERSION = """
SELECT position FROM events WHERE tenant = %s AND category = %s AND aggregate_id = %s AND version >= %s ORDER BY version LIMIT 1
"""


async def positions_of(connection: Connection, tenant: str, names: Names, *, after: int, upto: int, limit: int) -> list[int]:
    """The positions of the first `limit` events of the aggregates that are behind `after` and not behind `upto`, in order.

    Of an aggregate that is purged that is the mark alone, whether or not all others are gone yet.

    Raises OverLimit (HISTORY_TOO_LONG) if more than LOOKED_AT_MAX events of the tables had to be looked at.
    """
    categories, ids = texts([name[0] for name in names]), texts([name[1] for name in names])
    async with connection.transaction():
        # One snapshot: what is put back from the archive meanwhile would be in none of the versions that were looked for.
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        await connection.execute("SELECT set_config('statement_timeout', %s, true)", (STATEMENT_TIMEOUT,))
        cursor = await connection.execute(_VERSIONS, (tenant, tenant, categories, ids))
        lows, highs, gone = [], [], []
        for name, (last, purged) in zip(names, await cursor.fetchall(), strict=True):
            key = (tenant, *name)
            gone.append(purged)
            lows.append((await _first_version(connection, key, after, purged + 1, max(last, purged) + 1))[0])
            highs.append((await _first_version(connection, key, upto, lows[-1], last + 1))[1])
        if sum(min(high - low, limit) for low, high in zip(lows, highs, strict=True)) > LOOKED_AT_MAX:
            text = f"more than {LOOKED_AT_MAX} events would have to be looked at: ask for fewer of them, or of fewer aggregates"
            raise OverLimit("HISTORY_TOO_LONG", text, events_max=LOOKED_AT_MAX)
        cursor = await connection.execute(
            _POSITIONS,
            {
                "tenant": tenant,
                "categories": categories,
                "ids": ids,
                "lows": int8s(lows),
                "highs": int8s(highs),
                "gone": int8s(gone),
                "after": after,
                "upto": upto,
                "limit": limit,
            },
        )
        return [position for (position,) in await cursor.fetchall()]


async def _first_version(
    connection: Connection, key: tuple[str, str, str], position: int, low: int, high: int
) -> tuple[int, int]:
    """Two versions of a stream, at most NEAR_VERSIONS apart, between which the first one behind a position is, or which it is.

    `low` and `high` are two further apart.
    """
    while high - low > NEAR_VERSIONS:
        middle = (low + high) // 2
        row = await (await connection.execute(_FROM_VERSION, (*key, middle))).fetchone()
        if row is None or row[0] > position:
            high = middle
        else:
            low = middle
    return low, high


async def pages_of(
    reads: Reads, archive: Archive | None, tenant: str, positions: Sequence[int]
) -> AsyncGenerator[list[StoredEvent], None]:
    """The events of a tenant at these positions, in pages.

    Raises Rejected (ARCHIVE_NOT_CONFIGURED, ARCHIVE_DAMAGED) or Unavailable (ARCHIVE_UNAVAILABLE, LINE_CHANGING).
    """
    for first in range(0, len(positions), PAGE_EVENTS):
        yield await _page(reads, archive, tenant, positions[first : first + PAGE_EVENTS])


async def _page(reads: Reads, archive: Archive | None, tenant: str, wanted: Sequence[int]) -> list[StoredEvent]:
    found: dict[int, StoredEvent] = {}
    tries = TRIES
    while missing := [position for position in wanted if position not in found]:
        before = len(found)
        async with reads.connection() as connection:
            events = await read_positions(connection, tenant, missing)
            found.update((event.position, event) for event in events)
            boxed = [position for position in missing if position not in found]
            places = await read_places_of(connection, tenant, boxed) if boxed else []
        # Reading the archive may end before the last place is read; then there is another round.
        found.update((event.position, event) for event in await read_boxed(reads, places, archive))
        if len(found) == before and not (tries := tries - 1):
            raise Unavailable("LINE_CHANGING", "aggregates are being boxed or unboxed; the same call may be made again")
    return [found[position] for position in wanted]
