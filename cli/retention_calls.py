"""The calls behind `foldline retention`. Every function returns plain data, as `-o json` prints it."""

from __future__ import annotations

from typing import Any

from cli.calls import TIMEOUT_S, caller, listed, plain
from cli.endpoints import Endpoints
from deploy.bank import options
from foldline.v1 import command_pb2, retention_pb2, retention_pb2_grpc

LONG_S = 6 * TIMEOUT_S


async def rules(endpoints: Endpoints, tenant: str) -> list[dict[str, Any]]:
    """The tenant's rules. Raises Refused."""
    async with caller(endpoints, tenant) as bank:
        stub = retention_pb2_grpc.RetentionServiceStub(bank.write)
        answer = await bank.call(stub.ListRetention, retention_pb2.ListRetentionRequest())
    return [plain(rule) for rule in answer.rules]


async def set_rule(endpoints: Endpoints, tenant: str, kind: str, days: int) -> dict[str, Any]:
    """Sets a rule, or ends it with 0 days; returns the receipt. Raises Refused."""
    request = retention_pb2.SetRetentionRequest(options=options(), aggregate_type=kind, box_after_days=days)
    async with caller(endpoints, tenant) as bank:
        receipt: command_pb2.CommandReceipt = await bank.call(
            retention_pb2_grpc.RetentionServiceStub(bank.write).SetRetention, request
        )
    return plain(receipt)


async def plan(endpoints: Endpoints, tenant: str, kind: str, days: int, limit: int) -> tuple[list[dict[str, Any]], bool]:
    """What the rules would box, and whether there is more than `limit`. Raises Refused."""
    request = retention_pb2.PlanRetentionRequest(aggregate_type=kind, box_after_days=days)
    async with caller(endpoints, tenant) as bank:
        stub = retention_pb2_grpc.RetentionServiceStub(bank.write)
        return await listed(lambda: bank.call(stub.PlanRetention, request, timeout_s=LONG_S), request, "boxes", limit)
