"""The calls behind `foldline archive`. Every function returns plain data, as `-o json` prints it."""

from __future__ import annotations

from typing import Any

from uuid_utils import uuid7

from cli.calls import TIMEOUT_S, caller, listed, plain
from cli.endpoints import Endpoints
from foldline.v1 import archive_pb2, command_pb2

LONG_S = 6 * TIMEOUT_S


async def find(endpoints: Endpoints, tenant: str, kind: str, key: str, limit: int) -> tuple[list[dict[str, Any]], bool]:
    """Boxes, the newest first, and whether there are more than `limit`. Raises Refused."""
    request = archive_pb2.ListBoxesRequest(aggregate_type=kind, aggregate_id=key)
    async with caller(endpoints, tenant) as bank:
        return await listed(lambda: bank.call(bank.archive.ListBoxes, request), request, "boxes", limit)


async def verify(endpoints: Endpoints, tenant: str, kind: str, key: str, version: int) -> dict[str, Any]:
    """Checks a box; returns what is known of it. Raises Refused."""
    request = archive_pb2.VerifyBoxRequest(aggregate_type=kind, aggregate_id=key, version=version)
    async with caller(endpoints, tenant) as bank:
        return plain((await bank.call(bank.archive.VerifyBox, request, timeout_s=LONG_S)).box)


async def box(endpoints: Endpoints, tenant: str, kind: str, key: str) -> dict[str, Any]:
    """Boxes an aggregate; returns the receipt. Raises Refused."""
    request = archive_pb2.BoxAggregateRequest(options=_options(), aggregate_type=kind, aggregate_id=key)
    async with caller(endpoints, tenant) as bank:
        return plain((await bank.call(bank.archive.BoxAggregate, request, timeout_s=LONG_S)).receipt)


async def unbox(endpoints: Endpoints, tenant: str, kind: str, key: str) -> dict[str, Any]:
    """Puts an aggregate back; returns the receipt. Raises Refused."""
    request = archive_pb2.UnboxAggregateRequest(options=_options(), aggregate_type=kind, aggregate_id=key)
    async with caller(endpoints, tenant) as bank:
        return plain((await bank.call(bank.archive.UnboxAggregate, request, timeout_s=LONG_S)).receipt)


def _options() -> command_pb2.CommandOptions:
    return command_pb2.CommandOptions(command_id=str(uuid7()))
