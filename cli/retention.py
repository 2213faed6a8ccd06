"""`foldline retention`: after how long aggregates go to the archive by themselves."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.endpoints import Endpoints
from cli.invoke import call
from cli.options import DATA, Data, Format, Output, Tenant
from cli.output import complain, print_json, print_table, show

retention = typer.Typer(invoke_without_command=True, rich_markup_mode=None)

AggregateType = Annotated[str, typer.Argument(metavar="TYPE")]
DAYS_MAX = 36_500


@retention.callback()
def list_rules(context: typer.Context, tenant: Tenant = "acme", data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Print the tenant's rules: aggregates of a type without an event for so many days go to the archive.

    \b
    Example:
      foldline retention plan person --box-after-days 365
      foldline retention set person --box-after-days 365
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
        print_table(("type", "boxed after days"), [(one["aggregate_type"], str(one["box_after_days"])) for one in found])
    else:
        print(f"Nothing of {tenant} goes to the archive by itself.")


@retention.command("set")
def set_rule(
    aggregate_type: AggregateType,
    days: Annotated[int, typer.Option("--box-after-days", min=1, max=DAYS_MAX, help="Without an event.")],
    tenant: Tenant = "acme",
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Set the rule for a type. See with `plan` first what it would box."""
    _set(aggregate_type, days, tenant, data, output)


@retention.command("end")
def end_rule(aggregate_type: AggregateType, tenant: Tenant = "acme", data: Data = DATA, output: Format = Output.TEXT) -> None:
    """End the rule for a type. What is in the archive stays there."""
    _set(aggregate_type, 0, tenant, data, output)


@retention.command("plan")
def plan(
    aggregate_type: Annotated[str, typer.Argument(metavar="[TYPE]", help="Only of this type.")] = "",
    days: Annotated[int, typer.Option("--box-after-days", min=0, max=DAYS_MAX, help="As if this were TYPE's rule.")] = 0,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="So many at the most.")] = 50,
    tenant: Tenant = "acme",
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Print what the rules, or a rule that is not set yet, would box now. Nothing is changed."""

    async def ask(known: Endpoints) -> tuple[list[dict[str, Any]], bool]:
        from cli import retention_calls

        return await retention_calls.plan(known, tenant, aggregate_type, days, limit)

    found, more = call(ask, data, output)
    if output is Output.JSON:
        print_json({"boxes": found, "more": more})
        return
    rows = [
        (
            f"{one['aggregate_type']} {one['aggregate_id']}",
            str(one["version"]),
            one["changed_at"],
            str(one["parts"]),
            one["held_by"] or "would be boxed",
        )
        for one in found
    ]
    print_table(("aggregate", "version", "last event", "with it", ""), rows)
    if more:
        complain(f"There are more than {limit}: raise --limit, or name a type.")


def _set(aggregate_type: str, days: int, tenant: str, data: Any, output: Output) -> None:
    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import retention_calls

        return await retention_calls.set_rule(known, tenant, aggregate_type, days)

    receipt = call(ask, data, output)
    if output is Output.JSON:
        show(receipt, output)
    else:
        rule = f"is boxed after {days} days" if days else "has no rule"
        print(f"{aggregate_type} {rule}" + ("" if receipt["events_appended"] else ", as it was"))
