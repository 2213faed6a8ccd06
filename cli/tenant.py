"""`foldline tenant`: what is stored of a tenant, its export, and its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.endpoints import Endpoints
from cli.invoke import call
from cli.options import DATA, Data, Format, Output
from cli.output import REFUSED, USAGE, complain, print_json, show

tenant = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Name = Annotated[str, typer.Argument(metavar="TENANT")]
Certificate = Annotated[Path | None, typer.Option("--certificate", metavar="FILE", help="Where what went is written, as JSON.")]


@tenant.command("show")
def describe(name: Name, data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Print how many rows of a tenant the write database has, counted up to 100,000 each."""
    show(_described(name, data, output), output)


@tenant.command("export")
def export(
    name: Name,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Must not be there yet.")],
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Write all that is stored of a tenant into a folder, as of one position of the line.

    Events, boxed ones too, commands, and recurring schedules, without password hashes. The folder is there when it is whole.

    \b
    Example:
      foldline tenant export umbrella ./umbrella
      foldline tenant verify ./umbrella
    """
    if folder.exists():
        complain(f"{folder} is there already")
        raise typer.Exit(USAGE)

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import tenant_calls

        return await tenant_calls.export(known, name, folder)

    show(call(ask, data, output), output)


@tenant.command("verify")
def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="As `export` has written it.")],
    output: Format = Output.TEXT,
) -> None:
    """Read an export and check every byte of it. Needs no service."""
    from cli import tenant_export

    try:
        manifest = tenant_export.verify(folder)
    except tenant_export.Damaged as damage:
        if output is Output.JSON:
            print_json({"error": {"reason": "EXPORT_DAMAGED", "text": str(damage)}})
        else:
            complain(f"damaged: {damage}")
        raise typer.Exit(REFUSED) from None
    if output is Output.JSON:
        print_json(manifest)
    else:
        counts = f"{manifest['events']} events, {manifest['commands']} commands and {manifest['schedules']} schedules"
        print(f"whole: {counts}, up to position {manifest['position']}")


@tenant.command("purge")
def purge(
    name: Name,
    confirmed: Annotated[str, typer.Option("--yes-purge", metavar="TENANT", help="The same name again.")] = "",
    certificate: Certificate = None,
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Close a tenant for ever and delete all that is stored of it; without --yes-purge only print what would go.

    Commands of the tenant are refused from then on. It goes on by itself when this command is interrupted; the same command
    again, or `foldline tenant purged`, waits for the end and prints what went.

    \b
    Example:
      foldline tenant purge umbrella
      foldline tenant purge umbrella --yes-purge umbrella --certificate umbrella.json
    """
    if confirmed and confirmed != name:
        complain(f"--yes-purge names {confirmed!r}, not {name!r}")
        raise typer.Exit(USAGE)
    if not confirmed:
        show(_described(name, data, output), output)
        complain(f"Nothing was deleted. All of it goes, for ever, with --yes-purge {name}")
        return

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import tenant_calls

        await tenant_calls.purge(known, name)
        return await tenant_calls.until_purged(known, name)

    _told(call(ask, data, output), certificate, output)


@tenant.command("purged")
def purged(
    name: Name,
    certificate: Certificate = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until all is gone.")] = False,
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Print how far the purge of a tenant is, and who has not passed its end yet; when all is gone, what went."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import tenant_calls

        return await (tenant_calls.until_purged if wait else tenant_calls.purged)(known, name)

    _told(call(ask, data, output), certificate, output)


def _described(name: str, data: Path, output: Output) -> dict[str, Any]:
    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import tenant_calls

        return await tenant_calls.describe(known, name)

    return call(ask, data, output)


def _told(found: dict[str, Any], certificate: Path | None, output: Output) -> None:
    show(found, output)
    if certificate is None:
        return
    if "sha256" not in found:
        complain("The purge is not done: no certificate was written.")
        return
    certificate.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
