"""Retention: aggregates of a type that had no event for so many days are boxed, by rules that each tenant sets.

The rules of a tenant are the state of an aggregate of that tenant, changed by a command: who set which rule, and when, is on
the line and in the command log. `plan` says what is past its date, and the sweeper boxes just that (`retention_sweeper.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from msgspec import Struct

from foldline.v1 import retention_pb2
from shared.commands import states
from shared.commands.boxes import read_stored
from shared.commands.boxing import Boxer
from shared.commands.codec import EventCodecs, MessageCodec
from shared.commands.registry import CommandRegistry
from shared.folds.aggregate import Aggregate, Decision, Meta
from shared.folds.errors import AggregateUnreadable, NotFound, Rejected
from shared.line.event_store import BOXED, AggregateKey
from shared.platform.identity import Role
from shared.platform.postgres import Reads

RULES_ID = "retention"
"""The id of the aggregate that holds a tenant's rules."""

PART_IN_USE = "PART_IN_USE"


class SetRetention(Struct, frozen=True, kw_only=True):
    """The command."""

    aggregate_type: str
    box_after_days: int


class RetentionSet(Struct, frozen=True, kw_only=True):
    """The event."""

    aggregate_type: str
    box_after_days: int


class Rules(Struct, frozen=True, kw_only=True):
    """After how many days without an event aggregates are boxed, by type."""

    days: dict[str, int] = {}


def evolve(rules: Rules, event: RetentionSet) -> Rules:
    """The rules after the event."""
    days = {type_: days for type_, days in rules.days.items() if type_ != event.aggregate_type}
    return Rules(days=days | {event.aggregate_type: event.box_after_days} if event.box_after_days else days)


RULES = Aggregate(category="retention", initial=Rules(), evolve=evolve)

SET_RETENTION = MessageCodec(
    SetRetention,
    retention_pb2.SetRetentionRequest,
    lambda message: SetRetention(aggregate_type=message.aggregate_type, box_after_days=message.box_after_days),
    lambda value: retention_pb2.SetRetentionRequest(
        aggregate_type=value.aggregate_type, box_after_days=value.box_after_days
    ).SerializeToString(),
)
RETENTION_SET = MessageCodec(
    RetentionSet,
    retention_pb2.RetentionSet,
    lambda message: RetentionSet(aggregate_type=message.aggregate_type, box_after_days=message.box_after_days),
    lambda value: retention_pb2.RetentionSet(
        aggregate_type=value.aggregate_type, box_after_days=value.box_after_days
    ).SerializeToString(),
)
EVENTS: EventCodecs[RetentionSet] = EventCodecs(RETENTION_SET)


def add_retention(registry: CommandRegistry, *, roles: frozenset[Role]) -> None:
    """Lets the roles set the rules of their tenant."""
    on = registry.aggregate(RULES, EVENTS, readers=roles, boxable=False)
    on.command(SET_RETENTION, _set_rule(registry), id=lambda c: RULES_ID, roles=roles)


def _set_rule(registry: CommandRegistry) -> Decision[Rules, SetRetention, RetentionSet]:
    def set_rule(rules: Rules, command: SetRetention, meta: Meta) -> list[RetentionSet]:
        """A rule that is so already stays so, without an event. Refusals: AGGREGATE_TYPE_NOT_FOUND, NEVER_BOXED."""
        refuse_type(registry, command.aggregate_type)
        if command.box_after_days == rules.days.get(command.aggregate_type, 0):
            return []
        return [RetentionSet(aggregate_type=command.aggregate_type, box_after_days=command.box_after_days)]

    return set_rule


def refuse_type(registry: CommandRegistry, category: str) -> None:
    """Refuses a type that no rule can be for. Refusals: AGGREGATE_TYPE_NOT_FOUND, NEVER_BOXED."""
    if registry.aggregate_or_none(category) is None:
        raise NotFound("AGGREGATE_TYPE_NOT_FOUND", "there is no such type of aggregate")
    if not registry.is_boxable(category):
        raise Rejected("NEVER_BOXED", "aggregates of this type are needed at any time")


async def current(registry: CommandRegistry, reads: Reads, tenant: str) -> Mapping[str, int]:
    """The rules of a tenant: days by type. Raises AggregateUnreadable."""
    key = (tenant, RULES.category, RULES_ID)
    async with reads.connection() as connection:
        rules = (await states.load(connection, registry, [key]))[key].state
    if not isinstance(rules, Rules):
        raise AggregateUnreadable
    return rules.days


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


async def plan(
    boxer: Boxer, reads: Reads, tenant: str, category: str, days: int, now: datetime, *, after: str, examined: int, found_max: int
) -> Page:
    """What a rule would box of a type, in the order of the ids behind `after`.

    Looks at `examined` aggregates at most, and ends behind the one that is the last of `found_max`.
    """
    before = now - timedelta(days=days)
    asked = {"tenant": tenant, "category": category, "after": after, "limit": examined}
    async with reads.connection() as connection:
        rows = await (await connection.execute(_NEWEST, asked)).fetchall()
    planned: list[Planned] = []
    for aggregate_id, version, type_name, changed_at in rows:
        if type_name == BOXED or changed_at > before:
            continue
        key = (tenant, category, aggregate_id)
        parts, held_by = await _parts(boxer, reads, key, before)
        planned.append(Planned(key, version, changed_at, parts, held_by))
        if len(planned) == found_max:
            return Page(planned, aggregate_id)
    return Page(planned, rows[-1][0] if len(rows) == examined else "")


async def _parts(boxer: Boxer, reads: Reads, key: AggregateKey, before: datetime) -> tuple[int, str]:
    """How many aggregates would be boxed with one, and why it cannot be boxed."""
    try:
        keys = await boxer.parts_of(key)
    except (NotFound, Rejected) as refusal:
        return 0, refusal.reason
    parts = [stored for stored in (await read_stored(reads, keys)).values() if not stored.boxed] if keys else []
    return len(parts), PART_IN_USE if any(stored.changed_at > before for stored in parts) else ""
