"""Streams as a caller sees them: real gRPC, real tokens; only the service behind them is the test's own."""

# ruff: noqa: N802 (methods are named as the RPCs are)

from __future__ import annotations

import io
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from bank.v1 import person_pb2
from foldline.v1 import command_pb2, command_pb2_grpc
from shared.folds.errors import Refusal
from shared.platform import telemetry
from shared.platform.settings import ServerSettings
from shared.platform.tokens import DevelopmentIssuer
from shared.rpc.client import bearer, channel
from shared.rpc.server import Server
from shared.rpc.status import from_rpc_error
from tests.support.logs import capture_logs
from tests.support.system.people import ID, SECRET, USERS, refused
from tests.support.system.waiting import eventually

COMMAND_METHODS = [method.name for method in command_pb2.DESCRIPTOR.services_by_name["CommandService"].methods]


async def unused(self: Any, request: Any, context: Any) -> Any:
    """An RPC of the service that no test here calls."""
    raise NotImplementedError


class Streams(command_pb2_grpc.CommandServiceServicer):
    """Answers each item of a stream with its tenant as the command's id."""

    async def SendBatch(self, request: Any, context: Any) -> command_pb2.SendBatchResponse:
        return command_pb2.SendBatchResponse()

    async def SendStream(
        self, request_iterator: AsyncIterator[command_pb2.SendStreamRequest], context: Any
    ) -> AsyncIterator[command_pb2.SendStreamResponse]:
        async for request in request_iterator:
            if request.item.tenant == "raise":
                raise RuntimeError(SECRET)
            yield answer(request.item.tenant)


for method in set(COMMAND_METHODS) - set(vars(Streams)):
    setattr(Streams, method, unused)


class BusyStreams(Streams):
    """Holds up the event loop before each answer, so that the call's time is over while the answer is being written."""

    async def SendStream(
        self, request_iterator: AsyncIterator[command_pb2.SendStreamRequest], context: Any
    ) -> AsyncIterator[command_pb2.SendStreamResponse]:
        async for request in request_iterator:
            time.sleep(0.4)  # noqa: ASYNC251 (that is what it is for)
            yield answer(request.item.tenant)


class BusyWriting(Streams):
    """The same, with the other form of a streaming handler: it writes through its context."""

    async def SendStream(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        async for request in request_iterator:
            time.sleep(0.4)  # noqa: ASYNC251 (that is what it is for)
            await context.write(answer(request.item.tenant))


def answer(text: str) -> command_pb2.SendStreamResponse:
    """The answer to an item."""
    return command_pb2.SendStreamResponse(receipt=command_pb2.CommandReceipt(command_id=text))


def item(text: str) -> command_pb2.SendStreamRequest:
    """A message of a stream, with its text where the tenant belongs."""
    made = command_pb2.SendStreamRequest(item=command_pb2.BatchItem(tenant=text))
    made.item.command.Pack(person_pb2.RegisterPersonRequest())
    return made


SEND_STREAM = "foldline.v1.CommandService/SendStream"


COMMAND_RPCS = [f"foldline.v1.CommandService/{method}" for method in COMMAND_METHODS]


class StreamWorld:
    """A server with a streaming service."""

    def __init__(self, folder: Path, servicer: Streams, **settings: Any) -> None:
        self.issuer = issuer = DevelopmentIssuer(folder)
        telemetry.configure("info", service="test", stream=io.BytesIO())
        self.server = Server(
            ServerSettings(jwks_file=issuer.jwks_file, **settings),
            roles=dict.fromkeys(COMMAND_RPCS, USERS),
            sizes_max={"foldline.v1.CommandService/SendBatch": 4 * 1024 * 1024},
        )
        self.server.add(command_pb2_grpc.add_CommandServiceServicer_to_server, servicer)
        self.metadata = bearer(issuer.issue(tenant="acme", user_id="alice", roles=USERS))

    async def __aenter__(self) -> StreamWorld:
        await self.server.start()
        self.channel = channel(f"127.0.0.1:{self.server.port}", retries=False)
        self.stub = command_pb2_grpc.CommandServiceStub(self.channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        await self.server.drain()

    def stream(self, *messages: command_pb2.SendStreamRequest) -> Any:
        return self.stub.SendStream(iter(messages), metadata=self.metadata, timeout=20)


@pytest.fixture(params=[Streams])
async def streaming(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[StreamWorld]:
    """The streaming service."""
    async with StreamWorld(tmp_path, request.param()) as made:
        yield made


async def collect(call: Any) -> tuple[list[str], Refusal | None]:
    """What a stream answered, and what ended it."""
    got: list[str] = []
    try:
        async for one in call:
            got.append(one.receipt.command_id)  # noqa: PERF401 (what came before an error counts)
    except aio.AioRpcError as error:
        return got, from_rpc_error(error)
    return got, None


async def test_a_stream_that_stays_open_is_no_slow_call(tmp_path: Path) -> None:
    """Its line in the log is that of any call."""
    async with StreamWorld(tmp_path, BusyStreams(), slow_call_ms=1) as world:  # type: ignore[abstract]  # the others are set above
        with capture_logs() as lines:
            assert await collect(world.stream(item("one"))) == (["one"], None)
            await eventually(lambda: any(line.get("method") == SEND_STREAM for line in lines))
    [line] = [line for line in lines if line.get("method") == SEND_STREAM]
    assert line["event"] == "call"
    assert line["took_ms"] > 1


async def test_a_stream_passes_the_same_behaviours(streaming: StreamWorld) -> None:
    """Messages are decoded and answered in order, and a stream without a token gets nothing."""
    assert await collect(streaming.stream(item("one"), item("two"))) == (["one", "two"], None)
    got, refusal = await collect(streaming.stub.SendStream(iter([item("one")]), timeout=20))
    assert (got, refusal and refusal.reason) == ([], "TOKEN_MISSING")


async def test_a_bad_message_ends_a_stream_after_the_answers_to_the_good_ones(streaming: StreamWorld) -> None:
    """Every message of a stream is held to its rules, and refused like a request of its own."""
    got, refusal = await collect(streaming.stream(item("one"), command_pb2.SendStreamRequest(), item("three")))
    assert (got, refusal and refusal.reason) == (["one"], "INVALID_REQUEST")
    raw: Any = streaming.channel.stream_stream(f"/{SEND_STREAM}")
    with pytest.raises(aio.AioRpcError) as caught:
        async for _ in raw(iter([b"\xff\xff\xff\xff"]), metadata=streaming.metadata, timeout=20):
            pass
    assert from_rpc_error(caught.value).reason == "MALFORMED_MESSAGE"


async def test_a_defect_in_a_stream_says_nothing(streaming: StreamWorld) -> None:
    """As in a single call: INTERNAL, and no word of the exception."""
    got, refusal = await collect(streaming.stream(item("one"), item("raise")))
    assert (got, refusal and refusal.reason) == (["one"], "INTERNAL")
    assert refusal is not None
    assert SECRET not in str(refusal)


async def test_draining_ends_a_stream_that_waits_for_its_caller(streaming: StreamWorld) -> None:
    """What came is answered, then the caller is told to go on elsewhere; an idle stream does not hold up the end."""
    call = streaming.stub.SendStream(metadata=streaming.metadata, timeout=20)
    await call.write(item("one"))
    first: Any = await call.read()
    began = time.monotonic()
    await streaming.server.drain()
    assert time.monotonic() - began < 5.5
    code, refusal = await refused(call.read())
    assert (first.receipt.command_id, code, refusal.reason) == ("one", grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")


@pytest.mark.parametrize("servicer", [Streams, BusyStreams])
@pytest.mark.parametrize("deadline_s", [None, 60])
async def test_a_stream_ends_by_name_after_its_last_answer(
    tmp_path: Path, servicer: type[Streams], deadline_s: float | None
) -> None:
    """Whatever deadline it has: all that came is answered, and the caller is told to open another."""
    async with StreamWorld(tmp_path, servicer(), stream_s_max=0.3) as world:
        call = world.stub.SendStream(metadata=world.metadata, timeout=deadline_s)
        await call.write(item("one"))
        got, refusal = await collect(call)
    assert (got, refusal and refusal.reason) == (["one"], "STREAM_OVER")


@pytest.mark.parametrize("servicer", [BusyStreams, BusyWriting])
async def test_an_answer_that_is_being_written_does_not_keep_a_stream_from_ending(
    tmp_path: Path, servicer: type[Streams]
) -> None:
    """The call's time is over while its answer is written: the caller gets both, the answer and the status."""
    async with StreamWorld(tmp_path, servicer(), stream_s_max=0.1, deadline_default_s=0.1) as world:
        call = world.stub.SendStream(metadata=world.metadata)
        await call.write(item("one"))
        got, refusal = await collect(call)
    assert (got, refusal and refusal.reason) == (["one"], "DEADLINE_EXCEEDED")


async def test_a_larger_size_is_given_by_the_table(streaming: StreamWorld) -> None:
    """A batch may have four mebibytes, where other requests may have one."""
    request = command_pb2.SendBatchRequest()
    for _ in range(2):
        request.items.add(causation_id=ID).command.Pack(person_pb2.RegisterPersonRequest(name="x" * 1024 * 1024))
    await streaming.stub.SendBatch(request, metadata=streaming.metadata, timeout=20)
    request.items.add(causation_id=ID).command.Pack(person_pb2.RegisterPersonRequest(name="x" * 2 * 1024 * 1024))
    code, refusal = await refused(streaming.stub.SendBatch(request, metadata=streaming.metadata, timeout=20))
    assert (code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")


@pytest.mark.parametrize("servicer", [Streams])
async def test_idle_streams_of_one_tenant_give_way_to_another(tmp_path: Path, servicer: type[Streams]) -> None:
    """The oldest of them, told by name; the other tenant is served at once."""
    async with StreamWorld(tmp_path, servicer(), calls_at_once_max=4) as world:
        idle = []
        for number in range(4):
            call = world.stub.SendStream(metadata=world.metadata, timeout=50)
            await call.write(item(f"{number}"))
            await call.read()
            idle.append(call)
        other = bearer(world.issuer.issue(tenant="umbrella", user_id="bob", roles=USERS))
        await world.stub.SendBatch(command_pb2.SendBatchRequest(items=[item("x").item]), metadata=other, timeout=20)
        code, refusal = await refused(idle[0].read())
        assert (code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CALL_GAVE_WAY")
        assert refusal.retry_after_s
        for call in idle[1:]:
            await call.write(item("more"))
            more: Any = await call.read()
            assert more.receipt.command_id == "more"
