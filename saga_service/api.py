"""The operators' RPCs: processes and deliveries. ROLES says who may call them: operators see and steer those of all tenants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from google.rpc import status_pb2

from foldline.v1 import delivery_pb2, delivery_pb2_grpc, process_pb2, process_pb2_grpc
from shared.line.standing import Standing, State
from shared.platform.clock import timestamp
from shared.platform.identity import Role, current_call
from shared.platform.telemetry import logger
from shared.processes.admin import Case, Place, ProcessAdmin
from shared.processes.delivery_admin import DeliveryAdmin
from shared.processes.delivery_store import Delivery
from shared.processes.history import LostCommand, Revised
from shared.processes.records import HistoryEntry, Process, ProcessStatus
from shared.rpc import pages

OPERATORS = frozenset({Role.OPERATOR})
# So many of each are told when a history is accepted; the totals say how many there are.
REVISED_MAX = 1000
# The first microsecond since 1970 that no calendar has.
STARTED_US_MAX = 253_402_300_800_000_000

log = logger(__name__)

ROLES: Mapping[str, frozenset[Role]] = {
    "foldline.v1.ProcessService/GetProcess": OPERATORS,
    "foldline.v1.ProcessService/ListProcesses": OPERATORS,
    "foldline.v1.ProcessService/RetryProcess": OPERATORS,
    "foldline.v1.ProcessService/CancelProcess": OPERATORS,
    "foldline.v1.ProcessService/ListRunners": OPERATORS,
    "foldline.v1.ProcessService/AcceptHistory": OPERATORS,
    "foldline.v1.DeliveryService/GetDelivery": OPERATORS,
    "foldline.v1.DeliveryService/ListDeliveries": OPERATORS,
    "foldline.v1.DeliveryService/RetryDelivery": OPERATORS,
    "foldline.v1.DeliveryService/DiscardDelivery": OPERATORS,
}

STATUSES = {
    ProcessStatus.RUNNING: process_pb2.PROCESS_STATUS_RUNNING,
    ProcessStatus.ENDED: process_pb2.PROCESS_STATUS_ENDED,
    ProcessStatus.PARKED: process_pb2.PROCESS_STATUS_PARKED,
    ProcessStatus.UNDONE: process_pb2.PROCESS_STATUS_UNDONE,
}
STATUS_OF = {status: str(text) for text, status in STATUSES.items()}
RUNNER_STATES = {
    State.RUNNING: process_pb2.RUNNER_STATE_RUNNING,
    State.STOPPED: process_pb2.RUNNER_STATE_STOPPED,
    State.DIVERGED: process_pb2.RUNNER_STATE_DIVERGED,
    State.AWAY: process_pb2.RUNNER_STATE_AWAY,
}


class ProcessService(process_pb2_grpc.ProcessServiceServicer):
    """foldline.v1.ProcessService."""

    def __init__(self, admin: ProcessAdmin) -> None:
        self._admin = admin

    async def GetProcess(self, request: process_pb2.GetProcessRequest, context: Any) -> process_pb2.GetProcessResponse:
        case = await self._admin.get((request.tenant, request.type, request.process_id.lower()))
        return process_pb2.GetProcessResponse(
            process=self._summary(case.process),
            state_json=case.process.state,
            history=[_entry(entry) for entry in case.history],
            commands=_commands(case),
            timers=[process_pb2.PendingTimer(name=name, due_at=timestamp(due_at)) for name, due_at in case.timers],
        )

    async def ListProcesses(self, request: process_pb2.ListProcessesRequest, context: Any) -> process_pb2.ListProcessesResponse:
        wanted, size = request.filter, request.page_size or pages.SIZE_DEFAULT
        status = STATUS_OF.get(wanted.status, "")
        query = ("ListProcesses", wanted.tenant, wanted.type, status, str(wanted.attention))
        after = pages.decode(query, request.page_token, (int, str, str, str))
        if after and not 0 <= after[0] < STARTED_US_MAX:  # beyond the calendar: not one of ours
            raise pages.invalid("is not a page token")
        rows: Sequence[Process] = await self._admin.find(
            size + 1,
            Place(*after) if after else None,
            tenant=wanted.tenant,
            type_=wanted.type,
            status=status,
            attention=wanted.attention,
        )
        shown, following = pages.cut(rows, size, query, self._admin.place)
        return process_pb2.ListProcessesResponse(processes=[self._summary(row) for row in shown], next_page_token=following)

    async def RetryProcess(self, request: process_pb2.RetryProcessRequest, context: Any) -> process_pb2.RetryProcessResponse:
        process = await self._admin.retry((request.tenant, request.type, request.process_id.lower()))
        return process_pb2.RetryProcessResponse(process=self._summary(process))

    async def CancelProcess(self, request: process_pb2.CancelProcessRequest, context: Any) -> process_pb2.CancelProcessResponse:
        process = await self._admin.cancel((request.tenant, request.type, request.process_id.lower()))
        return process_pb2.CancelProcessResponse(process=self._summary(process))

    async def ListRunners(self, request: process_pb2.ListRunnersRequest, context: Any) -> process_pb2.ListRunnersResponse:
        return process_pb2.ListRunnersResponse(runners=map(_runner, await self._admin.runners()))

    async def AcceptHistory(self, request: process_pb2.AcceptHistoryRequest, context: Any) -> process_pb2.AcceptHistoryResponse:
        revision = await self._admin.accept_history()
        before, common = revision.before, revision.common
        log.warning(
            "history_accepted",
            user_id=current_call.get().identity.user_id,
            before=before.epoch,
            epoch=common.at.epoch,
            position=before.position,
            common_position=common.at.position,
            head=common.head,
            processes=len(revision.processes),
            commands=len(revision.commands),
        )
        return process_pb2.AcceptHistoryResponse(
            epoch=common.at.epoch,
            head_position=common.head,
            former_epoch=before.epoch,
            former_position=before.position,
            common_position=common.at.position,
            processes=map(_revised, revision.processes[:REVISED_MAX]),
            processes_total=len(revision.processes),
            commands=map(_lost, revision.commands[:REVISED_MAX]),
            commands_total=len(revision.commands),
        )

    def _summary(self, process: Process) -> process_pb2.ProcessSummary:
        return process_pb2.ProcessSummary(
            tenant=process.tenant,
            type=process.type,
            process_id=process.process_id,
            status=STATUSES[ProcessStatus(process.status)],
            attention=process.trouble or process.attention,
            phase=process.phase,
            started_at=timestamp(process.started_at),
            moved_at=timestamp(process.moved_at),
            stuck=self._admin.is_stuck(process),
        )


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


def _runner(standing: Standing) -> process_pb2.RunnerStatus:
    return process_pb2.RunnerStatus(
        name=standing.name,
        shard=standing.shard,
        epoch=standing.checkpoint.epoch,
        position=standing.checkpoint.position,
        state=RUNNER_STATES[standing.state],
        reason=standing.reason,
        moved_at=None if standing.moved_at is None else timestamp(standing.moved_at),
    )


def _revised(it: Revised) -> process_pb2.RevisedProcess:
    tenant, type_, process_id = it.key
    return process_pb2.RevisedProcess(
        tenant=tenant,
        type=type_,
        process_id=process_id,
        outcome=it.outcome,
        lost_event_id=it.lost_event_id,
        lost_position=it.lost_position,
    )


def _lost(it: LostCommand) -> process_pb2.LostCommand:
    tenant, _, process_id = it.key
    return process_pb2.LostCommand(
        tenant=tenant, command_id=it.command_id, type=it.type, process_id=process_id, certain=it.certain
    )


def _entry(entry: HistoryEntry) -> process_pb2.ProcessEntry:
    return process_pb2.ProcessEntry(
        happened_at=timestamp(entry.happened_at),
        kind=entry.kind,
        name=entry.name,
        id=entry.id,
        position=entry.position,
        attempts=entry.attempts,
        error=None if entry.error is None else status_pb2.Status.FromString(entry.error),
        phase=entry.phase,
        step=entry.step,
    )


def _commands(case: Case) -> list[process_pb2.PendingCommand]:
    return [
        process_pb2.PendingCommand(
            step=pending.command.step,
            attempt=pending.command.attempt,
            command_id=str(pending.command.command_id),
            type=pending.command.command_type,
            tries=pending.command.tries,
            # One that was given up is due no more.
            due_at=None if pending.given_up else timestamp(pending.due_at),
            last_error=pending.last_error,
        )
        for pending in case.commands
    ]
