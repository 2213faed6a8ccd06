"""The rules in the `.proto` files: what is plainly valid is what the library finds nothing wrong with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from protovalidate import Validator

from bank.v1 import account_pb2, user_pb2
from foldline.v1 import command_pb2
from shared.folds.errors import Invalid
from shared.rpc.validation import VIOLATIONS_MAX, plainly_valid, refuse_invalid
from tests.support.checks.contracts import contracts

FILES = (*contracts("bank/v1"), *contracts("foldline/v1"))
UUID = "8d0f4c1e-6b1c-4a53-9a51-3f2f4c9b7a10"
# At, and on either side of, what rules speak of.
TEXTS = st.one_of(
    st.sampled_from(
        [
            *("", UUID, UUID.upper(), UUID + "\n", UUID[:-1], UUID.replace("-", ""), f"{{{UUID}}}", UUID.replace("8", "\u0668")),
            *("USD", "usd", "US\0", "US", "DEUR", "\u00e4\u00f6\u00fc", "name", "name desc", "started_at", "a@b.example", "\0"),
            *("x" * n for n in (1, 7, 8, 55, 56, 63, 64, 100, 101, 128, 129, 200, 201, 254, 512, 513, 1024, 1025, 2048, 2049)),
            *("\U0001f600" * n for n in (1, 63, 64, 128, 129, 256, 257)),
        ]
    ),
    st.text(max_size=4),
)
NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 499, 500, 501, 2**31 - 1, -(2**31)])
LONG_NUMBERS = st.one_of(NUMBERS, st.sampled_from([2**63 - 1, -(2**63)]))


def requests() -> Iterator[Descriptor]:
    """Every request of every service."""
    for file in FILES:
        for service in file.DESCRIPTOR.services_by_name.values():
            yield from (method.input_type for method in service.methods)
        yield from (kind for kind in file.DESCRIPTOR.message_types_by_name.values() if kind.name.endswith("Request"))


REQUESTS = sorted({kind.full_name: kind for kind in requests()}.values(), key=lambda kind: kind.full_name)


def values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    """What a field may hold on the wire, well or badly chosen."""
    if field.message_type is not None:
        return messages(field.message_type)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=3)
    # Well chosen more often than not, else hardly any message would be valid as a whole.
    return {
        FieldDescriptor.CPPTYPE_STRING: mostly({"currency": "USD", "order_by": ""}.get(field.name, UUID), TEXTS),
        FieldDescriptor.CPPTYPE_INT64: mostly(5, LONG_NUMBERS),
        FieldDescriptor.CPPTYPE_INT32: mostly(5, NUMBERS),
        FieldDescriptor.CPPTYPE_ENUM: st.integers(-1, 7),
        FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    }[field.cpp_type]


def mostly(usual: Any, other: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Four times of five the usual value."""
    return st.integers(1, 5).flatmap(lambda n: other if n == 1 else st.just(usual))


def messages(kind: Descriptor) -> st.SearchStrategy[Message]:
    """Messages of a type, each field left out or given some value."""
    made = message_factory.GetMessageClass(kind)
    fields = {field.name: st.lists(values(field), max_size=2) if field.is_repeated else values(field) for field in kind.fields}
    return st.fixed_dictionaries({}, optional=fields).map(lambda some: made(**some))


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.full_name)
def test_what_is_plainly_valid_breaks_no_rule(kind: Descriptor) -> None:
    """The quick look lets nothing pass that the library would refuse, of any request there is."""
    validator = Validator()

    @settings(max_examples=150, deadline=None)
    @given(messages(kind))
    def check(message: Message) -> None:
        if plainly_valid(message):
            assert validator.collect_violations(message) == []

    check()


def with_unknown(message: Message, *numbers: int) -> Message:
    """The message with fields that no contract of ours has, of these numbers above 15 and below 2,048, else of 999."""
    keys = [number << 3 for number in numbers or (999,)]
    more = b"".join(bytes((key & 0x7F | 0x80, key >> 7, 1)) for key in keys)
    return type(message).FromString(message.SerializeToString() + more)


def holders(kind: Descriptor, outer: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The ways from a message to those in it that are not protobuf's own, by names of fields; to itself: the empty one."""
    yield ()
    for field in kind.fields:
        inner = field.message_type
        if inner is None or inner.GetOptions().map_entry or inner.full_name in outer:
            continue
        if not inner.full_name.startswith("google.protobuf."):
            yield from ((field.name, *way) for way in holders(inner, (*outer, kind.full_name)))


def holding(kind: Descriptor, way: tuple[str, ...]) -> tuple[Message, str]:
    """A message with nothing in it but an unknown field at the end of the way, and that field's path."""
    made: Any = message_factory.GetMessageClass(kind)
    if not way:
        return with_unknown(made()), "999"
    field = kind.fields_by_name[way[0]]
    assert field.message_type is not None
    inner, path = holding(field.message_type, way[1:])
    message = made(**{way[0]: [inner] if field.is_repeated else inner})
    return message, f"{way[0]}[0].{path}" if field.is_repeated else f"{way[0]}.{path}"


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.full_name)
def test_no_unknown_field_is_passed_over(kind: Descriptor) -> None:
    """Of a request, or of anything in it: it is refused by its number, before all rules."""
    for way in holders(kind):
        message, path = holding(kind, way)
        assert not plainly_valid(message)
        with pytest.raises(Invalid) as caught:
            refuse_invalid(message)
        assert (caught.value.reason, [field for field, _ in caught.value.violations]) == ("UNKNOWN_FIELD", [path])


def test_an_unknown_field_makes_what_is_else_valid_invalid() -> None:
    """Its path begins where the message lies."""
    with pytest.raises(Invalid) as caught:
        refuse_invalid(valid(options=with_unknown(valid().options)), within="items[3].")
    assert (caught.value.reason, [path for path, _ in caught.value.violations]) == ("UNKNOWN_FIELD", ["items[3].options.999"])


def test_an_unknown_field_is_named_once_and_16_are_in_all() -> None:
    """However many there are."""
    with pytest.raises(Invalid) as caught:
        refuse_invalid(with_unknown(valid(), *[900] * 100))
    assert [path for path, _ in caught.value.violations] == ["900"]
    with pytest.raises(Invalid) as caught:
        refuse_invalid(with_unknown(valid(), *range(900, 1000)))
    assert [path for path, _ in caught.value.violations] == [str(number) for number in range(900, 900 + VIOLATIONS_MAX)]


def valid(**changes: Any) -> account_pb2.DepositMoneyRequest:
    """A deposit with everything that one may have."""
    fields: dict[str, Any] = {
        "options": command_pb2.CommandOptions(command_id=UUID, expected_version=0, correlation_id=UUID),
        "account_id": UUID,
        "amount_minor": 1,
        "currency": "USD",
        "transfer_id": UUID,
        "not_after_ms": 1,
    }
    return account_pb2.DepositMoneyRequest(**{**fields, **changes})


def test_what_is_sent_most_is_plainly_valid() -> None:
    """Else the look would be worth nothing; a field that is absent where it may be does not matter."""
    assert plainly_valid(valid())
    assert plainly_valid(valid(options=command_pb2.CommandOptions(command_id=UUID), transfer_id=None, not_after_ms=None))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"options": None}, "options"),
        ({"options": command_pb2.CommandOptions()}, "options.command_id"),
        ({"options": command_pb2.CommandOptions(command_id=UUID, expected_version=-1)}, "options.expected_version"),
        ({"options": command_pb2.CommandOptions(command_id=UUID, correlation_id="x")}, "options.correlation_id"),
        ({"account_id": UUID + "0"}, "account_id"),
        ({"amount_minor": 0}, "amount_minor"),
        ({"currency": "US"}, "currency"),
        ({"transfer_id": ""}, "transfer_id"),
        ({"not_after_ms": -5}, "not_after_ms"),
    ],
)
def test_each_broken_rule_is_found(changes: dict[str, Any], field: str) -> None:
    """Not plainly valid, and the library says which field it is, with the path it has been given."""
    message = valid(**changes)
    assert not plainly_valid(message)
    with pytest.raises(Invalid) as caught:
        refuse_invalid(message, within="items[3].")
    assert (caught.value.reason, [path for path, _ in caught.value.violations]) == ("INVALID_REQUEST", ["items[3]." + field])


def test_what_the_look_does_not_know_is_left_to_the_library() -> None:
    """An address of e-mail is never plainly valid, and is accepted or refused all the same."""
    message = user_pb2.StartUserRegistrationRequest(
        options=command_pb2.CommandOptions(command_id=UUID), user_id=UUID, login="ada", email="ada@example.com", password="x" * 8
    )
    assert not plainly_valid(message)
    refuse_invalid(message)
    message.email = "nobody"
    with pytest.raises(Invalid):
        refuse_invalid(message)
