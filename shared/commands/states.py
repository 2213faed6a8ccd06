"""The states of aggregates, read in one query: the newest usable snapshot and the events after it.

Hand-written SQL on the driver, since loading is on the hot path.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from msgspec import Struct

from shared.commands.registry import CommandRegistry
from shared.folds.errors import AggregateUnreadable, Refusal, ReleaseTooOld
from shared.line.ends import AGGREGATE_PURGED
from shared.line.event_store import BOXED, UNBOXED, AggregateKey, StoredEvent
from shared.platform.packing import Packed, int4s, texts
from shared.platform.postgres import Connection
from shared.platform.telemetry import logger

log = logger(__name__)


class Boxed(Struct, frozen=True):
    """In place of the state of an aggregate whose events are in the archive. No decision sees it."""


class Purged(Struct, frozen=True):
    """In place of the state of an aggregate that is purged. No decision sees it."""


class Unreadable(Struct, frozen=True):
    """In place of the state of an aggregate with an event that this release cannot read. No decision sees it."""

    # Whether a newer release wrote the event: its type is not known.
    newer: bool = False

    @property
    def refusal(self) -> Refusal:
        """What whoever asks for the state is told."""
        return ReleaseTooOld() if self.newer else AggregateUnreadable()


NO_SCHEMA = -1
"""That no snapshot has."""

MARKS = frozenset({BOXED, UNBOXED, AGGREGATE_PURGED})
"""Types of events that say where the others are, or that they are gone. No fold sees them."""


class Versioned(Struct):
    """A state, and the number of events it is folded from."""

    version: int
    state: Any


def packed_keys(keys: Sequence[AggregateKey]) -> tuple[Packed, Packed, Packed]:
    """Keys as three arrays: tenants, categories, aggregate ids."""
    return texts([key[0] for key in keys]), texts([key[1] for key in keys]), texts([key[2] for key in keys])


# The newest snapshot of the current schema, if there is one, and the events after it. A row without a type is a
# snapshot; it is sorted before its events. Of an aggregate that is purged, the mark alone: its snapshot is gone at once, but its
# events, of which there may be millions, go in steps.
_LOAD = """
WITH wanted AS (
  SELECT * FROM unnest(%s, %s, %s, %s) WITH ORDINALITY AS w(tenant, category, aggregate_id, schema, nth)
), base AS MATERIALIZED (
  SELECT w.*, s.version AS base_version, s.state
  FROM wanted w LEFT JOIN LATERAL (
    SELECT s.version, s.state FROM snapshots s
    WHERE s.tenant = w.tenant AND s.category = w.category AND s.aggregate_id = w.aggregate_id AND s.schema = w.schema
    ORDER BY s.version DESC LIMIT 1) s ON true
)
SELECT nth::integer, base_version AS version, '' AS type, state AS data FROM base WHERE base_version IS NOT NULL
UNION ALL
SELECT b.nth::integer, e.version, e.type, e.payload FROM base b JOIN LATERAL (
  SELECT e.version, e.type, e.payload FROM events e
  WHERE e.tenant = b.tenant AND e.category = b.category AND e.aggregate_id = b.aggregate_id
    AND e.version > coalesce(b.base_version, (
      SELECT n.version - 1 FROM (
        SELECT l.version, l.type FROM events l
        WHERE l.tenant = b.tenant AND l.category = b.category AND l.aggregate_id = b.aggregate_id
        ORDER BY l.version DESC LIMIT 1) n
      WHERE n.type = %s), 0)
  ORDER BY e.version OFFSET 0) e ON true
ORDER BY 1, 2
"""


async def load(connection: Connection, registry: CommandRegistry, keys: Iterable[AggregateKey]) -> dict[AggregateKey, Versioned]:
    """The states of aggregates by key, in one query; an aggregate without events is at version 0 in its initial state.

    The state of one that is boxed is `Boxed()`, of one that is purged `Purged()`, and of one with an event that this release
    cannot read `Unreadable(...)`: the others are loaded all the same. A snapshot that cannot be read is passed over, which takes
    a second query.
    """
    wanted = list(keys)
    loaded, spoilt = await _load(connection, registry, wanted, [registry.aggregate_of(key[1]).schema for key in wanted])
    if spoilt:
        loaded |= (await _load(connection, registry, spoilt, [NO_SCHEMA] * len(spoilt)))[0]
    return loaded


def fold(registry: CommandRegistry, category: str, events: Iterable[StoredEvent]) -> Any:
    """The state behind the last of all events of an aggregate. Raises AggregateUnreadable and ReleaseTooOld."""
    aggregate = registry.aggregate_of(category)
    state = aggregate.initial
    for event in events:
        if event.type in MARKS:
            continue
        try:
            state = aggregate.evolve(state, registry.codecs.decode(event.type, event.payload))
        except Exception as error:
            raise unreadable(registry, event.type).refusal from error
    return state


def unreadable(registry: CommandRegistry, type_name: str) -> Unreadable:
    """In place of the state of an aggregate that an event of this type cannot be folded into."""
    return Unreadable(not registry.codecs.knows(type_name))


async def _load(
    connection: Connection, registry: CommandRegistry, wanted: Sequence[AggregateKey], schemas: Sequence[int]
) -> tuple[dict[AggregateKey, Versioned], list[AggregateKey]]:
    """The states, and the keys of those whose snapshot cannot be read."""
    aggregates = [registry.aggregate_of(category) for _, category, _ in wanted]
    cursor = await connection.execute(_LOAD, (*packed_keys(wanted), int4s(schemas), AGGREGATE_PURGED))
    versions = [0] * len(wanted)
    states = [aggregate.initial for aggregate in aggregates]
    marks: dict[int, str] = {}
    unread: dict[int, Unreadable] = {}
    spoilt: list[AggregateKey] = []
    for nth, version, type_name, data in await cursor.fetchall():
        at = nth - 1
        versions[at] = version
        try:
            if type_name in MARKS:
                marks[at] = type_name
            elif type_name:
                states[at] = aggregates[at].evolve(states[at], registry.codecs.decode(type_name, data))
            else:
                states[at] = registry.load_state(wanted[at][1], data)
        except Exception as error:  # noqa: BLE001 - one aggregate must not hold up those that are loaded with it
            tenant, category, aggregate_id = wanted[at]
            facts = {"tenant": tenant, "category": category, "aggregate_id": aggregate_id, "version": version}
            if type_name:
                log.error("event_unreadable", type=type_name, error=type(error).__name__, **facts)  # noqa: TRY400 - as above
                unread.setdefault(at, unreadable(registry, type_name))
            else:
                log.warning("snapshot_unreadable", error=type(error).__name__, **facts)
                spoilt.append(wanted[at])
    for at, instead in unread.items():
        states[at] = instead
    for at, mark in marks.items():
        if mark != UNBOXED:
            states[at] = Boxed() if mark == BOXED else Purged()
    return {key: Versioned(versions[at], states[at]) for at, key in enumerate(wanted)}, spoilt
