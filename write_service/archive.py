"""The RPCs that move aggregates to the archive and back. ROLES says which roles may call them."""

from __future__ import annotations

from typing import Any

from foldline.v1 import archive_pb2, archive_pb2_grpc
from shared.commands.boxes import StoredBox, list_boxes, newest_box
from shared.commands.boxing import Boxer
from shared.commands.bus import CommandBus
from shared.commands.registry import CommandRegistry
from shared.folds.errors import NotFound
from shared.folds.moments import timestamp_or_none
from shared.platform.clock import timestamp
from shared.platform.identity import Role, current_call
from shared.platform.postgres import Reads
from shared.rpc import pages
from shared.rpc.bounds import rules_broken
from write_service.registry import ADMINS

ROLES: dict[str, frozenset[Role]] = {
    "foldline.v1.ArchiveService/BoxAggregate": ADMINS,
    "foldline.v1.ArchiveService/UnboxAggregate": ADMINS,
    "foldline.v1.ArchiveService/ListBoxes": ADMINS,
    "foldline.v1.ArchiveService/VerifyBox": ADMINS,
}


class ArchiveService(archive_pb2_grpc.ArchiveServiceServicer):
    """foldline.v1.ArchiveService."""

    def __init__(self, boxer: Boxer, commands: CommandBus, reads: Reads, registry: CommandRegistry) -> None:
        self._boxer = boxer
        self._commands = commands
        self._reads = reads
        self._registry = registry

    async def BoxAggregate(self, request: archive_pb2.BoxAggregateRequest, context: Any) -> archive_pb2.BoxAggregateResponse:
        return archive_pb2.BoxAggregateResponse(receipt=self._commands.receipt(await self._boxer.box(request)))

    async def UnboxAggregate(
        self, request: archive_pb2.UnboxAggregateRequest, context: Any
    ) -> archive_pb2.UnboxAggregateResponse:
        return archive_pb2.UnboxAggregateResponse(receipt=self._commands.receipt(await self._boxer.unbox(request)))

    async def ListBoxes(self, request: archive_pb2.ListBoxesRequest, context: Any) -> archive_pb2.ListBoxesResponse:
        identity = current_call.get().identity
        if request.aggregate_id and not request.aggregate_type:
            raise rules_broken(("aggregate_type", "is needed with aggregate_id"))
        aggregate_id, size = request.aggregate_id.lower(), request.page_size or pages.SIZE_DEFAULT
        query = ("ListBoxes", identity.tenant, *sorted(identity.roles), request.aggregate_type, aggregate_id)
        keys = pages.decode(query, request.page_token, (int,))
        rows = await list_boxes(
            self._reads,
            identity.tenant,
            category=request.aggregate_type,
            aggregate_id=aggregate_id,
            hidden=self._registry.hidden_from(identity.roles),
            below=keys[0] if keys else 2**63 - 1,
            limit=size + 1,
        )
        shown, following = pages.cut(rows, size, query, lambda box: (box.box_id,))
        return archive_pb2.ListBoxesResponse(boxes=map(_box, shown), next_page_token=following)

    async def VerifyBox(self, request: archive_pb2.VerifyBoxRequest, context: Any) -> archive_pb2.VerifyBoxResponse:
        identity = current_call.get().identity
        self._registry.refuse_reading(request.aggregate_type, identity.roles)
        key = (identity.tenant, request.aggregate_type, request.aggregate_id.lower())
        _ = self._boxer.archive
        box = await newest_box(self._reads, key, request.version)
        if box is None or not box.location:
            raise NotFound("BOX_NOT_FOUND", "there is no such box")
        await self._boxer.verify(key, box)
        return archive_pb2.VerifyBoxResponse(box=_box(box))


def _box(box: StoredBox) -> archive_pb2.Box:
    return archive_pb2.Box(
        aggregate_type=box.category,
        aggregate_id=box.aggregate_id,
        version=box.version,
        location=box.location,
        events=box.version,
        boxed_at=timestamp(box.boxed_at),
        unboxed_at=timestamp_or_none(box.unboxed_at),
    )
