"""SIGTERM under load: calls in flight are answered, nothing acknowledged is lost, it ends by itself and with code 0."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Any

import grpc.aio
import pytest

from deploy.local.system import PROJECTOR, READ, RELAY, SAGA, WRITE
from foldline.v1 import command_pb2
from tests.support.checks.invariants import Acknowledged, check, look
from tests.support.checks.stream import published
from tests.support.clients.bank import Bank, channels, deposit, item, read_refusal
from tests.support.clients.traffic import running
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

# The services end themselves within 10 s of work; a machine that stands still meanwhile is given more.
DRAINS_WITHIN_S = 30.0
STARTED = {WRITE: "listening", READ: "listening", RELAY: "relay_follows", PROJECTOR: "consumer_starts", SAGA: "consumer_starts"}


@pytest.mark.long
async def test_each_process_ended_under_load(stack: Stack) -> None:
    """One after the other: code 0, and the next life goes on where the last one ended."""
    async with running(stack) as traffic:
        for name, word in STARTED.items():
            # Before it listens to signals, SIGTERM ends it as it ends any program.
            await eventually(lambda: word in stack.log(name).read_text(), 60)  # noqa: B023 (called at once)
            began = time.monotonic()
            assert await stack.stop(name, DRAINS_WITHIN_S) == 0, name
            assert time.monotonic() - began < DRAINS_WITHIN_S, name
            stack.start(name)
            await traffic.more(100)
    picture = await look(stack)
    check(picture, traffic.acknowledged)
    await published(stack.nats.url, picture.line)


async def test_everything_ended_under_load(stack: Stack) -> None:
    """All of it at once, each with code 0; what was acknowledged is there when it is started again."""
    async with running(stack) as traffic:
        await eventually(lambda: all(word in stack.log(name).read_text() for name, word in STARTED.items()), 60)
        began = time.monotonic()
        await stack.stop_all(DRAINS_WITHIN_S)
        assert time.monotonic() - began < DRAINS_WITHIN_S
        assert {name: await stack.stop(name) for name in stack.programs} == dict.fromkeys(stack.programs, 0)
        await stack.start_all()
        await traffic.more(50)
    check(await look(stack), traffic.acknowledged)


async def test_a_stream_of_commands_is_ended_with_what_came_answered(stack: Stack) -> None:
    """A client that holds a stream open does not hold up the end: it gets receipts without a gap, then UNAVAILABLE."""
    async with channels(stack) as (write, read):
        bank = Bank(write, read, stack.token("load"))
        alice, _ = await bank.register("Alice")
        blue, _ = await bank.open(alice)
        call: Any = bank.commands.SendStream(metadata=bank.who, timeout=30)
        for _ in range(20):
            await call.write(command_pb2.SendStreamRequest(item=item(deposit(blue, 1))))
        receipts = [(await call.read()).receipt]
        stack.send_signal(WRITE, signal.SIGTERM)
        told = None
        try:
            while (answer := await asyncio.wait_for(call.read(), DRAINS_WITHIN_S)) is not grpc.aio.EOF:
                receipts.append(answer.receipt)
        except grpc.aio.AioRpcError as error:
            told = read_refusal(error)
        assert told is not None
        assert (told.code, told.reason) == ("UNAVAILABLE", "SHUTTING_DOWN")
        assert told.retry_after_s is not None
        await eventually(lambda: not stack.alive(WRITE), DRAINS_WITHIN_S)
    assert await stack.stop(WRITE) == 0
    stack.start(WRITE)
    await stack.wait_ready(WRITE)
    # What had not yet come when it was told to end is absent; what had come is answered.
    assert [receipt.version for receipt in receipts] == list(range(2, 2 + len(receipts)))
    check(await look(stack), [Acknowledged("load", receipt.command_id, receipt) for receipt in receipts])
