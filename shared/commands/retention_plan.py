"""What the rules of retention would box and purge: aggregates that are past their date, and why some of these stay all the same.

An aggregate that has ended, by what its row of the registry says of its state, is purged with what it is boxed with, all of it or
nothing. Whether it has ended is asked of the state, which for one that is boxed is read from the archive; what has not ended is
remembered, so that it is not read at every look.

What is not known here: whether a process in flight will yet send a command to it. That command is refused as
AGGREGATE_PURGED, which is an answer like any other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime, timedelta

from msgspec import Struct
from msgspec.structs import replace

from shared.commands import states
from shared.commands.boxes import Stored, last_used, newest_box, read_stored, stored_as
from shared.commands.boxing import Boxer
from shared.commands.registry import CommandRegistry
from shared.commands.states import Boxed, Purged, Unreadable
from shared.folds.errors import NotFound, Refusal, Rejected
from shared.line.event_store import AggregateKey
from shared.platform.packing import texts
from shared.platform.postgres import Reads, one

PART_IN_USE, PART_NOT_ENDED, COMMAND_WAITS = "PART_IN_USE", "PART_NOT_ENDED", "COMMAND_WAITS"

LOADED_AT_ONCE = 50
REMEMBERED_MAX = 100_000


class Planned(Struct, frozen=True):
    """An aggregate that is past its date. `held_by`: why it is left where it is, else empty."""

    key: AggregateKey
    version: int
    changed_at: datetime
    parts: int
    held_by: str


class Page(Struct, frozen=True):
    """Of the aggregates of a type, those that are past their date; `after` is the last that was looked at, empty at the end."""

    planned: Sequence[Planned]
    after: str


class PlannedPurge(Struct, frozen=True):
    """An aggregate that would be purged. `parts`: what goes with it. `held_by`: why it stays, else empty."""

    key: AggregateKey
    version: int
    changed_at: datetime
    parts: Sequence[PlannedPurge] = ()
    held_by: str = ""


class PurgePage(Struct, frozen=True):
    """As Page."""

    planned: Sequence[PlannedPurge]
    after: str


# Walks the index from one aggregate to the next, whatever number of events each has.
_NEWEST = """
WITH RECURSIVE walk AS (
  (SELECT e.aggregate_id FROM events e WHERE e.tenant = %(tenant)s AND e.category = %(category)s AND e.aggregate_id > %(after)s
   ORDER BY e.aggregate_id LIMIT 1)
  UNION ALL
  SELECT n.aggregate_id FROM walk w CROSS JOIN LATERAL (
    SELECT e.aggregate_id FROM events e
    WHERE e.tenant = %(tenant)s AND e.category = %(category)s AND e.aggregate_id > w.aggregate_id
    ORDER BY e.aggregate_id LIMIT 1) n
)
SELECT n.aggregate_id, n.version, n.type, n.recorded_at
FROM (SELECT aggregate_id FROM walk LIMIT %(limit)s) w CROSS JOIN LATERAL (
  SELECT e.aggregate_id, e.version, e.type, e.recorded_at FROM events e
  WHERE e.tenant = %(tenant)s AND e.category = %(category)s AND e.aggregate_id = w.aggregate_id
  ORDER BY e.version DESC LIMIT 1) n
ORDER BY n.aggregate_id
"""


async def _walk(reads: Reads, tenant: str, category: str, *, after: str, examined: int) -> tuple[dict[AggregateKey, Stored], str]:
    """Where the next `examined` aggregates are, by id, without those that are purged, and the last that was looked at."""
    asked = {"tenant": tenant, "category": category, "after": after, "limit": examined}
    async with reads.connection() as connection:
        rows = await (await connection.execute(_NEWEST, asked)).fetchall()
    found = {(tenant, category, id_): stored_as(version, type_, at) for id_, version, type_, at in rows}
    return {key: at for key, at in found.items() if not at.purged}, rows[-1][0] if len(rows) == examined else ""


async def _as_last_used(reads: Reads, found: dict[AggregateKey, Stored]) -> dict[AggregateKey, Stored]:
    """The same, each with the time of the newest event that is neither of boxing nor of unboxing."""
    marked = [key for key, at in found.items() if at.marked]
    used_at = await last_used(reads, marked) if marked else {}
    return {key: replace(at, changed_at=used_at.get(key, at.changed_at)) for key, at in found.items()}


async def plan(
    boxer: Boxer, reads: Reads, tenant: str, category: str, days: int, now: datetime, *, after: str, examined: int, found_max: int
) -> Page:
    """What a rule would box of a type, in the order of the ids behind `after`: what has no event for so many days.

    Unboxing is such an event, so that what was put back stays for as long as what was used.
    Looks at `examined` aggregates at most, and ends behind the one that is the last of `found_max`.
    """
    before = now - timedelta(days=days)
    found, last = await _walk(reads, tenant, category, after=after, examined=examined)
    planned: list[Planned] = []
    for key, at in found.items():
        if at.boxed or at.changed_at > before:
            continue
        parts, held_by = await _parts(boxer, reads, key, before)
        planned.append(Planned(key, at.version, at.changed_at, parts, held_by))
        if len(planned) == found_max:
            return Page(planned, key[2])
    return Page(planned, last)


async def _parts(boxer: Boxer, reads: Reads, key: AggregateKey, before: datetime) -> tuple[int, str]:
    """How many aggregates would be boxed with one, and why it cannot be boxed."""
    try:
        keys = await boxer.parts_of(key)
    except (NotFound, Rejected) as refusal:
        return 0, refusal.reason
    found = (await read_stored(reads, keys)).values() if keys else ()
    parts = [stored for stored in found if not (stored.boxed or stored.purged)]
    return len(parts), PART_IN_USE if any(stored.changed_at > before for stored in parts) else ""


class Purges:
    """Plans purges. Remembers which aggregates have not ended, as of a version."""

    def __init__(self, boxer: Boxer, reads: Reads, registry: CommandRegistry) -> None:
        self._boxer = boxer
        self._reads = reads
        self._registry = registry
        self._not_ended: dict[AggregateKey, int] = {}

    async def plan(
        self, tenant: str, category: str, days: int, now: datetime, *, after: str, examined: int, found_max: int
    ) -> PurgePage:
        """What a rule would purge of a type, as `plan` says what it would box; boxing and unboxing are no use of an aggregate."""
        before = now - timedelta(days=days)
        found, last = await _walk(self._reads, tenant, category, after=after, examined=examined)
        old = {key: at for key, at in (await _as_last_used(self._reads, found)).items() if at.changed_at <= before}
        planned: list[PlannedPurge] = []
        keys = list(old)
        for first in range(0, len(keys), LOADED_AT_ONCE):
            some = {key: old[key] for key in keys[first : first + LOADED_AT_ONCE]}
            ended, unknown = await self._ended(some)
            for key, stored in some.items():
                if key in unknown:
                    planned.append(PlannedPurge(key, stored.version, stored.changed_at, held_by=unknown[key]))
                elif key in ended:
                    planned.append(await self._with_parts(key, stored, before))
                else:
                    continue
                if len(planned) == found_max:
                    return PurgePage(planned, key[2])
        return PurgePage(planned, last)

    async def _with_parts(self, key: AggregateKey, stored: Stored, before: datetime) -> PlannedPurge:
        found: dict[AggregateKey, Stored] = {}
        held_by = ""
        try:
            keys = [part for part in await self._boxer.parts_of(key) if part != key]
            found = {part: at for part, at in (await read_stored(self._reads, keys)).items() if not at.purged} if keys else {}
            found = await _as_last_used(self._reads, found)
            ended, unknown = await self._ended(found)
            if any(at.changed_at > before for at in found.values()):
                held_by = PART_IN_USE
            elif ended != found.keys():
                held_by = next(iter(unknown.values()), PART_NOT_ENDED)
            elif await self._awaited([key, *found]):
                held_by = COMMAND_WAITS
        except (NotFound, Rejected) as refusal:
            held_by = refusal.reason
        parts = [PlannedPurge(part, at.version, at.changed_at) for part, at in found.items()]
        return PlannedPurge(key, stored.version, stored.changed_at, parts, held_by)

    async def _awaited(self, keys: Sequence[AggregateKey]) -> bool:
        """Whether a scheduled command or a recurring schedule is for one of the aggregates, which are of one tenant."""
        categories, ids = texts([key[1] for key in keys]), texts([key[2] for key in keys])
        async with self._reads.connection() as connection:
            (found,) = await one(
                connection,
                "SELECT coalesce(bool_or(aggregate_awaits(%s, a.category, a.id)), false) FROM unnest(%s, %s) AS a(category, id)",
                (keys[0][0], categories, ids),
            )
        return bool(found)

    async def _ended(self, stored: dict[AggregateKey, Stored]) -> tuple[set[AggregateKey], dict[AggregateKey, str]]:
        """Those that have ended, and why it cannot be told of some."""
        asked = [key for key, at in stored.items() if self._not_ended.get(key) != at.version]
        ended: set[AggregateKey] = set()
        unknown: dict[AggregateKey, str] = {}
        if not asked:
            return ended, unknown
        async with self._reads.connection() as connection:
            loaded = await states.load(connection, self._registry, asked)
        for key, at in loaded.items():
            try:
                state = await self._boxed_state(key) if isinstance(at.state, Boxed) else at.state
            except Refusal as refusal:
                unknown[key] = refusal.reason
                continue
            if isinstance(state, Unreadable):
                unknown[key] = state.refusal.reason
            elif not isinstance(state, Purged) and self._registry.has_ended(key[1], state):
                ended.add(key)
            else:
                self._remember(key, stored[key].version)
        return ended, unknown

    async def _boxed_state(self, key: AggregateKey) -> object:
        box = await newest_box(self._reads, key)
        if box is None or not box.location:
            return Purged()
        found = await self._boxer.archive.read(box.location, key, box.chain)
        return await asyncio.to_thread(states.fold, self._registry, key[1], found.events)

    def _remember(self, key: AggregateKey, version: int) -> None:
        self._not_ended.pop(key, None)
        self._not_ended[key] = version
        if len(self._not_ended) > REMEMBERED_MAX:
            del self._not_ended[next(iter(self._not_ended))]
