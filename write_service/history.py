"""The RPCs that show what an aggregate is and was. ROLES says which roles may call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from foldline.v1 import history_pb2, history_pb2_grpc
from shared.commands import history
from shared.commands.registry import CommandRegistry
from shared.line.event_store import AggregateKey
from shared.platform.fairness import Room
from shared.platform.identity import Role, current_call
from shared.platform.postgres import Reads
from write_service.registry import ADMINS, CALLERS

ROLES: dict[str, frozenset[Role]] = {
    "foldline.v1.HistoryService/DescribeAggregate": CALLERS,
    "foldline.v1.HistoryService/GetAggregate": CALLERS,
    "foldline.v1.HistoryService/DiffAggregate": CALLERS,
}

PERSONAL = ADMINS
"""Who sees the personal fields of a state."""


class _Named(Protocol):
    """A request about one aggregate."""

    aggregate_type: str
    aggregate_id: str


class HistoryService(history_pb2_grpc.HistoryServiceServicer):
    """foldline.v1.HistoryService."""

    def __init__(self, reads: Reads, registry: CommandRegistry, is_cached: Callable[[AggregateKey], bool]) -> None:
        self._reads = reads
        self._registry = registry
        self._is_cached = is_cached
        self._room = Room()

    async def DescribeAggregate(
        self, request: history_pb2.DescribeAggregateRequest, context: Any
    ) -> history_pb2.DescribeAggregateResponse:
        key, _ = self._allowed(request)
        return await history.describe(self._registry, self._reads, key, cached=self._is_cached(key))

    async def GetAggregate(self, request: history_pb2.GetAggregateRequest, context: Any) -> history_pb2.GetAggregateResponse:
        key, personal = self._allowed(request)
        return await history.get(self._registry, self._reads, self._room, key, request, personal=personal)

    async def DiffAggregate(self, request: history_pb2.DiffAggregateRequest, context: Any) -> history_pb2.DiffAggregateResponse:
        key, personal = self._allowed(request)
        versions = request.from_version, request.to_version
        return await history.diff(self._registry, self._reads, self._room, key, *versions, personal=personal)

    def _allowed(self, request: _Named) -> tuple[AggregateKey, bool]:
        """The aggregate, and whether the caller may see what is personal. Raises Forbidden (ROLE_MISSING)."""
        identity = current_call.get().identity
        self._registry.refuse_reading(request.aggregate_type, identity.roles)
        key = (identity.tenant, request.aggregate_type, request.aggregate_id.lower())
        return key, not PERSONAL.isdisjoint(identity.roles)
