"""A server's start, its health, and its draining."""

# ruff: noqa: N802 (methods are named as the RPCs are)

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from bank.v1 import person_pb2_grpc
from foldline.v1 import command_pb2, event_store_pb2_grpc
from shared.platform.settings import ServerSettings
from shared.platform.tokens import DevelopmentIssuer
from shared.rpc.client import channel
from shared.rpc.handlers import Misconfigured
from shared.rpc.server import Server
from tests.support.system.people import CLOSE, ID, REGISTER, RENAME, USERS, MakeWorld, People, World, receipt, refused


async def test_health_and_reflection_answer_without_a_token(make_world: MakeWorld) -> None:
    """Probes and tools have none; neither says anything about data."""
    world = await make_world(reflection=True)
    health = health_pb2_grpc.HealthStub(world.channel)
    for service in ("", "bank.v1.PersonService"):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    asked = reflection_pb2_grpc.ServerReflectionStub(world.channel).ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5
    )
    names = {service.name async for one in asked for service in one.list_services_response.service}
    assert "bank.v1.PersonService" in names


async def test_health_says_not_serving_until_told(tmp_path: Path) -> None:
    """A process that listens but still waits for its database is not sent calls."""
    world = World(tmp_path)
    port = await world.server.start(serving=False)
    async with channel(f"127.0.0.1:{port}") as to_server:
        health = health_pb2_grpc.HealthStub(to_server)
        before = await health.Check(health_pb2.HealthCheckRequest(), timeout=20)
        await world.server.set_serving(True)
        after = await health.Check(health_pb2.HealthCheckRequest(), timeout=20)
    await world.server.drain()
    assert (before.status, after.status) == (health_pb2.HealthCheckResponse.NOT_SERVING, health_pb2.HealthCheckResponse.SERVING)


async def test_a_table_of_roles_that_does_not_fit_stops_the_start(tmp_path: Path) -> None:
    """An RPC without a row is not open to all, and a row without an RPC is a misspelling: neither gets as far as serving."""
    settings = ServerSettings(jwks_file=DevelopmentIssuer(tmp_path).jwks_file)
    missing = Server(settings, roles={REGISTER: USERS})
    missing.add(person_pb2_grpc.add_PersonServiceServicer_to_server, People())
    with pytest.raises(Misconfigured, match="RenamePerson"):
        await missing.start()
    unknown = Server(settings, roles={REGISTER: USERS, RENAME: USERS, CLOSE: USERS, "bank.v1.PersonService/Typo": USERS})
    unknown.add(person_pb2_grpc.add_PersonServiceServicer_to_server, People())
    with pytest.raises(Misconfigured, match="Typo"):
        await unknown.start()


async def test_a_service_cannot_be_added_twice_or_unimplemented(tmp_path: Path) -> None:
    """The second would silently win, and a forgotten method would be found by its first caller."""
    server = Server(
        ServerSettings(jwks_file=DevelopmentIssuer(tmp_path).jwks_file), roles={REGISTER: USERS, RENAME: USERS, CLOSE: USERS}
    )
    server.add(person_pb2_grpc.add_PersonServiceServicer_to_server, People())
    with pytest.raises(Misconfigured, match="twice"):
        server.add(person_pb2_grpc.add_PersonServiceServicer_to_server, People())

    class Forgetful(event_store_pb2_grpc.EventStoreServiceServicer):
        async def ReadAll(self, request: Any, context: Any) -> Any:  # type: ignore[override]
            """Does nothing."""

    with pytest.raises(Misconfigured, match="ReadStream"):
        server.add(event_store_pb2_grpc.add_EventStoreServiceServicer_to_server, Forgetful())  # type: ignore[abstract]


async def test_draining_lets_calls_finish_before_it_closes_what_they_use(world: World) -> None:
    """A call in flight is answered; only then the callbacks run, the last registered first."""
    order: list[str] = []
    started, go_on = asyncio.Event(), asyncio.Event()

    async def handle(request: Any) -> command_pb2.CommandReceipt:
        started.set()
        await go_on.wait()
        await asyncio.sleep(0.5)  # the handler's work, longer than answers are waited for that are on their way
        order.append("call")
        return await receipt(request)

    async def close(name: str) -> None:
        order.append(name)

    world.people.handle = handle
    world.server.on_drained(lambda: close("keys"))
    world.server.on_drained(lambda: close("committer"))
    world.server.on_drained(lambda: close("pool"), last=True)
    watching = health_pb2_grpc.HealthStub(world.channel).Watch(health_pb2.HealthCheckRequest())
    assert (await anext(aiter(watching))).status == health_pb2.HealthCheckResponse.SERVING
    call = asyncio.create_task(world.register())
    await started.wait()
    began = time.monotonic()
    draining = asyncio.create_task(world.server.drain())
    assert (await anext(aiter(watching))).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert order == []
    go_on.set()
    assert (await call).command_id == ID
    await draining
    assert order == ["call", "committer", "keys", "pool"]
    # Whoever watches health would hold it up for all of drain_calls_s.
    assert time.monotonic() - began < world.settings.drain_calls_s


async def test_draining_waits_for_handlers_that_grpc_has_given_up(make_world: MakeWorld) -> None:
    """`stop` returns while an aborted handler still cleans up; what it uses is closed after it, not under it."""
    world = await make_world(drain_calls_s=0.05, drain_s=5)
    order: list[str] = []
    started = asyncio.Event()

    async def handle(request: Any) -> command_pb2.CommandReceipt:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.5)  # the handler's cleaning up
            order.append("handler ended")
        raise AssertionError

    async def close() -> None:
        order.append("closed")

    world.people.handle = handle
    world.server.on_drained(close)
    call = asyncio.create_task(world.register())
    await started.wait()
    await world.server.drain()
    assert order == ["handler ended", "closed"]
    code, _ = await refused(call)
    assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


async def test_draining_ends_in_time_whatever_hangs(make_world: MakeWorld) -> None:
    """Neither a handler nor a callback that never ends keeps the process."""
    world = await make_world(drain_calls_s=0.05, drain_s=0.3)
    started, release, closed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def handle(request: Any) -> command_pb2.CommandReceipt:
        started.set()
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        return await receipt(request)

    async def close() -> None:
        closed.set()

    async def hang() -> None:
        await asyncio.Event().wait()

    world.people.handle = handle
    world.server.on_drained(close)
    world.server.on_drained(hang)
    call = asyncio.create_task(world.register())
    await started.wait()
    began = time.monotonic()
    await world.server.drain()
    assert time.monotonic() - began < 5.5
    release.set()
    await refused(call)
