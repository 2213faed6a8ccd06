"""`foldline history`: what an aggregate is, what it was, and what changed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.commands import read_moment
from cli.endpoints import Endpoints, UsageError
from cli.invoke import call
from cli.options import DATA, Data, Format, Output, Tenant
from cli.output import one_line, print_json, print_table, show


def history(
    aggregate_type: str,
    aggregate_id: str,
    at: Annotated[str | None, typer.Option("--at", metavar="MOMENT", help="Its state as it was then.")] = None,
    version: Annotated[int | None, typer.Option("--version", min=1, help="Its state behind this event.")] = None,
    diff: Annotated[
        tuple[int, int] | None, typer.Option("--diff", metavar="A B", help="What differs between two versions.")
    ] = None,
    tenant: Tenant = "acme",
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Print the state of an aggregate, now or in the past, how it is stored, or what changed.

    \b
    Examples:
      foldline history account ID --at 2026-01-01
      foldline history person ID --diff 1 21
    """

    async def ask(known: Endpoints) -> Any:
        from cli import history_calls as calls

        if sum(option is not None for option in (at, version, diff)) > 1:
            raise UsageError("give one of --at, --version and --diff")
        name = (known, tenant, aggregate_type, aggregate_id)
        if diff is not None:
            return await calls.diff(*name, diff)
        return await calls.state(*name, version=version, moment=read_moment(at) if at is not None else None)

    found = call(ask, data, output)
    if output is Output.JSON:
        print_json(found)
    elif diff is not None:
        rows = [
            (one["field"], *(("hidden",) * 2 if "hidden" in one else map(one_line, (one["from"], one["to"])))) for one in found
        ]
        print_table(("field", f"version {diff[0]}", f"version {diff[1]}"), rows)
    else:
        show(_lines(found), output)


def _lines(found: dict[str, Any]) -> dict[str, Any]:
    """The state, below what is known about the aggregate."""
    aggregate = found["aggregate"]
    stored = "boxed, in the archive" if aggregate["boxed"] else "cached" if aggregate["cached"] else "not cached"
    lines = {
        "aggregate": f"{aggregate['aggregate_type']} {aggregate['aggregate_id']}",
        "stored": f"{aggregate['version']} events, {stored}",
        "snapshots at": aggregate["snapshot_versions"],
    }
    if "state" in found:
        lines["version"] = f"{found['version']}, of {found['recorded_at']}"
        lines |= {f"  {name}": value for name, value in found["state"].items()}
        lines |= {f"  {name}": "(hidden)" for name in found["hidden_fields"]}
    return lines
