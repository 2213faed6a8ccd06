"""`foldline get`: summaries from the read service, commands and events from the write service."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.endpoints import Endpoints
from cli.invoke import call
from cli.options import DATA, Data, Format, Output, Tenant
from cli.output import one_line, print_json, print_table, show

get = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

After = Annotated[str, typer.Option("--after", help="A consistency token: wait until the answer includes its command.")]


@get.command("person")
def get_person(
    person_id: str, after: After = "", tenant: Tenant = "acme", data: Data = DATA, output: Format = Output.TEXT
) -> None:
    """Print a person's summary: name, accounts, total balances.

    \b
    Example:
      foldline get person 0190e4a0-0000-7000-8000-000000000000 --after TOKEN
    """

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import calls

        return await calls.get_person(known, tenant, person_id, after)

    show(call(ask, data, output), output)


@get.command("account")
def get_account(
    account_id: str, after: After = "", tenant: Tenant = "acme", data: Data = DATA, output: Format = Output.TEXT
) -> None:
    """Print an account's summary: owner, balance in minor units, status."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import calls

        return await calls.get_account(known, tenant, account_id, after)

    show(call(ask, data, output), output)


@get.command("transfer")
def get_transfer(
    transfer_id: str, after: After = "", tenant: Tenant = "acme", data: Data = DATA, output: Format = Output.TEXT
) -> None:
    """Print a transfer's summary: status, where the money is, and every step with its time."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import calls

        return await calls.get_transfer(known, tenant, transfer_id, after)

    show(call(ask, data, output), output)


@get.command("user")
def get_user(user_id: str, after: After = "", tenant: Tenant = "acme", data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Print a user's summary: login, e-mail, and what became of the registration."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import calls

        return await calls.get_user(known, tenant, user_id, after)

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
        (str(event["version"]), str(event["position"]), event["type"], event.get("recorded_at", ""), one_line(event["payload"]))
        for event in events
    ]
    print_table(("version", "position", "event", "recorded at", "content"), rows)
