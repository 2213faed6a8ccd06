"""`foldline commands`: the command log, and what is scheduled in it."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

import typer

from cli.endpoints import Endpoints, UsageError
from cli.invoke import call
from cli.options import DATA, Data, Format, Output, Tenant
from cli.output import show, show_page

commands = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


class CommandStatus(StrEnum):
    """What became of a command."""

    SCHEDULED = "scheduled"
    COMPLETED = "completed"
    REJECTED = "rejected"
    FAILED = "failed"
    CANCELLED = "cancelled"


@commands.command("list")
def list_commands(
    status: Annotated[CommandStatus | None, typer.Option("--status", help="Only of this status.")] = None,
    type_: Annotated[str, typer.Option("--type", help="Only of this message, for example bank.v1.DepositMoneyRequest.")] = "",
    aggregate: Annotated[
        tuple[str, str], typer.Option("--aggregate", metavar="TYPE ID", help="Only for this aggregate, for example account ID.")
    ] = ("", ""),
    user: Annotated[str, typer.Option("--user", help="Only what this user sent.")] = "",
    on_behalf_of: Annotated[str, typer.Option("--on-behalf-of", help="Only what was sent on behalf of this user.")] = "",
    correlation: Annotated[str, typer.Option("--correlation", help="Only of this correlation id.")] = "",
    cause: Annotated[str, typer.Option("--cause", help="Only what this command or event caused.")] = "",
    since: Annotated[str | None, typer.Option("--since", metavar="MOMENT", help="Only what was received from then on.")] = None,
    before: Annotated[str | None, typer.Option("--before", metavar="MOMENT", help="Only what was received before then.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="So many at the most.")] = 50,
    tenant: Tenant = "acme",
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Print commands, the newest first: users see their own, a tenant's administrator the tenant's.

    \b
    Examples:
      foldline commands list --status scheduled
      foldline commands list --aggregate account ID --since 2026-01-01
    """

    async def ask(known: Endpoints) -> tuple[list[dict[str, Any]], bool]:
        from cli import calls

        wanted: dict[str, Any] = {
            "type": type_,
            "aggregate_type": aggregate[0],
            "aggregate_id": aggregate[1],
            "user_id": user,
            "on_behalf_of": on_behalf_of,
            "correlation_id": correlation,
            "causation_id": cause,
        }
        if status is not None:
            wanted["status"] = f"COMMAND_STATUS_{status.name}"
        for name, text in (("received_from", since), ("received_before", before)):
            if text is not None:
                wanted[name] = read_moment(text)
        return await calls.list_commands(known, tenant, wanted, limit)

    found, more = call(ask, data, output)
    names = ("received", "due", "status", "type", "aggregate", "user", "ms", "command id", "reason")
    show_page({"commands": found, "more": more}, names, [_row(one) for one in found], limit, output, narrow="filter")


@commands.command("cancel")
def cancel(command_id: str, tenant: Tenant = "acme", data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Cancel a scheduled command. Refused (NOT_SCHEDULED) if it has run."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import calls

        return await calls.cancel(known, tenant, command_id)

    _show(call(ask, data, output), output)


@commands.command("reschedule")
def reschedule(
    command_id: str,
    at: Annotated[str, typer.Option("--at", metavar="MOMENT", help="When it is to run now.")],
    tenant: Tenant = "acme",
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Put a scheduled command at another time.

    \b
    Example:
      foldline commands reschedule ID --at 2026-12-24T18:00:00+01:00
    """

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import calls

        return await calls.reschedule(known, tenant, command_id, read_moment(at))

    _show(call(ask, data, output), output)


def read_moment(text: str) -> datetime:
    """A moment as it was typed, in ISO 8601; without an offset it is of this machine's time zone. Raises UsageError."""
    try:
        moment = datetime.fromisoformat(text)
        return moment if moment.tzinfo else moment.astimezone()
    except (ValueError, OverflowError, OSError):
        raise UsageError(f"{text!r} is no moment: type it as 2026-12-24T18:00:00+01:00 or 2026-12-24") from None


def status_of(receipt: dict[str, Any]) -> str:
    """The status of a receipt in one word."""
    return str(receipt["status"]).removeprefix("COMMAND_STATUS_").lower()


def _show(receipt: dict[str, Any], output: Output) -> None:
    if output is Output.JSON:
        show(receipt, output)
    else:
        print(f"{status_of(receipt)}: {receipt['aggregate_type']} {receipt['aggregate_id']}")


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    receipt = record["receipt"]
    return (
        record["received_at"],
        record.get("due_at", ""),
        status_of(receipt),
        record["command"].get("@type", "").rpartition("/")[2],
        f"{receipt['aggregate_type']} {receipt['aggregate_id']}",
        record["on_behalf_of"] or record["user_id"],
        f"{(record['waited_us'] + record['decided_us']) / 1000:.1f}",
        receipt["command_id"],
        receipt.get("error", {}).get("reason", ""),
    )
