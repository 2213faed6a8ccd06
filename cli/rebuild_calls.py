"""The calls behind `foldline projection rebuild` and its like. Every function returns plain data, as `-o json` prints it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from grpc.aio import AioRpcError

from cli.calls import Refused, plain, unary
from cli.channels import channel
from cli.endpoints import Endpoints
from foldline.v1 import projection_pb2, projection_pb2_grpc
from shared.rpc.client import bearer
from shared.rpc.status import from_rpc_error


async def start(endpoints: Endpoints, name: str, *, only_if_same: bool) -> dict[str, Any]:
    """Starts a rebuild. Raises Refused."""
    request = projection_pb2.StartRebuildRequest(name=name, only_if_same=only_if_same)
    async with channel(endpoints.read, retries=False) as read:
        stub = projection_pb2_grpc.ProjectionServiceStub(read)
        return plain((await unary(stub.StartRebuild, request, endpoints.token("operator"))).rebuild)


async def follow(endpoints: Endpoints, name: str) -> AsyncIterator[dict[str, Any]]:
    """How far a rebuild is, until it has switched or waits for an operator. Raises Refused."""
    async with channel(endpoints.read) as read:
        stub = projection_pb2_grpc.ProjectionServiceStub(read)
        call = stub.WatchRebuild(projection_pb2.WatchRebuildRequest(name=name), metadata=bearer(endpoints.token("operator")))
        try:
            async for answer in call:
                yield plain(answer.rebuild)
        except AioRpcError as error:
            raise Refused(from_rpc_error(error)) from None
        finally:
            call.cancel()


async def steer(endpoints: Endpoints, action: str, name: str) -> dict[str, Any]:
    """Carries out `switch`, `cancel` or `drop` on the rebuild of a projection. Raises Refused."""
    async with channel(endpoints.read, retries=False) as read:
        stub = projection_pb2_grpc.ProjectionServiceStub(read)
        rpcs: dict[str, tuple[Any, Any]] = {
            "switch": (stub.SwitchRebuild, projection_pb2.SwitchRebuildRequest),
            "cancel": (stub.CancelRebuild, projection_pb2.CancelRebuildRequest),
            "drop": (stub.DropFormer, projection_pb2.DropFormerRequest),
        }
        method, kind = rpcs[action]
        return plain((await unary(method, kind(name=name), endpoints.token("operator"))).rebuild)
