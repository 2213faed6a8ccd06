"""The operators' RPCs. ROLES says who may call them: operators see and steer the processes of all tenants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from google.rpc import status_pb2

from foldline.v1 import process_pb2, process_pb2_grpc
from shared.platform.clock import timestamp
from shared.platform.identity import Role
from shared.processes.admin import Case, Place, ProcessAdmin
from shared.processes.round import Entry, Process, ProcessStatus
from shared.rpc import pages

OPERATORS = frozenset({Role.OPERATOR})

ROLES: Mapping[str, frozenset[Role]] = {
    "foldline.v1.ProcessService/GetProcess": OPERATORS,
    "foldline.v1.ProcessService/ListProcesses": OPERATORS,
    "foldline.v1.ProcessService/RetryProcess": OPERATORS,
    "foldline.v1.ProcessService/CancelProcess": OPERATORS,
}

STATUSES = {
    ProcessStatus.RUNNING: process_pb2.PROCESS_STATUS_RUNNING,
    ProcessStatus.ENDED: process_pb2.PROCESS_STATUS_ENDED,
    ProcessStatus.PARKED: process_pb2.PROCESS_STATUS_PARKED,
}
STATUS_OF = {status: str(text) for text, status in STATUSES.items()}


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


def _entry(entry: Entry) -> process_pb2.ProcessEntry:
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
