"""As of when something is asked for, from the options of a command."""

from __future__ import annotations

from typing import Any

from cli.commands import read_moment
from cli.endpoints import UsageError


def as_of(at: str | None, position: int | None, token: str | None) -> Any:
    """As of when something is asked for, as a message; None for now. Raises UsageError."""
    from cli import past_calls as calls

    if sum(option is not None for option in (at, position, token)) > 1:
        raise UsageError("give one of --at, --at-position and --at-token")
    return calls.as_of(None if at is None else read_moment(at), position, token)
