"""What operators are refused, by code, reason and fields: of processes, projections and the line."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from deploy.local.system import READ, SAGA, WRITE
from foldline.v1 import (
    delivery_pb2,
    delivery_pb2_grpc,
    event_store_pb2,
    event_store_pb2_grpc,
    process_pb2,
    process_pb2_grpc,
    projection_pb2,
    projection_pb2_grpc,
)
from foldline.v1.process_pb2 import (
    AskAcknowledgementRequest,
    ConfirmAcknowledgementRequest,
    DiscardParkedEventRequest,
    ListParkedStreamsRequest,
    PauseProcessesRequest,
    RejectAcknowledgementRequest,
    ResumeProcessesRequest,
    RetryParkedStreamRequest,
    RetryProcessesRequest,
    SkipStepRequest,
)
from shared.platform.identity import Role
from shared.rpc import pages
from tests.support.clients.bank import new_id, refused
from tests.support.system.stack import Stack

LISTED = ("ListProcesses", "", "", "", "False")


@dataclass
class Operator:
    """The operators' services."""

    processes: process_pb2_grpc.ProcessServiceStub
    deliveries: delivery_pb2_grpc.DeliveryServiceStub
    projections: projection_pb2_grpc.ProjectionServiceStub
    line: event_store_pb2_grpc.EventStoreServiceStub
    who: tuple[tuple[str, str], ...]
    user: tuple[tuple[str, str], ...]

    def show(self, tenant: str = "acme", type_: str = "transfer", process_id: str = "") -> Awaitable[object]:
        """GetProcess."""
        request = process_pb2.GetProcessRequest(tenant=tenant, type=type_, process_id=process_id or new_id())
        return self.processes.GetProcess(request, metadata=self.who, timeout=20)

    def steer(self, action: str, tenant: str = "acme", type_: str = "transfer", process_id: str = "") -> Awaitable[object]:
        """RetryProcess or CancelProcess."""
        request = getattr(process_pb2, f"{action}Request")(tenant=tenant, type=type_, process_id=process_id or new_id())
        answer: Awaitable[object] = getattr(self.processes, action)(request, metadata=self.who, timeout=20)
        return answer

    def ask(self, request: Any, *, user: bool = False) -> Awaitable[object]:
        """The RPC of ProcessService that takes this request."""
        method = getattr(self.processes, type(request).__name__.removesuffix("Request"))
        answer: Awaitable[object] = method(request, metadata=self.user if user else self.who, timeout=20)
        return answer

    def find(self, page_token: str = "", **wanted: str) -> Awaitable[object]:
        """ListProcesses."""
        wanted_ = process_pb2.ProcessFilter(**wanted)  # type: ignore[arg-type]
        request = process_pb2.ListProcessesRequest(page_token=page_token, filter=wanted_)
        return self.processes.ListProcesses(request, metadata=self.who, timeout=20)

    def find_deliveries(self, tenant: str) -> Awaitable[object]:
        """ListDeliveries."""
        request = delivery_pb2.ListDeliveriesRequest(filter=delivery_pb2.DeliveryFilter(tenant=tenant))
        return self.deliveries.ListDeliveries(request, metadata=self.who, timeout=20)

    def discard_delivery(self, reason: str) -> Awaitable[object]:
        """DiscardDelivery."""
        request = delivery_pb2.DiscardDeliveryRequest(delivery_id=new_id(), reason=reason)
        return self.deliveries.DiscardDelivery(request, metadata=self.who, timeout=20)

    def accept(self, *, user: bool = False) -> Awaitable[object]:
        """ProcessService.AcceptHistory."""
        who = self.user if user else self.who
        return self.processes.AcceptHistory(process_pb2.AcceptHistoryRequest(), metadata=who, timeout=20)

    def refill(self, name: str, *, user: bool = False) -> Awaitable[object]:
        """RefillProjection."""
        who = self.user if user else self.who
        return self.projections.RefillProjection(projection_pb2.RefillProjectionRequest(name=name), metadata=who, timeout=20)

    def parked(self, rpc: str, *, user: bool = False, **fields: Any) -> Awaitable[object]:
        """ListParked, GetParked, RetryParked or DiscardParked; of a key that nobody has unless told otherwise."""
        if rpc != "ListParked":
            fields.setdefault("parked_id", new_id())
        request = getattr(projection_pb2, f"{rpc}Request")(**fields)
        answer: Awaitable[object] = getattr(self.projections, rpc)(request, metadata=self.user if user else self.who, timeout=20)
        return answer

    def forgotten(self, rpc: str, tenant: str, *, user: bool = False) -> Awaitable[object]:
        """GetForgottenTenant of the read service or GetForgottenProcesses of the saga service."""
        module, stub = (projection_pb2, self.projections) if rpc == "GetForgottenTenant" else (process_pb2, self.processes)
        request = getattr(module, f"{rpc}Request")(tenant=tenant)
        answer: Awaitable[object] = getattr(stub, rpc)(request, metadata=self.user if user else self.who, timeout=20)
        return answer

    def rebuild(self, rpc: str, name: str, *, user: bool = False) -> Awaitable[object]:
        """An RPC of rebuilds; of WatchRebuild the first answer."""
        request = getattr(projection_pb2, f"{rpc}Request")(name=name)
        call: Any = getattr(self.projections, rpc)(request, metadata=self.user if user else self.who, timeout=20)
        answer: Awaitable[object] = call.read() if rpc == "WatchRebuild" else call
        return answer

    def restored(self, epoch: str, *, user: bool = False) -> Awaitable[object]:
        """MarkRestored."""
        who = self.user if user else self.who
        return self.line.MarkRestored(event_store_pb2.MarkRestoredRequest(epoch=epoch), metadata=who, timeout=20)


@pytest.fixture
async def operator(shared_stack: Stack) -> AsyncIterator[Operator]:
    """An operator, and a user who tries."""
    async with shared_stack.channel(SAGA) as saga, shared_stack.channel(READ) as read, shared_stack.channel(WRITE) as write:
        yield Operator(
            process_pb2_grpc.ProcessServiceStub(saga),
            delivery_pb2_grpc.DeliveryServiceStub(saga),
            projection_pb2_grpc.ProjectionServiceStub(read),
            event_store_pb2_grpc.EventStoreServiceStub(write),
            _bearer(shared_stack, Role.OPERATOR),
            _bearer(shared_stack, Role.USER),
        )


def _bearer(stack: Stack, role: Role) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {stack.token('operators', 'olga', [role])}"),)


Row = tuple[str, Callable[[Operator], Awaitable[object]], str, str, tuple[str, ...]]


def bad(situation: str, call: Callable[[Operator], Awaitable[object]], *fields: str) -> Row:
    """A row of what breaks the rules of fields."""
    return situation, call, "INVALID_ARGUMENT", "INVALID_REQUEST", fields


def bad_token(situation: str, *keys: object) -> Row:
    """A row of a page token that is bound to the right query, and holds what no row has."""
    token = pages.encode(LISTED, keys)  # type: ignore[arg-type]
    return situation, lambda d: d.find(token), "INVALID_ARGUMENT", "PAGE_TOKEN_INVALID", ("page_token",)


def bad_parked(situation: str, *keys: str | int) -> Row:
    """The same of the list of parked keys."""
    token = pages.encode(("ListParked", "", ""), keys)
    call = lambda d: d.parked("ListParked", page_token=token)  # noqa: E731 (a row's cell)
    return situation, call, "INVALID_ARGUMENT", "PAGE_TOKEN_INVALID", ("page_token",)


def rebuilding(rpc: str, code: str = "", reason: str = "") -> list[Row]:
    """The rows of an RPC of rebuilds; with how it is refused where there is no rebuild."""
    rows = [
        bad(f"{rpc}: NUL in the name", lambda d: d.rebuild(rpc, "\0"), "name"),
        (f"{rpc}: by a user", lambda d: d.rebuild(rpc, "users", user=True), "PERMISSION_DENIED", "ROLE_MISSING", ()),
        (f"{rpc}: no such projection", lambda d: d.rebuild(rpc, "x"), "NOT_FOUND", "PROJECTION_NOT_FOUND", ()),
    ]
    return [*rows, (f"{rpc}: none there", lambda d: d.rebuild(rpc, "users"), code, reason, ())] if code else rows


REBUILDS: dict[str, tuple[str, ...]] = {
    "StartRebuild": (),
    "WatchRebuild": ("NOT_FOUND", "REBUILD_NOT_FOUND"),
    "SwitchRebuild": ("FAILED_PRECONDITION", "REBUILD_NOT_WAITING"),
    "CancelRebuild": ("FAILED_PRECONDITION", "REBUILD_NOT_RUNNING"),
    "DropFormer": ("FAILED_PRECONDITION", "NO_FORMER_TABLES"),
}
NULS = projection_pb2.ParkedFilter(projection="\0", tenant="\0")


def ask(request: type[Any], fields: dict[str, Any], *, user: bool = False) -> Callable[[Operator], Awaitable[object]]:
    """A call of the RPC that takes this request."""
    return lambda d: d.ask(request(**fields), user=user)


def named(**more: Any) -> dict[str, Any]:
    """The fields of a process that is not there."""
    return {"tenant": "acme", "type": "transfer", "process_id": new_id(), **more}


def stream(**more: Any) -> dict[str, Any]:
    """The fields of a stream that is not parked."""
    return {"tenant": "acme", "aggregate_type": "account", "aggregate_id": new_id(), **more}


STEERING: list[Row] = [
    bad(
        "retry all: NULs", lambda d: d.ask(RetryProcessesRequest(tenant="\0", type="\0", reason="\0")), "tenant", "type", "reason"
    ),
    bad("pause: nothing", lambda d: d.ask(PauseProcessesRequest()), "type", "reason"),
    bad("pause: a reason of 501", lambda d: d.ask(PauseProcessesRequest(type="transfer", reason="x" * 501)), "reason"),
    bad("resume: NUL", lambda d: d.ask(ResumeProcessesRequest(type="\0")), "type"),
    bad("skip: nothing", lambda d: d.ask(SkipStepRequest()), "tenant", "type", "process_id", "step", "reason"),
    bad("skip: NULs", lambda d: d.ask(SkipStepRequest(**named(step="\0", reason="\0"))), "step", "reason"),
    bad("ask: nothing", lambda d: d.ask(AskAcknowledgementRequest(**named())), "attention", "resolution"),
    bad("ask: too long", lambda d: d.ask(AskAcknowledgementRequest(**named(attention="A", resolution="x" * 1001))), "resolution"),
    bad("confirm: NUL", lambda d: d.ask(ConfirmAcknowledgementRequest(**named(type="\0"))), "type"),
    bad("reject: nothing", lambda d: d.ask(RejectAcknowledgementRequest(**named())), "reason"),
    bad("parked: NUL", lambda d: d.ask(ListParkedStreamsRequest(tenant="\0")), "tenant"),
    bad("retry parked: NUL", lambda d: d.ask(RetryParkedStreamRequest(**stream(aggregate_id="\0"))), "aggregate_id"),
    bad("discard parked: no position", lambda d: d.ask(DiscardParkedEventRequest(**stream())), "position"),
    (
        "parked: a page token of another list",
        lambda d: d.ask(ListParkedStreamsRequest(page_token=pages.encode(LISTED, ("acme", "account", "x")))),
        "INVALID_ARGUMENT",
        "PAGE_TOKEN_INVALID",
        ("page_token",),
    ),
    (
        "retry all: a start beyond all calendars",
        lambda d: d.ask(
            RetryProcessesRequest(page_token=pages.encode(("RetryProcesses", "", "", ""), (2**63 - 1, "acme", "transfer", "x")))
        ),
        "INVALID_ARGUMENT",
        "PAGE_TOKEN_INVALID",
        ("page_token",),
    ),
    (
        "pause: no such type",
        lambda d: d.ask(PauseProcessesRequest(type="loan", reason="x")),
        "NOT_FOUND",
        "PROCESS_TYPE_NOT_FOUND",
        (),
    ),
    ("resume: not paused", lambda d: d.ask(ResumeProcessesRequest(type="transfer")), "FAILED_PRECONDITION", "NOT_PAUSED", ()),
    *(
        (f"{request.__name__}: not there", ask(request, fields), "NOT_FOUND", reason, ())
        for request, fields, reason in (
            (SkipStepRequest, named(step="complete", reason="x"), "PROCESS_NOT_FOUND"),
            (AskAcknowledgementRequest, named(attention="A", resolution="x"), "PROCESS_NOT_FOUND"),
            (ConfirmAcknowledgementRequest, named(), "PROCESS_NOT_FOUND"),
            (RejectAcknowledgementRequest, named(reason="x"), "PROCESS_NOT_FOUND"),
            (RetryParkedStreamRequest, stream(), "PARKED_NOT_FOUND"),
            (DiscardParkedEventRequest, stream(position=1), "PARKED_NOT_FOUND"),
        )
    ),
    *(
        (f"{request.__name__}: by a user", ask(request, fields, user=True), "PERMISSION_DENIED", "ROLE_MISSING", ())
        for request, fields in (
            (RetryProcessesRequest, {}),
            (PauseProcessesRequest, {"type": "transfer", "reason": "x"}),
            (ResumeProcessesRequest, {"type": "transfer"}),
            (SkipStepRequest, named(step="complete", reason="x")),
            (AskAcknowledgementRequest, named(attention="A", resolution="x")),
            (ConfirmAcknowledgementRequest, named()),
            (RejectAcknowledgementRequest, named(reason="x")),
            (ListParkedStreamsRequest, {}),
            (RetryParkedStreamRequest, stream()),
            (DiscardParkedEventRequest, stream(position=1)),
        )
    ),
]

TABLE: list[Row] = [
    *STEERING,
    bad("show: NUL in the tenant", lambda d: d.show(tenant="\0"), "tenant"),
    bad("show: NUL in the type", lambda d: d.show(type_="a\0"), "type"),
    bad("show: NUL in the id", lambda d: d.show(process_id="\0"), "process_id"),
    bad("retry: NULs", lambda d: d.steer("RetryProcess", "\0", "\0", "\0"), "tenant", "type", "process_id"),
    bad("cancel: NULs", lambda d: d.steer("CancelProcess", "\0", "\0", "\0"), "tenant", "type", "process_id"),
    bad("list: NUL in the tenant", lambda d: d.find(tenant="\0"), "filter.tenant"),
    bad("list: NUL in the type", lambda d: d.find(type="\0"), "filter.type"),
    bad("list: a page token of 3 KB", lambda d: d.find("x" * 3000), "page_token"),
    bad("deliveries: NUL in the tenant", lambda d: d.find_deliveries("\0"), "filter.tenant"),
    bad("discard: NUL in the reason", lambda d: d.discard_delivery("\0"), "reason"),
    bad("refill: NUL in the name", lambda d: d.refill("\0"), "name"),
    bad("restored: NUL in the epoch", lambda d: d.restored("\0"), "epoch"),
    bad_token("list: a start beyond all calendars", 2**63 - 1, "acme", "transfer", "x"),
    bad_token("list: a start before all calendars", -(2**63), "acme", "transfer", "x"),
    bad_token("list: a start of 65 bits", 2**64 - 1, "acme", "transfer", "x"),
    bad_token("list: a tenant with NUL", 0, "\0", "transfer", "x"),
    bad_token("list: too few keys", 0, "acme"),
    ("show: not there", lambda d: d.show(), "NOT_FOUND", "PROCESS_NOT_FOUND", ()),
    ("accept: nothing diverged", lambda d: d.accept(), "FAILED_PRECONDITION", "NOT_DIVERGED", ()),
    ("accept: by a user", lambda d: d.accept(user=True), "PERMISSION_DENIED", "ROLE_MISSING", ()),
    ("refill: nothing diverged", lambda d: d.refill("accounts"), "FAILED_PRECONDITION", "NOT_DIVERGED", ()),
    ("refill: no such projection", lambda d: d.refill("sums"), "NOT_FOUND", "PROJECTION_NOT_FOUND", ()),
    ("refill: by a user", lambda d: d.refill("accounts", user=True), "PERMISSION_DENIED", "ROLE_MISSING", ()),
    bad("parked: no UUID", lambda d: d.parked("GetParked", parked_id="1"), "parked_id"),
    bad("parked: retry of no UUID", lambda d: d.parked("RetryParked", parked_id=""), "parked_id"),
    bad("parked: discard of no UUID", lambda d: d.parked("DiscardParked", parked_id="x\0"), "parked_id"),
    bad("parked: NULs in the filter", lambda d: d.parked("ListParked", filter=NULS), "filter.projection", "filter.tenant"),
    bad("parked: 501 a page", lambda d: d.parked("ListParked", page_size=501), "page_size"),
    bad_parked("parked: a time beyond all calendars", 2**63 - 1, new_id()),
    bad_parked("parked: an id that is none", 0, "x"),
    bad_parked("parked: too few keys", 0),
    ("parked: not there", lambda d: d.parked("GetParked"), "NOT_FOUND", "PARKED_NOT_FOUND", ()),
    ("parked: retry of what is not there", lambda d: d.parked("RetryParked"), "NOT_FOUND", "PARKED_NOT_FOUND", ()),
    ("parked: discard of what is not there", lambda d: d.parked("DiscardParked"), "NOT_FOUND", "PARKED_NOT_FOUND", ()),
    *(
        (f"{rpc}: by a user", lambda d, rpc=rpc: d.parked(rpc, user=True), "PERMISSION_DENIED", "ROLE_MISSING", ())
        for rpc in ("ListParked", "GetParked", "RetryParked", "DiscardParked")
    ),
    bad("forgotten: rows of no tenant", lambda d: d.forgotten("GetForgottenTenant", ""), "tenant"),
    bad("forgotten: processes of no tenant", lambda d: d.forgotten("GetForgottenProcesses", ""), "tenant"),
    *(
        (f"{rpc}: by a user", lambda d, rpc=rpc: d.forgotten(rpc, "x", user=True), "PERMISSION_DENIED", "ROLE_MISSING", ())
        for rpc in ("GetForgottenTenant", "GetForgottenProcesses")
    ),
    *(row for rpc, refusal in REBUILDS.items() for row in rebuilding(rpc, *refusal)),
    ("restored: another epoch", lambda d: d.restored("of old/1"), "FAILED_PRECONDITION", "EPOCH_CHANGED", ()),
    ("restored: by a user", lambda d: d.restored("of old/1", user=True), "PERMISSION_DENIED", "ROLE_MISSING", ()),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
async def test_the_table_of_errors(operator: Operator, row: Row) -> None:
    """Each situation is refused with its code, reason and fields; none is INTERNAL."""
    _, call, code, reason, fields = row
    refusal = await refused(call(operator))
    assert (refusal.code, refusal.reason, refusal.fields) == (code, reason, fields)


def test_every_situation_has_its_own_name() -> None:
    """A row that is named like another would be taken for it."""
    names = [row[0] for row in TABLE]
    assert len(names) == len(set(names))
