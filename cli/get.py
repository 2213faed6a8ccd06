"""`foldline get`: summaries from the read service, commands and events from the write service."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.endpoints import Endpoints
from cli.invoke import call
from cli.options import DATA, At, AtPosition, AtToken, Data, Format, Output, Tenant
from cli.output import one_line, print_json, print_table, show
from cli.past import as_of
from cli.summaries import SUMMARIES

get = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

After = Annotated[str, typer.Option("--after", help="A consistency token: wait until the answer includes its command.")]
Key = Annotated[str, typer.Argument(metavar="ID")]


def get_summary(name: str) -> None:
    """Adds the command that prints one kind of summary."""
    article = "an" if name[0] in "aeio" else "a"

    @get.command(name, help=f"Print {article} {name}'s summary, as it is or as it was.")
    def get_one(
        key: Key,
        after: After = "",
        at: At = None,
        at_position: AtPosition = None,
        at_token: AtToken = None,
        tenant: Tenant = "acme",
        data: Data = DATA,
        output: Format = Output.TEXT,
    ) -> None:
        async def ask(known: Endpoints) -> dict[str, Any]:
            from cli import calls

            return await calls.get_summary(known, tenant, name, key, after, as_of(at, at_position, at_token))

        show(call(ask, data, output), output)


for each in SUMMARIES:
    get_summary(each)


@get.command("totals")
def get_totals(after: After = "", tenant: Tenant = "acme", data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Print what a tenant has in all, by status and currency: for its administrators."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import calls

        return await calls.get_totals(known, tenant, after)

    show(call(ask, data, output), output)


@get.command("command")
def get_command(command_id: str, tenant: Tenant = "acme", data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Print a command from the log: who sent it, when, and its result."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import calls

        return await calls.get_command(known, tenant, command_id)

    show(call(ask, data, output), output)


@get.command("stream")
def get_stream(
    aggregate_type: str, aggregate_id: str, tenant: Tenant = "acme", data: Data = DATA, output: Format = Output.TEXT
) -> None:
    """Print the events of an aggregate, oldest first.

    \b
    Example:
      foldline get stream person 0190e4a0-0000-7000-8000-000000000000
    """

    async def ask(known: Endpoints) -> list[dict[str, Any]]:
        from cli import calls

        return await calls.get_stream(known, tenant, aggregate_type, aggregate_id)

    events = call(ask, data, output)
    if output is Output.JSON:
        print_json(events)
        return
    rows = [
        # Tenants are not told positions.
        (
            str(event["version"]),
            str(event["position"] or ""),
            event["type"],
            event.get("recorded_at", ""),
            one_line(event["payload"]),
        )
        for event in events
    ]
    print_table(("version", "position", "event", "recorded at", "content"), rows)
