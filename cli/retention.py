"""`foldline retention`: after how long aggregates go to the archive, or for good, by themselves."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.endpoints import Endpoints, UsageError
from cli.invoke import call
from cli.options import DATA, Data, Format, Output, Tenant
from cli.output import fail, print_json, print_table, show, show_page

retention = typer.Typer(invoke_without_command=True, rich_markup_mode=None)

AggregateType = Annotated[str, typer.Argument(metavar="TYPE")]
DAYS_MAX = 36_500


@retention.callback()
def list_rules(context: typer.Context, tenant: Tenant = "acme", data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Print the tenant's rules: aggregates of a type without an event for so many days go to the archive, or are purged.

    Purged are only those that have ended, for example people who are no customers any more.

    \b
    Example:
      foldline retention plan person --box-after-days 365 --purge-after-days 3650
      foldline retention set person --box-after-days 365 --purge-after-days 3650
    """
    if context.invoked_subcommand:
        return

    async def ask(known: Endpoints) -> list[dict[str, Any]]:
        from cli import retention_calls

        return await retention_calls.rules(known, tenant)

    found = call(ask, data, output)
    if output is Output.JSON:
        print_json(found)
    elif found:
        rows = [(one["aggregate_type"], *(_days(one[name]) for name in ("box_after_days", "purge_after_days"))) for one in found]
        print_table(("type", "boxed after days", "purged after days"), rows)
    else:
        print(f"Nothing of {tenant} goes to the archive or is purged by itself.")


@retention.command("set")
def set_rule(
    aggregate_type: AggregateType,
    box: Annotated[int, typer.Option("--box-after-days", min=0, max=DAYS_MAX, help="Without an event; 0: never.")] = 0,
    purge: Annotated[
        int, typer.Option("--purge-after-days", min=0, max=DAYS_MAX, help="Since the last event of one that has ended; 0: never.")
    ] = 0,
    tenant: Tenant = "acme",
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Set the rule for a type, in place of the one before. See with `plan` first what it would do: a purge is for good."""
    if not (box or purge):
        fail(UsageError("name --box-after-days, --purge-after-days or both; `end` ends a rule"), output)
    _set(aggregate_type, box, purge, tenant, data, output)


@retention.command("end")
def end_rule(aggregate_type: AggregateType, tenant: Tenant = "acme", data: Data = DATA, output: Format = Output.TEXT) -> None:
    """End the rule for a type. What is in the archive stays there."""
    _set(aggregate_type, 0, 0, tenant, data, output)


@retention.command("plan")
def plan(
    aggregate_type: Annotated[str, typer.Argument(metavar="[TYPE]", help="Only of this type.")] = "",
    box: Annotated[int, typer.Option("--box-after-days", min=0, max=DAYS_MAX, help="As if this were TYPE's rule.")] = 0,
    purge: Annotated[int, typer.Option("--purge-after-days", min=0, max=DAYS_MAX, help="As if this were TYPE's rule.")] = 0,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="So many at the most.")] = 50,
    tenant: Tenant = "acme",
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Print what the rules, or a rule that is not set yet, would box and purge now. Nothing is changed."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import retention_calls

        return await retention_calls.plan(known, tenant, aggregate_type, box, purge, limit)

    planned = call(ask, data, output)
    rows = [_row(one, str(one["parts"]), "would be boxed") for one in planned["boxes"]]
    for one in planned["purges"]:
        parts = ", ".join(f"{part['aggregate_type']} {part['aggregate_id']}" for part in one["parts"])
        rows.append(_row(one, parts or "0", "would be purged"))
    show_page(planned, ("aggregate", "version", "last event", "with it", ""), rows, limit, output)


def _row(one: dict[str, Any], parts: str, would: str) -> tuple[str, ...]:
    name = f"{one['aggregate_type']} {one['aggregate_id']}"
    return name, str(one["version"]), one["changed_at"], parts, f"stays: {one['held_by']}" if one["held_by"] else would


def _days(days: int | str) -> str:
    return str(days) if int(days) else "never"


def _set(aggregate_type: str, box: int, purge: int, tenant: str, data: Any, output: Output) -> None:
    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import retention_calls

        return await retention_calls.set_rule(known, tenant, aggregate_type, box, purge)

    receipt = call(ask, data, output)
    if output is Output.JSON:
        show(receipt, output)
        return
    says = [f"{what} after {days} days" for what, days in (("boxed", box), ("purged", purge)) if days]
    rule = f"is {' and '.join(says)}" if says else "has no rule"
    print(f"{aggregate_type} {rule}" + ("" if receipt["events_appended"] else ", as it was"))
