"""The calls behind `foldline parked`. Every function returns plain data, as `-o json` prints it."""

from __future__ import annotations

from typing import Any

from cli.calls import listed, plain, unary
from cli.channels import channel
from cli.endpoints import Endpoints
from foldline.v1 import projection_pb2, projection_pb2_grpc

TIMEOUT_S = 30


async def find(endpoints: Endpoints, projection: str, tenant: str, limit: int) -> tuple[list[dict[str, Any]], bool]:
    """Parked keys, the oldest first, and whether there are more than `limit`. Raises Refused."""
    wanted = projection_pb2.ParkedFilter(projection=projection, tenant=tenant)
    request = projection_pb2.ListParkedRequest(filter=wanted)
    async with channel(endpoints.read) as read:
        stub = projection_pb2_grpc.ProjectionServiceStub(read)
        return await listed(lambda: unary(stub.ListParked, request, endpoints.token("operator")), request, "parked", limit)


async def get(endpoints: Endpoints, parked_id: str) -> dict[str, Any]:
    """A parked key with the events that wait. Raises Refused."""
    async with channel(endpoints.read) as read:
        stub = projection_pb2_grpc.ProjectionServiceStub(read)
        return plain(
            await unary(stub.GetParked, projection_pb2.GetParkedRequest(parked_id=parked_id), endpoints.token("operator"))
        )


async def retry(endpoints: Endpoints, parked_id: str) -> dict[str, Any]:
    """Has the events of a key folded again. Raises Refused."""
    request = projection_pb2.RetryParkedRequest(parked_id=parked_id)
    async with channel(endpoints.read, retries=False) as read:
        stub = projection_pb2_grpc.ProjectionServiceStub(read)
        return plain(await unary(stub.RetryParked, request, endpoints.token("operator"), timeout_s=TIMEOUT_S))


async def discard(endpoints: Endpoints, parked_id: str, *, all_events: bool) -> dict[str, Any]:
    """Has the first event of a key skipped, or all. Raises Refused."""
    request = projection_pb2.DiscardParkedRequest(parked_id=parked_id, all=all_events)
    async with channel(endpoints.read, retries=False) as read:
        stub = projection_pb2_grpc.ProjectionServiceStub(read)
        return plain(await unary(stub.DiscardParked, request, endpoints.token("operator"), timeout_s=TIMEOUT_S))
