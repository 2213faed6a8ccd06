"""The calls behind `foldline retention`. Every function returns plain data, as `-o json` prints it."""

from __future__ import annotations

from typing import Any

from cli.calls import TIMEOUT_S, caller, listed, plain
from cli.endpoints import Endpoints
from deploy.bank_requests import options
from foldline.v1 import command_pb2, retention_pb2, retention_pb2_grpc

LONG_S = 6 * TIMEOUT_S


async def rules(endpoints: Endpoints, tenant: str) -> list[dict[str, Any]]:
    """The tenant's rules. Raises Refused."""
    async with caller(endpoints, tenant) as bank:
        stub = retention_pb2_grpc.RetentionServiceStub(bank.write)
        answer = await bank.call(stub.ListRetention, retention_pb2.ListRetentionRequest())
    return [plain(rule) for rule in answer.rules]


async def set_rule(endpoints: Endpoints, tenant: str, kind: str, box: int, purge: int) -> dict[str, Any]:
    """Sets a rule in days, or ends it if both are 0; returns the receipt. Raises Refused."""
    request = retention_pb2.SetRetentionRequest(
        options=options(), aggregate_type=kind, box_after_days=box, purge_after_days=purge
    )
    async with caller(endpoints, tenant) as bank:
        receipt: command_pb2.CommandReceipt = await bank.call(
            retention_pb2_grpc.RetentionServiceStub(bank.write).SetRetention, request
        )
    return plain(receipt)


async def plan(endpoints: Endpoints, tenant: str, kind: str, box: int, purge: int, limit: int) -> dict[str, Any]:
    """What the rules would box and purge, and whether there is more than `limit` in all. Raises Refused."""
    request = retention_pb2.PlanRetentionRequest(aggregate_type=kind, box_after_days=box, purge_after_days=purge)

    def both(answer: retention_pb2.PlanRetentionResponse) -> list[dict[str, Any]]:
        return [{"kind": "boxes", **plain(each)} for each in answer.boxes] + [
            {"kind": "purges", **plain(each)} for each in answer.purges
        ]

    async with caller(endpoints, tenant) as bank:
        stub = retention_pb2_grpc.RetentionServiceStub(bank.write)
        found, more = await listed(lambda: bank.call(stub.PlanRetention, request, timeout_s=LONG_S), request, both, limit)
    planned: dict[str, Any] = {"boxes": [], "purges": []}
    for each in found:
        planned[each.pop("kind")].append(each)
    return planned | {"more": more}
