"""The table of boxes, and which aggregates are boxed."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import LiteralString

from msgspec import Struct

from shared.commands.states import packed_keys
from shared.line.ends import AGGREGATE_PURGED
from shared.line.event_store import BOXED, UNBOXED, AggregateKey
from shared.platform.packing import texts
from shared.platform.postgres import Reads


class StoredBox(Struct, frozen=True):
    """A row of the table of boxes. Without a location it stands for events that were purged."""

    box_id: int
    category: str
    aggregate_id: str
    version: int
    location: str
    chain: bytes
    boxed_at: datetime
    unboxed_at: datetime | None


class Stored(Struct, frozen=True):
    """Where an aggregate is: version and time of its newest event, and whether those before it are in the archive, or gone.

    `marked`: whether boxing or unboxing appended that event.
    """

    version: int
    boxed: bool
    purged: bool
    changed_at: datetime
    marked: bool


async def read_stored(reads: Reads, keys: Sequence[AggregateKey]) -> dict[AggregateKey, Stored]:
    """Where aggregates are, in one query; those without events are left out."""
    async with reads.connection() as connection:
        cursor = await connection.execute(
            """SELECT w.nth::integer, e.version, e.type, e.recorded_at
               FROM unnest(%s, %s, %s) WITH ORDINALITY AS w(tenant, category, aggregate_id, nth) CROSS JOIN LATERAL (
                 SELECT e.version, e.type, e.recorded_at FROM events e
                 WHERE e.tenant = w.tenant AND e.category = w.category AND e.aggregate_id = w.aggregate_id
                 ORDER BY e.version DESC LIMIT 1) e""",
            packed_keys(keys),
        )
        return {keys[nth - 1]: stored_as(version, type_, at) for nth, version, type_, at in await cursor.fetchall()}


def stored_as(version: int, type_name: str, recorded_at: datetime) -> Stored:
    """Where an aggregate with this newest event is."""
    return Stored(version, type_name == BOXED, type_name == AGGREGATE_PURGED, recorded_at, type_name in (BOXED, UNBOXED))


async def last_used(reads: Reads, keys: Sequence[AggregateKey]) -> dict[AggregateKey, datetime]:
    """When aggregates last changed, whatever boxing and unboxing has appended since.

    Left out are those that are in a box of a release that did not note it.
    """
    async with reads.connection() as connection:
        cursor = await connection.execute(
            """SELECT u.nth, u.used_at FROM (
                 SELECT w.nth::integer, coalesce(
                   (SELECT e.recorded_at FROM events e
                    WHERE e.tenant = w.tenant AND e.category = w.category AND e.aggregate_id = w.aggregate_id
                      AND e.type <> ALL(%s) ORDER BY e.version DESC LIMIT 1),
                   (SELECT b.changed_at FROM boxes b
                    WHERE b.tenant = w.tenant AND b.category = w.category AND b.aggregate_id = w.aggregate_id
                    ORDER BY b.version DESC LIMIT 1)) AS used_at
                 FROM unnest(%s, %s, %s) WITH ORDINALITY AS w(tenant, category, aggregate_id, nth)) u
               WHERE u.used_at IS NOT NULL""",
            (texts([BOXED, UNBOXED]), *packed_keys(keys)),
        )
        return {keys[nth - 1]: used_at for nth, used_at in await cursor.fetchall()}


async def newest_box(reads: Reads, key: AggregateKey, version: int = 0) -> StoredBox | None:
    """The newest box of an aggregate, or that of a version; None if there is none."""
    async with reads.connection() as connection:
        cursor = await connection.execute(
            """SELECT box_id, category, aggregate_id, version, location, chain, boxed_at, unboxed_at FROM boxes
               WHERE tenant = %s AND category = %s AND aggregate_id = %s AND (%s = 0 OR version = %s)
               ORDER BY version DESC LIMIT 1""",
            (*key, version, version),
        )
        row = await cursor.fetchone()
    return StoredBox(*row) if row else None


async def list_boxes(
    reads: Reads, tenant: str, *, category: str, aggregate_id: str, hidden: Sequence[str], below: int, limit: int
) -> list[StoredBox]:
    """The newest boxes of a tenant with an id below one, of all aggregates or some, without those of the hidden categories."""
    wanted: LiteralString = ""
    if category:
        wanted = "AND category = %s AND aggregate_id = %s" if aggregate_id else "AND category = %s"
    async with reads.connection() as connection:
        cursor = await connection.execute(
            f"""SELECT box_id, category, aggregate_id, version, location, chain, boxed_at, unboxed_at FROM boxes
                WHERE tenant = %s {wanted} AND category <> ALL(%s) AND box_id < %s AND location <> ''
                ORDER BY box_id DESC LIMIT %s""",  # noqa: S608
            (tenant, *filter(None, (category, aggregate_id)), texts(hidden), below, limit),
        )
        return [StoredBox(*row) for row in await cursor.fetchall()]
