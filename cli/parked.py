"""`foldline parked`: keys of query tables whose events could not be applied, for operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from cli.endpoints import Endpoints
from cli.invoke import call
from cli.options import DATA, Data, Format, Output
from cli.output import REFUSED, complain, print_json, print_table

parked = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

ParkedId = Annotated[str, typer.Argument(metavar="ID", help="As `foldline parked list` shows it.")]


@parked.command("list")
def parked_list(
    projection: Annotated[str, typer.Option("--projection", help="Only of this group of tables, for example accounts.")] = "",
    tenant: Annotated[str, typer.Option("--tenant", "-t", help="Only this tenant's.")] = "",
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="So many at the most.")] = 50,
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Print the parked keys, the oldest first. Queries show their rows as stale; all other rows are kept up to date."""

    async def ask(known: Endpoints) -> tuple[list[dict[str, Any]], bool]:
        from cli import parked_calls

        return await parked_calls.find(known, projection, tenant, limit)

    found, more = call(ask, data, output)
    if output is Output.JSON:
        print_json(found)
    else:
        _show(found)
    if more:
        complain(f"there are more than {limit}: raise --limit to see them")


@parked.command("show")
def parked_show(parked_id: ParkedId, data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Print a parked key and the events that wait, the one that failed first."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import parked_calls

        return await parked_calls.get(known, parked_id)

    found = call(ask, data, output)
    if output is Output.JSON:
        print_json(found)
        return
    _show([found["parked"]])
    print()
    _show_events(found["events"])


@parked.command("retry")
def parked_retry(parked_id: ParkedId, data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Apply the events of a parked key again, in order, for example after a release that mends the cause.

    Exits with 1 if the key is still parked.
    """

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import parked_calls

        return await parked_calls.retry(known, parked_id)

    _show_outcome(call(ask, data, output), output)


@parked.command("discard")
def parked_discard(
    parked_id: ParkedId,
    all_events: Annotated[bool, typer.Option("--all", help="Skip all events that wait, not only the first.")] = False,
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Skip the event that failed, and apply the others in order; print what was skipped.

    The row lacks what was skipped until its projection is rebuilt. Exits with 1 if the key is still parked.
    """

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import parked_calls

        return await parked_calls.discard(known, parked_id, all_events=all_events)

    _show_outcome(call(ask, data, output), output)


def _show(found: Sequence[dict[str, Any]]) -> None:
    names = ("id", "projection", "tenant", "key", "events", "parked at", "error")
    rows = [
        (
            one["parked_id"],
            one["projection"],
            one["tenant"],
            f"{one['table'] or 'aggregate'} {' '.join(one['key'])}",
            str(one["events"]),
            one.get("parked_at", ""),
            one["error"] or f"waits for {one['behind_parked_id']}",
        )
        for one in found
    ]
    print_table(names, rows)


def _show_events(events: Sequence[dict[str, Any]]) -> None:
    print_table(("position", "event", "type"), [(str(one["position"]), one["event_id"], one["type"]) for one in events])


def _show_outcome(found: dict[str, Any], output: Output) -> None:
    if output is Output.JSON:
        print_json(found)
    else:
        print(f"{'released' if found['released'] else 'still parked'}: {found['applied']} events applied")
        if skipped := found.get("skipped"):
            print(f"\nskipped, and not in the row: {skipped}")
            _show_events(found["skipped_events"])
        if not found["released"]:
            print()
            _show([found["parked"]])
    if not found["released"]:
        raise typer.Exit(REFUSED)
