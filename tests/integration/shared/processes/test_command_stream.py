"""The stream to the write service on real gRPC: which receipts come over it, and when commands go in a call instead."""

# ruff: noqa: N802 (methods are named as the RPCs are)

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import grpc
import pytest
from grpc import aio

from foldline.v1 import command_pb2, command_pb2_grpc
from shared.platform.clock import utc_now
from shared.processes import command_stream
from shared.processes.command_stream import CommandStream
from shared.processes.dispatcher import Dispatcher, RetryPolicy, Told
from shared.processes.records import CommandResult, PendingCommand
from shared.rpc.client import channel
from tests.support.system.waiting import eventually
from tests.support.system.working import running


@dataclass
class Writing(command_pb2_grpc.CommandServiceServicer):
    """Answers every command with its id, over streams and in calls; what a test says ends a stream."""

    streams: list[list[str]] = field(default_factory=list)
    calls: list[list[str]] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    ends_at: str = ""
    streams_open: int = 0

    def __post_init__(self) -> None:
        self.gate.set()

    async def SendStream(
        self, request_iterator: AsyncIterator[command_pb2.SendStreamRequest], context: Any
    ) -> AsyncIterator[command_pb2.SendStreamResponse]:
        self.tokens.append(dict(context.invocation_metadata())["authorization"])
        self.streams.append(came := [])
        self.streams_open += 1
        try:
            async for request in request_iterator:
                came.append(request.item.causation_id)
                if request.item.causation_id == self.ends_at:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "on purpose")
                await self.gate.wait()
                yield command_pb2.SendStreamResponse(receipt=_receipt(request.item))
        finally:
            self.streams_open -= 1

    async def SendBatch(self, request: command_pb2.SendBatchRequest, context: Any) -> command_pb2.SendBatchResponse:
        self.calls.append([item.causation_id for item in request.items])
        return command_pb2.SendBatchResponse(receipts=map(_receipt, request.items))


def _receipt(item: command_pb2.BatchItem) -> command_pb2.CommandReceipt:
    return command_pb2.CommandReceipt(command_id=item.causation_id, status=command_pb2.COMMAND_STATUS_COMPLETED)


def _items(*names: str) -> list[command_pb2.BatchItem]:
    return [command_pb2.BatchItem(causation_id=name) for name in names]


def _command(number: int, *, tries: int = 1) -> PendingCommand:
    return PendingCommand("acme", "gift", "p", "s", 1, UUID(int=number), "bank.v1.X", b"", str(number), "", "", tries, 0)


@dataclass
class World:
    """A write service, and a stream to it under the token of a file."""

    service: Writing
    stub: command_pb2_grpc.CommandServiceStub
    token_file: Path
    stream: CommandStream

    async def ids(self, *names: str) -> list[str] | None:
        """The ids of the receipts that the stream brings."""
        receipts = await self.stream.send(_items(*names))
        return None if receipts is None else [receipt.command_id for receipt in receipts]

    @asynccontextmanager
    async def dispatcher(self) -> AsyncIterator[Dispatcher]:
        """A dispatcher with the stream, at work."""
        news, patience = asyncio.Event(), RetryPolicy(few=3)
        async with running(
            Dispatcher(self.stub.SendBatch, self.token_file, clock=utc_now, news=news, patience=patience, stream=self.stream)
        ) as dispatcher:
            yield dispatcher


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A write service of the test's own."""
    server = aio.server()
    service = Writing()  # type: ignore[abstract]  # two RPCs are called
    command_pb2_grpc.add_CommandServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    token_file = tmp_path / "token"
    token_file.write_text("first")
    async with channel(f"127.0.0.1:{port}", retries=False) as through:
        stub = command_pb2_grpc.CommandServiceStub(through)
        stream = CommandStream(stub.SendStream, token_file)
        yield World(service, stub, token_file, stream)
        await stream.close()
    await server.stop(None)


async def _told(dispatcher: Dispatcher, *commands: PendingCommand) -> list[Told]:
    """What becomes of the commands, which are sent together."""
    told: list[Told] = []
    dispatcher.send(commands)

    def all_told() -> bool:
        told.extend(dispatcher.take())
        return len(told) >= len(commands)

    await eventually(all_told)
    return told


async def test_commands_of_many_senders_share_one_stream(world: World) -> None:
    """Each sender gets the receipts of its own commands, in their order."""
    many = await asyncio.gather(*(world.ids(f"{nth}a", f"{nth}b") for nth in range(50)))
    assert many == [[f"{nth}a", f"{nth}b"] for nth in range(50)]
    assert len(world.service.streams) == 1


async def test_when_a_stream_ends_its_unanswered_commands_are_for_a_call(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were answered are answered; no stream is opened for a while, and then another one."""
    world.service.ends_at = "bad"
    assert await asyncio.gather(*(world.ids(name) for name in ("one", "bad", "behind"))) == [["one"], None, None]
    assert await world.ids("soon") is None
    assert len(world.service.streams) == 1
    monkeypatch.setattr(command_stream, "PAUSE_S", 0.0)
    world.stream._not_before = 0.0
    assert await world.ids("later") == ["later"]
    assert [came[-1] for came in world.service.streams][1:] == ["later"]


async def test_a_stream_that_does_not_answer_is_not_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands are for a call, and it is ended on both sides."""
    monkeypatch.setattr(command_stream, "ANSWER_S", 0.3)
    world.service.gate.clear()
    assert await world.ids("one") is None
    await eventually(lambda: world.service.streams == [["one"]] and world.service.streams_open == 0)


async def test_a_late_receipt_holds_up_no_other_commands(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is waited for the others are for calls, and the stream goes on when it has come."""
    monkeypatch.setattr(command_stream, "ANSWER_S", 60.0)
    world.service.gate.clear()
    late = asyncio.create_task(world.ids("late"))
    await eventually(lambda: world.stream._stream is not None and world.stream._stream.held_up(asyncio.get_running_loop().time()))
    assert await world.ids("behind") is None
    world.service.gate.set()
    assert await late == ["late"]
    assert await world.ids("next") == ["next"]
    assert world.service.streams == [["late", "next"]]


async def test_streams_take_turns_under_the_token_of_the_file(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next stream is opened under the token that is there then; what was sent over the last one is still answered."""
    assert await world.ids("one") == ["one"]
    world.service.gate.clear()
    under_way = asyncio.create_task(world.ids("two"))
    await eventually(lambda: world.service.streams == [["one", "two"]])
    monkeypatch.setattr(command_stream, "LIFE_S", 0.0)
    world.token_file.write_text("second")
    behind = asyncio.create_task(world.ids("three"))
    await eventually(lambda: len(world.service.streams) == 2)
    monkeypatch.undo()
    world.service.gate.set()
    assert [await under_way, await behind] == [["two"], ["three"]]
    assert world.service.tokens == ["Bearer first", "Bearer second"]
    await eventually(lambda: world.service.streams_open == 1)
    world.token_file.unlink()
    await world.stream.close()
    assert await world.ids("four") is None  # the call will tell that there is no token


async def test_a_few_commands_go_over_the_stream_and_the_others_in_calls(world: World) -> None:
    """Many at once, and those that are sent again, go in a call."""
    async with world.dispatcher() as dispatcher:
        await _told(dispatcher, _command(1), _command(2))
        await _told(dispatcher, *map(_command, range(10, 14)))
        told = await _told(dispatcher, _command(3, tries=2))
        assert told == [CommandResult(_command(3, tries=2), None, "")]
        await _told(dispatcher, _command(4))
        assert world.service.streams == [["1", "2", "4"]]
        assert world.service.calls == [["10", "11", "12", "13"], ["3"]]
    await eventually(lambda: world.service.streams_open == 0)


async def test_a_command_whose_stream_ended_is_sent_in_a_call(world: World) -> None:
    """At once, as it is, and the answer is that of the call."""
    world.service.ends_at = "2"
    async with world.dispatcher() as dispatcher:
        for number in (1, 2, 3):
            assert await _told(dispatcher, _command(number)) == [CommandResult(_command(number), None, "")]
    assert world.service.streams == [["1", "2"]]
    assert world.service.calls == [["2"], ["3"]]
