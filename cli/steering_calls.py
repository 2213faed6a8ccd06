"""The calls behind `foldline process pause`, `skip`, `acknowledge` and `parked`. Each returns plain data, as `-o json` does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf.message import Message

from cli.calls import listed, plain, unary
from cli.channels import channel
from cli.endpoints import Endpoints
from foldline.v1 import process_pb2, process_pb2_grpc

PAGE = 200


async def _ask(endpoints: Endpoints, method: Callable[[Any], Callable[..., Awaitable[Any]]], request: Message) -> Any:
    async with channel(endpoints.known_saga()) as saga:
        return await unary(method(process_pb2_grpc.ProcessServiceStub(saga)), request, endpoints.token("operator"))


async def pause(endpoints: Endpoints, type_: str, reason: str) -> dict[str, Any]:
    """Pauses a type; returns how. Raises Refused."""
    request = process_pb2.PauseProcessesRequest(type=type_, reason=reason)
    return plain((await _ask(endpoints, lambda stub: stub.PauseProcesses, request)).paused)


async def resume(endpoints: Endpoints, type_: str) -> dict[str, Any]:
    """Lets a type go on; returns how it was paused. Raises Refused."""
    request = process_pb2.ResumeProcessesRequest(type=type_)
    return plain((await _ask(endpoints, lambda stub: stub.ResumeProcesses, request)).was)


async def skip(endpoints: Endpoints, tenant: str, type_: str, process_id: str, step: str, reason: str) -> dict[str, Any]:
    """Skips a step; returns the process. Raises Refused."""
    request = process_pb2.SkipStepRequest(tenant=tenant, type=type_, process_id=process_id, step=step, reason=reason)
    return plain((await _ask(endpoints, lambda stub: stub.SkipStep, request)).process)


async def ask(endpoints: Endpoints, tenant: str, type_: str, process_id: str, attention: str, resolution: str) -> dict[str, Any]:
    """Asks for an acknowledgement; returns it. Raises Refused."""
    request = process_pb2.AskAcknowledgementRequest(
        tenant=tenant, type=type_, process_id=process_id, attention=attention, resolution=resolution
    )
    return plain((await _ask(endpoints, lambda stub: stub.AskAcknowledgement, request)).acknowledgement)


async def confirm(endpoints: Endpoints, tenant: str, type_: str, process_id: str) -> dict[str, Any]:
    """Confirms an acknowledgement; returns the process. Raises Refused."""
    request = process_pb2.ConfirmAcknowledgementRequest(tenant=tenant, type=type_, process_id=process_id)
    return plain((await _ask(endpoints, lambda stub: stub.ConfirmAcknowledgement, request)).process)


async def reject(endpoints: Endpoints, tenant: str, type_: str, process_id: str, reason: str) -> dict[str, Any]:
    """Rejects an acknowledgement; returns the process. Raises Refused."""
    request = process_pb2.RejectAcknowledgementRequest(tenant=tenant, type=type_, process_id=process_id, reason=reason)
    return plain((await _ask(endpoints, lambda stub: stub.RejectAcknowledgement, request)).process)


async def retry_all(endpoints: Endpoints, tenant: str, type_: str, reason: str) -> dict[str, int]:
    """Retries all parked processes of a filter; returns how many. Raises Refused."""
    total = {"retried": 0, "parked_again": 0}
    request = process_pb2.RetryProcessesRequest(page_size=PAGE, tenant=tenant, type=type_, reason=reason)
    while True:
        answer = await _ask(endpoints, lambda stub: stub.RetryProcesses, request)
        total["retried"] += answer.retried
        total["parked_again"] += answer.parked_again
        request.page_token = answer.next_page_token
        if not answer.next_page_token:
            return total


async def find_parked(endpoints: Endpoints, tenant: str, limit: int) -> tuple[list[dict[str, Any]], bool]:
    """Parked streams, and whether there are more than `limit`. Raises Refused."""
    request = process_pb2.ListParkedStreamsRequest(tenant=tenant)
    return await listed(lambda: _ask(endpoints, lambda stub: stub.ListParkedStreams, request), request, "streams", limit)


async def retry_parked(endpoints: Endpoints, tenant: str, aggregate_type: str, aggregate_id: str) -> dict[str, Any]:
    """Takes the events of a parked stream again. Raises Refused."""
    request = process_pb2.RetryParkedStreamRequest(tenant=tenant, aggregate_type=aggregate_type, aggregate_id=aggregate_id)
    return plain(await _ask(endpoints, lambda stub: stub.RetryParkedStream, request))


async def discard_parked(
    endpoints: Endpoints, tenant: str, aggregate_type: str, aggregate_id: str, position: int
) -> dict[str, Any]:
    """Gives up the first event of a parked stream. Raises Refused."""
    request = process_pb2.DiscardParkedEventRequest(
        tenant=tenant, aggregate_type=aggregate_type, aggregate_id=aggregate_id, position=position
    )
    return plain(await _ask(endpoints, lambda stub: stub.DiscardParkedEvent, request))
