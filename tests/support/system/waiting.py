"""Waits for conditions. A test never sleeps for a time that it hopes is long enough."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

T = TypeVar("T")


@overload
async def eventually(condition: Callable[[], Awaitable[T]], deadline_s: float = 30.0, *, every_s: float = 0.01) -> T: ...
@overload
async def eventually(condition: Callable[[], T], deadline_s: float = 30.0, *, every_s: float = 0.01) -> T: ...
async def eventually(condition: Callable[[], Any], deadline_s: float = 30.0, *, every_s: float = 0.01) -> Any:
    """Calls `condition`, sync or async, until it returns something true, and returns that.

    An AssertionError in it means "not yet". Past the deadline the test fails with the last one, or with what the
    condition last returned. Any other exception comes through at once.
    """
    end = time.monotonic() + deadline_s
    while True:
        failure: AssertionError | None = None
        result: object = None
        try:
            called = condition()
            value = await called if inspect.isawaitable(called) else called
            if value:
                return value
            result = value
        except AssertionError as error:
            failure = error
        if time.monotonic() > end:
            raise failure or AssertionError(f"not within {deadline_s} s, the last answer was {result!r}")
        await asyncio.sleep(every_s)
