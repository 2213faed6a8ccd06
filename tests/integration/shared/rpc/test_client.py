"""Channels of ours: what they try again, and where calls go."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shared.rpc.client import channel
from tests.support.system.waiting import eventually

REQUEST = health_pb2.HealthCheckRequest()
ANSWER = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


@asynccontextmanager
async def failing(code: grpc.StatusCode) -> AsyncIterator[tuple[str, list[int]]]:
    """A server whose first answer is that code; its address, and the attempts that it saw."""
    attempts: list[int] = []

    async def check(request: Any, context: aio.ServicerContext[Any, Any]) -> health_pb2.HealthCheckResponse:
        attempts.append(1)
        if len(attempts) == 1:
            await context.abort(code, "")
        return ANSWER

    handler = grpc.unary_unary_rpc_method_handler(
        check,
        request_deserializer=health_pb2.HealthCheckRequest.FromString,
        response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
    )
    server = aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}", attempts
    await server.stop(0)


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
async def test_a_call_that_met_a_stopping_server_is_repeated(code: grpc.StatusCode) -> None:
    """Unless the caller sees to that: then the first answer comes through."""
    async with failing(code) as (address, attempts), channel(address) as through:
        assert await health_pb2_grpc.HealthStub(through).Check(REQUEST, timeout=10) == ANSWER
        assert len(attempts) == 2
    async with failing(code) as (address, attempts), channel(address, retries=False) as through:
        with pytest.raises(aio.AioRpcError) as refused:
            await health_pb2_grpc.HealthStub(through).Check(REQUEST, timeout=10)
        assert (refused.value.code(), len(attempts)) == (code, 1)


async def test_a_refusal_is_not_repeated() -> None:
    """The server has answered."""
    async with failing(grpc.StatusCode.FAILED_PRECONDITION) as (address, attempts), channel(address) as through:
        with pytest.raises(aio.AioRpcError):
            await health_pb2_grpc.HealthStub(through).Check(REQUEST, timeout=10)
        assert len(attempts) == 1


async def test_calls_take_turns_between_the_addresses_of_a_name() -> None:
    """Several of a service have the same share of the calls."""
    async with (
        failing(grpc.StatusCode.ABORTED) as (one, of_one),
        failing(grpc.StatusCode.ABORTED) as (other, of_other),
        channel(f"ipv4:{one},{other}") as through,
    ):
        stub = health_pb2_grpc.HealthStub(through)

        async def both_were_called() -> bool:
            with suppress(aio.AioRpcError):
                await stub.Check(REQUEST, timeout=10)
            return bool(of_one and of_other)

        await eventually(both_were_called, 10)
        before = len(of_one), len(of_other)
        for _ in range(10):
            await stub.Check(REQUEST, timeout=10)
        assert (len(of_one) - before[0], len(of_other) - before[1]) == (5, 5)


class Serving(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Always there."""

    async def Check(self, request: Any, context: Any) -> health_pb2.HealthCheckResponse:  # noqa: N802 (as the RPC)
        return ANSWER

    async def Watch(  # noqa: N802 (as the RPC)
        self, request: Any, context: Any
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        yield ANSWER


@asynccontextmanager
async def serving(port: int = 0) -> AsyncIterator[int]:
    """A server on that port, or on a free one; its port."""
    server = aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(Serving(), server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    yield port
    await server.stop(0)


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_first_call_after_a_restart_is_answered(streamed: bool) -> None:
    """Although the channel, which found nobody, has not connected again; a stream too, as no answer of it has come yet."""
    async with AsyncExitStack() as stack:
        async with serving() as port:
            through = await stack.enter_async_context(channel(f"127.0.0.1:{port}"))
            stub = health_pb2_grpc.HealthStub(through)
            assert await stub.Check(REQUEST, timeout=10) == ANSWER
        await eventually(lambda: through.get_state() is grpc.ChannelConnectivity.TRANSIENT_FAILURE, 10)
        async with serving(port):
            if streamed:
                assert [answer async for answer in stub.Watch(REQUEST, timeout=10)] == [ANSWER]
            else:
                assert await stub.Check(REQUEST, timeout=10) == ANSWER
