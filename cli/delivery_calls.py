"""The calls behind `foldline delivery`. Every function returns plain data, as `-o json` prints it."""

from __future__ import annotations

import json
from typing import Any

from cli.calls import listed, plain, unary
from cli.channels import channel
from cli.endpoints import Endpoints
from foldline.v1 import delivery_pb2, delivery_pb2_grpc


async def find(endpoints: Endpoints, tenant: str, status: str, limit: int) -> tuple[list[dict[str, Any]], bool]:
    """Deliveries, the newest first, and whether there are more than `limit`. Raises Refused."""
    wanted = delivery_pb2.DeliveryFilter(
        tenant=tenant, status=delivery_pb2.DeliveryStatus.Value(f"DELIVERY_STATUS_{status or 'UNSPECIFIED'}")
    )
    request = delivery_pb2.ListDeliveriesRequest(filter=wanted)
    async with channel(endpoints.known_saga()) as saga:
        stub = delivery_pb2_grpc.DeliveryServiceStub(saga)
        return await listed(
            lambda: unary(stub.ListDeliveries, request, endpoints.token("operator")), request, "deliveries", limit
        )


async def get(endpoints: Endpoints, delivery_id: str) -> dict[str, Any]:
    """A delivery with its message. Raises Refused."""
    async with channel(endpoints.known_saga()) as saga:
        request = delivery_pb2.GetDeliveryRequest(delivery_id=delivery_id)
        answer = await unary(delivery_pb2_grpc.DeliveryServiceStub(saga).GetDelivery, request, endpoints.token("operator"))
    return {"delivery": plain(answer.delivery), "content": json.loads(answer.content_json)}


async def retry(endpoints: Endpoints, *delivery_ids: str) -> list[dict[str, Any]]:
    """Sends deliveries at once. Raises Refused."""
    found: list[dict[str, Any]] = []
    async with channel(endpoints.known_saga()) as saga:
        stub = delivery_pb2_grpc.DeliveryServiceStub(saga)
        for delivery_id in delivery_ids:
            request = delivery_pb2.RetryDeliveryRequest(delivery_id=delivery_id)
            answer = await unary(stub.RetryDelivery, request, endpoints.token("operator"))
            found += map(plain, answer.deliveries)
    return found


async def retry_dead(endpoints: Endpoints, tenant: str) -> list[dict[str, Any]]:
    """Sends all dead deliveries at once, the oldest first; one whose fold still fails stops it. Raises Refused."""
    dead, _ = await find(endpoints, tenant, "DEAD", 100_000)
    return await retry(endpoints, *(one["delivery_id"] for one in reversed(dead)))


async def discard(endpoints: Endpoints, delivery_id: str, reason: str) -> dict[str, Any]:
    """Gives a delivery up. Raises Refused."""
    async with channel(endpoints.known_saga()) as saga:
        request = delivery_pb2.DiscardDeliveryRequest(delivery_id=delivery_id, reason=reason)
        answer = await unary(delivery_pb2_grpc.DeliveryServiceStub(saga).DiscardDelivery, request, endpoints.token("operator"))
    return plain(answer.delivery)
