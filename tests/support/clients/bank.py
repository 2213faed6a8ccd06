"""The bank's client over the system of a test, and the details of a refused call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import grpc.aio
from google.rpc import error_details_pb2, status_pb2

from deploy.bank import Bank
from deploy.bank_requests import (
    close,
    close_person,
    deposit,
    freeze,
    item,
    new_id,
    open_account,
    options,
    packed,
    register,
    rename,
    start_registration,
    start_transfer,
    unfreeze,
    withdraw,
)
from deploy.local.system import READ, WRITE, System
from shared.platform.identity import Role

__all__ = [
    "INSIDER",
    "Bank",
    "Refused",
    "auditor",
    "channels",
    "close",
    "close_person",
    "deposit",
    "freeze",
    "item",
    "new_id",
    "open_account",
    "options",
    "packed",
    "query",
    "read_refusal",
    "read_status",
    "refused",
    "register",
    "rename",
    "round_trip",
    "start_registration",
    "start_transfer",
    "tried",
    "unfreeze",
    "withdraw",
]


INSIDER = frozenset({Role.USER, Role.TENANT_ADMIN, Role.READER})
"""The roles of a caller who may also read the line of all tenants, and so sees positions."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A refusal as a caller sees it: the status code and its details."""

    code: str
    text: str
    reason: str = ""
    fields: tuple[str, ...] = ()
    retry_after_s: float | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


def read_refusal(error: grpc.aio.AioRpcError) -> Refused:
    """The details of a failed call, read by google.rpc alone, as any client of gRPC would."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            assert isinstance(value, bytes)
            return read_status(status_pb2.Status.FromString(value), error.code().name)
    return Refused(error.code().name, error.details() or "")


def read_status(status: status_pb2.Status, code: str = "") -> Refused:
    """The refusal in a status, which receipts of batches hold."""
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in status.details:
        assert any(detail.Unpack(known) for known in (info, bad, retry)), detail.type_url
    names = {known.value[0]: known.name for known in grpc.StatusCode}
    assert not code or names[status.code] == code, "the details contradict the status"
    return Refused(
        names[status.code],
        status.message,
        info.reason,
        tuple(violation.field for violation in bad.field_violations),
        retry.retry_delay.ToTimedelta().total_seconds() if retry.HasField("retry_delay") else None,
        dict(info.metadata),
    )


async def refused(call: Awaitable[object]) -> Refused:
    """Makes a call that must be refused; returns the refusal."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return read_refusal(error)
    raise AssertionError(f"accepted: {answer}")


async def tried(call: Awaitable[object]) -> str:
    """The reason why a call is refused; empty if it is accepted."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return read_refusal(error).reason
    return ""


def query(bank: Bank, summary: str, rpc: str) -> tuple[Any, type[Any]]:
    """An RPC of a summary's service, GetAccount for one, and the type of its requests."""
    contract, stubs = (import_module(f"bank.v1.{summary}_query_pb2{end}") for end in ("", "_grpc"))
    [service] = contract.DESCRIPTOR.services_by_name
    return getattr(getattr(stubs, f"{service}Stub")(bank.read), rpc), getattr(contract, f"{rpc}Request")


async def round_trip(bank: Bank, account_id: str) -> bool:
    """Whether a deposit is answered and a query shows it; false while a service on the way is UNAVAILABLE."""
    try:
        receipt = await bank.deposit(account_id, 1)
        summary = await bank.account(account_id, receipt.consistency_token)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return False
        raise
    return summary.version >= receipt.version


@asynccontextmanager
async def channels(
    system: System, write: str = WRITE, read: str = READ
) -> AsyncIterator[tuple[grpc.aio.Channel, grpc.aio.Channel]]:
    """Channels to a write service and a read service."""
    async with system.channel(write) as to_write, system.channel(read) as to_read:
        yield to_write, to_read


@asynccontextmanager
async def auditor(system: System) -> AsyncIterator[Bank]:
    """A caller that may read the line of all tenants."""
    async with channels(system) as (write, read):
        yield Bank(write, read, system.token("operators", "olga", [Role.READER]))
