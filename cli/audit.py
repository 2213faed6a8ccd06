"""`foldline audit`: who did what, when, on whose behalf and because of what."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.commands import read_moment, status_of
from cli.endpoints import Endpoints
from cli.invoke import call
from cli.options import DATA, Data, Format, Output, Tenant
from cli.output import show_page


def audit(
    user: Annotated[str, typer.Option("--user", help="What this user sent, and what was sent on the user's behalf.")] = "",
    correlation: Annotated[str, typer.Option("--correlation", help="Only of this correlation id.")] = "",
    cause: Annotated[str, typer.Option("--cause", help="What this command, event or schedule caused.")] = "",
    since: Annotated[
        str | None, typer.Option("--since", metavar="MOMENT", help="Only of what was received from then on.")
    ] = None,
    before: Annotated[
        str | None, typer.Option("--before", metavar="MOMENT", help="Only of what was received before then.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="So many entries at the most.")] = 50,
    tenant: Tenant = "acme",
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Print the commands of a tenant and the events that they appended, the newest first: for a tenant's administrator.

    \b
    Examples:
      foldline audit --user alice --since 2026-01-01
      foldline audit --cause COMMAND_ID
    """

    async def ask(known: Endpoints) -> tuple[list[dict[str, Any]], bool]:
        from cli import audit_calls as calls

        wanted: dict[str, Any] = {"user_id": user, "correlation_id": correlation, "causation_id": cause}
        for name, text in (("received_from", since), ("received_before", before)):
            if text is not None:
                wanted[name] = read_moment(text)
        return await calls.list_audit(known, tenant, wanted, limit)

    found, more = call(ask, data, output)
    names = ("time", "what", "type", "aggregate", "outcome", "user", "on behalf of", "id", "cause", "correlation")
    rows = [_event(one["event"]) if "event" in one else _command(one["command"]) for one in found]
    show_page({"entries": found, "more": more}, names, rows, limit, output, narrow="filter")


def _event(event: dict[str, Any]) -> tuple[str, ...]:
    return (
        event["recorded_at"],
        "event",
        event["type"].rpartition(".")[2] or "(in the archive)",
        f"{event['aggregate_type']} {event['aggregate_id']}",
        f"version {event['version']}" if event["version"] else "",
        event["user_id"],
        event["on_behalf_of"],
        event["event_id"],
        event["command_id"],
        event["correlation_id"],
    )


def _command(record: dict[str, Any]) -> tuple[str, ...]:
    receipt = record["receipt"]
    return (
        record["received_at"],
        "command",
        record["command"].get("@type", "").rpartition(".")[2],
        f"{receipt['aggregate_type']} {receipt['aggregate_id']}",
        f"{status_of(receipt)} {receipt.get('error', {}).get('reason', '')}".rstrip(),
        record["user_id"],
        record["on_behalf_of"],
        receipt["command_id"],
        record["causation_id"],
        record["correlation_id"],
    )
