"""Messages and codecs for the domains of tests, made from their structs: none of them is among the generated code."""

from __future__ import annotations

from typing import Any, TypeVar, get_args, get_type_hints

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto
from google.protobuf.message import Message
from msgspec import Struct
from msgspec.structs import fields

from foldline.v1 import command_pb2, options_pb2
from shared.commands.codec import OPTIONS, MessageCodec

Content = TypeVar("Content", bound=Struct)

_TYPES = {str: FieldDescriptorProto.TYPE_STRING, int: FieldDescriptorProto.TYPE_INT64, bool: FieldDescriptorProto.TYPE_BOOL}


def message_of(struct: type[Struct], *, options: bool = False, redacted: tuple[str, ...] = (), name: str = "") -> type[Message]:
    """A message with the fields of a struct, `trial.<its name>`; with command options and redacted fields if asked for."""
    name = name or struct.__name__
    file = descriptor_pb2.FileDescriptorProto(name=f"trial/{name}.proto", package="trial", syntax="proto3")
    file.dependency.extend([command_pb2.DESCRIPTOR.name, options_pb2.DESCRIPTOR.name])
    described = file.message_type.add(name=name)
    if options:
        kind, type_name = FieldDescriptorProto.TYPE_MESSAGE, ".foldline.v1.CommandOptions"
        described.field.add(name="options", number=1, type=kind, type_name=type_name, label=FieldDescriptorProto.LABEL_OPTIONAL)
    hints = get_type_hints(struct)
    for number, field in enumerate(fields(struct), start=2):
        kind, *more = get_args(hints[field.name]) or [hints[field.name]]
        added = described.field.add(name=field.name, number=number, type=_TYPES[kind], label=FieldDescriptorProto.LABEL_OPTIONAL)
        if more == [type(None)]:  # str | None
            added.proto3_optional, added.oneof_index = True, len(described.oneof_decl)
            described.oneof_decl.add(name=f"_{field.name}")
        elif more:  # tuple[str, ...]
            added.label = FieldDescriptorProto.LABEL_REPEATED
        if field.name in redacted:
            added.options.Extensions[options_pb2.redacted] = True
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"trial.{name}"))


def codec_of(struct: type[Content], message: type[Message]) -> MessageCodec[Content]:
    """A codec as the generated code has it, with a loop over the fields in place of one expression for each."""
    described = [field for field in message.DESCRIPTOR.fields if field.name != OPTIONS]

    def value_of(given: Any, field: Any) -> Any:
        if field.is_repeated:
            return tuple(getattr(given, field.name))
        return getattr(given, field.name) if not field.has_presence or given.HasField(field.name) else None

    def decode(given: Message) -> Content:
        return struct(**{field.name: value_of(given, field) for field in described})

    def encode(value: Content) -> bytes:
        return message(**{field.name: getattr(value, field.name) for field in described}).SerializeToString()

    return MessageCodec(struct, message, decode, encode)


def command_codec(struct: type[Content], *, redacted: tuple[str, ...] = ()) -> MessageCodec[Content]:
    """The codec of a command, over the message `trial.<its name>`."""
    return codec_of(struct, message_of(struct, options=True, redacted=redacted))


def event_codec(struct: type[Content]) -> MessageCodec[Content]:
    """The codec of an event, over the message `trial.<its name>`."""
    return codec_of(struct, message_of(struct))
