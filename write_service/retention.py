"""The RPCs of retention. ROLES says which roles may call them, beside SetRetention, which is a command (`registry.py`)."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from foldline.v1 import command_pb2, retention_pb2, retention_pb2_grpc
from shared.commands import retention
from shared.commands.boxing import Boxer
from shared.commands.bus import CommandBus
from shared.commands.registry import CommandRegistry
from shared.commands.retention import Planned
from shared.platform.clock import timestamp
from shared.platform.identity import Role, current_call
from shared.platform.postgres import Reads
from shared.rpc import pages
from shared.rpc.bounds import rules_broken
from write_service.registry import ADMINS

ROLES: dict[str, frozenset[Role]] = {
    "foldline.v1.RetentionService/ListRetention": ADMINS,
    "foldline.v1.RetentionService/PlanRetention": ADMINS,
}

EXAMINED = 1000
"""Aggregates that a page of a plan looks at."""


class RetentionService(retention_pb2_grpc.RetentionServiceServicer):
    """foldline.v1.RetentionService."""

    def __init__(
        self, commands: CommandBus, boxer: Boxer, reads: Reads, registry: CommandRegistry, *, clock: Callable[[], datetime]
    ) -> None:
        self._commands = commands
        self._boxer = boxer
        self._reads = reads
        self._registry = registry
        self._clock = clock

    async def SetRetention(self, request: retention_pb2.SetRetentionRequest, context: Any) -> command_pb2.CommandReceipt:
        return await self._commands.send(request)

    async def ListRetention(
        self, request: retention_pb2.ListRetentionRequest, context: Any
    ) -> retention_pb2.ListRetentionResponse:
        rules = await retention.current(self._registry, self._reads, current_call.get().identity.tenant)
        shown = [retention_pb2.RetentionRule(aggregate_type=type_, box_after_days=days) for type_, days in sorted(rules.items())]
        return retention_pb2.ListRetentionResponse(rules=shown)

    async def PlanRetention(
        self, request: retention_pb2.PlanRetentionRequest, context: Any
    ) -> retention_pb2.PlanRetentionResponse:
        tenant = current_call.get().identity.tenant
        if request.box_after_days and not request.aggregate_type:
            raise rules_broken(("aggregate_type", "is needed with box_after_days"))
        if request.aggregate_type:
            retention.refuse_type(self._registry, request.aggregate_type)
        query = ("PlanRetention", tenant, request.aggregate_type, str(request.box_after_days))
        category, after = pages.decode(query, request.page_token, (str, str)) or ("", "")
        rules = dict(await retention.current(self._registry, self._reads, tenant))
        if request.aggregate_type:
            days = request.box_after_days or rules.get(request.aggregate_type, 0)
            rules = {request.aggregate_type: days} if days else {}
        left = sorted(each for each in rules if each >= category)
        answer = retention_pb2.PlanRetentionResponse()
        if not left:
            return answer
        page = await retention.plan(
            self._boxer,
            self._reads,
            tenant,
            left[0],
            rules[left[0]],
            self._clock(),
            after=after if left[0] == category else "",
            examined=EXAMINED,
            found_max=request.page_size or pages.SIZE_DEFAULT,
        )
        answer.boxes.extend(map(_shown, page.planned))
        if page.after:
            answer.next_page_token = pages.encode(query, (left[0], page.after))
        elif left[1:]:
            answer.next_page_token = pages.encode(query, (left[1], ""))
        return answer


def _shown(planned: Planned) -> retention_pb2.PlannedBox:
    return retention_pb2.PlannedBox(
        aggregate_type=planned.key[1],
        aggregate_id=planned.key[2],
        version=planned.version,
        changed_at=timestamp(planned.changed_at),
        parts=planned.parts,
        held_by=planned.held_by,
    )
