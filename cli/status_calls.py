"""The calls of `foldline status`, and those that go on after a restore."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grpc.aio import AioRpcError
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cli.calls import TIMEOUT_S, Refused, list_processes, plain, told, unary
from cli.channels import channel
from cli.endpoints import Endpoints
from foldline.v1 import (
    event_store_pb2,
    event_store_pb2_grpc,
    process_pb2,
    process_pb2_grpc,
    projection_pb2,
    projection_pb2_grpc,
)
from shared.rpc.client import bearer
from shared.rpc.status import from_rpc_error

BEYOND_THE_LINE = 2**62
ATTENTION_MAX = 20
ACCEPT_TIMEOUT_S = 60


async def status(endpoints: Endpoints) -> dict[str, Any]:
    """Whether the services serve, how long the line is, how far each consumer is, which processes need an operator.

    Never raises Refused: what does not answer is said in its place.
    """
    token = endpoints.token("operator")
    found: dict[str, Any] = {"line": None, "projections": [], "runners": []}
    async with channel(endpoints.write, retries=False) as write, channel(endpoints.read, retries=False) as read:
        found["services"] = [
            {"service": name, "address": address, "health": await health(connection)}
            for name, address, connection in (("write", endpoints.write, write), ("read", endpoints.read, read))
        ]
        try:
            found["line"] = await _line(write, token)
        except Refused as refused:
            found["line"] = {"error": told(refused.refusal)}
        try:
            stub = projection_pb2_grpc.ProjectionServiceStub(read)
            answer = await unary(stub.ListProjections, projection_pb2.ListProjectionsRequest(), token)
        except Refused as refused:
            found["projections_error"] = told(refused.refusal)
        else:
            found["projections"] = [placed(plain(projection), found["line"]) for projection in answer.projections]
    if endpoints.saga:
        await _processes(endpoints, found)
    return found


async def mark_restored(endpoints: Endpoints) -> dict[str, Any]:
    """Says that the line was restored; returns its former and its new epoch, and its head. Raises Refused."""
    token = endpoints.token("operator")
    async with channel(endpoints.write) as write:
        before = (await _line(write, token))["epoch"]
        stub = event_store_pb2_grpc.EventStoreServiceStub(write)
        answer = await unary(stub.MarkRestored, event_store_pb2.MarkRestoredRequest(epoch=before), token)
    return {"former_epoch": before, **plain(answer)}


async def accept_history(endpoints: Endpoints) -> dict[str, Any]:
    """Lets processes go on with the line as it is; returns what that came to. Raises Refused."""
    async with channel(endpoints.known_saga()) as saga:
        stub = process_pb2_grpc.ProcessServiceStub(saga)
        token, request = endpoints.token("operator"), process_pb2.AcceptHistoryRequest()
        return plain(await unary(stub.AcceptHistory, request, token, timeout_s=ACCEPT_TIMEOUT_S))


async def refill(endpoints: Endpoints, name: str) -> dict[str, Any]:
    """Lets a projection be emptied and filled from the line as it is; returns how it was, beside the line. Raises Refused."""
    token = endpoints.token("operator")
    async with channel(endpoints.write) as write, channel(endpoints.read) as read:
        stub = projection_pb2_grpc.ProjectionServiceStub(read)
        answer = await unary(stub.RefillProjection, projection_pb2.RefillProjectionRequest(name=name), token)
        return {"was": plain(answer.projection), "line": await _line(write, token)}


async def _line(write: Any, token: str) -> dict[str, Any]:
    stub = event_store_pb2_grpc.EventStoreServiceStub(write)
    request = event_store_pb2.ReadAllRequest(from_position=BEYOND_THE_LINE, events_max=1)
    call = stub.ReadAll(request, metadata=bearer(token), timeout=TIMEOUT_S)
    try:
        async for part in call:
            return {"shard": part.shard, "head_position": part.head_position, "epoch": part.epoch}
    except AioRpcError as error:
        raise Refused(from_rpc_error(error)) from None
    finally:
        call.cancel()
    raise RuntimeError("the event store answered nothing")  # against its contract


async def _processes(endpoints: Endpoints, found: dict[str, Any]) -> None:
    """Adds whether the saga service serves, how far processes are, and which ones an operator should look at."""
    async with channel(endpoints.saga, retries=False) as saga:
        found["services"].append({"service": "saga", "address": endpoints.saga, "health": await health(saga)})
        try:
            stub = process_pb2_grpc.ProcessServiceStub(saga)
            answer = await unary(stub.ListRunners, process_pb2.ListRunnersRequest(), endpoints.token("operator"))
            processes, more = await list_processes(endpoints, {"attention": True}, ATTENTION_MAX)
        except Refused as refused:
            found["processes_error"] = told(refused.refusal)
            return
    found["runners"] = [placed(plain(runner), found["line"]) for runner in answer.runners]
    found["deliveries"] = plain(answer.deliveries)
    found["attention"] = {"processes": processes, "more": more}


async def health(connection: Any) -> str:
    """`SERVING`, `NOT_SERVING`, or the reason why there is no answer."""
    try:
        answer = await health_pb2_grpc.HealthStub(connection).Check(health_pb2.HealthCheckRequest(), timeout=3)
    except AioRpcError as error:
        return from_rpc_error(error).reason
    name: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return name


def placed(consumer: dict[str, Any], line: Mapping[str, Any] | None) -> dict[str, Any]:
    """A consumer with its distance to the head of the line, in events: `lag` behind it, `ahead` of it; None if not known."""
    head = (line or {}).get("head_position")
    known = head is not None
    behind = head - consumer["position"] if known else 0
    return {**consumer, "lag": max(0, behind) if known else None, "ahead": max(0, -behind) if known else None}
