"""The gRPC calls of the commands. This module imports gRPC, so commands import it only when they make a call.

Every function returns plain data, which `-o json` prints as it is; names are those of the contracts.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message
from grpc.aio import AioRpcError

from bank.v1 import totals_query_pb2, totals_query_pb2_grpc
from cli import contract
from cli.channels import channel
from cli.endpoints import Endpoints
from deploy.bank import Bank
from deploy.bank_requests import packed
from foldline.v1 import (
    command_pb2,
    event_store_pb2,
    process_pb2,
    process_pb2_grpc,
)
from shared.folds.errors import Refusal
from shared.rpc.client import bearer
from shared.rpc.status import from_rpc_error, from_status

TIMEOUT_S = 10
PAGE_SIZE_MAX = 500


class Refused(Exception):
    """A service refused the call, or did not answer; `refusal` says which."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


@asynccontextmanager
async def caller(endpoints: Endpoints, tenant: str) -> AsyncIterator[Bank]:
    """A client with the tenant's token. Raises Refused for a call that fails inside."""
    token = endpoints.token(tenant)
    async with channel(endpoints.write) as write, channel(endpoints.read) as read:
        try:
            yield Bank(write, read, token, timeout_s=TIMEOUT_S)
        except AioRpcError as error:
            raise Refused(from_rpc_error(error)) from None


async def send(endpoints: Endpoints, tenant: str, request: Message) -> dict[str, Any]:
    """Sends a command; returns its receipt and the ids that it was sent with. Raises Refused."""
    try:
        async with caller(endpoints, tenant) as bank:
            answer = await bank.call(bank.commands.Send, command_pb2.SendRequest(command=packed(request)))
    except Refused as refused:
        # The id was made here; the caller needs it to send the same command again.
        refused.refusal.facts["command_id"] = request.options.command_id  # type: ignore[attr-defined]
        raise
    return plain(answer.receipt)


async def schedule(endpoints: Endpoints, tenant: str, request: Message, due_at: datetime) -> dict[str, Any]:
    """Schedules a command; returns what is known of it. Raises Refused."""
    async with caller(endpoints, tenant) as bank:
        return plain(await bank.schedule(request, due_at))


async def reschedule(endpoints: Endpoints, tenant: str, command_id: str, due_at: datetime) -> dict[str, Any]:
    """Puts a scheduled command at another time. Raises Refused."""
    async with caller(endpoints, tenant) as bank:
        return plain(await bank.reschedule(command_id, due_at))


async def cancel(endpoints: Endpoints, tenant: str, command_id: str) -> dict[str, Any]:
    """Cancels a scheduled command. Raises Refused."""
    async with caller(endpoints, tenant) as bank:
        return plain(await bank.cancel(command_id))


async def list_commands(
    endpoints: Endpoints, tenant: str, wanted: Mapping[str, Any], limit: int
) -> tuple[list[dict[str, Any]], bool]:
    """Commands of the log, the newest first, and whether there are more than `limit`. Raises Refused."""
    found: list[dict[str, Any]] = []
    following = ""
    async with caller(endpoints, tenant) as bank:
        while len(found) < limit:
            page = await bank.list_commands(min(limit - len(found), PAGE_SIZE_MAX), following, **wanted)
            found += map(record, page.commands)
            following = page.next_page_token
            if not following:
                return found, False
    return found, True


async def list_overrides(endpoints: Endpoints, tenant: str) -> list[dict[str, Any]]:
    """What runs otherwise for the tenant. Raises Refused."""
    async with caller(endpoints, tenant) as bank:
        return [plain(override) for override in await bank.list_overrides()]


async def switch_override(endpoints: Endpoints, tenant: str, name: str, on: bool) -> dict[str, Any]:
    """Switches an override of the tenant; returns the receipt. Raises Refused."""
    async with caller(endpoints, tenant) as bank:
        return plain(await bank.switch_override(name, on))


def record(row: command_pb2.CommandRecord) -> dict[str, Any]:
    """A row of the command log."""
    made = plain(row)
    if row.receipt.HasField("error"):
        made["receipt"]["error"] = told(from_status(row.receipt.error))
    return made


async def get_summary(
    endpoints: Endpoints, tenant: str, name: str, key: str, after: str, as_of: Message | None = None
) -> dict[str, Any]:
    """The summary of one row, for example of a person; with `as_of` also its `origin`. Raises Refused."""
    rpc, request, answer_type = contract.summary(name, key, after, as_of)
    async with caller(endpoints, tenant) as bank:
        ask = bank.read.unary_unary(rpc, type(request).SerializeToString, answer_type.FromString)
        answer = plain(await bank.call(ask, request))
    made: dict[str, Any] = answer[name]
    return made if as_of is None else {**made, "origin": answer["origin"]}


async def get_totals(endpoints: Endpoints, tenant: str, after: str) -> dict[str, Any]:
    """What a tenant has in all. Raises Refused."""
    request = totals_query_pb2.GetTenantTotalsRequest(consistency_token=after)
    async with caller(endpoints, tenant) as bank:
        stub: Any = totals_query_pb2_grpc.TotalsQueryServiceStub(bank.read)
        answer = plain(await bank.call(stub.GetTenantTotals, request))
    made: dict[str, Any] = answer["totals"]
    return made


async def get_command(endpoints: Endpoints, tenant: str, command_id: str) -> dict[str, Any]:
    """A row of the command log. Raises Refused."""
    async with caller(endpoints, tenant) as bank:
        command = await bank.command(command_id)
    return record(command)


async def get_stream(endpoints: Endpoints, tenant: str, aggregate_type: str, aggregate_id: str) -> list[dict[str, Any]]:
    """The events of an aggregate, with their payloads as fields. Raises Refused."""
    async with caller(endpoints, tenant) as bank:
        return [event(envelope) for envelope in await bank.stream(aggregate_type, aggregate_id)]


async def listed(
    ask: Callable[[], Awaitable[Any]], request: Any, items: str | Callable[[Any], list[dict[str, Any]]], limit: int
) -> tuple[list[dict[str, Any]], bool]:
    """Up to `limit` things of a list, and whether there are more. Raises Refused.

    `ask` sends the request, once for each page; `items` is the answer's field, or takes the things from an answer.
    """
    found: list[dict[str, Any]] = []
    while len(found) < limit:
        request.page_size = min(limit - len(found), PAGE_SIZE_MAX)
        answer = await ask()
        found += map(plain, getattr(answer, items)) if isinstance(items, str) else items(answer)
        request.page_token = answer.next_page_token
        if not answer.next_page_token:
            return found, False
    return found, True


async def list_processes(endpoints: Endpoints, wanted: Mapping[str, Any], limit: int) -> tuple[list[dict[str, Any]], bool]:
    """Processes, newest first, and whether there are more than `limit`. Raises Refused."""
    request = process_pb2.ListProcessesRequest(filter=process_pb2.ProcessFilter(**wanted))
    async with channel(endpoints.known_saga()) as saga:
        stub = process_pb2_grpc.ProcessServiceStub(saga)
        return await listed(lambda: unary(stub.ListProcesses, request, endpoints.token("operator")), request, "processes", limit)


async def get_process(endpoints: Endpoints, tenant: str, type_: str, process_id: str) -> dict[str, Any]:
    """A process with its history, commands, timers and diagram; without a type, the only one of the id. Raises Refused."""
    async with channel(endpoints.known_saga()) as saga:
        request = process_pb2.GetProcessRequest(tenant=tenant, type=type_, process_id=process_id)
        stub = process_pb2_grpc.ProcessServiceStub(saga)
        answer = await unary(stub.GetProcess, request, endpoints.token("operator"))
    made = plain(answer)
    made["state"] = json.loads(made.pop("state_json") or "{}")
    for entry, data in zip(answer.history, made["history"], strict=True):
        if entry.HasField("error"):
            data["error"] = told(from_status(entry.error))
    return made


async def steer_process(endpoints: Endpoints, action: str, tenant: str, type_: str, process_id: str) -> dict[str, Any]:
    """Carries out `retry` or `cancel` on a process; returns its summary. Raises Refused."""
    async with channel(endpoints.known_saga()) as saga:
        stub = process_pb2_grpc.ProcessServiceStub(saga)
        method: Any = {"retry": stub.RetryProcess, "cancel": stub.CancelProcess}[action]
        kind: Any = {"retry": process_pb2.RetryProcessRequest, "cancel": process_pb2.CancelProcessRequest}[action]
        request = kind(tenant=tenant, type=type_, process_id=process_id)
        answer = await unary(method, request, endpoints.token("operator"))
    return plain(answer.process)


async def unary(method: Callable[..., Awaitable[Any]], request: Message, token: str, *, timeout_s: float = TIMEOUT_S) -> Any:
    """Makes a call. Raises Refused."""
    try:
        return await method(request, metadata=bearer(token), timeout=timeout_s)
    except AioRpcError as error:
        raise Refused(from_rpc_error(error)) from None


def event(envelope: event_store_pb2.EventEnvelope) -> dict[str, Any]:
    """An event with its payload as fields, if the type is one that is known here."""
    made = plain(envelope)
    payload = contract.decoded(envelope.type, envelope.payload)
    if payload is not None:  # else it stays as it came, in base64
        made["payload"] = plain(payload)
    return made


def told(refusal: Refusal) -> dict[str, Any]:
    """A refusal as data."""
    made: dict[str, Any] = {"code": refusal.code.name, "reason": refusal.reason, "text": refusal.text}
    if refusal.violations:
        made["violations"] = [{"field": field, "description": text} for field, text in refusal.violations]
    if refusal.facts:
        made["facts"] = refusal.facts
    if refusal.retry_after_s is not None:
        made["retry_after_s"] = refusal.retry_after_s
    return made


def plain(message: Message) -> dict[str, Any]:
    """A message as data. Fields without presence are always included, and 64-bit numbers are numbers, not text."""
    made: dict[str, Any] = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return _numbers(message, made)


def _numbers(message: Message, made: dict[str, Any]) -> dict[str, Any]:
    """Turns 64-bit numbers, which protobuf's JSON writes as text, into numbers."""
    for field in message.DESCRIPTOR.fields:
        value = made.get(field.name)
        if field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64) and isinstance(value, str):
            made[field.name] = int(value)
        elif field.message_type is not None and field.message_type.GetOptions().map_entry:
            if field.message_type.fields_by_name["value"].cpp_type == field.CPPTYPE_INT64:
                made[field.name] = {key: int(count) for key, count in sorted((value or {}).items())}
        elif field.message_type is not None and not field.message_type.full_name.startswith("google."):
            inner = getattr(message, field.name)
            for one, data in zip(inner, value, strict=True) if isinstance(value, list) else [(inner, value)] if value else []:
                _numbers(one, data)
    return made
