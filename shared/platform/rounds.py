"""Work that is done again and again beside a service: what hinders it is logged once, and it is tried again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from shared.folds.errors import Refusal
from shared.platform.cancellation import heed_cancellation
from shared.platform.telemetry import logger

log = logger(__name__)


class Hindrances:
    """Logs why work does not go on, once for each reason and thing, until it goes on again."""

    def __init__(self, event: str) -> None:
        """`event` names the log lines."""
        self._event = event
        self._told: dict[str, str] = {}

    @contextmanager
    def told(self, about: str = "", **facts: object) -> Iterator[None]:
        """Keeps an exception of the block from the caller; `about` says what the work is on."""
        why = ""
        try:
            yield
        except Refusal as refusal:
            why = refusal.reason
        except Exception as error:  # noqa: BLE001 - it is tried again
            why = type(error).__name__
        if not why:
            self._told.pop(about, None)
        elif why != self._told.get(about):
            self._told[about] = why
            log.warning(self._event, reason=why, **facts)


async def rounds(hindrances: Hindrances, one: Callable[[], Awaitable[object]], every_s: float | Callable[[], float]) -> None:
    """Calls `one` until cancelled, with so many seconds between; a function says how many after each call."""
    while True:
        with hindrances.told():
            await one()
        heed_cancellation()
        await asyncio.sleep(every_s if isinstance(every_s, float) else every_s())
