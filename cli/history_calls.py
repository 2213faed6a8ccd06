"""The calls behind `foldline history`. Every function returns plain data, as `-o json` prints it."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from cli.calls import caller, plain
from cli.endpoints import Endpoints
from foldline.v1 import history_pb2
from shared.platform.clock import timestamp


async def state(
    endpoints: Endpoints, tenant: str, aggregate_type: str, aggregate_id: str, *, version: int | None, moment: datetime | None
) -> dict[str, Any]:
    """An aggregate's description, and its state now, at a version or at a moment. Raises Refused."""
    who: dict[str, Any] = {"aggregate_type": aggregate_type, "aggregate_id": aggregate_id}
    request = history_pb2.GetAggregateRequest(**who)
    if version is not None:
        request.version = version
    if moment is not None:
        request.moment.CopyFrom(timestamp(moment))
    async with caller(endpoints, tenant) as bank:
        described = await bank.call(bank.history.DescribeAggregate, history_pb2.DescribeAggregateRequest(**who))
        found = {"aggregate": plain(described)}
        if described.boxed and version is None and moment is None:
            return found
        got = await bank.call(bank.history.GetAggregate, request)
    answer = plain(got)
    answer["state"] = json.loads(answer.pop("state_json"))
    return found | answer


async def diff(
    endpoints: Endpoints, tenant: str, aggregate_type: str, aggregate_id: str, versions: tuple[int, int]
) -> list[dict[str, Any]]:
    """The fields that differ between two versions; without values if they are hidden from the caller. Raises Refused."""
    request = history_pb2.DiffAggregateRequest(
        aggregate_type=aggregate_type, aggregate_id=aggregate_id, from_version=versions[0], to_version=versions[1]
    )
    async with caller(endpoints, tenant) as bank:
        answer = await bank.call(bank.history.DiffAggregate, request)
    return [
        {"field": change.field}
        | ({"from": json.loads(change.from_json), "to": json.loads(change.to_json)} if change.from_json else {"hidden": True})
        for change in answer.changes
    ]
