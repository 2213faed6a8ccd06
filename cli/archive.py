"""`foldline archive`: aggregates whose events are in the archive."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.endpoints import Endpoints
from cli.invoke import call
from cli.options import DATA, Data, Format, Output, Tenant
from cli.output import show, show_page

archive = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

AggregateType = Annotated[str, typer.Argument(metavar="TYPE")]
Key = Annotated[str, typer.Argument(metavar="ID")]


@archive.command("list")
def list_boxes(
    aggregate_type: Annotated[str, typer.Argument(metavar="[TYPE]", help="Only of this type.")] = "",
    aggregate_id: Annotated[str, typer.Argument(metavar="[ID]", help="Only of this aggregate.")] = "",
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="So many at the most.")] = 50,
    tenant: Tenant = "acme",
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Print the boxes, the newest first; also those whose events are back in the tables."""

    async def ask(known: Endpoints) -> tuple[list[dict[str, Any]], bool]:
        from cli import archive_calls

        return await archive_calls.find(known, tenant, aggregate_type, aggregate_id, limit)

    found, more = call(ask, data, output)
    rows = [
        (
            f"{one['aggregate_type']} {one['aggregate_id']}",
            str(one["events"]),
            one["boxed_at"],
            one.get("unboxed_at", ""),
            one["location"],
        )
        for one in found
    ]
    show_page({"boxes": found, "more": more}, ("aggregate", "events", "boxed", "back", "folder"), rows, limit, output)


@archive.command("verify")
def verify(
    aggregate_type: AggregateType,
    aggregate_id: Key,
    version: Annotated[int, typer.Option("--version", min=0, help="That of the box; 0: the newest.")] = 0,
    tenant: Tenant = "acme",
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Read a box and check every byte of it."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import archive_calls

        return await archive_calls.verify(known, tenant, aggregate_type, aggregate_id, version)

    found = call(ask, data, output)
    if output is Output.JSON:
        show(found, output)
    else:
        print(f"whole: {found['events']} events in {found['location']}")


@archive.command("box")
def box(
    aggregate_type: AggregateType,
    aggregate_id: Key,
    tenant: Tenant = "acme",
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Move an aggregate's events to the archive, with a person those of the accounts. Commands on it are refused then.

    \b
    Example:
      foldline archive box person ID
    """

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import archive_calls

        return await archive_calls.box(known, tenant, aggregate_type, aggregate_id)

    _told(call(ask, data, output), "boxed", output)


@archive.command("unbox")
def unbox(
    aggregate_type: AggregateType,
    aggregate_id: Key,
    tenant: Tenant = "acme",
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Put an aggregate's events back where they were. The box stays in the archive."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import archive_calls

        return await archive_calls.unbox(known, tenant, aggregate_type, aggregate_id)

    _told(call(ask, data, output), "unboxed", output)


def _told(receipt: dict[str, Any], done: str, output: Output) -> None:
    if output is Output.JSON:
        show(receipt, output)
    else:
        print(f"{done}: {receipt['aggregate_type']} {receipt['aggregate_id']}, version {receipt['version']}")
