"""The query RPCs that are more than a summary (`registry.RPCS`): an account's statement, and the projections for operators.

ROLES says who may call them; the tenant is always that of the caller's token.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Collection, Mapping
from typing import Any

from bank.v1 import account_query_pb2
from foldline.v1 import projection_pb2, projection_pb2_grpc
from read_service.projections.accounts import AccountRow, movement_view
from read_service.registry import CALLERS
from read_service.statement import FILTERS, Place, cut, statement_query
from shared.folds.errors import NotFound, Rejected
from shared.line.standing import Standing, State, read_standings
from shared.platform.clock import timestamp
from shared.platform.identity import Role, current_call
from shared.platform.leader import LockClass
from shared.platform.postgres import Reads, one
from shared.platform.telemetry import logger
from shared.projections.admin import Outcome, ParkedAdmin, ParkedRow
from shared.projections.filtering import conditions_of
from shared.projections.masks import mask_of, only
from shared.projections.rebuild import serving
from shared.projections.rebuild_admin import ENDED, RebuildAdmin, RebuildRow
from shared.projections.summary import SummaryServicer, in_tenant, tell_stale, tenant
from shared.rpc import pages

OPERATORS = frozenset({Role.OPERATOR})

log = logger(__name__)

ROLES: Mapping[str, frozenset[Role]] = {
    "bank.v1.AccountQueryService/ListMovements": CALLERS,
    "foldline.v1.ProjectionService/ListProjections": OPERATORS,
    "foldline.v1.ProjectionService/RefillProjection": OPERATORS,
    **{
        f"foldline.v1.ProjectionService/{rpc}": OPERATORS
        for rpc in ("StartRebuild", "WatchRebuild", "SwitchRebuild", "CancelRebuild", "DropFormer")
    },
    "foldline.v1.ProjectionService/GetForgottenTenant": OPERATORS,
    "foldline.v1.ProjectionService/ListParked": OPERATORS,
    "foldline.v1.ProjectionService/GetParked": OPERATORS,
    "foldline.v1.ProjectionService/RetryParked": OPERATORS,
    "foldline.v1.ProjectionService/DiscardParked": OPERATORS,
}

STATES = {
    State.RUNNING: projection_pb2.PROJECTION_STATE_RUNNING,
    State.STOPPED: projection_pb2.PROJECTION_STATE_STOPPED,
    State.DIVERGED: projection_pb2.PROJECTION_STATE_DIVERGED,
    State.AWAY: projection_pb2.PROJECTION_STATE_AWAY,
}

REBUILD_STATES = {
    "asked": projection_pb2.REBUILD_STATE_ASKED,
    "filling": projection_pb2.REBUILD_STATE_FILLING,
    "waiting": projection_pb2.REBUILD_STATE_WAITING,
    "switching": projection_pb2.REBUILD_STATE_SWITCHING,
    "switched": projection_pb2.REBUILD_STATE_SWITCHED,
    "cancelling": projection_pb2.REBUILD_STATE_ENDING,
    "dropping": projection_pb2.REBUILD_STATE_ENDING,
}
PROGRESS_S = 0.25
WATCH_REBUILD = "foldline.v1.ProjectionService/WatchRebuild"


class AccountQueryService(SummaryServicer[AccountRow]):
    """bank.v1.AccountQueryService: the summary, and the statement of an account."""

    async def ListMovements(
        self, request: account_query_pb2.ListMovementsRequest, context: Any
    ) -> account_query_pb2.ListMovementsResponse:
        account_id, size = request.account_id.lower(), request.page_size or pages.SIZE_DEFAULT
        mask = mask_of(request, account_query_pb2.Movement.DESCRIPTOR)
        found, bound = conditions_of(FILTERS, request.filter)
        oldest_first = request.order_by == "moved_at"
        as_of = [request.as_of] if request.HasField("as_of") else []
        asked = (str(oldest_first), *bound, *(then.SerializeToString().hex() for then in as_of))
        query = ("ListMovements", tenant(), account_id, *asked)
        keys = pages.decode(query, request.page_token, (int, int))
        after = Place(*keys or (0, 0))
        await self.gate.wait(request.consistency_token, tenant(), context.time_remaining())
        if keys is None and as_of:
            # Movements never change, so those of then are those of now up to a version, as soon as the tables have them all.
            row, origin, _ = await self.existed(account_id, request.as_of, context)
            await self.gate.wait(origin.token, tenant(), context.time_remaining())
            after = Place(0, row.version + 1)
        sql, values = statement_query(account_id, found, after, size + 1, oldest_first=oldest_first)
        rows = await in_tenant(self.reads, tenant(), sql, values)
        stale = await self.is_stale(account_id) if rows else (await self.existing(account_id)).stale
        if stale:
            tell_stale(context)
        shown, following = cut(rows, size, query, after.below)
        return account_query_pb2.ListMovementsResponse(
            movements=[only(mask, movement_view(row)) for row in shown], next_page_token=following, stale=stale
        )


class ProjectionService(projection_pb2_grpc.ProjectionServiceServicer):
    """foldline.v1.ProjectionService."""

    def __init__(self, reads: Reads, shard: int, names: Collection[str]) -> None:
        """`names` are those of the groups of tables."""
        self._reads = reads
        self._shard = shard
        self._names = names
        self._parked = ParkedAdmin(reads, shard)
        self._rebuilds = RebuildAdmin(reads, shard, names)

    async def ListProjections(
        self, request: projection_pb2.ListProjectionsRequest, context: Any
    ) -> projection_pb2.ListProjectionsResponse:
        async with self._reads.connection() as connection:
            serve = [await serving(connection, name, self._shard) for name in self._names]
            found = await read_standings(connection, LockClass.PROJECTOR, self._shard, serve)
        parked = await self._parked.counts()
        shown = [_projection(standing, parked.get(standing.name, 0)) for standing in found]
        return projection_pb2.ListProjectionsResponse(projections=shown)

    async def RefillProjection(
        self, request: projection_pb2.RefillProjectionRequest, context: Any
    ) -> projection_pb2.RefillProjectionResponse:
        if request.name not in self._names:
            raise NotFound("PROJECTION_NOT_FOUND", f"there is no projection {request.name}")
        async with self._reads.connection() as connection:
            name = await serving(connection, request.name, self._shard)
            [found] = await read_standings(connection, LockClass.PROJECTOR, self._shard, (name,))
            (asked,) = await one(connection, "SELECT ask_refill(%s, %s)", (name, self._shard))
        if not asked:
            raise Rejected("NOT_DIVERGED", "the projection follows the line, or stopped for another reason: see its state")
        log.warning("refill_asked", projection=request.name, user_id=current_call.get().identity.user_id)
        return projection_pb2.RefillProjectionResponse(projection=_projection(found))

    async def StartRebuild(
        self, request: projection_pb2.StartRebuildRequest, context: Any
    ) -> projection_pb2.StartRebuildResponse:
        user_id = _noted("start", request.name)
        row = await self._rebuilds.start(request.name, only_if_same=request.only_if_same, user_id=user_id)
        return projection_pb2.StartRebuildResponse(rebuild=_rebuild(request.name, row))

    async def WatchRebuild(
        self, request: projection_pb2.WatchRebuildRequest, context: Any
    ) -> AsyncIterator[projection_pb2.WatchRebuildResponse]:
        before, read_at, rate = None, 0.0, 0.0
        while True:
            row, now = await self._rebuilds.get(request.name), time.monotonic()
            if before is not None:
                rate = max(0, row.position - before) / (now - read_at)
            before, read_at = row.position, now
            yield projection_pb2.WatchRebuildResponse(rebuild=_rebuild(request.name, row, rate))
            if row.state in ENDED:
                return
            await asyncio.sleep(PROGRESS_S)

    async def SwitchRebuild(
        self, request: projection_pb2.SwitchRebuildRequest, context: Any
    ) -> projection_pb2.SwitchRebuildResponse:
        _noted("switch", request.name)
        row = await self._rebuilds.switch(request.name)
        return projection_pb2.SwitchRebuildResponse(rebuild=_rebuild(request.name, row))

    async def CancelRebuild(
        self, request: projection_pb2.CancelRebuildRequest, context: Any
    ) -> projection_pb2.CancelRebuildResponse:
        _noted("cancel", request.name)
        row = await self._rebuilds.cancel(request.name)
        return projection_pb2.CancelRebuildResponse(rebuild=_rebuild(request.name, row))

    async def DropFormer(self, request: projection_pb2.DropFormerRequest, context: Any) -> projection_pb2.DropFormerResponse:
        _noted("drop", request.name)
        row = await self._rebuilds.drop(request.name)
        return projection_pb2.DropFormerResponse(rebuild=_rebuild(request.name, row))

    async def GetForgottenTenant(
        self, request: projection_pb2.GetForgottenTenantRequest, context: Any
    ) -> projection_pb2.GetForgottenTenantResponse:
        async with self._reads.connection() as connection:
            cursor = await connection.execute("SELECT * FROM forgotten_rows(%s, %s)", (self._shard, request.tenant))
            return projection_pb2.GetForgottenTenantResponse(rows=dict(await cursor.fetchall()))

    async def ListParked(self, request: projection_pb2.ListParkedRequest, context: Any) -> projection_pb2.ListParkedResponse:
        size, wanted = request.page_size or pages.SIZE_DEFAULT, request.filter
        query = ("ListParked", wanted.projection, wanted.tenant)
        after = pages.decode(query, request.page_token, (int, str))
        try:
            rows = await self._parked.find(wanted.projection, wanted.tenant, None if after is None else (*after,), size + 1)
        except ValueError:
            raise pages.invalid("is not a page token") from None
        shown, following = pages.cut(rows, size, query, lambda row: (row.parked_at_us, str(row.parked_id)))
        return projection_pb2.ListParkedResponse(parked=map(_parked, shown), next_page_token=following)

    async def GetParked(self, request: projection_pb2.GetParkedRequest, context: Any) -> projection_pb2.GetParkedResponse:
        parked, events = await self._parked.get(request.parked_id)
        shown = [projection_pb2.ParkedEvent(position=at, event_id=event_id, type=type_) for at, event_id, type_ in events]
        return projection_pb2.GetParkedResponse(parked=_parked(parked), events=shown)

    async def RetryParked(self, request: projection_pb2.RetryParkedRequest, context: Any) -> projection_pb2.RetryParkedResponse:
        done = await self._ask(request.parked_id, "retry", context)
        return projection_pb2.RetryParkedResponse(
            released=done.parked is None, parked=done.parked and _parked(done.parked), applied=done.applied
        )

    async def DiscardParked(
        self, request: projection_pb2.DiscardParkedRequest, context: Any
    ) -> projection_pb2.DiscardParkedResponse:
        done = await self._ask(request.parked_id, "discard", context, all_events=request.all)
        return projection_pb2.DiscardParkedResponse(
            released=done.parked is None,
            parked=done.parked and _parked(done.parked),
            applied=done.applied,
            skipped=done.skipped,
            skipped_events=[projection_pb2.ParkedEvent(**event) for event in done.skipped_events],
        )

    async def _ask(self, parked_id: str, action: str, context: Any, *, all_events: bool = False) -> Outcome:
        """Has an operator's request carried out, and logs who asked for what."""
        user_id = current_call.get().identity.user_id
        log.warning("parked_asked", action=action, parked_id=parked_id, all_events=all_events, user_id=user_id)
        within_s = context.time_remaining()
        return await self._parked.ask(parked_id, action, all_events=all_events, user_id=user_id, within_s=within_s)


def _noted(action: str, projection: str) -> str:
    """Logs what an operator asks of a rebuild; returns who that is."""
    user_id = current_call.get().identity.user_id
    log.warning("rebuild_asked", action=action, projection=projection, user_id=user_id)
    return user_id


def _rebuild(name: str, row: RebuildRow, rate: float = 0.0) -> projection_pb2.Rebuild:
    made = projection_pb2.Rebuild(
        name=name,
        version=row.version,
        state=REBUILD_STATES[row.state],
        position=row.position,
        target_position=row.target_position,
        events_per_s=rate,
        left_s=max(0, row.target_position - row.position) / rate if rate else 0.0,
        reason=row.reason,
        parked=row.parked,
        asked_by=row.asked_by,
        started_at=None if row.started_at is None else timestamp(row.started_at),
        ended_at=None if row.ended_at is None else timestamp(row.ended_at),
    )
    if row.compared_at is not None:
        made.diff.position = row.compared_at
        made.diff.rows_before, made.diff.rows_after = row.rows_before or 0, row.rows_after or 0
        made.diff.rows_differing = row.rows_differing or 0
        made.diff.rows.extend(projection_pb2.DifferentRow(**each) for each in row.different_rows)  # type: ignore[arg-type]
    return made


def _parked(row: ParkedRow) -> projection_pb2.ParkedKey:
    return projection_pb2.ParkedKey(
        parked_id=str(row.parked_id),
        projection=row.consumer,
        shard=row.shard,
        tenant=row.tenant,
        table=row.table,
        key=map(str, json.loads(row.key)),
        error=row.error,
        behind_parked_id="" if row.behind is None else str(row.behind),
        parked_at=timestamp(row.parked_at),
        events=row.events,
    )


def _projection(standing: Standing, parked: int = 0) -> projection_pb2.ProjectionStatus:
    return projection_pb2.ProjectionStatus(
        name=standing.name.partition("@")[0],
        version=int(standing.name.partition("@")[2] or 1),
        shard=standing.shard,
        epoch=standing.checkpoint.epoch,
        position=standing.checkpoint.position,
        state=STATES[standing.state],
        reason=standing.reason,
        moved_at=None if standing.moved_at is None else timestamp(standing.moved_at),
        parked=parked,
    )
