"""What is boxed with an aggregate: those that its events name, by the rules of the registry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import Struct

from shared.commands.registry import CommandRegistry
from shared.line.event_store import BOXED, AggregateKey
from shared.platform.packing import texts
from shared.platform.postgres import Reads

PAGE_EVENTS = 2000


class Named(Struct, frozen=True):
    """The newest event of an aggregate, and what the events in the tables name, in the order in which they do."""

    version: int
    boxed: bool
    parts: Sequence[AggregateKey]


async def read_named(reads: Reads, registry: CommandRegistry, key: AggregateKey, *, version_max: int) -> Named | None:
    """As of one moment; None if there is no such aggregate.

    Only events of types that name something are read, a page at a time, and none of an aggregate that is boxed or that has a
    version above `version_max`.
    """
    types = texts(registry.codecs.upcasters.stored_as(registry.boxed_with(key[1])))
    found: dict[AggregateKey, None] = {}
    async with reads.connection() as connection, connection.transaction():
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        cursor = await connection.execute(
            """SELECT version, type FROM events WHERE tenant = %s AND category = %s AND aggregate_id = %s
               ORDER BY version DESC LIMIT 1""",
            key,
        )
        if (newest := await cursor.fetchone()) is None:
            return None
        version, boxed = newest[0], newest[1] == BOXED
        after = version if boxed or version > version_max else 0
        while after < version:
            cursor = await connection.execute(
                """SELECT version, type, payload FROM events
                   WHERE tenant = %s AND category = %s AND aggregate_id = %s AND version > %s AND type = ANY(%s)
                   ORDER BY version LIMIT %s""",
                (*key, after, types, PAGE_EVENTS),
            )
            page = await cursor.fetchall()
            found |= dict.fromkeys(named_by(registry, key, ((type_, payload) for _, type_, payload in page)))
            after = page[-1][0] if len(page) == PAGE_EVENTS else version
    return Named(version, boxed, list(found))


def named_by(registry: CommandRegistry, key: AggregateKey, events: Iterable[tuple[str, bytes]]) -> list[AggregateKey]:
    """What events of an aggregate name, in the order in which they do; each is a type and a payload as stored."""
    rules = registry.boxed_with(key[1])
    found: dict[AggregateKey, None] = {}
    for type_, payload in events:
        if (rule := rules.get(registry.codecs.upcasters.newest(type_))) is not None:
            found[(key[0], rule.category, rule.id(registry.codecs.decode(type_, payload)))] = None
    return list(found)
