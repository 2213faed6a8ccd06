"""Bounds what a bad request may cost, before its contents are looked at.

Decoding makes an object of every element: 2,000,000 empty elements fit into 4 MiB and take seconds and gigabytes. So the
outermost fields of a large request are counted first, by its bytes alone; that costs 0.3 us each and stops at the first one too
many. What was decoded is then held to the sizes of its rules, before all other rules: the library that judges those takes 20 us
for an element, and reads a long text several times.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, cast

from buf.validate import validate_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from shared.folds.errors import Invalid

COUNTED_ABOVE_BYTES = 64 * 1024
"""The elements of smaller requests are not counted before they are decoded, which takes 3 ms at most."""
OTHER_FIELDS_MAX = 1024
"""How many outermost fields a request may have beside the elements of repeated ones."""
ITEMS_MAX = 1000
"""How many elements a repeated field may have whose rules do not say."""
TEXT_CHARACTERS_MAX = 4 * 1024
"""A text that is longer than its rules and this allow is refused without a look at the other fields."""

_RULES: Any = validate_pb2.DESCRIPTOR.extensions_by_name["field"]
_DEPTH_MAX = 8
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5


def rules_broken(*violations: tuple[str, str]) -> Invalid:
    """The refusal of a request whose fields break rules, each a path and what it must be."""
    return Invalid("INVALID_REQUEST", "the request breaks the rules of its fields", violations=violations)


def refuse_uncounted(message: type[Message], raw: bytes) -> None:
    """Refuses the bytes of a message whose fields, or those of a large message in it, are too many.

    Bytes that cannot be read are left to the decoder.

    Raises Invalid: INVALID_REQUEST if a field has more elements than its rules allow, or the request too many other fields;
    MALFORMED_MESSAGE for a group, which no contract has.
    """
    _refuse_uncounted(cast("Descriptor", message.DESCRIPTOR), raw, 0)


def _refuse_uncounted(kind: Descriptor, raw: bytes, depth: int) -> None:
    if len(raw) <= COUNTED_ABOVE_BYTES or depth > _DEPTH_MAX:
        return
    left = dict(_limits(kind))
    others = OTHER_FIELDS_MAX
    at, end = 0, len(raw)
    try:
        while at < end:
            key, at = _varint(raw, at)
            number, wire_type = key >> 3, key & 7
            if number in left:
                left[number] -= 1
                if left[number] < 0:
                    raise _too_many(kind.fields_by_number[number])
            else:
                others -= 1
                if others < 0:
                    text = f"must have at most {OTHER_FIELDS_MAX} fields beside the elements of lists"
                    raise Invalid("INVALID_REQUEST", "the request has too many fields", violations=(("", text),))
            if wire_type == _DELIMITED:
                size, at = _varint(raw, at)
                _refuse_uncounted_inner(kind.fields_by_number.get(number), raw, (at, size), depth + 1)
                at += size
            elif wire_type == _VARINT:
                _, at = _varint(raw, at)
            elif wire_type == _FIXED64:
                at += 8
            elif wire_type == _FIXED32:
                at += 4
            else:
                text = f"these bytes are not a {kind.full_name}"
                raise Invalid("MALFORMED_MESSAGE", "the request cannot be read", violations=(("", text),))
    except (IndexError, ValueError):
        return


def _refuse_uncounted_inner(field: FieldDescriptor | None, raw: bytes, part: tuple[int, int], depth: int) -> None:
    """The same of a field's message, whose bytes begin at the first number of `part` and are as many as the second."""
    at, size = part
    if size > COUNTED_ABOVE_BYTES and field is not None and field.message_type is not None:
        _refuse_uncounted(field.message_type, raw[at : at + size], depth)


def refuse_oversized(message: Message, *, within: str = "") -> None:
    """Refuses a message with a list that is longer than its rules allow, or a text that is much longer: at the first one.

    The path of the field begins with `within`. Raises Invalid (INVALID_REQUEST).
    """
    _refuse_oversized(message, within, 0)


def _refuse_oversized(message: Any, within: str, depth: int) -> None:
    for size in _sizes(message.DESCRIPTOR):
        name = size.field.name
        if size.items_max is None:
            if size.length_max is None and not message.HasField(name):
                continue
            _refuse_value(getattr(message, name), within + name, size, depth)
        else:
            values = getattr(message, name)
            if len(values) > size.items_max:
                raise _too_many(size.field, within)
            for nth, value in enumerate(values):
                _refuse_value(value, f"{within}{name}[{nth}]", size, depth)


def _refuse_value(value: Any, path: str, size: _Size, depth: int) -> None:
    if size.length_max is None:
        if isinstance(value, Message) and depth < _DEPTH_MAX:
            _refuse_oversized(value, path + ".", depth + 1)
    elif len(value) > size.length_max:
        text = f"must have at most {size.length_max} characters"
        raise rules_broken((path, text))


class _Size(NamedTuple):
    """How large a field may be: None for `items_max` if it is no list, and for `length_max` if it is no text."""

    field: FieldDescriptor
    items_max: int | None
    length_max: int | None


@cache
def _sizes(kind: Descriptor) -> tuple[_Size, ...]:
    """The fields of a kind of message that may be large, or have fields that may be."""
    sizes = []
    for field in kind.fields:
        is_text = field.type == FieldDescriptor.TYPE_STRING
        if is_text or field.is_repeated or field.message_type is not None:
            sizes.append(_Size(field, _items_max(field) if field.is_repeated else None, _length_max(field) if is_text else None))
    return tuple(sizes)


@cache
def _limits(kind: Descriptor) -> tuple[tuple[int, int], ...]:
    """For each repeated field of a kind of message its number and how many elements it may have."""
    return tuple((size.field.number, size.items_max) for size in _sizes(kind) if size.items_max is not None)


def _items_max(field: FieldDescriptor) -> int:
    rules = field.GetOptions().Extensions[_RULES].repeated
    return rules.max_items if rules.HasField("max_items") else ITEMS_MAX


def _length_max(field: FieldDescriptor) -> int:
    """The number of characters above which a text is refused unread."""
    rules = field.GetOptions().Extensions[_RULES]
    text = rules.repeated.items.string if field.is_repeated else rules.string
    named = [getattr(text, name) for name in ("max_len", "len", "max_bytes") if text.HasField(name)]
    return max(min(named, default=0), TEXT_CHARACTERS_MAX)


def _too_many(field: FieldDescriptor, within: str = "") -> Invalid:
    text = f"must have at most {_items_max(field)} elements"
    return Invalid("INVALID_REQUEST", "the request has too many elements", violations=((within + field.name, text),))


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """The number that begins at `at`, and where it ends. Raises IndexError at the end, ValueError if it has too many bytes."""
    value = raw[at]
    if value < 0x80:
        return value, at + 1
    value &= 0x7F
    for nth in range(1, 10):
        byte = raw[at + nth]
        value |= (byte & 0x7F) << (7 * nth)
        if byte < 0x80:
            return value, at + nth + 1
    raise ValueError("a number of more than ten bytes")
