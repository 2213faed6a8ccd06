"""`foldline delivery`: e-mails and webhooks, for operators."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from cli.endpoints import Endpoints, UsageError
from cli.invoke import call
from cli.options import DATA, Data, Format, Output
from cli.output import complain, fail, print_json, print_table

delivery = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

DeliveryId = Annotated[str, typer.Argument(metavar="ID", help="The delivery's id; a Message-ID begins with it.")]


class DeliveryStatus(StrEnum):
    """Whether a delivery has arrived."""

    PENDING = "pending"
    SENT = "sent"
    DEAD = "dead"
    DISCARDED = "discarded"


@delivery.command("list")
def delivery_list(
    tenant: Annotated[str, typer.Option("--tenant", "-t", help="Only this tenant's.")] = "",
    status: Annotated[DeliveryStatus | None, typer.Option("--status", help="Only of this status.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="So many at the most.")] = 50,
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Print e-mails and webhooks, the newest first.

    \b
    Example:
      foldline delivery list --status dead
    """

    async def ask(known: Endpoints) -> tuple[list[dict[str, Any]], bool]:
        from cli import delivery_calls

        return await delivery_calls.find(known, tenant, "" if status is None else status.name, limit)

    found, more = call(ask, data, output)
    _show(found, output)
    if more:
        complain(f"there are more than {limit}: raise --limit to see them")


@delivery.command("show")
def delivery_show(delivery_id: DeliveryId, data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Print a delivery with its message."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import delivery_calls

        return await delivery_calls.get(known, delivery_id)

    found = call(ask, data, output)
    if output is Output.JSON:
        print_json(found)
        return
    _show([found["delivery"]], output)
    print()
    for name, value in found["content"].items():
        print(f"{name}: {value}")


@delivery.command("retry")
def delivery_retry(
    delivery_id: Annotated[str, typer.Argument(metavar="[ID]", help="The delivery's id.")] = "",
    dead: Annotated[bool, typer.Option("--dead", help="All dead ones, of --tenant if that is given.")] = False,
    tenant: Annotated[str, typer.Option("--tenant", "-t", help="With --dead: only this tenant's.")] = "",
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Send a delivery at once that waits, is dead or was discarded; or all dead ones.

    \b
    Examples:
      foldline delivery retry 0190e4a0-0000-7000-8000-000000000000
      foldline delivery retry --dead --tenant umbrella
    """
    if bool(delivery_id) == dead:
        fail(UsageError("name one delivery, or all dead ones with --dead"), output)

    async def ask(known: Endpoints) -> list[dict[str, Any]]:
        from cli import delivery_calls

        return await (delivery_calls.retry_dead(known, tenant) if dead else delivery_calls.retry(known, delivery_id))

    _show(call(ask, data, output), output)


@delivery.command("discard")
def delivery_discard(
    delivery_id: DeliveryId,
    reason: Annotated[str, typer.Option("--reason", help="Why, for the record.")],
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Give up a delivery that waits or is dead."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import delivery_calls

        return await delivery_calls.discard(known, delivery_id, reason)

    _show([call(ask, data, output)], output)


def _show(found: list[dict[str, Any]], output: Output) -> None:
    if output is Output.JSON:
        print_json(found)
        return
    names = ("id", "tenant", "announcement", "channel", "to", "status", "tries", "created at", "next try at", "last error")
    rows = [
        (
            one["delivery_id"],
            one["tenant"],
            one["name"],
            one["channel"],
            one["recipient"],
            one["status"].removeprefix("DELIVERY_STATUS_") + (" (under way)" if one["sending"] else ""),
            str(one["tries"]),
            one.get("created_at", ""),
            one.get("due_at", ""),
            one["last_error"],
        )
        for one in found
    ]
    print_table(names, rows)
