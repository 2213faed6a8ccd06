"""Holds every request to the rules in its `.proto`: in single calls, in batches and in streams alike."""

from __future__ import annotations

from google.protobuf.message import Message
from protovalidate import Validator, Violation

from shared.errors import Invalid

_validator = Validator()


def refuse_invalid(message: Message, *, within: str = "") -> None:
    """Raises Invalid (INVALID_REQUEST) with a violation for each field that breaks a rule.

    Field paths begin with `within`, for a message that lies inside another.
    """
    if violations := _validator.collect_violations(message):
        raise Invalid(
            "INVALID_REQUEST",
            "the request breaks the rules of its fields",
            violations=tuple((within + _path(violation), _text(violation)) for violation in violations),
        )


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
