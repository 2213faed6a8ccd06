"""Between the domain's structs and the messages that are stored and sent.

The functions are generated from the `.proto` (`protos/generate.py`). What is added here is checked against the message's
descriptor at start-up, because protobuf would read a forgotten field as zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from msgspec import Struct
from msgspec.structs import replace

from foldline.v1 import options_pb2
from shared.folds.aggregate import Content, Event
from shared.folds.upcasting import NONE, Upcasters

Kind = TypeVar("Kind", bound=Message)
Event_co = TypeVar("Event_co", covariant=True)

OPTIONS = "options"
"""The field that begins every command, and is no part of its content."""


class MessageCodec(Generic[Content]):
    """A struct, the message that has the same fields, and the functions between the two.

    `decode` makes the struct of a message; `encode` makes the message's bytes of the struct, the same value always the
    same bytes; `encode_shown` does so without the redacted fields. Raises TypeError if the fields differ, if a redacted
    one is no text, or if one holds a message or a map, whose bytes protobuf may order differently each time.
    """

    __slots__ = ("decode", "encode", "encode_shown", "message", "redacted", "struct", "type_name")

    def __init__(
        self,
        struct: type[Content],
        message: type[Kind],
        decode: Callable[[Kind], Content],
        encode: Callable[[Content], bytes],
    ) -> None:
        self.struct = struct
        self.message: type[Message] = message
        self.decode: Callable[[Any], Content] = decode
        self.encode = encode
        self.type_name: str = message.DESCRIPTOR.full_name
        fields = [field for field in message.DESCRIPTOR.fields if field.name != OPTIONS]
        names = [field.name for field in fields]
        if not issubclass(struct, Struct) or set(names) != set(struct.__struct_fields__):
            raise TypeError(f"{struct.__name__} and {self.type_name} differ: {names}")
        if nested := [field.name for field in fields if field.message_type is not None]:
            raise TypeError(f"{self.type_name} is not flat: {nested}")
        self.redacted = tuple(field.name for field in fields if field.GetOptions().Extensions[options_pb2.redacted])
        if any(message.DESCRIPTOR.fields_by_name[name].type != FieldDescriptor.TYPE_STRING for name in self.redacted):
            raise TypeError(f"{self.type_name} has a redacted field that is no text")
        blank = dict.fromkeys(self.redacted, "")
        self.encode_shown = (lambda value: encode(_replaced(value, blank))) if blank else encode


def _replaced(value: Content, fields: dict[str, str]) -> Content:
    return cast("Content", replace(cast("Struct", value), **fields))


class Decodes(Protocol[Event_co]):
    """A codec as far as it reads: one of a single event is also one of the union that has it."""

    @property
    def decode(self) -> Callable[[Any], Event_co]:
        """The struct of a message."""


class EventCodecs(Generic[Event]):
    """The codecs of all events of one aggregate; `Event` is the union of their structs."""

    def __init__(self, *codecs: Decodes[Event]) -> None:
        self._codecs: tuple[Any, ...] = codecs

    def __iter__(self) -> Iterator[MessageCodec[Any]]:
        return iter(self._codecs)


class Codecs:
    """The codecs of one service, found by struct or by the message's full name."""

    def __init__(self, upcasters: Upcasters = NONE) -> None:
        self.upcasters = upcasters
        self._by_struct: dict[type, MessageCodec[Any]] = {}
        self._by_type: dict[str, MessageCodec[Any]] = {}

    def add(self, codec: MessageCodec[Any]) -> None:
        """Adds a codec; raises TypeError if its struct or its message has one already."""
        if codec.struct in self._by_struct or codec.type_name in self._by_type:
            raise TypeError(f"{codec.struct.__name__} or {codec.type_name} is registered twice")
        self._by_struct[codec.struct] = self._by_type[codec.type_name] = codec

    def __iter__(self) -> Iterator[MessageCodec[Any]]:
        return iter(self._by_struct.values())

    def of(self, value: Any) -> MessageCodec[Any]:
        """The codec of a struct; raises KeyError for one that was never added."""
        return self._by_struct[type(value)]

    def by_struct(self, struct: type) -> MessageCodec[Any]:
        """The codec of a kind of struct; raises KeyError for one that was never added."""
        return self._by_struct[struct]

    def knows(self, type_name: str) -> bool:
        """Whether `decode` has a codec for stored bytes of that type."""
        return type_name in self._by_type or type_name in self.upcasters

    def decode(self, type_name: str, payload: bytes) -> Any:
        """The struct of stored bytes, of older contracts too; raises KeyError for an unknown type."""
        if type_name in self.upcasters:
            type_name, payload = self.upcasters.upcast(type_name, payload)
        codec = self._by_type[type_name]
        return codec.decode(codec.message.FromString(payload))
