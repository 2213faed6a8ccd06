"""Who did what: the commands of a tenant with the events that they appended, page by page.

What identifies the sender of an event stands in its metadata, which no index reads. The command log has the same of each
command, and the positions of its events: those of one command lie side by side on the line. So an event is found by its command.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import chain, islice

from msgspec import Struct

from foldline.v1 import audit_pb2
from shared.commands.bus import CommandBus
from shared.commands.log import StoredCommand, Wanted, list_commands
from shared.commands.registry import CommandRegistry
from shared.folds.errors import Forbidden
from shared.folds.moments import timestamp_or_none
from shared.platform.identity import Identity, Role, seen_position
from shared.platform.packing import int8s
from shared.platform.postgres import Connection, Reads
from shared.rpc import pages
from shared.rpc.validation import moment_of


class Place(Struct, frozen=True):
    """An entry: the event of a command by its number among those, from 1 on, or the command itself by 0, behind its events."""

    command: StoredCommand
    nth: int

    @property
    def position(self) -> int:
        """The event's position on the line."""
        return self.command.position - self.command.events_appended + self.nth


class AuditedRow(Struct, frozen=True):
    """What is told of an event; of one in the archive neither type nor version."""

    event_id: str
    category: str
    aggregate_id: str
    type: str
    version: int
    boxed: bool


async def list_audit(
    identity: Identity, request: audit_pb2.ListAuditRequest, commands: CommandBus, registry: CommandRegistry, reads: Reads
) -> audit_pb2.ListAuditResponse:
    """The page that was asked for. Raises Forbidden (ROLE_MISSING) or Invalid (INVALID_REQUEST, PAGE_TOKEN_INVALID)."""
    hidden = registry.hidden_from(identity.roles)
    wanted = _wanted(identity, request.filter, hidden)
    size = request.page_size or pages.SIZE_DEFAULT
    query = ("ListAudit", identity.user_id, *map(str, (getattr(wanted, name) for name in wanted.__struct_fields__)))
    keys = pages.decode(query, request.page_token, (int, str, int))
    async with reads.connection() as connection:
        after = (pages.moment_of(keys[0]), pages.uuid_of(keys[1]), keys[2]) if keys else None
        found = await places(connection, wanted, size + 1, after)
        events = await read_events(connection, [place.position for place in found if place.nth])
    shown, following = pages.cut(found, size, query, _key)
    entries = [_entry(place, commands, events) for place in shown]
    told = [entry for entry in entries if not (entry.HasField("event") and entry.event.aggregate_type in ("", *hidden))]
    return audit_pb2.ListAuditResponse(entries=told, next_page_token=following)


async def places(
    connection: Connection, wanted: Wanted, limit: int, after: tuple[datetime, str, int] | None = None
) -> list[Place]:
    """Up to `limit` entries, the newest first, behind `after`: a command's time, its id, and the number of an event."""
    if after is None:
        rows = await list_commands(connection, wanted, limit=limit)
        return list(islice(chain.from_iterable(map(_places, rows)), limit))
    moment, command_id, below = after
    rows = await list_commands(connection, wanted, limit=limit, after=(moment, command_id), including=below != 0)
    found = chain.from_iterable(map(_places, rows))
    left = (place for place in found if place.command.command_id != command_id or place.nth < below)
    return list(islice(left, limit))


async def read_events(connection: Connection, positions: Sequence[int]) -> Mapping[int, AuditedRow]:
    """What is told of the events at these positions; what is purged is left out."""
    if not positions:
        return {}
    cursor = await connection.execute(
        """SELECT e.position, e.event_id::text, e.category, e.aggregate_id, e.type, e.version, false
           FROM unnest(%(positions)s) AS w(position) JOIN events e USING (position)
           UNION ALL
           SELECT b.position, b.event_id::text, x.category, x.aggregate_id, '', 0, true
           FROM unnest(%(positions)s) AS w(position) JOIN boxed_events b USING (position) JOIN boxes x USING (box_id)""",
        {"positions": int8s(positions)},
    )
    return {row[0]: AuditedRow(*row[1:]) for row in await cursor.fetchall()}


def _places(command: StoredCommand) -> list[Place]:
    return [Place(command, nth) for nth in range(command.events_appended, -1, -1)]


def _wanted(identity: Identity, given: audit_pb2.AuditFilter, hidden: list[str]) -> Wanted:
    if given.tenant not in ("", identity.tenant) and Role.OPERATOR not in identity.roles:
        raise Forbidden("ROLE_MISSING", "only an operator may audit another tenant", roles=Role.OPERATOR)
    return Wanted(
        tenant=given.tenant or identity.tenant,
        hidden=hidden,
        concerns=given.user_id,
        correlation_id=given.correlation_id.lower(),
        follows=given.causation_id.lower(),
        received_from=moment_of(given.received_from, "filter.received_from") if given.HasField("received_from") else None,
        received_before=moment_of(given.received_before, "filter.received_before") if given.HasField("received_before") else None,
    )


def _entry(place: Place, commands: CommandBus, events: Mapping[int, AuditedRow]) -> audit_pb2.AuditEntry:
    """The entry of a place; an event that is gone has no aggregate."""
    command = place.command
    if not place.nth:
        return audit_pb2.AuditEntry(command=commands.record(command))
    event = events.get(place.position, AuditedRow("", "", "", "", 0, False))
    return audit_pb2.AuditEntry(
        event=audit_pb2.AuditedEvent(
            event_id=event.event_id,
            aggregate_type=event.category,
            aggregate_id=event.aggregate_id,
            type=event.type,
            version=event.version,
            position=seen_position(place.position),
            recorded_at=timestamp_or_none(command.finished_at),
            command_id=command.command_id,
            user_id=command.user_id,
            on_behalf_of=command.on_behalf_of,
            correlation_id=command.correlation_id,
            causation_id=command.causation_id or "",
            boxed=event.boxed,
        )
    )


def _key(place: Place) -> tuple[int, str, int]:
    return pages.moment_key(place.command.received_at), place.command.command_id, place.nth
