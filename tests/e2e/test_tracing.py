"""F: what one call causes in all processes is one trace. And telemetry never holds up what it tells of."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from bank.v1 import account_query_pb2
from deploy.engines.child import free_port
from deploy.engines.nats import Nats
from deploy.local.system import PROJECTOR, READ, RELAY, SAGA, WRITE
from foldline.v1 import as_of_pb2
from shared.platform import tracing
from shared.platform.telemetry import new_traceparent
from tests.e2e.conftest import foldline_of
from tests.support.clients.bank import Bank, channels
from tests.support.system.collector import Collector, Seen, collecting
from tests.support.system.engines import Engines
from tests.support.system.mail import Mailbox
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

SpanKind = Span.SpanKind
PASSWORD = "correct horse battery"
NAMES = ("Zaphod Beeblebrox", "Trillian Astra", "Heart of Gold", "ford@betelgeuse.example", "ford-prefect")


# The tree of a transfer in the documentation: indented, three characters a level.
PICTURE = re.search(r"```\n(bank\.v1\.TransferService.*?)```", Path("docs/observability.md").read_text(), re.DOTALL)[1]  # type: ignore[index]
ROW = re.compile(r"([│├└─ ]*)(\S.*?) {2,}(\w+) +([A-Z]+)")


def stack_of(folder: Path, engines: Engines, nats: Nats, mail: Mailbox, settings: dict[str, str]) -> Stack:
    """All processes with databases of their own and these settings.

    With a broker of its own, too: a stream has one line, and on the common one it may be another's.
    """
    return Stack(folder, engines.databases(), engines.postgres, nats, mail, settings=settings)


@asynccontextmanager
async def recording(settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Records the calls of this process as a client's, which asks for traces as the processes do."""
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    tracing.configure("client")
    try:
        yield
    finally:
        await asyncio.to_thread(tracing.shutdown)  # the collector is here, too, and must go on


@pytest.mark.timeout(300)
async def test_a_transfer_is_one_trace_over_all_processes(
    tmp_path: Path, engines: Engines, nats_server: Nats, mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's call is the root; decision, commit, relay, projector, saga and its commands are below, commits are linked."""
    async with collecting() as collector:
        stack = stack_of(tmp_path / "stack", engines, nats_server, mailbox, collector.settings())
        try:
            await stack.start_all()
            async with recording(collector.settings(), monkeypatch), channels(stack) as (write, read):
                bank = Bank(write, read, stack.token())
                one, _ = await bank.register(NAMES[0])
                other, _ = await bank.register(NAMES[1])
                source, _ = await bank.open(one, name=NAMES[2])
                target, _ = await bank.open(other, name=NAMES[2])
                deposited = await bank.deposit(source, 100)
                await bank.ended_registration(await bank.register_user(NAMES[4], PASSWORD))
                # The stream of a relay that begins later begins there: it would send none of the events before.
                await eventually(lambda: "relay_follows" in stack.log(RELAY).read_text())
                # Consumers that are behind read the store; one that has caught up is brought its events by the relay.
                lacking = [PICTURE]
                async with asyncio.timeout(150):
                    while lacking:
                        transfer_id, receipt = await bank.transfer(source, target, 1)
                        await bank.ended_transfer((transfer_id, receipt))
                        lacking = _lacking(PICTURE, await _checked_tree(collector, transfer_id))
                past = as_of_pb2.AsOf(token=deposited.consistency_token)
                request = account_query_pb2.GetAccountRequest(account_id=source, as_of=past)
                assert (await bank.call(bank.account_queries.GetAccount, request)).account.balance_minor == 100
                foldline = foldline_of(stack, "acme", tmp_path)
                told = await asyncio.to_thread(foldline, "send", "RenamePerson", f"person_id={one}", f"name={NAMES[1]}")
                assert told[0] == 0, told
                await eventually(lambda: not [line for line in CALLS if _lacking(line, collector.spans)], 30, every_s=0.2)
                exported = {"foldline.commands", "process.memory.usage", "foldline.commit.duration"}
                await eventually(lambda: exported <= collector.metrics, 20)
            tokens = [stack.token(), (stack.issuer.jwks_file.parent / "saga.token").read_text()]
        finally:
            await stack.stop_all()
    assert {seen.service for seen in collector.spans} == {"client", "cli", WRITE, RELAY, READ, PROJECTOR, SAGA}
    for secret in (*NAMES, PASSWORD, *tokens):
        assert not any(secret in text for text in collector.texts())


# Beside the transfer's. A command of the command line; what is asked of the past; and the line as those read it who follow it.
CALLS = (
    "foldline.v1.CommandService/Send  cli  CLIENT\n"
    "└─ foldline.v1.CommandService/Send  write_service  SERVER\n"
    "   └─ decide RenamePerson  write_service  INTERNAL\n",
    "bank.v1.AccountQueryService/GetAccount  client  CLIENT\n"
    "└─ bank.v1.AccountQueryService/GetAccount  read_service  SERVER\n"
    "   └─ foldline.v1.EventStoreService/ReadStreams  read_service  CLIENT\n"
    "      └─ foldline.v1.EventStoreService/ReadStreams  write_service  SERVER\n",
    *(
        f"foldline.v1.EventStoreService/ReadAll  {service}  CLIENT\n"
        "└─ foldline.v1.EventStoreService/ReadAll  write_service  SERVER\n"
        for service in (PROJECTOR, SAGA)
    ),
)


async def _checked_tree(collector: Collector, transfer_id: str) -> list[Seen]:
    """The trace of a transfer, when it is complete and has been checked: each span, but for the client's, is below another."""
    found = await eventually(lambda: _complete(collector, transfer_id), 30, every_s=0.2)
    by_id = {seen.id: seen for seen in found}
    decision = _decision(found, transfer_id)
    call = by_id[decision.parent]
    assert (call.service, call.name, decision.service) == (WRITE, "bank.v1.TransferService/StartTransfer", WRITE)
    [root] = [seen for seen in found if not seen.parent]
    assert (root.id, root.name, root.service) == (call.parent, call.name, "client")
    assert any(seen.name == "validate" and seen.parent == call.id for seen in found)
    # The batch that committed it is linked to it, and it to the batch.
    commit = next(seen for seen in found if seen.name == "append_batch" and call.id in seen.links)
    assert commit.id in decision.links
    assert commit.attributes["db.system.name"] == "postgresql"

    sent = next(seen for seen in found if seen.service == RELAY and seen.parent == call.id)
    assert sent.attributes["foldline.event.type"] == "bank.v1.TransferStarted"
    [round_] = [seen for seen in found if seen.service == SAGA and seen.parent in (sent.id, call.id)]
    [projected] = [seen for seen in found if seen.service == PROJECTOR and seen.parent in (sent.id, call.id)]
    assert (round_.name, projected.name) == ("process processes", "process transfers")
    # What the saga does next is below its round, and the calls that send it are linked to it.
    for name in ("WithdrawMoney", "DepositMoney", "CompleteTransfer"):
        assert any(seen.parent == round_.id for seen in found if seen.name == f"decide {name}")
    batches = [seen for seen in found if seen.service == SAGA and seen.name == "foldline.v1.CommandService/SendBatch"]
    assert any(round_.id in seen.links for seen in batches)
    received = [seen for seen in found if seen.service == WRITE and seen.name == "foldline.v1.CommandService/SendBatch"]
    assert {seen.parent for seen in received} <= {seen.id for seen in batches}
    assert {seen.service for seen in found} == {"client", WRITE, RELAY, PROJECTOR, SAGA}
    return found


def _lacking(picture: str, found: list[Seen]) -> list[str]:
    """The lines of a picture of a tree that no span is like: in name, service and kind, and below a span like the line above."""
    like = {seen.id: (seen.name, seen.service, SpanKind.Name(seen.span.kind).removeprefix("SPAN_KIND_")) for seen in found}
    edges = {(like.get(seen.parent), like[seen.id]) for seen in found}
    path: list[tuple[str, str, str]] = []
    lacking = []
    for line in picture.splitlines():
        row = ROW.match(line)
        assert row is not None, line
        del path[len(row[1]) // 3 :]
        drawn = (row[2], row[3], row[4])
        if (path[-1] if path else None, drawn) not in edges:
            lacking.append(line)
        path.append(drawn)
    return lacking


def test_a_line_that_no_span_is_like_is_found() -> None:
    """Another name, another service, another kind, or below another span."""
    first = Seen("a", Span(name="one", span_id=b"1", kind=SpanKind.SPAN_KIND_SERVER))
    second = Seen("b", Span(name="two words", span_id=b"2", parent_span_id=b"1", kind=SpanKind.SPAN_KIND_CLIENT))
    found = [first, second]
    assert _lacking("one  a  SERVER  what it is\n└─ two words  b  CLIENT\n", found) == []
    for wrong in ("└─ two  b  CLIENT", "└─ two words  a  CLIENT", "└─ two words  b  SERVER", "two words  b  CLIENT"):
        assert _lacking(f"one  a  SERVER\n{wrong}\n", found) == [wrong]


def _decision(found: list[Seen], transfer_id: str) -> Seen:
    wanted = ("decide StartTransfer", transfer_id)
    return next(seen for seen in found if (seen.name, seen.attributes.get("foldline.aggregate.id")) == wanted)


def _complete(collector: Collector, transfer_id: str) -> list[Seen]:
    """The spans of a transfer's trace. AssertionError until each is there, up to those that tell of its end."""
    decided = [seen for seen in collector.spans if seen.attributes.get("foldline.aggregate.id") == transfer_id]
    assert any(seen.name == "decide CompleteTransfer" for seen in decided)
    found = collector.of(_decision(decided, transfer_id).span.trace_id.hex())
    ids = {seen.id for seen in found}
    assert [seen.service for seen in found if seen.parent not in ids] == ["client"]
    ends = Counter(seen.service for seen in found if seen.attributes.get("foldline.event.type") == "bank.v1.TransferCompleted")
    assert ends[PROJECTOR] == 1 <= ends[RELAY], ends
    return found


@pytest.mark.parametrize("how", [pytest.param("away", marks=pytest.mark.long), "black-holed"])
async def test_a_collector_that_does_not_answer_holds_up_nothing(
    tmp_path: Path, engines: Engines, nats_server: Nats, mailbox: Mailbox, how: str
) -> None:
    """Commands are carried out, though queues are full, the log is not filled with complaints, and the processes end in time."""
    with socket.socket() as hole:
        port = free_port()
        if how == "black-holed":
            hole.bind(("127.0.0.1", 0))
            hole.listen(64)  # accepted by the kernel, and never read
            port = hole.getsockname()[1]
        collector = Collector(url=f"http://127.0.0.1:{port}")
        full = {"OTEL_BSP_MAX_QUEUE_SIZE": "16", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "8"}
        stack = stack_of(tmp_path / "stack", engines, nats_server, mailbox, collector.settings() | full)
        try:
            await stack.start_all()
            async with channels(stack) as (write, read):
                bank = Bank(write, read, stack.token())
                bank.who = (*bank.who, ("traceparent", new_traceparent()[:-2] + "01"))
                person_id, receipt = await bank.register(NAMES[0])
                await bank.person(person_id, receipt.consistency_token)
                # Several exports have failed by then.
                end = time.monotonic() + 5
                while time.monotonic() < end:
                    await bank.rename(person_id, NAMES[1])
                    await asyncio.sleep(0.2)
        finally:
            took = {}
            for name in (WRITE, RELAY, READ, PROJECTOR, SAGA):
                began = time.monotonic()
                assert await stack.stop(name) == 0
                took[name] = time.monotonic() - began
        assert max(took.values()) < 6, took
        for name in took:
            modules = [json.loads(line)["module"] for line in stack.log(name).read_text().splitlines()]  # each line is JSON
            assert len([module for module in modules if module.startswith("opentelemetry")]) <= 1
