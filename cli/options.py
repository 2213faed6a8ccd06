"""Options and arguments that several commands have."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Output(StrEnum):
    """How answers are printed."""

    TEXT = "text"
    JSON = "json"


Data = Annotated[Path, typer.Option("--data", envvar="FOLDLINE_DATA", help="The folder that `foldline dev` runs on.")]
Format = Annotated[Output, typer.Option("--output", "-o", help="text for people, json for programs.")]
Tenant = Annotated[str, typer.Option("--tenant", "-t", help="The tenant whose data is meant; selects the token.")]

At = Annotated[str | None, typer.Option("--at", metavar="MOMENT", help="As it was then.")]
AtPosition = Annotated[int | None, typer.Option("--at-position", min=1, help="As it was behind this event: for operators.")]
AtToken = Annotated[
    str | None, typer.Option("--at-token", metavar="TOKEN", help="As it was behind the command of this consistency token.")
]

DATA = Path(".foldline")
