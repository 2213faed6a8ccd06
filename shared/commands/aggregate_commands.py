"""The commands that box, unbox and purge an aggregate, which a function of the database carries out in place of a decision.

A rule of a tenant sends them too, as user RETENTION_USER. Their ids follow from the aggregate and its version, so that of two
replicas one does it; and nobody else may use them, or a user who computed one could keep an aggregate from the rule for ever.

The log may have commands of rules to box under ids that anybody could use (uuid5), of earlier versions of this code. They are not
carried out again under the ids of today: an aggregate that is in its box is refused as AGGREGATE_BOXED, and one that was put back
has another version since. If the earlier version was killed between a part and the whole, the part is found boxed and skipped.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from google.protobuf.message import Message
from msgspec import Struct

from foldline.v1 import archive_pb2, retention_pb2
from shared.commands.codec import MessageCodec
from shared.commands.decide import Command, Sender
from shared.commands.registry import Route
from shared.folds.aggregate import Aggregate
from shared.folds.ids import derived_id, is_of_processes, reserved_id
from shared.line.event_store import AggregateKey
from shared.platform.identity import Role

RETENTION_USER = "retention"


class NamedAggregate(Struct, frozen=True, kw_only=True):
    """The content of each of these commands."""

    aggregate_type: str
    aggregate_id: str


def _codec(message: type[Message]) -> MessageCodec[NamedAggregate]:
    def decode(request: Any) -> NamedAggregate:
        return NamedAggregate(aggregate_type=request.aggregate_type, aggregate_id=request.aggregate_id.lower())

    def encode(value: NamedAggregate) -> bytes:
        return message(aggregate_type=value.aggregate_type, aggregate_id=value.aggregate_id).SerializeToString()

    return MessageCodec(NamedAggregate, message, decode, encode)


BOX_AGGREGATE = _codec(archive_pb2.BoxAggregateRequest)
UNBOX_AGGREGATE = _codec(archive_pb2.UnboxAggregateRequest)
PURGE_AGGREGATE = _codec(retention_pb2.PurgeAggregateRequest)


def route_of(codec: MessageCodec[NamedAggregate], aggregate: Aggregate[Any, Any], roles: frozenset[Role]) -> Route:
    """The route of one of the commands to aggregates of a type, for callers with one of the roles."""
    return Route(codec, aggregate, lambda c: c.aggregate_id, _decided_elsewhere, roles)


def command_of_rule(
    rule: str, codec: MessageCodec[NamedAggregate], aggregate: Aggregate[Any, Any], key: AggregateKey, version: int, now: datetime
) -> Command:
    """The command by which a rule of this name does something to an aggregate, if its newest event still has this version."""
    content = NamedAggregate(aggregate_type=key[1], aggregate_id=key[2])
    command_id = reserved_id(rule, *key, str(version))
    return Command(
        key=(key[0], command_id),
        route=route_of(codec, aggregate, frozenset()),
        aggregate=key,
        content=content,
        payload=codec.encode(content),
        expected_version=version,
        correlation_id=command_id,
        sender=Sender(key[0], RETENTION_USER, "", frozenset(), None, ""),
        received_at=now,
    )


def as_part(command: Command, key: AggregateKey) -> Command:
    """The command for an aggregate that goes with another. Its id follows from the whole's, so a repeat finds it.

    It is closed to users if the whole's is.
    """
    content = NamedAggregate(aggregate_type=key[1], aggregate_id=key[2])
    follows = reserved_id if is_of_processes(command.key[1]) else derived_id
    return Command(
        key=(command.key[0], follows(command.key[1], key[1], key[2])),
        route=command.route,
        aggregate=key,
        content=content,
        payload=command.route.codec.encode(content),
        expected_version=None,
        correlation_id=command.correlation_id,
        sender=command.sender,
        received_at=command.received_at,
    )


def _decided_elsewhere(state: Any, content: Any, meta: Any) -> Any:
    raise NotImplementedError
