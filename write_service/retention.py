"""The RPCs of retention. ROLES says which roles may call them, beside SetRetention, which is a command (`registry.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from foldline.v1 import command_pb2, retention_pb2, retention_pb2_grpc
from shared.commands import retention, retention_plan
from shared.commands.boxing import Boxer
from shared.commands.bus import CommandBus
from shared.commands.registry import CommandRegistry
from shared.commands.retention import NO_RULE, Rule
from shared.commands.retention_plan import Planned, PlannedPurge, Purges
from shared.commands.retention_sweeper import BOX, PURGE
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
        self,
        commands: CommandBus,
        boxer: Boxer,
        purges: Purges,
        reads: Reads,
        registry: CommandRegistry,
        *,
        clock: Callable[[], datetime],
    ) -> None:
        self._commands = commands
        self._boxer = boxer
        self._purges = purges
        self._reads = reads
        self._registry = registry
        self._clock = clock

    async def SetRetention(self, request: retention_pb2.SetRetentionRequest, context: Any) -> command_pb2.CommandReceipt:
        return await self._commands.send(request)

    async def ListRetention(
        self, request: retention_pb2.ListRetentionRequest, context: Any
    ) -> retention_pb2.ListRetentionResponse:
        rules = await retention.current(self._registry, self._reads, current_call.get().identity.tenant)
        shown = [
            retention_pb2.RetentionRule(
                aggregate_type=type_, box_after_days=rule.box_after_days, purge_after_days=rule.purge_after_days
            )
            for type_, rule in sorted(rules.items())
        ]
        return retention_pb2.ListRetentionResponse(rules=shown)

    async def PlanRetention(
        self, request: retention_pb2.PlanRetentionRequest, context: Any
    ) -> retention_pb2.PlanRetentionResponse:
        tenant = current_call.get().identity.tenant
        asked = Rule(box_after_days=request.box_after_days, purge_after_days=request.purge_after_days)
        if asked != NO_RULE and not request.aggregate_type:
            raise rules_broken(("aggregate_type", "is needed with box_after_days or purge_after_days"))
        if request.aggregate_type:
            retention.refuse_rule(self._registry, request.aggregate_type, asked)
        days_asked = (str(asked.box_after_days), str(asked.purge_after_days))
        query = ("PlanRetention", tenant, request.aggregate_type, *days_asked)
        begin, after = _place(pages.decode(query, request.page_token, (str, str, str)))
        rules = dict(await retention.current(self._registry, self._reads, tenant))
        if request.aggregate_type:
            one = asked if asked != NO_RULE else rules.get(request.aggregate_type, NO_RULE)
            rules = {request.aggregate_type: one}
        left = sorted(turn for turn in _turns(rules) if turn[:2] >= begin)
        answer = retention_pb2.PlanRetentionResponse()
        if not left:
            return answer
        (category, kind, days), *more = left
        behind = after if (category, kind) == begin else ""
        bounds: dict[str, Any] = {
            "after": behind,
            "examined": EXAMINED,
            "found_max": request.page_size or pages.SIZE_DEFAULT,
        }
        if kind == BOX:
            boxes = await retention_plan.plan(self._boxer, self._reads, tenant, category, days, self._clock(), **bounds)
            answer.boxes.extend(map(_shown, boxes.planned))
            last = boxes.after
        else:
            purges = await self._purges.plan(tenant, category, days, self._clock(), **bounds)
            answer.purges.extend(map(_purge_shown, purges.planned))
            last = purges.after
        if last:
            answer.next_page_token = pages.encode(query, (category, kind, last))
        elif more:
            answer.next_page_token = pages.encode(query, (*more[0][:2], ""))
        return answer


def _turns(rules: Mapping[str, Rule]) -> Iterator[tuple[str, str, int]]:
    """Type, kind and days of all that the rules say."""
    for type_, rule in rules.items():
        if rule.box_after_days:
            yield type_, BOX, rule.box_after_days
        if rule.purge_after_days:
            yield type_, PURGE, rule.purge_after_days


def _place(token: Sequence[Any] | None) -> tuple[tuple[str, str], str]:
    """Type and kind at which a page begins, and the aggregate that it begins behind."""
    category, kind, after = token or ("", "", "")
    return (category, kind), after


def _shown(planned: Planned) -> retention_pb2.PlannedBox:
    return retention_pb2.PlannedBox(
        aggregate_type=planned.key[1],
        aggregate_id=planned.key[2],
        version=planned.version,
        changed_at=timestamp(planned.changed_at),
        parts=planned.parts,
        held_by=planned.held_by,
    )


def _purge_shown(planned: PlannedPurge) -> retention_pb2.PlannedPurge:
    return retention_pb2.PlannedPurge(
        aggregate_type=planned.key[1],
        aggregate_id=planned.key[2],
        version=planned.version,
        changed_at=timestamp(planned.changed_at),
        parts=map(_purge_shown, planned.parts),
        held_by=planned.held_by,
    )
