"""`foldline schedules`: commands that are sent again and again."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from cli.commands import status_of
from cli.endpoints import Endpoints
from cli.invoke import call
from cli.options import DATA, Data, Format, Output, Tenant
from cli.output import one_line, print_json, show, show_page
from cli.send import read_fields

schedules = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


class CatchUp(StrEnum):
    """What becomes of firings that were due while nothing ran."""

    NONE = "none"
    ONE = "one"
    ALL = "all"


@schedules.command("create")
def create(
    cron: Annotated[str, typer.Argument(help="Minute, hour, day of the month, month, day of the week: '0 9 * * mon-fri'.")],
    command: Annotated[str, typer.Argument(help="The command's name, for example DepositMoney.")],
    fields: Annotated[list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="Its fields.")] = None,
    as_json: Annotated[str | None, typer.Option("--json", metavar="OBJECT", help="Its fields as a JSON object.")] = None,
    zone: Annotated[str, typer.Option("--zone", help="The time zone of the times, for example Europe/Berlin.")] = "UTC",
    catch_up: Annotated[
        CatchUp, typer.Option("--catch-up", help="What to send of what was due while nothing ran: none, one for all, or all.")
    ] = CatchUp.NONE,
    schedule_id: Annotated[str | None, typer.Option("--id", help="A UUID; made if not given.")] = None,
    tenant: Tenant = "acme",
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Send a command again and again, at the times of a cron expression.

    \b
    Example:
      foldline schedules create '0 9 1 * *' DepositMoney account_id=ID amount_minor=10000 currency=USD --zone Europe/Berlin
    """

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import contract
        from cli import schedules_calls as calls

        request = contract.build(command, read_fields(fields or [], as_json), command_id=schedule_id, expected_version=None)
        return await calls.create(known, tenant, request, cron, zone, catch_up.value)

    found = call(ask, data, output)
    if output is Output.JSON:
        print_json(found)
    else:
        print(f"{found['schedule_id']}: next at {found['next_due_at']}")


@schedules.command("list")
def list_schedules(
    ended: Annotated[bool, typer.Option("--ended", help="Those that have ended, in place of those that have not.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="So many at the most.")] = 50,
    tenant: Tenant = "acme",
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Print schedules, the newest first: users see their own, a tenant's administrator the tenant's."""

    async def ask(known: Endpoints) -> tuple[list[dict[str, Any]], bool]:
        from cli import schedules_calls as calls

        return await calls.list_schedules(known, tenant, ended=ended, limit=limit)

    found, more = call(ask, data, output)
    names = ("id", "status", "times", "zone", "command", "aggregate", "user", "next", "last", "outcome")
    show_page({"schedules": found, "more": more}, names, [_row(one) for one in found], limit, output, narrow="end some")


@schedules.command("show")
def show_schedule(schedule_id: str, tenant: Tenant = "acme", data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Print one schedule. `foldline commands list --cause ID` prints its firings."""
    _one("show", schedule_id, tenant, data, output)


@schedules.command("pause")
def pause(schedule_id: str, tenant: Tenant = "acme", data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Stop a schedule until it is resumed. What was due and has not run is cancelled."""
    _one("pause", schedule_id, tenant, data, output)


@schedules.command("resume")
def resume(schedule_id: str, tenant: Tenant = "acme", data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Let a schedule go on with the first time from now on."""
    _one("resume", schedule_id, tenant, data, output)


@schedules.command("end")
def end(schedule_id: str, tenant: Tenant = "acme", data: Data = DATA, output: Format = Output.TEXT) -> None:
    """End a schedule for good. What was due and has not run is cancelled."""
    _one("end", schedule_id, tenant, data, output)


def _one(action: str, schedule_id: str, tenant: str, data: Any, output: Output) -> None:
    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import schedules_calls as calls

        return await calls.one(known, tenant, action, schedule_id)

    found = call(ask, data, output)
    if output is Output.JSON:
        print_json(found)
        return
    last = found.get("last_firing")
    lines = {
        "schedule": found["schedule_id"],
        "status": _status(found),
        "times": f"{found['cron']} ({found['time_zone']})",
        "catch up": found["catch_up"].removeprefix("CATCH_UP_").lower(),
        "command": one_line(found["command"]),
        "user": found["user_id"],
        "next": found.get("next_due_at", ""),
        "last": found.get("last_due_at", ""),
        "outcome": _outcome(last) if last else "",
        "changed": f"{found['changed_at']}, by {found['changed_by'] or 'the scheduler'}",
    }
    show(lines, output)


def _status(schedule: dict[str, Any]) -> str:
    status = str(schedule["status"]).removeprefix("SCHEDULE_STATUS_").lower()
    return f"{status}: {schedule['problem']}" if schedule["problem"] else status


def _outcome(receipt: dict[str, Any]) -> str:
    reason = receipt.get("error", {}).get("reason", "")
    return f"{status_of(receipt)} {reason}".rstrip()


def _row(schedule: dict[str, Any]) -> tuple[str, ...]:
    last = schedule.get("last_firing")
    return (
        schedule["schedule_id"],
        _status(schedule),
        schedule["cron"],
        schedule["time_zone"],
        schedule["command"].get("@type", "").rpartition("/")[2],
        f"{schedule['aggregate_type']} {schedule['aggregate_id']}",
        schedule["user_id"],
        schedule.get("next_due_at", ""),
        schedule.get("last_due_at", ""),
        _outcome(last) if last else "",
    )
