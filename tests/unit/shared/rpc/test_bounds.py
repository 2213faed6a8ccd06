"""A request of 4 MiB costs the event loop less than 50 ms until it is refused, whatever is in it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from bank.v1 import person_pb2, user_pb2
from foldline.v1 import command_pb2
from shared.folds.errors import Invalid, OverLimit, Refusal
from shared.rpc.behaviours import Rpc, read_message
from shared.rpc.bounds import ITEMS_MAX, OTHER_FIELDS_MAX, TEXT_CHARACTERS_MAX, refuse_oversized
from shared.rpc.validation import VIOLATIONS_MAX, load_validator, refuse_invalid
from tests.support.checks.contracts import contracts

SIZE = 4 * 1024 * 1024
REFUSED_WITHIN_S = 0.05
DELIMITED, VARINT, GROUP, GROUP_END = 2, 0, 3, 4
UNKNOWN = 500

FILES = (*contracts("bank/v1"), *contracts("foldline/v1"))
REQUESTS = sorted(
    {
        method.input_type.full_name: method.input_type
        for file in FILES
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }.values(),
    key=lambda kind: kind.full_name,
)


def varint(number: int) -> bytes:
    """A number as it is on the wire."""
    parts = bytearray()
    while number >= 0x80:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*parts, number))


def tag(number: int, wire_type: int) -> bytes:
    """What begins a field."""
    return varint(number << 3 | wire_type)


def field(number: int, content: bytes) -> bytes:
    """A field of bytes, a text or a message, as it is on the wire."""
    return tag(number, DELIMITED) + varint(len(content)) + content


def filled(part: bytes) -> bytes:
    """As many copies of something as fit into a request."""
    return part * (SIZE // len(part))


def floods(kind: Descriptor) -> Iterator[tuple[str, bytes]]:
    """The worst that we could think of for the fields of a message: 4 MiB each."""
    yield "unknown fields", filled(field(UNKNOWN, b""))
    yield "unknown numbers", filled(tag(UNKNOWN, VARINT) + b"\1")
    yield "one unknown field", field(UNKNOWN, b"x" * SIZE)
    yield "groups", filled(tag(UNKNOWN, GROUP) + tag(UNKNOWN, GROUP_END))
    yield "a deep group", tag(UNKNOWN, GROUP) * (SIZE // 2)
    yield "garbage", b"\xff" * SIZE
    for each in kind.fields:
        if each.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_MESSAGE):
            yield f"many empty {each.name}", filled(field(each.number, b""))
            yield f"many short {each.name}", filled(field(each.number, b"\n\1x"))
        if each.type == FieldDescriptor.TYPE_STRING:
            for text in (b"x", b"\xf0\x9f\x98\x80", b"\0", b"8d0f4c1e-6b1c-4a53-9a51-3f2f4c9b7a10"):
                yield f"a long {each.name}", field(each.number, text * (SIZE // len(text)))
        if each.type == FieldDescriptor.TYPE_MESSAGE:
            assert each.message_type is not None
            for name, raw in inner_floods(each.message_type, 2):
                yield f"{each.name}: {name}", field(each.number, raw)


def inner_floods(kind: Descriptor, depth: int) -> Iterator[tuple[str, bytes]]:
    """4 MiB within one field of a message."""
    yield "unknown fields", filled(field(UNKNOWN, b""))
    for each in kind.fields:
        if each.type == FieldDescriptor.TYPE_STRING:
            yield f"a long {each.name}", field(each.number, b"x" * SIZE)
        if each.is_repeated:
            yield f"many {each.name}", filled(field(each.number, b""))
        if each.message_type is not None and depth:
            for name, raw in inner_floods(each.message_type, depth - 1):
                yield f"{each.name}: {name}", field(each.number, raw)


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.full_name)
def test_no_request_takes_long_to_refuse(kind: Descriptor) -> None:
    """Processor time of this thread, which is what other callers of an event loop would wait for."""
    message = message_factory.GetMessageClass(kind)
    load_validator().collect_violations(message())  # its rules are compiled once
    rpc = rpc_of(message)
    for name, raw in floods(kind):
        assert min(refusing_took_s(rpc, raw) for _ in range(3)) < REFUSED_WITHIN_S, name


def refusing_took_s(rpc: Rpc, raw: bytes) -> float:
    """The processor time of reading a request that is refused, or read if there is nothing wrong with it."""
    began = time.thread_time()
    with suppress(Invalid):
        read_message(rpc, raw)
    return time.thread_time() - began


def rpc_of(message: type[Message], size_max: int = 2 * SIZE) -> Rpc:
    """An RPC that takes a message; larger ones than any real RPC."""
    return Rpc(
        name="test/Test", roles=frozenset(), request_type=message, size_max=size_max, streams_requests=False, is_command=False
    )


def reason(message: type[Message], raw: bytes) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Why a request is refused, and the violations."""
    with pytest.raises(Refusal) as refused:
        read_message(rpc_of(message), raw)
    return refused.value.reason, refused.value.violations


def test_the_elements_of_a_large_request_are_counted_before_it_is_decoded() -> None:
    """And nothing in front of them keeps them from being counted."""
    batch = command_pb2.SendBatchRequest
    items = [("items", "must have at most 256 elements")]
    assert reason(batch, filled(field(1, b""))) == ("INVALID_REQUEST", tuple(items))
    others = f"must have at most {OTHER_FIELDS_MAX} fields beside the elements of lists"
    assert reason(batch, filled(field(UNKNOWN, b""))) == ("INVALID_REQUEST", (("", others),))
    group = tag(UNKNOWN, GROUP) + tag(UNKNOWN, GROUP_END)
    for raw in (group + filled(field(1, b"")), filled(field(1, b"x" * 100))[:-1], b"\xff" * SIZE):
        assert reason(batch, raw)[0] in ("MALFORMED_MESSAGE", "INVALID_REQUEST")


def test_a_large_request_with_as_many_elements_as_allowed_is_read() -> None:
    """Large and valid is not refused."""
    item = command_pb2.BatchItem()
    item.command.type_url, item.command.value = "type.googleapis.com/bank.v1.DepositMoneyRequest", b"x" * 10_000
    request = command_pb2.SendBatchRequest(items=[item] * 256)
    assert read_message(rpc_of(command_pb2.SendBatchRequest), request.SerializeToString()) == request


def test_small_requests_are_refused_by_size_before_the_library_reads_them() -> None:
    """In the outermost message and within another."""
    many = command_pb2.SendBatchRequest(items=[command_pb2.BatchItem()] * 257)
    assert reason(command_pb2.SendBatchRequest, many.SerializeToString())[0] == "INVALID_REQUEST"
    nested = person_pb2.RegisterPersonRequest(name="x" * (TEXT_CHARACTERS_MAX + 1))
    with pytest.raises(Invalid, match="rules of its fields") as refused:
        refuse_oversized(nested, within="command.")
    assert refused.value.violations == (("command.name", "must have at most 4096 characters"),)


def test_texts_and_lists_without_rules_have_a_limit_too() -> None:
    """A contract that forgets a rule is bounded all the same."""
    record = command_pb2.ListCommandsResponse()
    record.commands.add(user_id="x" * (TEXT_CHARACTERS_MAX + 1))
    with pytest.raises(Invalid) as refused:
        refuse_oversized(record)
    assert [path for path, _ in refused.value.violations] == ["commands[0].user_id"]
    many = command_pb2.ListCommandsResponse(commands=[command_pb2.CommandRecord()] * (ITEMS_MAX + 1))
    with pytest.raises(Invalid, match="too many elements"):
        refuse_oversized(many)


def test_a_refusal_names_a_handful_of_violations() -> None:
    """All 256 items break a rule, and a list that is too long is one violation."""
    with pytest.raises(Invalid) as refused:
        refuse_invalid(command_pb2.SendBatchRequest(items=[command_pb2.BatchItem()] * 256))
    assert len(refused.value.violations) == VIOLATIONS_MAX
    request = user_pb2.ChangeUserRolesRequest(roles=["x"] * 300)
    with pytest.raises(Invalid) as refused:
        refuse_invalid(request)
    assert [path for path, _ in refused.value.violations] == ["roles"]


def test_a_request_above_its_size_is_refused_by_name() -> None:
    """Before it is decoded."""
    with pytest.raises(OverLimit) as refused:
        read_message(rpc_of(command_pb2.SendBatchRequest, size_max=10), b"x" * 11)
    assert refused.value.reason == "MESSAGE_TOO_LARGE"
