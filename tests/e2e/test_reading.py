"""The event store and the services themselves, as readers and tools see them."""

from __future__ import annotations

from typing import Any

import grpc.aio
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from deploy.local.system import READ, WRITE
from foldline.v1 import event_store_pb2
from shared.platform.identity import Role
from tests.e2e.conftest import Caller
from tests.support.clients.bank import Bank, deposit, item, new_id, refused
from tests.support.system.stack import Stack

SERVICES = {
    WRITE: {
        "bank.v1.AccountService",
        "bank.v1.PersonService",
        "bank.v1.TransferService",
        "bank.v1.UserService",
        "foldline.v1.CommandService",
        "foldline.v1.EventStoreService",
        "foldline.v1.ArchiveService",
        "foldline.v1.HistoryService",
        "foldline.v1.OverrideService",
        "foldline.v1.AuditService",
        "foldline.v1.RetentionService",
        "foldline.v1.ScheduleService",
        "foldline.v1.TenantService",
    },
    READ: {
        "bank.v1.AccountQueryService",
        "bank.v1.PersonQueryService",
        "bank.v1.TransferQueryService",
        "bank.v1.UserQueryService",
        "bank.v1.TotalsQueryService",
        "foldline.v1.ProjectionService",
    },
}
INT64_MAX = 2**63 - 1


async def account_of_1202_events(bank: Bank) -> str:
    """More events than one message of a stream holds."""
    alice, _ = await bank.register("Alice")
    blue, _ = await bank.open(alice)
    for nth in range(5):
        await bank.batch(*[item(deposit(blue, 1)) for _ in range(240 if nth else 241)])
    return blue


async def test_a_long_stream_is_read_whole_or_in_part(bank: Bank) -> None:
    """1202 events: all; from a version; so many at the most; 0 and 1 both mean the first."""
    blue = await account_of_1202_events(bank)
    versions = [event.version for event in await bank.stream("account", blue)]
    assert versions == list(range(1, 1203))

    async def part(**more: int) -> tuple[int, int]:
        events = await bank.stream("account", blue, **more)
        assert [event.version for event in events] == list(range(events[0].version, events[-1].version + 1))
        return events[0].version, events[-1].version

    assert await part(from_version=1, events_max=1) == (1, 1)
    assert await part(from_version=0, events_max=501) == (1, 501)
    assert await part(from_version=1200) == (1200, 1202)
    assert await part(from_version=700, events_max=INT64_MAX) == (700, 1202)


async def test_the_line_from_anywhere(caller: Caller, insider: Bank) -> None:
    """ReadAll from the beginning, the middle, the end and beyond; the first message always tells head and epoch."""
    _, receipt = await insider.register("Alice")
    reader = caller(tenant="operators", roles=[Role.READER])
    whole = await reader.line()
    head = len(whole)
    assert [event.position for event in whole] == list(range(1, head + 1))
    assert [event.position for event in whole if event.metadata.command_id == receipt.command_id] == [receipt.position]
    assert await reader.line(from_position=head) == whole[-1:]
    assert await reader.line(from_position=1, events_max=2) == whole[:2]
    for beyond in (head + 1, INT64_MAX):
        [answer] = await reader.collect(reader.events.ReadAll, event_store_pb2.ReadAllRequest(from_position=beyond))
        assert (len(answer.events), answer.head_position, answer.shard) == (0, head, 1)
        assert answer.epoch.count("/") == 1


async def test_the_line_shows_the_events_of_all_tenants_to_readers(caller: Caller, insider: Bank, tenant: str) -> None:
    """What ReadStream shows one tenant is, envelope by envelope, what ReadAll shows."""
    alice, _ = await insider.register("Alice")
    await insider.rename(alice, "Alice Cooper")
    stream = await insider.stream("person", alice)
    line = await caller(roles=[Role.READER]).line(from_position=stream[0].position)
    assert [event for event in line if event.tenant == tenant] == stream


async def test_a_tenant_does_not_see_how_far_the_line_of_all_is(caller: Caller, bank: Bank, insider: Bank) -> None:
    """Receipts, the log and streams have no position for it, and its tokens say nothing: they are no other tenant's either."""
    alice, receipt = await bank.register("Alice")
    record, seen = await bank.command(receipt.command_id), await insider.command(receipt.command_id)
    [event], [shown] = await bank.stream("person", alice), await insider.stream("person", alice)
    assert (receipt.position, record.receipt.position, event.position) == (0, 0, 0)
    assert seen.receipt.position == shown.position > 0
    stranger = caller(tenant=f"t-{new_id()}")
    token = receipt.consistency_token
    assert (await refused(stranger.person(alice, token))).reason == "CONSISTENCY_TOKEN_MALFORMED"
    assert (await refused(bank.person(alice, token[:-2]))).reason == "CONSISTENCY_TOKEN_MALFORMED"
    assert (await bank.person(alice, token)).name == "Alice"


@pytest.mark.parametrize("name", SERVICES)
async def test_health(shared_stack: Stack, name: str) -> None:
    """Without a token: the process and each of its services serve; a service that is not there is unknown."""
    async with shared_stack.channel(name) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for service in ("", *SERVICES[name]):
            answer = await check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await check(health_pb2.HealthCheckRequest(service="bank.v1.LoanService"), timeout=10)
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=10)
        async for answer in watching:
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            break
        watching.cancel()


@pytest.mark.parametrize("name", SERVICES)
async def test_reflection(shared_stack: Stack, name: str) -> None:
    """`buf curl` and grpcurl need no .proto: every service is listed, and its methods can be looked up."""
    async with shared_stack.channel(name) as channel:
        listed = await _reflect(channel, list_services="")
        names = {service.name for service in listed.list_services_response.service}
        assert names == SERVICES[name] | {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
        for service in SERVICES[name]:
            found = await _reflect(channel, file_containing_symbol=service)
            raw = found.file_descriptor_response.file_descriptor_proto[0]
            file = descriptor_pb2.FileDescriptorProto.FromString(raw)
            assert service in {f"{file.package}.{one.name}" for one in file.service}


async def _reflect(channel: grpc.aio.Channel, **question: str) -> Any:
    request = reflection_pb2.ServerReflectionRequest(**question)
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    async for answer in stub.ServerReflectionInfo(iter([request]), timeout=10):
        return answer
    raise AssertionError("no answer")
