"""`foldline watch`: a summary as it is, and again whenever it changes."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from cli.endpoints import Endpoints
from cli.get import SUMMARIES
from cli.invoke import call
from cli.options import DATA, Data, Format, Output, Tenant
from cli.output import one_line

watch = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


def watch_summary(name: str) -> None:
    """Adds the command that follows one kind of summary."""
    article = "an" if name[0] in "aeio" else "a"

    @watch.command(name, help=f"Print {article} {name}'s summary as it is, and again whenever it changes, until Ctrl-C.")
    def follow(
        key: Annotated[str, typer.Argument(metavar="ID")],
        count: Annotated[int, typer.Option("--count", min=0, help="End after so many lines; 0: never.")] = 0,
        resume: Annotated[str, typer.Option("--resume", help="A resume token: print only what has changed since.")] = "",
        tenant: Tenant = "acme",
        data: Data = DATA,
        output: Format = Output.TEXT,
    ) -> None:
        async def ask(known: Endpoints) -> None:
            from cli import watch_calls

            printed = 0
            async for change in watch_calls.watch(known, tenant, name, key, resume):
                text = json.dumps(change, ensure_ascii=False) if output is Output.JSON else one_line(change[name])
                print(text, flush=True)
                printed += 1
                if printed == count:
                    return

        try:
            call(ask, data, output)
        except KeyboardInterrupt:
            raise typer.Exit from None


for each in SUMMARIES:
    watch_summary(each)
