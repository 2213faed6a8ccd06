"""`foldline why`: which events made a person, an account, a transfer or a user what it is."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.endpoints import Endpoints, UsageError
from cli.invoke import call
from cli.options import DATA, At, AtPosition, AtToken, Data, Format, Output, Tenant
from cli.output import complain, one_line, print_json, print_table
from cli.past import as_of
from cli.summaries import SUMMARIES


def why(
    summary: str,
    key: Annotated[str, typer.Argument(metavar="ID")],
    field: Annotated[str, typer.Option("--field", help="Only what changed this field of the summary.")] = "",
    at: At = None,
    at_position: AtPosition = None,
    at_token: AtToken = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="So many events at the most.")] = 50,
    tenant: Tenant = "acme",
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Print the events that made a person, account, transfer or user what it is, the newest first, and what each changed.

    \b
    Examples:
      foldline why account ID --field balance_minor
      foldline why person ID --at 2026-01-01
      foldline get account ID --at-token TOKEN      (TOKEN: of an event here, with -o json)
    """

    async def ask(known: Endpoints) -> tuple[list[dict[str, Any]], bool, bool]:
        from cli import past_calls as calls

        if summary not in SUMMARIES:
            raise UsageError(f"there is no summary {summary!r}; there are: {', '.join(SUMMARIES)}")
        return await calls.explain(known, tenant, summary, key, field, as_of(at, at_position, at_token), limit)

    changes, more, stale = call(ask, data, output)
    if output is Output.JSON:
        print_json({"changes": changes, "more": more, "stale": stale})
        return
    rows = [row for change in changes for row in _rows(change)]
    print_table(("recorded at", "event", "field", "from", "to", "user", "command"), rows)
    if stale:
        complain("An event could not be applied, so it and later ones are missing: `foldline parked list`, for operators.")
    if more:
        complain(f"There are more than {limit}: raise --limit, or name a --field.")


def _rows(change: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line for each field that an event changed; what is known of the event stands in the first."""
    event = (change["origin"]["recorded_at"], change["type"].rpartition(".")[2])
    by = (change["user_id"], change["command_id"])
    rows = []
    for nth, each in enumerate(change["fields"]):
        ends = ("" if each[end] is None else one_line(each[end]) for end in ("from", "to"))
        rows.append((*(("", "") if nth else event), each["field"], *ends, *(("", "") if nth else by)))
    return rows
