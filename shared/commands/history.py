"""What an aggregate was: its state at any version or moment, folded from its events.

Events never change, so a state of the past is the same whoever asks and however often. The events are read in pages, each on a
connection of its own, so a long stream keeps no connection from the others. If the aggregate is boxed between two pages, the
pages end too early, and the caller is told that it is boxed.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, LiteralString

from msgspec import DecodeError, Struct, json, to_builtins

from foldline.v1 import history_pb2, options_pb2
from shared.commands.decide import aggregate_boxed, aggregate_purged
from shared.commands.registry import CommandRegistry
from shared.commands.states import MARKS, unreadable
from shared.folds.errors import NotFound
from shared.line.ends import AGGREGATE_PURGED
from shared.line.event_store import BOXED, AggregateKey
from shared.platform.clock import timestamp
from shared.platform.fairness import Room, Turns
from shared.platform.postgres import Connection, Reads
from shared.rpc.validation import moment_of

PAGE_EVENTS = 500


class Stored(Struct, frozen=True):
    """An event of a stream, without its content."""

    version: int
    type: str
    recorded_at: datetime


class PastState(Struct, frozen=True):
    """The state behind an event, and when the event was appended."""

    version: int
    recorded_at: datetime
    state: Any


async def describe(
    registry: CommandRegistry, reads: Reads, key: AggregateKey, *, cached: bool
) -> history_pb2.DescribeAggregateResponse:
    """How an aggregate is stored. Raises NotFound (AGGREGATE_NOT_FOUND)."""
    async with reads.connection() as connection:
        newest = await _newest(connection, key)
        cursor = await connection.execute(
            """SELECT version FROM snapshots
               WHERE tenant = %s AND category = %s AND aggregate_id = %s AND schema = %s ORDER BY version""",
            (*key, registry.aggregate_of(key[1]).schema),
        )
        snapshots = [version for (version,) in await cursor.fetchall()]
    return history_pb2.DescribeAggregateResponse(
        aggregate_type=key[1],
        aggregate_id=key[2],
        version=newest.version,
        changed_at=timestamp(newest.recorded_at),
        snapshot_versions=snapshots,
        cached=cached,
        boxed=newest.type == BOXED,
        purged=newest.type == AGGREGATE_PURGED,
    )


async def past_state(
    registry: CommandRegistry,
    reads: Reads,
    room: Room,
    key: AggregateKey,
    *,
    version: int | None = None,
    moment: datetime | None = None,
) -> PastState:
    """The state at a version, at a moment, or now.

    Raises NotFound (AGGREGATE_NOT_FOUND, VERSION_NOT_FOUND), Rejected (AGGREGATE_BOXED, AGGREGATE_PURGED) or OverLimit
    (TOO_MANY_PAST_STATES).
    """
    async with room.slots.one(key[0]):
        return await _past_state(registry, reads, room.turns, key, version, moment)


async def _past_state(
    registry: CommandRegistry, reads: Reads, turns: Turns, key: AggregateKey, version: int | None, moment: datetime | None
) -> PastState:
    async with reads.connection() as connection:
        newest = await _newest(connection, key)
        if newest.type == BOXED:
            raise aggregate_boxed()
        if newest.type == AGGREGATE_PURGED:
            raise aggregate_purged()
        wanted = newest if version is None and moment is None else await _at(connection, key, version, moment)
        if wanted is None:
            when = "at this moment" if version is None else "with this version"
            raise NotFound("VERSION_NOT_FOUND", f"the aggregate has no event {when}", version=newest.version)
        at, state = await _base(connection, registry, key, wanted.version)
    aggregate = registry.aggregate_of(key[1])
    while at < wanted.version:
        await turns.next(key[0])
        async with reads.connection() as connection:
            cursor = await connection.execute(
                """SELECT version, type, payload FROM events
                   WHERE tenant = %s AND category = %s AND aggregate_id = %s AND version > %s AND version <= %s
                   ORDER BY version LIMIT %s""",
                (*key, at, wanted.version, PAGE_EVENTS),
            )
            events = await cursor.fetchall()
        if not events:
            raise aggregate_boxed()
        for _, type_name, payload in events:
            if type_name in MARKS:
                continue
            try:
                state = aggregate.evolve(state, registry.codecs.decode(type_name, payload))
            except Exception as error:
                raise unreadable(registry, type_name).refusal from error
        at = events[-1][0]
    return PastState(wanted.version, wanted.recorded_at, state)


async def get(
    registry: CommandRegistry,
    reads: Reads,
    room: Room,
    key: AggregateKey,
    request: history_pb2.GetAggregateRequest,
    *,
    personal: bool,
) -> history_pb2.GetAggregateResponse:
    """The state that a request asks for, with its personal fields or without. Raises as `past_state` and `moment_of` do."""
    when = request.WhichOneof("when")
    found = await past_state(
        registry,
        reads,
        room,
        key,
        version=request.version if when == "version" else None,
        moment=moment_of(request.moment, "moment") if when == "moment" else None,
    )
    fields = to_builtins(found.state)
    hidden = [] if personal else [name for name in personal_fields(registry, key[1]) if name in fields]
    return history_pb2.GetAggregateResponse(
        version=found.version,
        recorded_at=timestamp(found.recorded_at),
        state_json=json.encode({name: value for name, value in fields.items() if name not in hidden}).decode(),
        hidden_fields=hidden,
    )


async def diff(
    registry: CommandRegistry,
    reads: Reads,
    room: Room,
    key: AggregateKey,
    from_version: int,
    to_version: int,
    *,
    personal: bool,
) -> history_pb2.DiffAggregateResponse:
    """The fields of the state that differ between two versions. Raises as `past_state` does."""
    one, other = [
        to_builtins((await past_state(registry, reads, room, key, version=version)).state)
        for version in (from_version, to_version)
    ]
    hidden = [] if personal else personal_fields(registry, key[1])

    def shown(name: str, value: Any) -> str:
        return "" if name in hidden else json.encode(value).decode()

    return history_pb2.DiffAggregateResponse(
        changes=[
            history_pb2.FieldChange(field=name, from_json=shown(name, one[name]), to_json=shown(name, other[name]))
            for name in one
            if one[name] != other[name]
        ]
    )


def personal_fields(registry: CommandRegistry, category: str) -> list[str]:
    """The names of the personal fields of a category's events, sorted: a field of the state with such a name is personal too."""
    return sorted(
        {
            field.name
            for codec in registry.events_of(category)
            for field in codec.message.DESCRIPTOR.fields
            if field.GetOptions().Extensions[options_pb2.personal]
        }
    )


async def _newest(connection: Connection, key: AggregateKey) -> Stored:
    found = await _find(connection, key, "", ())
    if found is None:
        raise NotFound("AGGREGATE_NOT_FOUND", "there is no such aggregate")
    return found


async def _at(connection: Connection, key: AggregateKey, version: int | None, moment: datetime | None) -> Stored | None:
    if version is not None:
        return await _find(connection, key, "AND version = %s", (version,))
    return await _find(connection, key, "AND recorded_at <= %s", (moment,))


async def _find(
    connection: Connection, key: AggregateKey, condition: LiteralString, parameters: tuple[Any, ...]
) -> Stored | None:
    query: LiteralString = f"""SELECT version, type, recorded_at FROM events
                WHERE tenant = %s AND category = %s AND aggregate_id = %s {condition} ORDER BY version DESC LIMIT 1"""  # noqa: S608
    cursor = await connection.execute(query, (*key, *parameters))
    row = await cursor.fetchone()
    return Stored(*row) if row else None


async def _base(connection: Connection, registry: CommandRegistry, key: AggregateKey, version: int) -> tuple[int, Any]:
    """The newest snapshot that is not beyond a version, else the initial state at version 0."""
    aggregate = registry.aggregate_of(key[1])
    cursor = await connection.execute(
        """SELECT version, state FROM snapshots
           WHERE tenant = %s AND category = %s AND aggregate_id = %s AND schema = %s AND version <= %s
           ORDER BY version DESC LIMIT 1""",
        (*key, aggregate.schema, version),
    )
    row = await cursor.fetchone()
    try:
        return (row[0], registry.load_state(key[1], row[1])) if row else (0, aggregate.initial)
    except DecodeError:  # the events tell the same
        return 0, aggregate.initial
