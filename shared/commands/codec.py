"""Between the domain's structs and the messages that are stored and sent.

The two have the same field names; tests hold every pair together in both directions, because protobuf would read a
forgotten field as zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

from buf.validate import validate_pb2
from google.protobuf.message import Message
from msgspec import Struct

from foldline.v1 import options_pb2

_RULES: Any = validate_pb2.DESCRIPTOR.extensions_by_name["field"]

OPTIONS = "options"
"""The field that begins every command, and is no part of its content."""


class Pair:
    """A struct and the message that has the same fields; raises TypeError if they differ or one holds a message or map.

    So the same value always gives the same bytes, which protobuf does not promise of maps.
    """

    def __init__(self, struct: type[Struct], message: type[Message]) -> None:
        self.struct = struct
        self.message = message
        self.type_name: str = message.DESCRIPTOR.full_name
        fields = [field for field in message.DESCRIPTOR.fields if field.name != OPTIONS]
        names = [field.name for field in fields]
        if set(names) != set(struct.__struct_fields__):
            raise TypeError(f"{struct.__name__} and {self.type_name} differ: {names}")
        if nested := [field.name for field in fields if field.message_type is not None]:
            raise TypeError(f"{self.type_name} is not flat: {nested}")
        self.redacted = tuple(field.name for field in fields if field.GetOptions().Extensions[options_pb2.redacted])
        self.decode: Callable[[Any], Any] = _call(struct, {field.name: _read(field) for field in fields})
        """The struct with a message's values. UUIDs are compared as text, so they become lower case here."""
        self._fill: Callable[[Any], Message] = _call(message, {name: f"given.{name}" for name in names})

    def encode(self, value: Any) -> bytes:
        """The message's bytes with the struct's values; the same value always gives the same bytes."""
        return self._fill(value).SerializeToString()


def _call(type_: type, values: dict[str, str]) -> Callable[[Any], Any]:
    """Makes a `type_` with the value of each field, an expression over what is `given`.

    What one would write by hand for a type, compiled from names that a `.proto` compiler has let through: a loop over the
    fields took twice as long, and every command and event passes here.
    """
    arguments = ", ".join(f"{name}={value}" for name, value in values.items())
    return cast("Callable[[Any], Any]", eval(f"lambda given: made({arguments})", {"made": type_}))  # noqa: S307 - of names alone


def _read(field: Any) -> str:
    """The expression for a field's value in `given`."""
    value = f"given.{field.name}"
    if field.is_repeated:
        return f"tuple({value})"
    if _is_uuid(field):
        value += ".lower()"
    return f'{value} if given.HasField("{field.name}") else None' if field.has_presence else value


def _is_uuid(field: Any) -> bool:
    rules: Any = field.GetOptions().Extensions[_RULES]
    return bool(rules.string.uuid)


class Codec:
    """The pairs of one service, found by struct or by the message's full name."""

    def __init__(self) -> None:
        self._by_struct: dict[type[Struct], Pair] = {}
        self._by_type: dict[str, Pair] = {}

    def add(self, struct: type[Struct], message: type[Message]) -> Pair:
        """Adds a pair; raises TypeError if either side is in another pair or the two differ."""
        pair = Pair(struct, message)
        if struct in self._by_struct or pair.type_name in self._by_type:
            raise TypeError(f"{struct.__name__} or {pair.type_name} is registered twice")
        self._by_struct[struct] = self._by_type[pair.type_name] = pair
        return pair

    def pairs(self) -> Iterable[Pair]:
        """All pairs, in the order they were added."""
        return self._by_struct.values()

    def of(self, value: Any) -> Pair:
        """The pair of a struct; raises KeyError for one that was never added."""
        return self._by_struct[type(value)]

    def decode(self, type_name: str, payload: bytes) -> Any:
        """The struct of stored bytes; raises KeyError for an unknown type."""
        pair = self._by_type[type_name]
        return pair.decode(pair.message.FromString(payload))
