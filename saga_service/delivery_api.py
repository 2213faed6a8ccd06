"""The operators' RPCs for deliveries. Their roles are in `saga_service/api.py`."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from foldline.v1 import delivery_pb2, delivery_pb2_grpc
from shared.platform.clock import timestamp
from shared.platform.identity import current_call
from shared.processes.delivery_admin import DeliveryAdmin
from shared.processes.delivery_store import Delivery
from shared.rpc import pages

DELIVERY_STATUSES = {
    "pending": delivery_pb2.DELIVERY_STATUS_PENDING,
    "sent": delivery_pb2.DELIVERY_STATUS_SENT,
    "dead": delivery_pb2.DELIVERY_STATUS_DEAD,
    "discarded": delivery_pb2.DELIVERY_STATUS_DISCARDED,
}
DELIVERY_STATUS_OF = {status: text for text, status in DELIVERY_STATUSES.items()}


class DeliveryService(delivery_pb2_grpc.DeliveryServiceServicer):
    """foldline.v1.DeliveryService."""

    def __init__(self, admin: DeliveryAdmin) -> None:
        self._admin = admin

    async def GetDelivery(self, request: delivery_pb2.GetDeliveryRequest, context: Any) -> delivery_pb2.GetDeliveryResponse:
        found = await self._admin.get(UUID(request.delivery_id))
        return delivery_pb2.GetDeliveryResponse(delivery=_delivery(found), content_json=found.content)

    async def ListDeliveries(
        self, request: delivery_pb2.ListDeliveriesRequest, context: Any
    ) -> delivery_pb2.ListDeliveriesResponse:
        wanted, size = request.filter, request.page_size or pages.SIZE_DEFAULT
        status = DELIVERY_STATUS_OF.get(wanted.status, "")
        query = ("ListDeliveries", wanted.tenant, status)
        before = pages.decode(query, request.page_token, (int,))
        rows = await self._admin.find(size + 1, before[0] if before else None, tenant=wanted.tenant, status=status)
        shown, following = pages.cut(rows, size, query, lambda row: (row.number,))
        return delivery_pb2.ListDeliveriesResponse(deliveries=map(_delivery, shown), next_page_token=following)

    async def RetryDelivery(self, request: delivery_pb2.RetryDeliveryRequest, context: Any) -> delivery_pb2.RetryDeliveryResponse:
        found = await self._admin.retry(UUID(request.delivery_id))
        return delivery_pb2.RetryDeliveryResponse(deliveries=map(_delivery, found))

    async def DiscardDelivery(
        self, request: delivery_pb2.DiscardDeliveryRequest, context: Any
    ) -> delivery_pb2.DiscardDeliveryResponse:
        user_id = current_call.get().identity.user_id
        found = await self._admin.discard(UUID(request.delivery_id), request.reason, user_id)
        return delivery_pb2.DiscardDeliveryResponse(delivery=_delivery(found))


def _delivery(row: Delivery) -> delivery_pb2.DeliverySummary:
    waits = row.status == "pending" and not row.sending
    return delivery_pb2.DeliverySummary(
        delivery_id=str(row.delivery_id),
        tenant=row.tenant,
        name=row.name,
        channel=row.channel,
        recipient=row.recipient,
        status=DELIVERY_STATUSES[row.status],
        sending=row.sending,
        tries=row.tries,
        last_error=row.last_error,
        created_at=timestamp(row.created_at),
        due_at=timestamp(row.due_at) if waits else None,
        ended_at=None if row.ended_at is None else timestamp(row.ended_at),
        order_key=row.order_key,
        source=row.source,
        correlation_id=row.correlation_id,
    )
