"""What the `.proto` files of a domain say: its aggregates with their commands, events and enums. The rules:

- A message whose first field is `foldline.v1.CommandOptions options` is a command. Beside commands, every message of the
  file that is no request or response of an RPC is an event.
- The first field (of a command: after its options) is the id of the aggregate and names it: `account_id` of an `account`.
- Commands and events are flat: the same value then always gives the same bytes, which protobuf does not promise of maps.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)

OPTIONS_TYPE = ".foldline.v1.CommandOptions"
RECEIPT_TYPE = ".foldline.v1.CommandReceipt"

_INTEGERS = ("INT32", "INT64", "UINT32", "UINT64", "SINT32", "SINT64", "FIXED32", "FIXED64", "SFIXED32", "SFIXED64", "ENUM")
_TYPES = {
    "STRING": "str",
    "BYTES": "bytes",
    "BOOL": "bool",
    "DOUBLE": "float",
    "FLOAT": "float",
    **dict.fromkeys(_INTEGERS, "int"),
}


class NotADomain(Exception):
    """A `.proto` breaks one of the rules above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A field of a command or event."""

    name: str
    comment: str
    type: str
    is_repeated: bool
    is_optional: bool
    is_uuid: bool
    is_redacted: bool
    is_personal: bool
    # The enum's type in the stubs of its module, if the field has one: transfer_pb2.Compensation.ValueType.
    enum: str

    @property
    def annotation(self) -> str:
        """The type of the struct's field."""
        if self.is_repeated:
            return f"tuple[{self.type}, ...]"
        return f"{self.type} | None" if self.is_optional else self.type

    @property
    def encoded(self) -> str:
        """The expression for the message's value, over the struct's `value`."""
        return f'cast("{self.enum}", value.{self.name})' if self.enum else f"value.{self.name}"

    @property
    def decoded(self) -> str:
        """The expression for the struct's value, over `message`. UUIDs are compared as text, so they become lower case."""
        value = f"message.{self.name}"
        if self.is_repeated:
            return f"tuple([each.lower() for each in {value}])" if self.is_uuid else f"tuple({value})"
        if self.is_uuid:
            value += ".lower()"
        return f'{value} if message.HasField("{self.name}") else None' if self.is_optional else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Struct:
    """A command or event: its name in the domain, and the message that it is sent and stored as."""

    name: str
    message: str
    module: str
    comment: str
    fields: Sequence[Field]

    @property
    def snake(self) -> str:
        """The name as functions have it: open_account."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", self.name).lower()


@dataclass(slots=True, kw_only=True)
class Aggregate:
    """An aggregate as its `.proto` declares it."""

    category: str
    commands: list[Struct] = field(default_factory=list)
    events: list[Struct] = field(default_factory=list)
    enums: dict[str, tuple[str, EnumDescriptorProto]] = field(default_factory=dict)
    sources: set[str] = field(default_factory=set)

    @property
    def event(self) -> str:
        """The name of the union of its events."""
        return "".join(part.title() for part in self.category.split("_")) + "Event"


class _Options:
    """Reads the options of fields, which are extensions, with the definitions of the image."""

    def __init__(self, image: FileDescriptorSet) -> None:
        pool = descriptor_pool.DescriptorPool()
        for file in image.file:
            pool.Add(file)  # type: ignore[no-untyped-call]
        self._kind: Any = message_factory.GetMessageClass(pool.FindMessageTypeByName("google.protobuf.FieldOptions"))
        self._rules, self._redacted, self._personal = (
            pool.FindExtensionByName(name) for name in ("buf.validate.field", "foldline.v1.redacted", "foldline.v1.personal")
        )

    def of(self, field: FieldDescriptorProto) -> tuple[bool, bool, bool]:
        """Whether a field is a UUID (or holds many), redacted, personal."""
        options = self._kind.FromString(field.options.SerializeToString())
        rules = options.Extensions[self._rules]
        is_uuid = rules.string.uuid or rules.repeated.items.string.uuid
        return is_uuid, options.Extensions[self._redacted], options.Extensions[self._personal]


def files_of(image: FileDescriptorSet, prefix: str) -> list[FileDescriptorProto]:
    """The `.proto` files of the image that begin with `prefix`."""
    return [file for file in image.file if file.name.startswith(prefix)]


def aggregates(image: FileDescriptorSet, prefix: str) -> list[Aggregate]:
    """The aggregates of the `.proto` files that begin with `prefix`. `image` has imports and source positions.

    Raises NotADomain.
    """
    options, found = _Options(image), dict[str, Aggregate]()
    for file in files_of(image, prefix):
        comments = comments_of(file)
        asked = {
            name for service in file.service for method in service.method for name in (method.input_type, method.output_type)
        }
        if not any(map(_is_command, file.message_type)):
            continue
        for nth, message in enumerate(file.message_type):
            is_command = _is_command(message)
            if not is_command and f".{file.package}.{message.name}" in asked:
                continue
            struct = _struct(message, file, options, comments, nth)
            category = struct.fields[0].name.removesuffix("_id") if struct.fields else ""
            if not struct.fields or not struct.fields[0].name.endswith("_id"):
                raise NotADomain(f"{file.name}: the first field of {message.name} must be its aggregate's id, as account_id")
            aggregate = found.setdefault(category, Aggregate(category=category))
            (aggregate.commands if is_command else aggregate.events).append(struct)
            aggregate.sources.add(file.name)
            _add_enums(aggregate, message, file, comments)
    for aggregate in found.values():
        if not aggregate.events:
            raise NotADomain(
                f"{', '.join(sorted(aggregate.sources))}: there is no event that begins with {aggregate.category}_id"
            )
    return list(found.values())


def events(image: FileDescriptorSet, prefix: str, *, marked: bool) -> list[Struct]:
    """The messages of the `.proto` files that begin with `prefix`; with `marked`, those whose comment begins with `Event:`."""
    options, found = _Options(image), list[Struct]()
    for file in files_of(image, prefix):
        comments = comments_of(file)
        found += [
            _struct(message, file, options, comments, nth)
            for nth, message in enumerate(file.message_type)
            if not marked or comments.get((4, nth), "").startswith("Event: ")
        ]
    return found


def _is_command(message: DescriptorProto) -> bool:
    return bool(message.field) and message.field[0].type_name == OPTIONS_TYPE


def _struct(
    message: DescriptorProto, file: FileDescriptorProto, options: _Options, comments: dict[tuple[int, ...], str], nth: int
) -> Struct:
    fields = []
    for place, described in enumerate(message.field):
        if described.type_name == OPTIONS_TYPE and place == 0:
            continue
        type_ = FieldDescriptorProto.Type.Name(described.type).removeprefix("TYPE_")
        is_oneof = described.HasField("oneof_index") and not described.proto3_optional
        if type_ not in _TYPES or is_oneof:
            raise NotADomain(f"{file.name}: {message.name}.{described.name} is not flat: no message, map or oneof is allowed")
        is_uuid, is_redacted, is_personal = options.of(described)
        fields.append(
            Field(
                name=described.name,
                comment=comments.get((4, nth, 2, place), ""),
                type=_TYPES[type_],
                is_repeated=described.label == FieldDescriptorProto.LABEL_REPEATED,
                is_optional=described.proto3_optional,
                is_uuid=is_uuid,
                is_redacted=is_redacted,
                is_personal=is_personal,
                enum=_enum_type(described, file),
            )
        )
    return Struct(
        name=message.name.removesuffix("Request") if _is_command(message) else message.name,
        message=message.name,
        module=module_of(file),
        comment=_sentence(comments.get((4, nth), "").removeprefix("Event: ")),
        fields=fields,
    )


def _enum_type(described: FieldDescriptorProto, file: FileDescriptorProto) -> str:
    if described.type != FieldDescriptorProto.TYPE_ENUM:
        return ""
    name = described.type_name.removeprefix(f".{file.package}.")
    if "." in name:
        raise NotADomain(f"{file.name}: the enum of {described.name} must stand in the same file, outside of messages")
    one = f"{module_of(file).rpartition('.')[2]}.{name}.ValueType"
    return f"Sequence[{one}]" if described.label == FieldDescriptorProto.LABEL_REPEATED else one


def _add_enums(
    aggregate: Aggregate, message: DescriptorProto, file: FileDescriptorProto, comments: dict[tuple[int, ...], str]
) -> None:
    """Notes the enums of the message's file that its fields have."""
    for nth, enum in enumerate(file.enum_type):
        if any(described.type_name == f".{file.package}.{enum.name}" for described in message.field):
            aggregate.enums[enum.name] = comments.get((5, nth), ""), enum


def _sentence(comment: str) -> str:
    return comment[:1].upper() + comment[1:]


def comments_of(file: FileDescriptorProto) -> dict[tuple[int, ...], str]:
    """The comment above each thing of a file, as one line, by the thing's path in the descriptor."""
    return {
        tuple(location.path): " ".join(location.leading_comments.split())
        for location in file.source_code_info.location
        if location.leading_comments
    }


def module_of(file: FileDescriptorProto) -> str:
    """The module of a file's messages: bank.v1.account_pb2."""
    return file.name.removesuffix(".proto").replace("/", ".") + "_pb2"
