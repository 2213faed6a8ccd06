"""What travels with a command through all processes, and what must never leave the place where it belongs."""

from __future__ import annotations

import json
from typing import Any

import nats
import psycopg
import pytest

from bank.v1 import person_query_pb2
from deploy.local.system import PROJECTOR, READ, RELAY, WRITE
from foldline.v1 import command_pb2
from shared.line.broker import stream_name
from tests.e2e.conftest import Caller
from tests.support.clients.bank import Bank, item, new_id, packed, refused, register, rename
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"

MALFORMED = {
    "none": None,
    "garbage": "garbage",
    "capitals": TRACEPARENT.upper(),
    "a trace of zeros": f"00-{'0' * 32}-{SPAN_ID}-01",
    "a span of zeros": f"00-{TRACE_ID}-{'0' * 16}-01",
    "the forbidden version": f"ff-{TRACE_ID}-{SPAN_ID}-01",
    "too long": TRACEPARENT + "-more",
    "an empty one": "",
}


async def message_at(stack: Stack, position: int) -> Any:
    """What NATS holds at a position of the line, when it is there."""
    client = await nats.connect(stack.nats.url)
    try:
        streams = client.jetstream()

        async def end() -> bool:
            return (await streams.stream_info(stream_name(1))).state.last_seq >= position

        await eventually(end, 30, every_s=0.02)
        return await streams.get_msg(stream_name(1), position)
    finally:
        await client.close()


async def test_the_callers_trace_goes_all_the_way(shared_stack: Stack, insider: Bank) -> None:
    """The traceparent that came is in the command log, in every event, in the header on NATS, and in the log's lines."""
    alice = new_id()
    receipt = await insider.call(insider.people.RegisterPerson, register(alice, "Alice"), more=[("traceparent", TRACEPARENT)])
    assert (await insider.command(receipt.command_id)).traceparent == TRACEPARENT
    [event] = await insider.stream("person", alice)
    assert event.metadata.traceparent == TRACEPARENT
    message = await message_at(shared_stack, receipt.position)
    assert message.headers["traceparent"] == TRACEPARENT
    assert message.headers["ce-id"] == event.event_id
    assert message.data == event.payload

    def told() -> list[dict[str, Any]]:
        return [line for line in log_lines(shared_stack, WRITE) if line.get("command_id") == receipt.command_id]

    lines = await eventually(told)
    assert [(line["trace_id"], line["span_id"], line["code"]) for line in lines] == [(TRACE_ID, SPAN_ID, "OK")]


@pytest.mark.parametrize("given", MALFORMED.values(), ids=MALFORMED)
async def test_without_a_usable_trace_a_new_one_begins(bank: Bank, given: str | None) -> None:
    """A trace context that is absent or malformed is replaced, and never stored as it came."""
    alice = new_id()
    more = [] if given is None else [("traceparent", given)]
    receipt = await bank.call(bank.people.RegisterPerson, register(alice, "Alice"), more=more)
    [event] = await bank.stream("person", alice)
    version, trace, span, flags = event.metadata.traceparent.split("-")
    assert (version, len(trace), len(span), flags) == ("00", 32, 16, "00")
    assert trace not in (TRACE_ID, "0" * 32)
    assert (await bank.command(receipt.command_id)).traceparent == event.metadata.traceparent


async def test_every_call_begins_a_trace_of_its_own(bank: Bank) -> None:
    """Two calls without one do not share a trace; the items of one batch do."""
    first, second, third, fourth = [new_id() for _ in range(4)]
    await bank.register("Ann", first)
    await bank.register("Bob", second)
    await bank.batch(item(register(third, "Cid")), item(register(fourth, "Dan")))
    traces = [(await bank.stream("person", one))[0].metadata.traceparent for one in (first, second, third, fourth)]
    assert len(set(traces)) == 3
    assert traces[2] == traces[3]


async def test_correlation(bank: Bank) -> None:
    """A correlation id ties commands and all their events together; without one it is the command's own id."""
    correlation = new_id()
    alice, registered = new_id(), new_id()
    await bank.call(
        bank.people.RegisterPerson, register(alice, "Alice", command_id=registered, correlation_id=correlation.upper())
    )
    blue, opened = await bank.open(alice)
    person = await bank.stream("person", alice)
    account = await bank.stream("account", blue)
    assert [event.metadata.correlation_id for event in person] == [correlation, opened.command_id]
    assert [event.metadata.correlation_id for event in account] == [opened.command_id]
    assert {event.metadata.command_id for event in (*person[1:], *account)} == {opened.command_id}
    assert person[0].metadata.command_id == registered


def log_lines(stack: Stack, name: str) -> list[dict[str, Any]]:
    """The lines of a process's log. Every single one must be JSON."""
    return [json.loads(line) for line in stack.log(name).read_text().splitlines()]


async def test_names_and_tokens_are_in_no_log(shared_stack: Stack, caller: Caller, tenant: str) -> None:
    """A name that went through every command, refusal and query, and the tokens that carried it: in no process's log."""
    name, account_name = f"Zaphod{new_id()[:8]}", f"Heart{new_id()[:8]}"
    bank = caller()
    alice, _ = await bank.register(name)
    await bank.rename(alice, f"{name} B.")
    await bank.batch(item(rename(alice, f"{name} C.")), item(register(alice, f"{name} D.")))
    blue, opened = await bank.open(alice, name=account_name)
    await refused(bank.register(name, alice))
    await refused(bank.rename(alice, name * 20))
    await refused(bank.open(alice, name=account_name * 9))
    await refused(bank.withdraw(blue, 1))
    await refused(caller(token=f"{bank.token}x").rename(alice, name))
    await bank.person(alice, opened.consistency_token)
    queries = bank.person_queries
    listing = person_query_pb2.ListPersonsRequest(filter=person_query_pb2.PersonFilter(name_prefix=name))
    assert len((await bank.call(queries.ListPersons, listing)).persons) == 1
    assert len((await bank.call(queries.ListPersons, listing)).persons[0].name) > len(name)

    await eventually(lambda: tenant in shared_stack.log(READ).read_text(), 30)
    secrets = [name, account_name, bank.token, bank.token.split(".")[1], bank.token.split(".")[2]]
    for process in (WRITE, RELAY, READ, PROJECTOR):
        text = shared_stack.log(process).read_text()
        assert text
        assert [secret for secret in secrets if secret in text] == []
    for process in shared_stack.programs:
        assert all({"time", "level", "service", "event", "module"} <= line.keys() for line in log_lines(shared_stack, process))
    projector_token = (shared_stack.issuer.jwks_file.parent / "projector.token").read_text()
    assert all(projector_token not in shared_stack.log(process).read_text() for process in shared_stack.programs)


async def test_a_token_is_in_no_table_and_no_message(shared_stack: Stack, insider: Bank) -> None:
    """The command log, the events, the query tables and NATS hold no part of a token. The control: they hold the name."""
    name = f"Trillian{new_id()[:8]}"
    alice, receipt = await insider.register(name)
    await insider.person(alice, receipt.consistency_token)
    message = await message_at(shared_stack, receipt.position)
    carried = (repr(message.headers) + message.subject).encode() + message.data
    signature = insider.token.split(".")[2].encode()
    for url, tables in (
        (shared_stack.databases.write.admin, ("commands", "events")),
        (shared_stack.databases.read.admin, ("people",)),
    ):
        with psycopg.connect(url) as connection:
            for table in tables:
                held = _everything(connection, table)
                assert name.encode() in held
                assert signature not in held
    assert name.encode() in carried
    assert signature not in carried


def _everything(connection: psycopg.Connection[Any], table: str) -> bytes:
    """All values of a table, one after the other."""
    rows = connection.execute(f"SELECT * FROM {table}").fetchall()
    return b"\n".join(value if isinstance(value, bytes) else repr(value).encode() for row in rows for value in row)


async def test_a_packed_command_is_told_by_its_id_in_the_log(shared_stack: Stack, bank: Bank, tenant: str) -> None:
    """Lines of Send carry the command's id, tenant, user and trace, as those of a command's own RPC do."""
    request = register(new_id(), "Alice")
    await bank.call(bank.commands.Send, command_pb2.SendRequest(command=packed(request)), more=[("traceparent", TRACEPARENT)])

    def told() -> list[dict[str, Any]]:
        return [line for line in log_lines(shared_stack, WRITE) if line.get("command_id") == request.options.command_id]

    # A line is written a moment later, which may be behind the answer.
    [line] = await eventually(told)
    assert (line["tenant"], line["user"], line["trace_id"], line["method"]) == (
        tenant,
        "alice",
        TRACE_ID,
        "foldline.v1.CommandService/Send",
    )
