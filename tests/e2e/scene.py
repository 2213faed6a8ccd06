"""What is there before a refusal is provoked: people and accounts of two tenants, made once for each worker."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import grpc.aio
from google.protobuf.message import Message

from bank.v1 import account_query_pb2, person_query_pb2, totals_query_pb2, totals_query_pb2_grpc
from foldline.v1 import (
    archive_pb2,
    audit_pb2,
    command_pb2,
    event_store_pb2,
    history_pb2,
    retention_pb2,
    retention_pb2_grpc,
    schedule_pb2,
    tenant_pb2,
    tenant_pb2_grpc,
)
from shared.platform.identity import Role
from tests.support.clients.bank import Bank, channels, deposit, new_id, options, packed, query
from tests.support.system.stack import Stack

NIL = "00000000-0000-4000-8000-000000000000"
BALANCE_MINOR = 10_000
ACCOUNT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Place:
    """Two tenants. `blue` and `ice` (frozen) are Alice's, in dollars; `gone` is closed; `theirs` is of the other tenant."""

    tenant: str
    other_tenant: str
    alice: str
    blue: str
    ice: str
    gone: str
    foreigner: str
    theirs: str
    their_command: str
    # A deposit of 1 on blue.
    used_command: str
    # Of the last thing that was done, for the tenant.
    consistency_token: str


class Scene:
    """A place, and callers at it. Every method makes one call."""

    def __init__(self, stack: Stack, place: Place, write: grpc.aio.Channel, read: grpc.aio.Channel) -> None:
        self.stack = stack
        self.place = place
        self.write = write
        self.read = read
        self.bank = self.by()
        self.retention = retention_pb2_grpc.RetentionServiceStub(write)

    def by(
        self,
        *roles: Role,
        user_id: str = "alice",
        tenant: str = "",
        token: str | None = None,
    ) -> Bank:
        """A caller, of the place's tenant unless another is named; a tenant administrator unless roles are given."""
        chosen: Iterable[Role] = roles or (Role.USER, Role.TENANT_ADMIN)
        return Bank(
            self.write,
            self.read,
            self.stack.token(tenant or self.place.tenant, user_id, chosen) if token is None else token,
        )

    async def send(self, request: command_pb2.SendRequest) -> Any:
        return await self.bank.call(self.bank.commands.Send, request)

    async def stream(self, *items: command_pb2.BatchItem, bank: Bank | None = None) -> list[command_pb2.CommandReceipt]:
        """SendStream with these items."""
        bank = bank or self.bank
        requests = iter([command_pb2.SendStreamRequest(item=item) for item in items])
        call = bank.commands.SendStream(requests, metadata=bank.who, timeout=20)
        return [answer.receipt async for answer in call]

    async def create_schedule(self, command: Message | None, cron: str = "0 9 * * *", zone: str = "UTC", **more: Any) -> Any:
        wrapped = packed(command) if command is not None else None
        request = schedule_pb2.CreateScheduleRequest(command=wrapped, cron=cron, time_zone=zone, **more)
        return await self.bank.call(self.bank.schedules.CreateSchedule, request)

    async def steer_schedule(self, action: str, schedule_id: str, *, bank: Bank | None = None) -> Any:
        """Gets, pauses, resumes or ends a schedule."""
        bank, name = bank or self.bank, f"{action}Schedule"
        return await bank.call(getattr(bank.schedules, name), getattr(schedule_pb2, f"{name}Request")(schedule_id=schedule_id))

    async def list_schedules(self, **fields: Any) -> Any:
        return await self.bank.call(self.bank.schedules.ListSchedules, schedule_pb2.ListSchedulesRequest(**fields))

    async def audit(self, *roles: Role, page_size: int = 0, page_token: str = "", **wanted: Any) -> Any:
        request = audit_pb2.ListAuditRequest(page_size=page_size, page_token=page_token, filter=audit_pb2.AuditFilter(**wanted))
        return await self.by(*roles).call(self.bank.audit.ListAudit, request)

    async def read_stream(self, aggregate_type: str, aggregate_id: str, **more: int) -> Any:
        return await self.bank.stream(aggregate_type, aggregate_id, **more)

    async def describe(self, aggregate_type: str, aggregate_id: str, *roles: Role) -> Any:
        request = history_pb2.DescribeAggregateRequest(aggregate_type=aggregate_type, aggregate_id=aggregate_id)
        return await self.by(*roles).call(self.bank.history.DescribeAggregate, request)

    async def state(self, aggregate_type: str, aggregate_id: str, *roles: Role, **when: Any) -> Any:
        request = history_pb2.GetAggregateRequest(aggregate_type=aggregate_type, aggregate_id=aggregate_id, **when)
        return await self.by(*roles).call(self.bank.history.GetAggregate, request)

    async def diff(self, aggregate_type: str, aggregate_id: str, one: int, other: int, *roles: Role) -> Any:
        request = history_pb2.DiffAggregateRequest(
            aggregate_type=aggregate_type, aggregate_id=aggregate_id, from_version=one, to_version=other
        )
        return await self.by(*roles).call(self.bank.history.DiffAggregate, request)

    async def box(self, aggregate_type: str, aggregate_id: str, *, roles: Iterable[Role] = (), **more: Any) -> Any:
        """BoxAggregate; `more` goes into the options."""
        request = archive_pb2.BoxAggregateRequest(
            options=command_pb2.CommandOptions(**{"command_id": new_id(), **more}),
            aggregate_type=aggregate_type,
            aggregate_id=aggregate_id,
        )
        return await self.by(*roles).call(self.bank.archive.BoxAggregate, request)

    async def unbox(self, aggregate_type: str, aggregate_id: str, *, roles: Iterable[Role] = (), **more: Any) -> Any:
        """UnboxAggregate; `more` goes into the options."""
        request = archive_pb2.UnboxAggregateRequest(
            options=command_pb2.CommandOptions(**{"command_id": new_id(), **more}),
            aggregate_type=aggregate_type,
            aggregate_id=aggregate_id,
        )
        return await self.by(*roles).call(self.bank.archive.UnboxAggregate, request)

    async def boxes(self, *, roles: Iterable[Role] = (), **fields: Any) -> Any:
        return await self.by(*roles).call(self.bank.archive.ListBoxes, archive_pb2.ListBoxesRequest(**fields))

    async def verify_box(self, aggregate_type: str, aggregate_id: str, version: int, roles: Iterable[Role] = ()) -> Any:
        request = archive_pb2.VerifyBoxRequest(aggregate_type=aggregate_type, aggregate_id=aggregate_id, version=version)
        return await self.by(*roles).call(self.bank.archive.VerifyBox, request)

    async def set_retention(self, kind: str, days: int, *roles: Role, purge: int = 0) -> Any:
        request = retention_pb2.SetRetentionRequest(
            options=options(), aggregate_type=kind, box_after_days=days, purge_after_days=purge
        )
        receipt: command_pb2.CommandReceipt = await self.by(*roles).call(self.retention.SetRetention, request)
        return receipt

    async def retention_rules(self, *roles: Role) -> Any:
        return await self.by(*roles).call(self.retention.ListRetention, retention_pb2.ListRetentionRequest())

    async def plan_retention(self, *roles: Role, **fields: Any) -> Any:
        return await self.by(*roles).call(self.retention.PlanRetention, retention_pb2.PlanRetentionRequest(**fields))

    async def tenants(self, rpc: str, tenant: str, *roles: Role, **more: Any) -> Any:
        """An RPC of TenantService, for an operator unless roles are given."""
        request = getattr(tenant_pb2, f"{rpc}Request")(tenant=tenant, **more)
        stub, bank = tenant_pb2_grpc.TenantServiceStub(self.write), self.by(*roles or (Role.OPERATOR,))
        return await (bank.collect if rpc == "ExportTenant" else bank.call)(getattr(stub, rpc), request)

    async def read_streams(self, *names: tuple[str, str], bank: Bank | None = None, events_max: int = 9, **more: Any) -> Any:
        request = event_store_pb2.ReadStreamsRequest(events_max=events_max, **more)
        for aggregate_type, aggregate_id in names:
            request.aggregates.add(aggregate_type=aggregate_type, aggregate_id=aggregate_id)
        bank = bank or self.bank
        return await bank.collect(bank.events.ReadStreams, request)

    async def past(self, rpc: str, name: str, bank: Bank | None = None, **fields: Any) -> Any:
        """GetAccount or ExplainAccount, or that of another summary; of what is not there unless an id is given."""
        bank = bank or self.bank
        method, request = query(bank, name, f"{rpc}{name.title()}")
        return await bank.call(method, request(**{f"{name}_id": NIL, **fields}))

    async def read_all(self, bank: Bank, **more: int) -> Any:
        return await bank.collect(bank.events.ReadAll, event_store_pb2.ReadAllRequest(**more))

    async def raw(self, method: str, body: bytes, *, channel: grpc.aio.Channel | None = None) -> Any:
        """A unary call with these bytes as its request."""
        call: Any = (channel or self.write).unary_unary(f"/{method}")
        return await call(body, metadata=self.bank.who, timeout=20)

    async def persons(self, *, bank: Bank | None = None, **fields: Any) -> person_query_pb2.ListPersonsResponse:
        bank = bank or self.bank
        listed: person_query_pb2.ListPersonsResponse = await bank.call(
            bank.person_queries.ListPersons, person_query_pb2.ListPersonsRequest(**fields)
        )
        return listed

    async def totals(self, *roles: Role, **fields: str) -> Any:
        """GetTenantTotals, for an administrator of the tenant unless roles are given."""
        stub = totals_query_pb2_grpc.TotalsQueryServiceStub(self.read)
        request = totals_query_pb2.GetTenantTotalsRequest(**fields)
        return await self.by(*roles or (Role.TENANT_ADMIN,)).call(stub.GetTenantTotals, request)

    async def accounts(self, *, bank: Bank | None = None, **fields: Any) -> account_query_pb2.ListAccountsResponse:
        bank = bank or self.bank
        listed: account_query_pb2.ListAccountsResponse = await bank.call(
            bank.account_queries.ListAccounts, account_query_pb2.ListAccountsRequest(**fields)
        )
        return listed

    async def movements(self, *, bank: Bank | None = None, **fields: Any) -> account_query_pb2.ListMovementsResponse:
        bank = bank or self.bank
        listed: account_query_pb2.ListMovementsResponse = await bank.call(
            bank.account_queries.ListMovements, account_query_pb2.ListMovementsRequest(**fields)
        )
        return listed


def build(stack: Stack) -> Place:
    """Makes the place."""
    return asyncio.run(_build(stack))


async def _build(stack: Stack) -> Place:
    tenant, other = f"here-{uuid4().hex[:8]}", f"there-{uuid4().hex[:8]}"
    async with channels(stack) as (write, read):
        here, there = Bank(write, read, stack.token(tenant)), Bank(write, read, stack.token(other))
        alice, _ = await here.register("Alice")
        blue, _ = await here.open(alice)
        ice, _ = await here.open(alice, name="ice")
        used_command = new_id()
        await here.call(here.accounts.DepositMoney, deposit(blue, BALANCE_MINOR, command_id=used_command))
        await here.freeze(ice)
        foreigner, theirs_registered = await there.register("Mallory")
        theirs, _ = await there.open(foreigner)
        await there.deposit(theirs, 1)
        gone, _ = await here.register("Alice's brother")
        last = await here.close_person(gone)
    return Place(
        tenant=tenant,
        other_tenant=other,
        alice=alice,
        blue=blue,
        ice=ice,
        gone=gone,
        foreigner=foreigner,
        theirs=theirs,
        their_command=theirs_registered.command_id,
        used_command=used_command,
        consistency_token=last.consistency_token,
    )
