"""The operators' RPCs for processes. ROLES says who may call these and those for deliveries: operators, for all tenants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import status_pb2

from foldline.v1 import process_pb2, process_pb2_grpc
from shared.line.standing import State
from shared.platform.clock import timestamp
from shared.platform.identity import Role, current_call
from shared.platform.telemetry import logger
from shared.processes.admin import Case, Place, ProcessAdmin
from shared.processes.history import LostCommand, Revised
from shared.processes.parked import ParkedStream, StreamKey
from shared.processes.pending import Acknowledgement
from shared.processes.records import HistoryEntry, Process, ProcessKey, ProcessStatus
from shared.processes.runners import PausedType, Runner
from shared.processes.steering import Replayed, Steering
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
    "foldline.v1.ProcessService/RetryProcesses": OPERATORS,
    "foldline.v1.ProcessService/PauseProcesses": OPERATORS,
    "foldline.v1.ProcessService/ResumeProcesses": OPERATORS,
    "foldline.v1.ProcessService/SkipStep": OPERATORS,
    "foldline.v1.ProcessService/AskAcknowledgement": OPERATORS,
    "foldline.v1.ProcessService/ConfirmAcknowledgement": OPERATORS,
    "foldline.v1.ProcessService/RejectAcknowledgement": OPERATORS,
    "foldline.v1.ProcessService/GetForgottenProcesses": OPERATORS,
    "foldline.v1.ProcessService/ListParkedStreams": OPERATORS,
    "foldline.v1.ProcessService/RetryParkedStream": OPERATORS,
    "foldline.v1.ProcessService/DiscardParkedEvent": OPERATORS,
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

    def __init__(self, admin: ProcessAdmin, steering: Steering) -> None:
        self._admin = admin
        self._steering = steering

    async def GetProcess(self, request: process_pb2.GetProcessRequest, context: Any) -> process_pb2.GetProcessResponse:
        case = await self._admin.get(_key(request))
        return process_pb2.GetProcessResponse(
            process=self._summary(case.process),
            state_json=case.process.state,
            history=[_entry(entry) for entry in case.history],
            commands=_commands(case),
            timers=[process_pb2.PendingTimer(name=name, due_at=timestamp(due_at)) for name, due_at in case.timers],
            acknowledgement=None if case.acknowledgement is None else _acknowledgement(case.acknowledgement),
            diagram=[process_pb2.ProcessArrow(**arrow._asdict()) for arrow in case.arrows],
        )

    async def ListProcesses(self, request: process_pb2.ListProcessesRequest, context: Any) -> process_pb2.ListProcessesResponse:
        wanted, size = request.filter, request.page_size or pages.SIZE_DEFAULT
        status = STATUS_OF.get(wanted.status, "")
        query = ("ListProcesses", wanted.tenant, wanted.type, status, str(wanted.attention), str(wanted.acknowledged))
        rows: Sequence[Process] = await self._admin.find(
            size + 1,
            _place(query, request.page_token),
            tenant=wanted.tenant,
            type_=wanted.type,
            status=status,
            attention=wanted.attention,
            acknowledged=wanted.acknowledged,
        )
        shown, following = pages.cut(rows, size, query, self._admin.place)
        return process_pb2.ListProcessesResponse(processes=[self._summary(row) for row in shown], next_page_token=following)

    async def RetryProcess(self, request: process_pb2.RetryProcessRequest, context: Any) -> process_pb2.RetryProcessResponse:
        process = await self._admin.retry(_key(request), _user_id())
        return process_pb2.RetryProcessResponse(process=self._summary(process))

    async def CancelProcess(self, request: process_pb2.CancelProcessRequest, context: Any) -> process_pb2.CancelProcessResponse:
        process = await self._admin.cancel(_key(request), _user_id())
        return process_pb2.CancelProcessResponse(process=self._summary(process))

    async def ListRunners(self, request: process_pb2.ListRunnersRequest, context: Any) -> process_pb2.ListRunnersResponse:
        backlog = await self._admin.backlog()
        deliveries = process_pb2.DeliveryBacklog(dead=backlog.dead, waiting_since=_moment(backlog.waiting_since))
        return process_pb2.ListRunnersResponse(runners=map(_runner, await self._admin.runners()), deliveries=deliveries)

    async def GetForgottenProcesses(
        self, request: process_pb2.GetForgottenProcessesRequest, context: Any
    ) -> process_pb2.GetForgottenProcessesResponse:
        return process_pb2.GetForgottenProcessesResponse(rows=await self._admin.forgotten(request.tenant))

    async def AcceptHistory(self, request: process_pb2.AcceptHistoryRequest, context: Any) -> process_pb2.AcceptHistoryResponse:
        revision = await self._admin.accept_history(_user_id())
        before, common = revision.before, revision.common
        log.warning(
            "history_accepted",
            user_id=_user_id(),
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

    async def RetryProcesses(
        self, request: process_pb2.RetryProcessesRequest, context: Any
    ) -> process_pb2.RetryProcessesResponse:
        size = request.page_size or pages.SIZE_DEFAULT
        query = ("RetryProcesses", request.tenant, request.type, request.reason)
        rows: Sequence[Process] = await self._admin.find(
            size + 1,
            _place(query, request.page_token),
            tenant=request.tenant,
            type_=request.type,
            status=ProcessStatus.PARKED,
            trouble=request.reason,
        )
        chosen, following = pages.cut(rows, size, query, self._admin.place)
        retried, parked_again = await self._steering.retry_all([row.key for row in chosen], _user_id())
        return process_pb2.RetryProcessesResponse(retried=retried, parked_again=parked_again, next_page_token=following)

    async def PauseProcesses(
        self, request: process_pb2.PauseProcessesRequest, context: Any
    ) -> process_pb2.PauseProcessesResponse:
        paused = await self._steering.pause(request.type, request.reason, _user_id())
        log.warning("processes_paused", type=request.type, reason=request.reason, user_id=_user_id())
        return process_pb2.PauseProcessesResponse(paused=_paused(paused))

    async def ResumeProcesses(
        self, request: process_pb2.ResumeProcessesRequest, context: Any
    ) -> process_pb2.ResumeProcessesResponse:
        was = await self._steering.resume(request.type)
        log.warning("processes_resumed", type=request.type, user_id=_user_id(), was_reason=was.reason, was_paused_by=was.user_id)
        return process_pb2.ResumeProcessesResponse(was=_paused(was))

    async def SkipStep(self, request: process_pb2.SkipStepRequest, context: Any) -> process_pb2.SkipStepResponse:
        process = await self._steering.skip(_key(request), request.step, request.reason, _user_id())
        return process_pb2.SkipStepResponse(process=self._summary(process))

    async def AskAcknowledgement(
        self, request: process_pb2.AskAcknowledgementRequest, context: Any
    ) -> process_pb2.AskAcknowledgementResponse:
        asked = await self._steering.ask(_key(request), request.attention, request.resolution, _user_id())
        _audit("acknowledgement_asked", request, attention=asked.attention)
        return process_pb2.AskAcknowledgementResponse(acknowledgement=_acknowledgement(asked))

    async def ConfirmAcknowledgement(
        self, request: process_pb2.ConfirmAcknowledgementRequest, context: Any
    ) -> process_pb2.ConfirmAcknowledgementResponse:
        process = await self._steering.confirm(_key(request), _user_id())
        _audit("acknowledgement_confirmed", request)
        return process_pb2.ConfirmAcknowledgementResponse(process=self._summary(process))

    async def RejectAcknowledgement(
        self, request: process_pb2.RejectAcknowledgementRequest, context: Any
    ) -> process_pb2.RejectAcknowledgementResponse:
        process = await self._steering.reject(_key(request), request.reason, _user_id())
        _audit("acknowledgement_rejected", request)
        return process_pb2.RejectAcknowledgementResponse(process=self._summary(process))

    async def ListParkedStreams(
        self, request: process_pb2.ListParkedStreamsRequest, context: Any
    ) -> process_pb2.ListParkedStreamsResponse:
        size, query = request.page_size or pages.SIZE_DEFAULT, ("ListParkedStreams", request.tenant)
        after = pages.decode(query, request.page_token, (str, str, str))
        rows = await self._steering.find_parked(
            size + 1, (after[0], after[1], after[2]) if after else ("", "", ""), request.tenant
        )
        shown, following = pages.cut(rows, size, query, lambda row: row.key)
        return process_pb2.ListParkedStreamsResponse(streams=map(_parked, shown), next_page_token=following)

    async def RetryParkedStream(
        self, request: process_pb2.RetryParkedStreamRequest, context: Any
    ) -> process_pb2.RetryParkedStreamResponse:
        replayed = await self._steering.retry_parked(_stream(request))
        return process_pb2.RetryParkedStreamResponse(events=replayed.events, stream=_first(replayed))

    async def DiscardParkedEvent(
        self, request: process_pb2.DiscardParkedEventRequest, context: Any
    ) -> process_pb2.DiscardParkedEventResponse:
        replayed = await self._steering.discard_parked(_stream(request), request.position, _user_id())
        return process_pb2.DiscardParkedEventResponse(events=replayed.events, stream=_first(replayed))

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


def _key(request: Any) -> ProcessKey:
    """The process that a request names; ids are taken in any case."""
    return request.tenant, request.type, request.process_id.lower()


def _stream(request: Any) -> StreamKey:
    return request.tenant, request.aggregate_type, request.aggregate_id.lower()


def _user_id() -> str:
    return current_call.get().identity.user_id


def _audit(event: str, request: Any, **facts: str) -> None:
    """A line of the log beside the process's history: who did it to which process."""
    tenant, type_, process_id = _key(request)
    log.warning(event, process_tenant=tenant, type=type_, process_id=process_id, user_id=_user_id(), **facts)


def _place(query: Sequence[str], page_token: str) -> Place | None:
    """Where a page token goes on. Raises Invalid."""
    after = pages.decode(query, page_token, (int, str, str, str))
    if after and not 0 <= after[0] < STARTED_US_MAX:  # beyond the calendar: not one of ours
        raise pages.invalid("is not a page token")
    return Place(*after) if after else None


def _moment(moment: datetime | None) -> Timestamp | None:
    return None if moment is None else timestamp(moment)


def _acknowledgement(asked: Acknowledgement) -> process_pb2.Acknowledgement:
    return process_pb2.Acknowledgement(
        attention=asked.attention, resolution=asked.resolution, asked_by=asked.asked_by, asked_at=timestamp(asked.asked_at)
    )


def _parked(it: ParkedStream) -> process_pb2.ParkedStream:
    return process_pb2.ParkedStream(
        tenant=it.tenant,
        aggregate_type=it.aggregate_type,
        aggregate_id=it.aggregate_id,
        position=it.position,
        event_id=it.event_id,
        type=it.type,
        reason=it.reason,
        parked_at=timestamp(it.parked_at),
        events=it.events,
    )


def _first(replayed: Replayed) -> process_pb2.ParkedStream | None:
    return None if replayed.stream is None else _parked(replayed.stream)


def _paused(it: PausedType) -> process_pb2.PausedType:
    return process_pb2.PausedType(type=it.type, reason=it.reason, paused_by=it.user_id, paused_at=timestamp(it.paused_at))


def _runner(runner: Runner) -> process_pb2.RunnerStatus:
    standing, work = runner
    goes_on = standing.state is State.RUNNING and not standing.reason
    return process_pb2.RunnerStatus(
        name=standing.name,
        shard=standing.shard,
        epoch=standing.checkpoint.epoch,
        position=standing.checkpoint.position,
        state=process_pb2.RUNNER_STATE_STUCK if goes_on and work.stuck else RUNNER_STATES[standing.state],
        reason=standing.reason,
        moved_at=_moment(standing.moved_at),
        paused=map(_paused, work.paused),
        parked_streams=work.parked_streams,
        due_since=_moment(work.due_since),
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
        note=entry.note,
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
