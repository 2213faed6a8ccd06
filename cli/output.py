"""What the commands print, for people and for programs, and the exit codes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.endpoints import NotRunning, UsageError
from cli.options import Output

OK, REFUSED, USAGE, UNAVAILABLE = 0, 1, 2, 3


def show(found: dict[str, Any], output: Output) -> None:
    """Prints an answer: a line for each field, or one JSON document."""
    if output is Output.JSON:
        print_json(found)
        return
    width = max(map(len, found), default=0)
    for name, value in found.items():
        print(f"{name:{width}}  {one_line(value) if isinstance(value, dict | list) else value}")


def print_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints rows. Columns are never cut to the width of the terminal, because ids are there to be copied."""
    table = Table(*names, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=10_000).print(table, soft_wrap=True)


def print_lines(lines: Sequence[Text]) -> None:
    """Prints lines, in colours on a terminal; none is cut to its width."""
    console = Console(width=10_000)
    for line in lines:
        console.print(line, soft_wrap=True)


def show_page(
    found: dict[str, Any],
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    limit: int,
    output: Output,
    *,
    narrow: str = "name a type",
) -> None:
    """Prints a list, of which `found` is the whole answer and has `more`: as a table of the rows, or as one JSON document.

    `narrow` says how to ask for less.
    """
    if output is Output.JSON:
        print_json(found)
        return
    print_table(names, rows)
    if found["more"]:
        complain(f"There are more than {limit}: raise --limit, or {narrow}.")


def one_line(value: Any) -> str:
    """Data as one line of JSON."""
    return json.dumps(value, ensure_ascii=False)


def print_json(value: Any) -> None:
    """Prints data for programs, as one document."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def complain(text: str) -> None:
    """Prints to standard error."""
    typer.echo(text, err=True)


def fail(problem: UsageError | NotRunning, output: Output) -> NoReturn:
    """Prints what was wrong with the input, or that no system runs, and exits."""
    usage = isinstance(problem, UsageError)
    if output is Output.JSON:
        reason = "USAGE" if usage else "NOT_RUNNING"
        print_json({"error": {"code": reason, "reason": reason, "text": str(problem)}})
    else:
        complain(str(problem))
    raise typer.Exit(USAGE if usage else UNAVAILABLE)
