"""`foldline status`: whether the system works, for operators."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from cli.endpoints import Endpoints
from cli.invoke import call
from cli.options import DATA, Data, Format, Output
from cli.output import OK, REFUSED, UNAVAILABLE, print_json, print_table, show
from cli.process import show_processes

STANDS_AFTER = timedelta(minutes=1)
PARKED_COUNTED_MAX = 10_000
"""Up to how many keys of a projection the read service counts."""


def status(data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Show whether the services serve, how far projections and processes have followed the line, and what needs an operator.

    "behind" counts the events that a projection or the processes have not seen yet. "ahead" counts events that they have seen
    and the line no longer has: the write database was restored. "state" is RUNNING, STOPPED (a fold failed), DIVERGED (after
    a restore), STUCK (processes leave work that has been due for a minute) or AWAY (no instance runs); "reason" says more, also
    which types of processes are paused, and what "stands still": there are events before it, and it has taken none for a minute.

    Exits with 3 if a service does not serve or the line cannot be read, with 1 if a projection or the processes do not go on or
    a type of process is paused.
    """

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import status_calls

        return await status_calls.status(known)

    found = call(ask, data, output)
    if output is Output.JSON:
        print_json(found)
    else:
        show_status(found)
    if code := exit_code(found):
        raise typer.Exit(code)


def exit_code(found: dict[str, Any]) -> int:
    """The exit code for the state of the system."""
    away = any(service["health"] != "SERVING" for service in found["services"])
    if away or "error" in (found["line"] or {"error": ""}) or {"projections_error", "processes_error"} & found.keys():
        return UNAVAILABLE
    epoch = found["line"]["epoch"]
    goes_on = all(
        one["state"].endswith("_STATE_RUNNING")
        and not one["reason"]
        and not (one["ahead"] and one["epoch"] == epoch)
        and not one.get("paused")
        for one in (*found["projections"], *found["runners"])
    )
    return OK if goes_on else REFUSED


def restored(data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Give the line a new epoch, because the write database was restored to an older state.

    The epoch names the history, so that no consumer takes the restored history for the lost one. This is needed when files
    were copied back, or when a dump was restored into the database that it was made of. A restore into another server or
    another database is recognised without it.

    Projections and processes that have seen lost events then stop as DIVERGED (`foldline status`). Let them go on with
    `foldline process accept-history` and `foldline projection accept-history NAME`.
    """

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import status_calls

        return await status_calls.mark_restored(known)

    show(call(ask, data, output), output)


projection = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@projection.command("accept-history")
def projection_accept_history(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `foldline status` shows it, for example summaries.")],
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Let a diverged projection go on with the present line: its tables are emptied and filled again.

    Until they are filled, queries find only a part of the data; queries with a consistency token wait.
    """

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import status_calls

        return await status_calls.refill(known, name)

    found = call(ask, data, output)
    if output is Output.JSON:
        print_json(found)
        return
    was, line = found["was"], found["line"]
    print(f"{was['name']}: emptied, and filled again from the {line['head_position']} events of history {line['epoch']}")
    print(f"  its tables had seen {was['position']} events of history {was['epoch']}")
    if was["position"] > line["head_position"]:
        print(f"  {was['position'] - line['head_position']} of them at least are gone, with the commands that caused them")
    print("  `foldline process accept-history` names the commands of processes that are gone")


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
    consumers = [consumer_row("projection", one) for one in found["projections"]]
    consumers += [consumer_row("processes", one) for one in found["runners"]]
    print_table(("follows the line", "name", "position", "behind", "ahead", "state", "reason"), consumers)
    show_parked([one["parked"] for one in found["projections"]])
    if error := found.get("processes_error"):
        print(f"\nprocesses: {error['text']}")
    elif attention := found.get("attention"):
        more = " at least" if attention["more"] else ""
        print(f"\nprocesses that an operator should look at:{more} {len(attention['processes'])}")
        if attention["processes"]:
            show_processes(attention["processes"])
        show_deliveries(found["deliveries"])


def show_parked(counts: Sequence[int]) -> None:
    """Says how many keys are parked, of the counts of all projections."""
    if parked := sum(counts):
        more = "+" if max(counts) >= PARKED_COUNTED_MAX else ""
        print(f"\nparked keys that an operator should look at: {parked:,}{more} (foldline parked list)")


def show_deliveries(backlog: dict[str, Any]) -> None:
    """Prints what has not arrived, if there is anything."""
    if dead := backlog["dead"]:
        print(f"\ndeliveries that an operator should look at: {dead} (foldline delivery list --status dead)")
    if since := backlog.get("waiting_since"):
        print(f"\nthe oldest delivery that is tried waits since {since} (foldline delivery list --status pending)")


def stands_still(one: dict[str, Any]) -> bool:
    """Whether a consumer runs, has events before it, and has taken none for a minute: it may hang."""
    if not one["lag"] or one["reason"] or not one["state"].endswith("_STATE_RUNNING") or not one.get("moved_at"):
        return False
    return datetime.now(UTC) - datetime.fromisoformat(one["moved_at"]) > STANDS_AFTER


def consumer_row(kind: str, one: dict[str, Any]) -> tuple[str, ...]:
    """A projection or a runner of processes, as a row."""
    behind, ahead = ("?" if one[name] is None else str(one[name]) for name in ("lag", "ahead"))
    # Only runners of processes have paused types and parked streams.
    reasons = [one["reason"]] + [f"{it['type']} is paused by {it['paused_by']}: {it['reason']}" for it in one.get("paused", ())]
    if stands_still(one):
        reasons.append(f"stands still since {one['moved_at']}")
    if streams := one.get("parked_streams"):
        reasons.append(f"{streams} streams are parked: foldline process parked list")
    reason = "; ".join(filter(None, reasons))
    return kind, one["name"], str(one["position"]), behind, ahead, one["state"].rpartition("_")[2], reason
