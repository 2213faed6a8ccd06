"""The calls behind `foldline why`, and the message of `--at` and its like."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from cli import contract
from cli.calls import PAGE_SIZE_MAX, caller, plain
from cli.endpoints import Endpoints
from foldline.v1 import as_of_pb2
from shared.platform.clock import timestamp


def as_of(moment: datetime | None, position: int | None, token: str | None) -> as_of_pb2.AsOf | None:
    """As of the one that is given; None if none is."""
    if moment is not None:
        return as_of_pb2.AsOf(moment=timestamp(moment))
    if position is not None:
        return as_of_pb2.AsOf(position=position)
    return None if token is None else as_of_pb2.AsOf(token=token)


async def explain(
    endpoints: Endpoints, tenant: str, name: str, key: str, field: str, then: as_of_pb2.AsOf | None, limit: int
) -> tuple[list[dict[str, Any]], bool, bool]:
    """The events that changed a row, the newest first; whether there are more than `limit`, and whether one could not be applied.

    Raises Refused.
    """
    rpc, request, answer_type = contract.explain(name, key, field, then)
    shown: Any = contract.summary(name, key, "")[2].DESCRIPTOR.fields_by_name[name].message_type
    found: list[dict[str, Any]] = []
    stale = False
    async with caller(endpoints, tenant) as bank:
        ask = bank.read.unary_unary(rpc, type(request).SerializeToString, answer_type.FromString)
        while True:
            request.page_size = min(limit - len(found), PAGE_SIZE_MAX)
            answer: Any = await bank.call(ask, request)
            stale |= answer.stale  # of later pages it says nothing
            found += [_shown(change, shown.fields_by_name) for change in answer.changes]
            request.page_token = answer.next_page_token
            if not request.page_token or len(found) == limit:
                return found, bool(request.page_token), stale


def _shown(change: as_of_pb2.RowChange, fields: Mapping[str, FieldDescriptor]) -> dict[str, Any]:
    """A change with its values as data: None for one that is not set, and 64-bit numbers as numbers."""

    def value(name: str, text: str) -> Any:
        if not text:
            return None
        read = json.loads(text)
        return int(read) if isinstance(read, str) and fields[name].cpp_type == FieldDescriptor.CPPTYPE_INT64 else read

    ends = [
        {"field": each.field, "from": value(each.field, each.from_json), "to": value(each.field, each.to_json)}
        for each in change.fields
    ]
    return {**plain(change), "fields": ends}
