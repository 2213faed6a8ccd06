"""The commands that can be sent, read from the contracts. This module imports protobuf, so it is imported only when needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal, InvalidOperation
from importlib import import_module
from typing import Any
from uuid import uuid4

from google.protobuf import descriptor_pool, json_format
from google.protobuf.descriptor import FieldDescriptor, FileDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from uuid_utils import uuid7

from bank.v1 import account_pb2, person_pb2, transfer_pb2, user_pb2
from cli.endpoints import UsageError
from foldline.v1 import command_pb2, options_pb2

PROCESS_ONLY = {
    "DepositMoney": ("transfer_id", "counterparty_account_id", "not_after_ms"),
    "WithdrawMoney": ("transfer_id", "counterparty_account_id", "not_after_ms"),
}
"""Fields that only a process may set: the write service refuses them from anybody else."""

INTEGERS = (
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
)
WHOLE_MAX = 2**64
"""No integer field of a contract holds more."""


def _declared(files: Iterable[FileDescriptor]) -> dict[str, type[Message]]:
    """The request type of each RPC that answers with a receipt, by the RPC's name: these are the commands."""
    return {
        method.name: GetMessageClass(method.input_type)
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
        if method.output_type is command_pb2.CommandReceipt.DESCRIPTOR
    }


COMMANDS: Mapping[str, type[Message]] = _declared(
    module.DESCRIPTOR for module in (person_pb2, account_pb2, transfer_pb2, user_pb2)
)


def fields_of(name: str) -> dict[str, bool]:
    """The fields of a command that a caller may set, and whether each is a secret. Raises UsageError."""
    kind = COMMANDS.get(name)
    if kind is None:
        raise UsageError(f"no such command: {name!r}; there are: {', '.join(COMMANDS)}")
    hidden = ("options", *PROCESS_ONLY.get(name, ()))
    return {
        field.name: field.GetOptions().Extensions[options_pb2.redacted]
        for field in kind.DESCRIPTOR.fields
        if field.name not in hidden
    }


def command_table() -> str:
    """A line for each command with the names of its fields, for the help."""
    width = max(map(len, COMMANDS))
    return "\n".join(f"  {name:{width}}  {' '.join(fields_of(name))}" for name in COMMANDS)


def summary(name: str, key: str, consistency_token: str, as_of: Message | None = None) -> tuple[str, Message, type[Message]]:
    """How to get a summary by its id: the RPC's path, the request and the type of the answer."""
    rpc, request, answer_type = _asked(name, f"Get{name.title()}")
    setattr(request, f"{name}_id", key)
    request.consistency_token = consistency_token
    if as_of is not None:
        request.as_of.CopyFrom(as_of)
    return rpc, request, answer_type


def explain(name: str, key: str, field: str, as_of: Message | None) -> tuple[str, Any, type[Any]]:
    """How to ask why a summary is as it is: the RPC's path, the request and the type of the answer."""
    rpc, request, answer_type = _asked(name, f"Explain{name.title()}")
    setattr(request, f"{name}_id", key)
    request.field = field
    if as_of is not None:
        request.as_of.CopyFrom(as_of)
    return rpc, request, answer_type


def watch(name: str, key: str) -> tuple[str, Any, type[Any]]:
    """How to watch a summary by its id: the RPC's path, the request and the type of the answers."""
    rpc, request, answer_type = _asked(name, f"Watch{name.title()}")
    setattr(request, f"{name}_id", key)
    return rpc, request, answer_type


def watch_list(name: str, wanted: Mapping[str, str]) -> tuple[str, Any, type[Any]]:
    """How to watch a list: the RPC's path, the request and the type of the answers. Raises UsageError for no such filter.

    `wanted` has fields of the filter, without `_id` if one likes, and values of enums without their common prefix.
    """
    rpc, request, answer_type = _asked(name, f"Watch{name.title()}s")
    fields = request.filter.DESCRIPTOR.fields_by_name
    values = {}
    for given, text in wanted.items():
        field = fields.get(given) or fields.get(f"{given}_id")
        if field is None:
            raise UsageError(f"{name}s have no filter {given!r}; there are: {', '.join(fields)}")
        values[field.name] = text
        if field.enum_type is not None:
            named = [each for each in field.enum_type.values_by_name if each.endswith(f"_{text.upper()}")]
            values[field.name] = named[0] if named else text
    try:
        json_format.ParseDict({"filter": values}, request)
    except json_format.ParseError as error:
        raise UsageError(str(error)) from None
    return rpc, request, answer_type


def _asked(name: str, rpc: str) -> tuple[str, Any, type[Any]]:
    file: FileDescriptor = import_module(f"bank.v1.{name}_query_pb2").DESCRIPTOR
    (service,) = file.services_by_name.values()
    method = service.methods_by_name[rpc]
    return f"/{service.full_name}/{rpc}", GetMessageClass(method.input_type)(), GetMessageClass(method.output_type)


def decoded(type_name: str, payload: bytes) -> Message | None:
    """An event of the bank's contracts; None if the type is not known here or the payload is not one."""
    try:
        return GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(type_name)).FromString(payload)
    except (KeyError, DecodeError):
        return None


def build(name: str, fields: Mapping[str, Any], *, command_id: str | None, expected_version: int | None) -> Message:
    """The request of a command from its fields; `new` as an id makes one. Raises UsageError."""
    known = fields_of(name)
    kind = COMMANDS[name]
    if unknown := sorted(set(fields) - set(known)):
        raise UsageError(f"{name} has no {', '.join(unknown)}; it has: {', '.join(sorted(known))}")
    values = {key: _value(kind.DESCRIPTOR.fields_by_name[key], value) for key, value in fields.items()}
    options: dict[str, Any] = {"command_id": command_id or str(uuid7())}
    if expected_version is not None:
        options["expected_version"] = expected_version
    try:
        return json_format.ParseDict({**values, "options": options}, kind())
    except json_format.ParseError as error:
        raise UsageError(f"{name}: {error}") from None


def _value(field: Any, value: Any) -> Any:
    """What json_format takes for a field: a fresh id for `new`, and an exact int for any way to write a whole number.

    json_format itself reads `9007199254740993.0` through a float, as 9007199254740992.
    """
    if value == "new" and field.name.endswith("_id"):
        return str(uuid4())
    if field.cpp_type not in INTEGERS:
        return float(value) if isinstance(value, Decimal) else value
    if not isinstance(value, str | Decimal):
        return value
    try:
        number = Decimal(value)
    except InvalidOperation:
        raise UsageError(f"{field.name}: {value!r} is not a whole number") from None
    # The bound comes first: 1e999999999 is a whole number too, of a gigabyte.
    if not (number.is_finite() and -WHOLE_MAX <= number <= WHOLE_MAX and number == number.to_integral_value()):
        raise UsageError(f"{field.name}: {value} is not a whole number of 64 bits")
    return int(number)
