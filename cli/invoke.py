"""Makes the calls of a command, and turns a failed call into a message and an exit code."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TypeVar

import typer

from cli import endpoints
from cli.endpoints import Endpoints, NotRunning, UsageError
from cli.options import Output
from cli.output import REFUSED, UNAVAILABLE, complain, fail, print_json

T = TypeVar("T")

NOT_REACHED = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")
"""Status codes that say that the service did not answer; the same command may succeed later."""


def call(ask: Callable[[Endpoints], Coroutine[object, object, T]], data: Path, output: Output) -> T:
    """The answer of the calls that `ask` makes. If there is none, prints why and exits with the code for it."""
    try:
        known = endpoints.load(data)
        # gRPC is imported only here, so that help and bad input do not wait for it.
        from cli.calls import Refused, told
        from cli.traces import recording

        try:
            with recording():
                return asyncio.run(ask(known))
        except Refused as refused:
            error = told(refused.refusal)
    except (UsageError, NotRunning) as problem:
        fail(problem, output)
    if output is Output.JSON:
        print_json({"error": error})
    else:
        complain(f"refused: {error['reason']}: {error['text']}")
        for violation in error.get("violations", ()):
            complain(f"  {violation['field'] or 'request'}: {violation['description']}")
        for name, value in error.get("facts", {}).items():
            complain(f"  {name.replace('_', ' ')}: {value}")
    raise typer.Exit(UNAVAILABLE if error["code"] in NOT_REACHED else REFUSED)
