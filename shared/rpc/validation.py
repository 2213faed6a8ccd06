"""Checks every request against the rules in its `.proto`: in single calls, in batches and in streams.

Protovalidate decides and names the violations. But it needs 5 us for a valid message, a sixth of the cost of a command in a
batch. So there is a fast path: a predicate compiled for the message type. True means valid; False means that protovalidate is
asked. A test compares the two.

A request with a field that this release does not know is refused, anywhere in it: a filter that is passed over would answer with
everything, a condition of a command that is passed over would have it carried out without. So clients use a new field when
all services know it; of what we answer they may ignore new fields as usual. Looking costs 0.1 us for each message of a request.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from buf.validate import validate_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from shared.folds.errors import Invalid
from shared.rpc.bounds import refuse_oversized, rules_broken

if TYPE_CHECKING:
    from protovalidate import Validator, Violation

Look = Callable[[Any], bool]
"""True if a message is certainly valid."""

VIOLATIONS_MAX = 16
"""How many of a request's violations its refusal names."""

_RULES: Any = validate_pb2.DESCRIPTOR.extensions_by_name["field"]
_MORE_RULES: Any = (
    validate_pb2.DESCRIPTOR.extensions_by_name["message"],
    validate_pb2.DESCRIPTOR.extensions_by_name["oneof"],
)
_IGNORE = {value.name: value.number for value in validate_pb2.DESCRIPTOR.enum_types_by_name["Ignore"].values}
_NEVER_EXTENDED = "google.protobuf."
"""Messages of protobuf itself, which get no new fields; in a batch each command is in one."""
_UUID = re.compile("[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_CONDITIONS: dict[str, str] = {
    "uuid": "uuid({value})",
    "len": "len({value}) == {limit}",
    "min_len": "len({value}) >= {limit}",
    "max_len": "len({value}) <= {limit}",
    "max_bytes": "len({value}.encode()) <= {limit}",
    "not_contains": "{limit} not in {value}",
    "gt": "{value} > {limit}",
    "gte": "{value} >= {limit}",
    "lt": "{value} < {limit}",
    "lte": "{value} <= {limit}",
    "in": "{value} in {limit}",
    "not_in": "{value} not in {limit}",
    "min_items": "len({value}) >= {limit}",
    "max_items": "len({value}) <= {limit}",
}
"""What each rule asks for, where we know it: as an expression over the field's `value` and the rule's own `limit`."""

_looks: dict[type[Message], Look] = {}


def refuse_invalid(message: Message, *, within: str = "") -> None:
    """Raises Invalid with a violation for each unknown field (UNKNOWN_FIELD), else for each that breaks a rule (INVALID_REQUEST).

    There are 16 at most. Field paths begin with `within`, for a message that lies inside another; an unknown field has its number
    for a name.
    """
    if plainly_valid(message):
        return
    refuse_oversized(message, within=within)
    if unknown := dict.fromkeys(islice(unknown_fields(message, within), VIOLATIONS_MAX)):
        named = tuple((path, "is a field that this release does not know") for path in unknown)
        raise Invalid("UNKNOWN_FIELD", "the request has fields that this release does not know", violations=named)
    if violations := load_validator().collect_violations(message):
        raise rules_broken(*((within + _path(violation), _text(violation)) for violation in violations[:VIOLATIONS_MAX]))


def unknown_fields(message: Message, within: str = "") -> Iterator[str]:
    """The paths of the unknown fields of a message and of those in it."""
    if message.DESCRIPTOR.full_name.startswith(_NEVER_EXTENDED):
        return
    fields = UnknownFieldSet(message)
    for nth in range(len(fields)):
        yield f"{within}{fields[nth].field_number}"
    for known, value in message.ListFields():
        if known.message_type is None:
            continue
        if not known.is_repeated:
            yield from unknown_fields(value, f"{within}{known.name}.")
        elif not known.message_type.GetOptions().map_entry:
            for nth, each in enumerate(value):
                yield from unknown_fields(each, f"{within}{known.name}[{nth}].")


@cache
def load_validator() -> Validator:
    """The library's validator. Importing it takes 0.4 s, so it is not done before there is something to judge.

    A server calls this a while after its start, so that no caller has to wait for it.
    """
    from protovalidate import Validator  # noqa: PLC0415

    return Validator()


def moment_of(stamp: Any, field: str) -> datetime:
    """The moment of a Timestamp. Raises Invalid (INVALID_REQUEST) if it is none, or beyond the year 9999."""
    try:
        made: datetime = stamp.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise rules_broken((field, "must be a moment of the years 1 to 9999")) from None
    return made


def plainly_valid(message: Message) -> bool:
    """True if a message is certainly valid; False if only the library can tell."""
    kind = type(message)
    if (look := _looks.get(kind)) is None:
        look = _looks[kind] = _look(cast("Descriptor", kind.DESCRIPTOR))
    return look(message)


def _look(described: Descriptor) -> Look:
    """The predicate of a message type, compiled once. A loop over the fields would be as slow as the library."""
    names: dict[str, Any] = {"uuid": _UUID.fullmatch, "unknown": UnknownFieldSet}
    try:
        source = _message(described, "given", names, ())
    except _Unusual:
        source = "False"
    return cast("Look", eval(f"lambda given: bool({source})", names))  # noqa: S307 - of names that a compiler let through


class _Unusual(Exception):
    """Only the library can check this rule."""


def _message(described: Descriptor, given: str, names: dict[str, Any], outer: tuple[str, ...]) -> str:
    """The expression for what the message `given` must be. Objects that it refers to are put into `names`."""
    if described.full_name in outer or any(_has(described, rules) for rules in _MORE_RULES):
        raise _Unusual
    if any(_has(oneof, rules) for oneof in described.oneofs for rules in _MORE_RULES):
        raise _Unusual
    wanted = [_field(field, given, names, (*outer, described.full_name)) for field in described.fields]
    if not described.full_name.startswith(_NEVER_EXTENDED):
        wanted.insert(0, f"not unknown({given})")
    return " and ".join(each for each in wanted if each) or "True"


def _has(described: Any, rules: Any) -> bool:
    options = described.GetOptions()
    return any(found.full_name == rules.full_name for found, _ in options.ListFields())


def _field(field: FieldDescriptor, given: str, names: dict[str, Any], outer: tuple[str, ...]) -> str:
    """The expression for what one field must be; empty if it may be anything."""
    rules: Any = field.GetOptions().Extensions[_RULES]
    value = f"{given}.{field.name}"
    wanted: list[str] = []
    try:
        for rule, content in rules.ListFields():
            if rule.name not in ("required", "ignore"):
                wanted += _conditions(field, rule, content, value, names)
    except _Unusual:
        if rules.ignore != _IGNORE["IGNORE_IF_ZERO_VALUE"] or field.has_presence:
            raise
        return f"not {value}"  # whatever the rule is, it does not hold for that
    if field.message_type is not None:
        if field.message_type.GetOptions().map_entry:
            raise _Unusual
        if field.is_repeated:
            inner = _message(field.message_type, "each", names, outer)
            wanted += [] if inner == "True" else [f"all([{inner} for each in {value}])"]
        else:
            # Taken out once: every access makes an object of its own.
            taken = f"inner{len(names)}"
            names[taken] = None
            inner = _message(field.message_type, taken, names, outer)
            wanted += [] if inner == "True" else [f"(({taken} := {value}) is not None and {inner})"]
    condition = " and ".join(wanted)
    is_there = f'{given}.HasField("{field.name}")' if field.has_presence else value
    if rules.required:
        return f"{is_there} and {condition}" if condition else is_there
    if rules.ignore not in (_IGNORE["IGNORE_UNSPECIFIED"], _IGNORE["IGNORE_IF_ZERO_VALUE"]):
        raise _Unusual
    if condition and (field.has_presence or rules.ignore == _IGNORE["IGNORE_IF_ZERO_VALUE"]):
        return f"(not {is_there} or {condition})"
    return condition


def _conditions(field: FieldDescriptor, rule: Any, content: Any, value: str, names: dict[str, Any]) -> list[str]:
    """The expressions for the rules of a field's type, `content`, which has the name of the type."""
    if rule.message_type is None or rule.name not in ("string", "int32", "int64", "enum", "repeated"):
        raise _Unusual
    limits: dict[str, Any] = {each.name: limit for each, limit in content.ListFields()}
    lows = [limits[name] for name in ("gt", "gte") if name in limits]
    if any(low >= limits[name] for low in lows for name in ("lt", "lte") if name in limits):
        raise _Unusual  # it means: not in between
    made = []
    for name, limit in limits.items():
        if name == "defined_only" and field.enum_type is not None:
            name, limit = "in", tuple(field.enum_type.values_by_number)  # noqa: PLW2901
        elif name in ("in", "not_in"):
            limit = tuple(limit)  # noqa: PLW2901
        if name not in _CONDITIONS or isinstance(limit, Message):
            raise _Unusual
        known_as = f"limit{len(names)}"
        names[known_as] = limit
        made.append(_CONDITIONS[name].format(value=value, limit=known_as))
    return made


def _path(violation: Violation) -> str:
    path = violation.proto.field
    if path is None:
        return ""
    names = []
    for element in path.elements:
        subscript = element.subscript
        names.append(f"{element.field_name}[{subscript.value}]" if subscript else element.field_name)
    return ".".join(names)


def _text(violation: Violation) -> str:
    return violation.proto.message or violation.proto.rule_id
