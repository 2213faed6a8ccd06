"""Between the domain's dataclasses and the messages that are stored and sent.

The two have the same field names; tests hold every pair together in both directions, because protobuf would read a
forgotten field as zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from types import MemberDescriptorType
from typing import Any, cast

from buf.validate import validate_pb2
from google.protobuf.message import Message

from foldline.v1 import options_pb2

_RULES: Any = validate_pb2.DESCRIPTOR.extensions_by_name["field"]

OPTIONS = "options"
"""The field that begins every command, and is no part of its content."""


class Pair:
    """A dataclass and the message that has the same fields; raises TypeError if they differ."""

    def __init__(self, dataclass: type, message: type[Message]) -> None:
        self.dataclass = dataclass
        self.message = message
        self.type_name: str = message.DESCRIPTOR.full_name
        fields = [field for field in message.DESCRIPTOR.fields if field.name != OPTIONS]
        names = [field.name for field in fields]
        if set(names) != {field.name for field in dataclasses.fields(dataclass)}:
            raise TypeError(f"{dataclass.__name__} and {self.type_name} differ: {names}")
        self.redacted = tuple(field.name for field in fields if field.GetOptions().Extensions[options_pb2.redacted])
        self.decode: Callable[[Any], Any] = _maker(dataclass, {field.name: _read(field) for field in fields})
        """The dataclass with a message's values. UUIDs are compared as text, so they become lower case here."""
        self._fill: Callable[[Any], Message] = _call(message, {name: f"given.{name}" for name in names})

    def encode(self, value: Any) -> bytes:
        """The message's bytes with the dataclass's values; the same value always gives the same bytes."""
        return self._fill(value).SerializeToString(deterministic=True)


# What one would write by hand for a type, compiled from names that a `.proto` compiler has let through: a loop over the
# fields took twice as long, and every command and event passes here.


def _call(type_: type, values: dict[str, str]) -> Callable[[Any], Any]:
    """Makes a `type_` with the value of each field, an expression over what is `given`."""
    arguments = ", ".join(f"{name}={value}" for name, value in values.items())
    return cast("Callable[[Any], Any]", eval(f"lambda given: made({arguments})", {"made": type_}))  # noqa: S307


def _maker(dataclass: type, values: dict[str, str]) -> Callable[[Any], Any]:
    """Does the same for a dataclass. One whose fields are all slots has them set directly, for half the price.

    Unless it has its own way of being made, which is then called: by what its author wrote, not what `dataclass` did.
    """
    slots = {f"set_{name}": vars(dataclass).get(name) for name in values}
    names: dict[str, Any] = {name: slot.__set__ for name, slot in slots.items() if isinstance(slot, MemberDescriptorType)}
    generated = getattr(vars(dataclass).get("__init__"), "__code__", None)
    own_init = generated is None or generated.co_filename != "<string>" or hasattr(dataclass, "__post_init__")
    own_new = any("__new__" in vars(base) for base in dataclass.__mro__ if base is not object)
    if own_init or own_new or len(names) < len(slots):
        return _call(dataclass, values)
    names |= {"new": object.__new__, "dataclass": dataclass}
    lines = [f"    set_{name}(made, {value})" for name, value in values.items()]
    exec("\n".join(["def make(given):", "    made = new(dataclass)", *lines, "    return made"]), names)  # noqa: S102
    return cast("Callable[[Any], Any]", names["make"])


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
    """The pairs of one service, found by dataclass or by the message's full name."""

    def __init__(self) -> None:
        self._by_dataclass: dict[type, Pair] = {}
        self._by_type: dict[str, Pair] = {}

    def add(self, dataclass: type, message: type[Message]) -> Pair:
        """Adds a pair; raises TypeError if either side is in another pair or the two differ."""
        pair = Pair(dataclass, message)
        if dataclass in self._by_dataclass or pair.type_name in self._by_type:
            raise TypeError(f"{dataclass.__name__} or {pair.type_name} is registered twice")
        self._by_dataclass[dataclass] = self._by_type[pair.type_name] = pair
        return pair

    def pairs(self) -> Iterable[Pair]:
        """All pairs, in the order they were added."""
        return self._by_dataclass.values()

    def of(self, value: Any) -> Pair:
        """The pair of a dataclass instance; raises KeyError for one that was never added."""
        return self._by_dataclass[type(value)]

    def decode(self, type_name: str, payload: bytes) -> Any:
        """The dataclass of stored bytes; raises KeyError for an unknown type."""
        pair = self._by_type[type_name]
        return pair.decode(pair.message.FromString(payload))
