"""What watches of rows and of lists have in common: the pace at which they are written, and the refusal of a resume token."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from shared.folds.errors import Invalid, OverLimit

HEARTBEAT_S = 10.0
WRITE_S = 5.0
"""So long a reader may take nothing; what is on its way to it, 64 KiB and more, it need not have taken."""
WAIT_MAX_S = 10.0
"""So long a watch waits until the tables are where its tokens say."""


async def in_time(writing: Awaitable[None]) -> None:
    """Waits for an answer to be written. Raises OverLimit WATCH_TOO_SLOW."""
    try:
        async with asyncio.timeout(WRITE_S):
            await writing
    except TimeoutError:
        raise OverLimit(
            "WATCH_TOO_SLOW", "the caller took none of the changes for too long; go on with the last resume token"
        ) from None


def invalid(what: str) -> Invalid:
    """The refusal of a token that was not made for `what`."""
    return Invalid(
        "RESUME_TOKEN_INVALID",
        f"the resume token is not one of {what}",
        violations=(("resume_token", "must be that of an answer about the same, unchanged"),),
    )
