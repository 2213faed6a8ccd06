"""Retention: aggregates of a type are boxed or purged when they had no event for so many days, by rules that each tenant sets.

The rules of a tenant are the state of an aggregate of that tenant, changed by a command: who set which rule, and when, is on
the line and in the command log. `retention_plan.py` says what is past its date, and the sweeper does just that
(`retention_sweeper.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from google.protobuf.message import Message
from msgspec import Struct
from msgspec.structs import asdict

from foldline.v1 import retention_pb2
from shared.commands import states
from shared.commands.codec import EventCodecs, MessageCodec
from shared.commands.registry import CommandRegistry
from shared.folds.aggregate import Aggregate, Decision, Meta
from shared.folds.errors import NotFound, Rejected
from shared.platform.identity import Role
from shared.platform.postgres import Reads

RULES_ID = "retention"
"""The id of the aggregate that holds a tenant's rules."""

Said = TypeVar("Said", bound=Struct)


class SetRetention(Struct, frozen=True, kw_only=True):
    """The command."""

    aggregate_type: str
    box_after_days: int
    purge_after_days: int


class RetentionSet(Struct, frozen=True, kw_only=True):
    """The event."""

    aggregate_type: str
    box_after_days: int
    purge_after_days: int


class Rule(Struct, frozen=True, kw_only=True):
    """After how many days without an event aggregates of a type are boxed, and purged if they have ended. 0: never."""

    box_after_days: int = 0
    purge_after_days: int = 0


NO_RULE = Rule()


class Rules(Struct, frozen=True, kw_only=True):
    """The rules by type."""

    by_type: dict[str, Rule] = {}


def evolve(rules: Rules, event: RetentionSet) -> Rules:
    """The rules after the event."""
    others = {type_: rule for type_, rule in rules.by_type.items() if type_ != event.aggregate_type}
    rule = Rule(box_after_days=event.box_after_days, purge_after_days=event.purge_after_days)
    return Rules(by_type=others if rule == NO_RULE else others | {event.aggregate_type: rule})


RULES = Aggregate(category="retention", initial=Rules(), evolve=evolve, schema=2)


def _codec(struct: type[Said], message: type[Message]) -> MessageCodec[Said]:
    """The codec of a struct whose fields have the names of the message's."""

    def read(told: Any) -> Said:
        return struct(**{name: getattr(told, name) for name in struct.__struct_fields__})

    return MessageCodec(struct, message, read, lambda value: message(**asdict(value)).SerializeToString())


SET_RETENTION = _codec(SetRetention, retention_pb2.SetRetentionRequest)
RETENTION_SET = _codec(RetentionSet, retention_pb2.RetentionSet)
EVENTS: EventCodecs[RetentionSet] = EventCodecs(RETENTION_SET)


def add_retention(registry: CommandRegistry, *, roles: frozenset[Role]) -> None:
    """Lets the roles set the rules of their tenant."""
    on = registry.aggregate(RULES, EVENTS, readers=roles, boxable=False)
    on.command(SET_RETENTION, _set_rule(registry), id=lambda c: RULES_ID, roles=roles)


def _set_rule(registry: CommandRegistry) -> Decision[Rules, SetRetention, RetentionSet]:
    def set_rule(rules: Rules, command: SetRetention, meta: Meta) -> list[RetentionSet]:
        """A rule that is so already stays so, without an event. Refusals: AGGREGATE_TYPE_NOT_FOUND, NEVER_BOXED, NEVER_PURGED."""
        rule = Rule(box_after_days=command.box_after_days, purge_after_days=command.purge_after_days)
        refuse_rule(registry, command.aggregate_type, rule)
        if rule == rules.by_type.get(command.aggregate_type, NO_RULE):
            return []
        return [RetentionSet(**asdict(command))]

    return set_rule


def refuse_rule(registry: CommandRegistry, category: str, rule: Rule) -> None:
    """Refuses what cannot be a rule for a type. Refusals: AGGREGATE_TYPE_NOT_FOUND, NEVER_BOXED, NEVER_PURGED."""
    if registry.aggregate_or_none(category) is None:
        raise NotFound("AGGREGATE_TYPE_NOT_FOUND", "there is no such type of aggregate")
    if rule.box_after_days and not registry.is_boxable(category):
        raise Rejected("NEVER_BOXED", "aggregates of this type are needed at any time")
    if rule.purge_after_days and not registry.is_purgeable(category):
        raise Rejected("NEVER_PURGED", "no state of this type is an end, or it is purged only with what it belongs to")


async def current(registry: CommandRegistry, reads: Reads, tenant: str) -> Mapping[str, Rule]:
    """The rules of a tenant by type. Raises AggregateUnreadable and ReleaseTooOld."""
    key = (tenant, RULES.category, RULES_ID)
    async with reads.connection() as connection:
        rules: Rules | states.Unreadable = (await states.load(connection, registry, [key]))[key].state
    if isinstance(rules, states.Unreadable):
        raise rules.refusal
    return rules.by_type
