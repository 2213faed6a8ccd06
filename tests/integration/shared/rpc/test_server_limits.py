"""Deadlines, callers that go away, and how many calls a server takes on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bank.v1 import person_pb2
from foldline.v1 import command_pb2
from shared.folds.errors import OverLimit
from shared.rpc.client import bearer
from shared.rpc.places import OPEN_CALLS_MAX
from tests.support.system.people import ID, OPTIONS, REGISTER_ROUTE, MakeWorld, World, receipt, refused
from tests.support.system.waiting import eventually


@pytest.mark.parametrize("timeout_s", [None, 3600])
async def test_a_missing_or_absurd_deadline_is_replaced(make_world: MakeWorld, timeout_s: float | None) -> None:
    """No call lasts longer than the server allows."""
    world = await make_world(deadline_default_s=0.05, deadline_max_s=0.1)

    async def handle(request: Any) -> command_pb2.CommandReceipt:
        await asyncio.Event().wait()
        raise AssertionError

    world.people.handle = handle
    code, refusal = await refused(world.register(timeout=timeout_s))
    assert (code, refusal.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")


FROZEN_CALLER = """
import sys, grpc
call = grpc.insecure_channel(sys.argv[1]).unary_unary(sys.argv[2])
call.future(bytes.fromhex(sys.argv[3]), timeout=1, metadata=(("authorization", "Bearer " + sys.argv[4]),)).exception()
"""


async def test_a_callers_own_deadline_is_kept_even_if_the_caller_is_frozen(world: World) -> None:
    """GRPC ends the handler at the caller's deadline by itself, which is why the server sets no timer then."""
    started, ended = asyncio.Event(), asyncio.Event()

    async def handle(request: Any) -> command_pb2.CommandReceipt:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    world.people.handle = handle
    request = person_pb2.RegisterPersonRequest(options=OPTIONS, person_id=ID, name="Alice")
    target = f"127.0.0.1:{world.server.port}"
    arguments = [target, REGISTER_ROUTE, request.SerializeToString().hex(), world.token()]
    caller = subprocess.Popen([sys.executable, "-c", FROZEN_CALLER, *arguments])
    try:
        await asyncio.wait_for(started.wait(), 20)
        caller.send_signal(19)
        await asyncio.wait_for(ended.wait(), 30)
    finally:
        caller.kill()
        caller.wait()


async def test_a_caller_that_goes_away_ends_its_handler(world: World) -> None:
    """Cancellation reaches the handler, and the log says CANCELLED."""
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def handle(request: Any) -> command_pb2.CommandReceipt:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError

    world.people.handle = handle
    call = asyncio.create_task(world.register())
    await started.wait()
    call.cancel()
    await asyncio.wait_for(cancelled.wait(), 30)
    await eventually(lambda: [line["code"] for line in world.lines("call")] == ["CANCELLED"])
    assert not world.lines("call_defect")


async def test_more_calls_than_it_takes_on_are_refused_by_name(make_world: MakeWorld) -> None:
    """A call that comes while two are under way is told to come again; when one has ended, it may."""
    world = await make_world(calls_at_once_max=2)
    inside, over = asyncio.Semaphore(0), asyncio.Event()

    async def wait(request: Any) -> command_pb2.CommandReceipt:
        inside.release()
        await over.wait()
        return await receipt(request)

    world.people.handle = wait
    async with asyncio.timeout(30), asyncio.TaskGroup() as calls:
        for _ in range(2):
            calls.create_task(world.register(timeout=30))
            await inside.acquire()
        code, refusal = await refused(world.register())
        assert (code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS")
        assert isinstance(refusal, OverLimit)
        assert refusal.retry_after_s
        assert len(world.lines("too_many_calls")) == 1
        over.set()
    assert (await world.register()).command_id == ID


async def test_a_call_without_a_token_holds_nothing(make_world: MakeWorld) -> None:
    """It is refused before its request has come; no number of them keeps others out."""
    world = await make_world()
    method: Any = world.channel.stream_unary(REGISTER_ROUTE)
    for _ in range(50):
        code, refusal = await refused(method(_silence(), timeout=20))
        assert (code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")


async def test_a_call_whose_request_does_not_come_is_ended(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, long before its deadline."""
    monkeypatch.setattr("shared.rpc.places.REQUEST_WITHIN_S", 0.3)
    world = await make_world(calls_at_once_max=1)
    method: Any = world.channel.stream_unary(REGISTER_ROUTE)
    code, refusal = await refused(method(_silence(), metadata=bearer(world.token()), timeout=50))
    assert (code, refusal.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "REQUEST_OVERDUE")
    assert (await world.register()).command_id == ID


async def _silence() -> AsyncIterator[bytes]:
    """The requests of a caller who sends none and does not go away."""
    await asyncio.Event().wait()
    yield b""


async def test_health_is_answered_under_a_flood_of_watchers(make_world: MakeWorld) -> None:
    """Calls without a token have a few places; the oldest watcher is told to ask again."""
    world = await make_world(calls_at_once_max=1)
    stub = health_pb2_grpc.HealthStub(world.channel)
    watching = []
    for _ in range(OPEN_CALLS_MAX):
        call = stub.Watch(health_pb2.HealthCheckRequest(), timeout=50)
        await call.read()
        watching.append(call)
    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    code, refusal = await refused(watching[0].read())
    assert (code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "CALL_GAVE_WAY")
    assert (await world.register()).command_id == ID
