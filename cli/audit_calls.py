"""The calls behind `foldline audit`, as plain data that `-o json` prints."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from cli.calls import PAGE_SIZE_MAX, caller, plain, record
from cli.endpoints import Endpoints
from foldline.v1 import audit_pb2
from shared.platform.clock import timestamp


async def list_audit(
    endpoints: Endpoints, tenant: str, wanted: Mapping[str, Any], limit: int
) -> tuple[list[dict[str, Any]], bool]:
    """Entries, the newest first, and whether there are more than `limit`. Raises Refused."""
    fields: dict[str, Any] = {name: timestamp(value) if isinstance(value, datetime) else value for name, value in wanted.items()}
    found: list[dict[str, Any]] = []
    following = ""
    async with caller(endpoints, tenant) as bank:
        while len(found) < limit:
            asked = audit_pb2.ListAuditRequest(
                page_size=min(limit - len(found), PAGE_SIZE_MAX), page_token=following, filter=audit_pb2.AuditFilter(**fields)
            )
            page = await bank.call(bank.audit.ListAudit, asked)
            found += map(_entry, page.entries)
            following = page.next_page_token
            if not following:
                return found, False
    return found, True


def _entry(entry: audit_pb2.AuditEntry) -> dict[str, Any]:
    return {"event": plain(entry.event)} if entry.HasField("event") else {"command": record(entry.command)}
