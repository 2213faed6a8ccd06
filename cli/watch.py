"""`foldline watch`: a summary or a list as it is, and again whenever it changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Annotated

import typer

from cli.endpoints import Endpoints, UsageError
from cli.invoke import call
from cli.options import DATA, Data, Format, Output, Tenant
from cli.output import one_line
from cli.summaries import SUMMARIES

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

        _until_stopped(ask, data, output)


def watch_list(name: str) -> None:
    """Adds the command that follows a list of one kind of summary."""
    text = f"""Print all {name}s that pass the filters, then those that enter, change and leave, until Ctrl-C.

    \b
    Each field of the list's filter is an option: --owner ID, --status active.
    """

    @watch.command(f"{name}s", help=text, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def follow(
        context: typer.Context,
        count: Annotated[int, typer.Option("--count", min=0, help="End after so many lines; 0: never.")] = 0,
        resume: Annotated[str, typer.Option("--resume", help="A resume token: print only what has changed since.")] = "",
        tenant: Tenant = "acme",
        data: Data = DATA,
        output: Format = Output.TEXT,
    ) -> None:
        async def ask(known: Endpoints) -> None:
            from cli import watch_calls

            printed = 0
            async for change in watch_calls.watch_list(known, tenant, name, _filters(context.args), resume):
                row = one_line(change[name]) if name in change else change[f"{name}_id"]
                print(
                    json.dumps(change, ensure_ascii=False) if output is Output.JSON else f"{change['change']:8}{row}", flush=True
                )
                printed += 1
                if printed == count:
                    return

        _until_stopped(ask, data, output)


def _filters(options: list[str]) -> dict[str, str]:
    """Options with their values. Raises UsageError."""
    found: dict[str, str] = {}
    given = iter(options)
    for option in given:
        name, equals, value = option.partition("=")
        if not name.startswith("--"):
            raise UsageError(f"not an option with a value: {option!r}")
        if not equals and (value := next(given, "")) == "":
            raise UsageError(f"{option} needs a value")
        found[name[2:].replace("-", "_")] = value
    return found


def _until_stopped(ask: Callable[[Endpoints], Coroutine[object, object, None]], data: Data, output: Format) -> None:
    try:
        call(ask, data, output)
    except KeyboardInterrupt:
        raise typer.Exit from None


for each in SUMMARIES:
    watch_summary(each)
    watch_list(each)
