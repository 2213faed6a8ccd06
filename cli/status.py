"""`foldline status`: whether the system works, for operators."""

from __future__ import annotations

from typing import Any

import typer

from cli.endpoints import Endpoints
from cli.invoke import call
from cli.options import DATA, Data, Format, Output
from cli.output import REFUSED, UNAVAILABLE, print_json, print_table
from cli.process import show_processes


def status(data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Show whether the services serve, how far the projections are behind, and which processes need an operator.

    Exits with 3 if a service does not serve or the line cannot be read, with 1 if a projection stopped.
    """

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import calls

        return await calls.status(known)

    found = call(ask, data, output)
    if output is Output.JSON:
        print_json(found)
    else:
        show_status(found)
    away = any(service["health"] != "SERVING" for service in found["services"])
    if away or "error" in (found["line"] or {"error": ""}) or {"projections_error", "processes_error"} & found.keys():
        raise typer.Exit(UNAVAILABLE)
    if any(projection["state"] != "PROJECTION_STATE_RUNNING" for projection in found["projections"]):
        raise typer.Exit(REFUSED)


def show_status(found: dict[str, Any]) -> None:
    """Prints the state of the system as tables."""
    services = [(service["service"], service["address"], service["health"]) for service in found["services"]]
    print_table(("service", "address", "health"), services)
    line = found["line"] or {"error": {"text": "no answer"}}
    if "error" in line:
        print(f"\nline: {line['error']['text']}\n")
    else:
        print(f"\nline: shard {line['shard']}, {line['head_position']} events, history {line['epoch']}\n")
    if error := found.get("projections_error"):
        print(f"projections: {error['text']}")
        return
    projections = [
        (
            one["name"],
            str(one["position"]),
            "?" if one["lag"] is None else str(one["lag"]),
            one["state"].removeprefix("PROJECTION_STATE_"),
            one["reason"],
        )
        for one in found["projections"]
    ]
    print_table(("projection", "position", "lag", "state", "reason"), projections)
    if error := found.get("processes_error"):
        print(f"\nprocesses: {error['text']}")
    elif attention := found.get("attention"):
        more = " at least" if attention["more"] else ""
        print(f"\nprocesses that an operator should look at:{more} {len(attention['processes'])}")
        if attention["processes"]:
            show_processes(attention["processes"])
