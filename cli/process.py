"""`foldline process`: what processes do, for operators."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.diagram import draw, passed
from cli.endpoints import Endpoints
from cli.invoke import call
from cli.options import DATA, Data, Format, Output
from cli.output import complain, one_line, print_json, print_lines, print_table, show

process = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

ProcessType = Annotated[str, typer.Argument(metavar="TYPE", help="For example transfer or registration.")]
ProcessId = Annotated[
    str, typer.Argument(metavar="ID", help="Of a transfer's process the transfer's id, of a registration's the user's.")
]
Owner = Annotated[str, typer.Option("--tenant", "-t", help="Whose process it is. The token is always the operator's.")]


class ProcessStatus(StrEnum):
    """Whether a process goes on by itself."""

    RUNNING = "running"
    ENDED = "ended"
    PARKED = "parked"
    UNDONE = "undone"


@process.command("list")
def process_list(
    tenant: Annotated[str, typer.Option("--tenant", "-t", help="Only this tenant's.")] = "",
    type_: Annotated[str, typer.Option("--type", help="Only of this type, for example transfer.")] = "",
    status: Annotated[ProcessStatus | None, typer.Option("--status", help="Only of this status.")] = None,
    attention: Annotated[bool, typer.Option("--attention", help="Only those that an operator should look at.")] = False,
    acknowledged: Annotated[
        bool, typer.Option("--acknowledged", help="Only those with something that two people have acknowledged.")
    ] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="So many at the most.")] = 50,
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Print processes, the youngest first.

    \b
    Examples:
      foldline process list --attention
      foldline process list --type transfer --status running
    """
    wanted: dict[str, Any] = {"tenant": tenant, "type": type_, "attention": attention, "acknowledged": acknowledged}
    if status is not None:
        wanted["status"] = f"PROCESS_STATUS_{status.name}"

    async def ask(known: Endpoints) -> tuple[list[dict[str, Any]], bool]:
        from cli import calls

        return await calls.list_processes(known, wanted, limit)

    found, more = call(ask, data, output)
    if output is Output.JSON:
        print_json(found)
    else:
        show_processes(found)
    if more:
        complain(f"there are more than {limit}: raise --limit to see them")


@process.command("show")
def process_show(
    name: Annotated[list[str], typer.Argument(metavar="[TYPE] ID", help="The type may be left out if the id names one process.")],
    tenant: Owner = "acme",
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Print a process: its state diagram with the path taken, its history, and the commands and timers that it waits for.

    In the diagram ━━▶ ● is the path, with the time at which the process came to each phase and how long it stayed; ──▶ ○ is what
    it might have done, and an ellipsis stands for a phase that is drawn elsewhere.

    \b
    Examples:
      foldline process show 0190e4a0-0000-7000-8000-000000000000
      foldline process show transfer 0190e4a0-0000-7000-8000-000000000000
    """
    if len(name) > 2:
        raise typer.BadParameter("one process at a time: its type, which may be left out, and its id")
    type_, process_id = name if len(name) == 2 else ("", name[0])

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import calls

        return await calls.get_process(known, tenant, type_, process_id)

    found = call(ask, data, output)
    if output is Output.JSON:
        print_json(found)
    else:
        show_process(found)


@process.command("retry")
def process_retry(
    type_: ProcessType, process_id: ProcessId, tenant: Owner = "acme", data: Data = DATA, output: Format = Output.TEXT
) -> None:
    """Let a process go on at once: its waiting inputs are folded again, and its commands are sent again."""
    steer("retry", tenant, type_, process_id, data, output)


@process.command("cancel")
def process_cancel(
    type_: ProcessType, process_id: ProcessId, tenant: Owner = "acme", data: Data = DATA, output: Format = Output.TEXT
) -> None:
    """Cancel the command that a process waits for. To the process it is refused, so the process compensates.

    A command that may have been carried out cannot be cancelled: MAY_HAVE_HAPPENED.
    """
    steer("cancel", tenant, type_, process_id, data, output)


@process.command("accept-history")
def process_accept_history(data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Let diverged processes go on after a restore of the write database; print the commands that are gone.

    A process whose first event is gone is undone; it begins anew if that event is appended again. A process that moved after
    the backup runs again from its beginning: commands that are still in the log keep their answers, the others are sent again.
    """

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import status_calls

        return await status_calls.accept_history(known)

    found = call(ask, data, output)
    if output is Output.JSON:
        print_json(found)
    else:
        show_revision(found)


def show_revision(found: dict[str, Any]) -> None:
    """Prints the processes that were undone, restarted or parked after a restore, and the commands that are gone."""
    print(f"processes go on behind event {found['common_position']} of history {found['epoch']}")
    print(f"  they had seen {found['former_position']} events of history {found['former_epoch']}")
    if found["processes"]:
        rows = [
            (it["tenant"], it["type"], it["process_id"], it["outcome"], str(it["lost_position"] or ""), it["lost_event_id"])
            for it in found["processes"]
        ]
        print(f"\nprocesses that moved since: {found['processes_total']}")
        print_table(("tenant", "type", "id", "now", "lost position", "lost event"), rows)
    if found["commands"]:
        gone = [
            (it["tenant"], it["type"], it["command_id"], it["process_id"], "gone" if it["certain"] else "gone, or done again")
            for it in found["commands"]
        ]
        print(f"\nacknowledged commands of processes: {found['commands_total']}")
        print_table(("tenant", "command", "id", "process", "now"), gone)


def steer(action: str, tenant: str, type_: str, process_id: str, data: Path, output: Output) -> None:
    """Carries out an operator's action on a process, and prints the process."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import calls

        return await calls.steer_process(known, action, tenant, type_, process_id)

    show(call(ask, data, output), output)


def show_processes(found: Sequence[dict[str, Any]]) -> None:
    """Prints processes as a table."""
    names = ("tenant", "type", "id", "status", "phase", "started at", "moved at", "attention")
    print_table(names, [process_row(one) for one in found])


def process_row(one: dict[str, Any]) -> tuple[str, ...]:
    """A process as a row; STUCK if it has not moved for too long."""
    attention = " ".join(filter(None, (one["attention"], "STUCK" if one["stuck"] else "")))
    status = one["status"].removeprefix("PROCESS_STATUS_")
    moments = (one.get("started_at", ""), one.get("moved_at", ""))
    return one["tenant"], one["type"], one["process_id"], status, one["phase"], *moments, attention


def show_process(found: dict[str, Any]) -> None:
    """Prints a process with its diagram, its history and what it waits for."""
    show_processes([found["process"]])
    print(f"\nstate: {one_line(found['state'])}\n")
    over = found["process"]["status"] in ("PROCESS_STATUS_ENDED", "PROCESS_STATUS_UNDONE")
    print_lines(draw(found["diagram"], passed(found["history"]), over=over, now=datetime.now(UTC)))
    print()
    history = []
    for entry in found["history"]:
        what = " ".join(filter(None, (entry["step"], entry["name"])))
        error = entry.get("error")
        tries = str(entry["attempts"] or "")
        more = f"{error['reason']}: {error['text']}" if error else entry["note"]
        history.append((entry.get("happened_at", ""), entry["kind"], what, entry["id"], tries, entry["phase"], more))
    print_table(("happened at", "kind", "what", "id or user", "tries", "phase after it", "refusal or note"), history)
    if asked := found.get("acknowledgement"):
        print(f"\n{asked['asked_by']} asks to acknowledge {asked['attention']}: {asked['resolution']}")
        print("another person confirms it: foldline process acknowledge confirm")
    if commands := found["commands"]:
        print()
        rows = [
            (one["step"], one["type"], one["command_id"], str(one["tries"]), one.get("due_at", "given up"), one["last_error"])
            for one in commands
        ]
        print_table(("waits for", "command", "id", "tries", "sent again at", "last error"), rows)
    if timers := found["timers"]:
        print()
        print_table(("timer", "due at"), [(one["name"], one.get("due_at", "")) for one in timers])
