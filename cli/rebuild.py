"""`foldline projection rebuild` and what comes after it: query tables are filled anew while the old ones answer."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.endpoints import Endpoints
from cli.invoke import call
from cli.options import DATA, Data, Format, Output
from cli.output import REFUSED, print_json, print_table

Name = Annotated[str, typer.Argument(metavar="NAME", help="As `foldline status` shows it, for example accounts.")]

OnlyIfSame = Annotated[bool, typer.Option("--only-if-same", help="If a row differs, wait for `switch` or `cancel`.")]


def add_rebuild(projection: typer.Typer) -> None:
    """Adds the commands to `foldline projection`."""
    projection.command("rebuild")(rebuild)
    projection.command("switch")(switch)
    projection.command("cancel")(cancel)
    projection.command("drop-former")(drop_former)


def rebuild(
    name: Name,
    only_if_same: Annotated[
        bool, typer.Option("--only-if-same", help="If a row differs, wait for `switch` or `cancel`.")
    ] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Start nothing: show how far the rebuild is that runs.")] = False,
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Fill the tables of a projection anew from the whole line, compare them with the old ones, and put them in their place.

    Queries are answered all the while. Ctrl-C ends this command, not the rebuild. The former tables are kept until
    `foldline projection drop-former NAME`. Exits with 1 if the rebuild waits, since rows
    differ or keys are parked in its tables alone.
    """

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import rebuild_calls

        if not follow:
            await rebuild_calls.start(known, name, only_if_same=only_if_same)
        last: dict[str, Any] = {}
        with _Bar(name, shown=output is Output.TEXT) as bar:
            async for last in rebuild_calls.follow(known, name):
                bar.show(last)
        return last

    found = call(ask, data, output)
    _show(found, output)
    if found["state"].endswith("_WAITING"):
        raise typer.Exit(REFUSED)


def switch(name: Name, data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Let a rebuild that waits put its tables in place."""
    _steer("switch", name, data, output)


def cancel(name: Name, data: Data = DATA, output: Format = Output.TEXT) -> None:
    """End a rebuild that has not switched, and drop its tables."""
    _steer("cancel", name, data, output)


def drop_former(name: Name, data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Drop the tables that served before the last rebuild."""
    _steer("drop", name, data, output)


def _steer(action: str, name: str, data: Data, output: Output) -> None:
    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import rebuild_calls

        return await rebuild_calls.steer(known, action, name)

    _show(call(ask, data, output), output)


def _show(found: dict[str, Any], output: Output) -> None:
    if output is Output.JSON:
        print_json(found)
        return
    state = found["state"].removeprefix("REBUILD_STATE_").lower()
    print(f"{found['name']}, version {found['version']}: {state} at event {found['position']}")
    if found["reason"]:
        print(f"  {found['reason']}")
    if found["parked"]:
        print(f"  parked keys in the new tables: {found['parked']}")
    if state == "waiting" and not found.get("diff"):
        print("  the tables that serve have stopped, so rows could not be compared")
    if diff := found.get("diff"):
        print(f"  rows at event {diff['position']}: {diff['rows_before']} before, {diff['rows_after']} now")
        print(f"  rows that differ: {diff['rows_differing']}")
        if diff["rows"]:
            print_table(("table", "key"), [(row["table"], " ".join(row["key"])) for row in diff["rows"]])


class _Bar:
    """A bar for a terminal: how far a rebuild is, events a second, time left."""

    def __init__(self, name: str, *, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown)
        self._task = self._progress.add_task(name, total=None, rate="")

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, rebuild: dict[str, Any]) -> None:
        """Draws the rebuild as it is now."""
        rate = f"{rebuild['events_per_s']:,.0f}/s, {rebuild['left_s']:.0f} s left"
        self._progress.update(self._task, completed=rebuild["position"], total=rebuild["target_position"] or None, rate=rate)
