"""`foldline overrides`: what runs otherwise for a tenant, and its switches."""

from __future__ import annotations

from typing import Any

import typer

from cli.endpoints import Endpoints
from cli.invoke import call
from cli.options import DATA, Data, Format, Output, Tenant
from cli.output import print_json, print_table, show

overrides = typer.Typer(invoke_without_command=True, rich_markup_mode=None)


@overrides.callback()
def list_overrides(context: typer.Context, tenant: Tenant = "acme", data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Print what runs otherwise for the tenant: decisions that are replaced, reactions that are added, announcements.

    \b
    Example:
      foldline overrides --tenant umbrella
    """
    if context.invoked_subcommand:
        return

    async def ask(known: Endpoints) -> list[dict[str, Any]]:
        from cli import calls

        return await calls.list_overrides(known, tenant)

    found = call(ask, data, output)
    if output is Output.JSON:
        print_json(found)
    elif found:
        rows = [(one["name"], "on" if one["on"] else "off", _what(one), one["description"]) for one in found]
        print_table(("name", "", "what", "description"), rows)
    else:
        print(f"Nothing runs otherwise for {tenant}.")


@overrides.command("on")
def switch_on(name: str, tenant: Tenant = "acme", data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Switch an override on, for every command from then on."""
    _switch(name, True, tenant, data, output)


@overrides.command("off")
def switch_off(name: str, tenant: Tenant = "acme", data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Switch an override off, for every command from then on."""
    _switch(name, False, tenant, data, output)


def _switch(name: str, on: bool, tenant: str, data: Any, output: Output) -> None:
    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import calls

        return await calls.switch_override(known, tenant, name, on)

    receipt = call(ask, data, output)
    if output is Output.JSON:
        show(receipt, output)
    else:
        print(f"{name} is {'on' if on else 'off'}" + ("" if receipt["events_appended"] else ", as it was"))


def _what(override: dict[str, Any]) -> str:
    kind = str(override["kind"]).removeprefix("OVERRIDE_KIND_").lower()
    preposition = {"decision": "on", "reaction": "to", "announcement": "of"}[kind]
    return f"{kind} {preposition} {override['type'].rpartition('.')[2]}"
