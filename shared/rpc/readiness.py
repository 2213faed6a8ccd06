"""Readiness of a process: named checks that run once a second, for gRPC health and the admin port.

A probe gets the last result, so any number of probes costs the database one statement a second.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from shared.platform.telemetry import logger

Check = Callable[[], Coroutine[Any, Any, str]]
"""Returns why the process is not ready, in a few words for an operator; empty if it is. An exception counts as a reason."""

ASK_EVERY_S = 1.0
ANSWER_WITHIN_S = 2.0
# The last answer of a process whose checks are no longer asked says nothing.
STALE_S = 3 * (ASK_EVERY_S + ANSWER_WITHIN_S)

log = logger(__name__)


class Readiness:
    """The last results of the checks. Not ready before the first results, nor after `drain`."""

    def __init__(self, *, every_s: float = ASK_EVERY_S, within_s: float = ANSWER_WITHIN_S) -> None:
        self._every_s = every_s
        self._within_s = within_s
        self._checks: dict[str, Check] = {}
        self._failures = {"start": "it is starting"}
        self._asked_at = time.monotonic()
        self._draining = False
        self._under_way: dict[str, asyncio.Task[str]] = {}

    def add(self, name: str, check: Check) -> None:
        """Adds a check."""
        self._checks[name] = check

    def drain(self) -> None:
        """Makes the process not ready from now on, whatever the checks say."""
        self._draining = True

    @property
    def failures(self) -> dict[str, str]:
        """The reasons of the checks that fail, by name; empty if the process is ready."""
        if self._draining:
            return {"drain": "it is being stopped"}
        if time.monotonic() - self._asked_at > STALE_S:
            return {"checks": "they have not been asked for a while"}
        return dict(self._failures)

    @property
    def ready(self) -> bool:
        """Whether nothing is missing."""
        return not self.failures

    async def ask(self) -> dict[str, str]:
        """Runs all checks at once and returns the reasons of those that fail."""
        names = list(self._checks)
        reasons = await asyncio.gather(*(self._ask(name) for name in names))
        failures = {name: reason for name, reason in zip(names, reasons, strict=True) if reason}
        if failures != self._failures:
            log.info("ready" if not failures else "not_ready", checks=failures)
        self._failures, self._asked_at = failures, time.monotonic()
        return self.failures

    async def keep_asking(self, tell: Callable[[bool], Awaitable[None]]) -> None:
        """Runs the checks repeatedly until cancelled; calls `tell` with each result."""
        while True:
            await self.ask()
            await tell(self.ready)
            await asyncio.sleep(self._every_s)

    async def close(self) -> None:
        """Ends the checks that are under way."""
        for task in self._under_way.values():
            task.cancel()
        await asyncio.gather(*self._under_way.values(), return_exceptions=True)

    async def _ask(self, name: str) -> str:
        # A check that does not end is not waited for, nor asked a second time meanwhile: cancelling a statement of a frozen
        # database takes the driver 5 s.
        task = self._under_way.get(name)
        if task is None or task.done():
            task = self._under_way[name] = asyncio.ensure_future(self._checks[name]())
            await asyncio.wait({task}, timeout=self._within_s)
        if not task.done():
            task.cancel()
            return f"no answer within {self._within_s:g} s"
        try:
            return task.result()
        except asyncio.CancelledError:
            return f"no answer within {self._within_s:g} s"
        except Exception as error:  # noqa: BLE001 (a check that is broken is a reason not to be ready)
            # The exception's text may hold anything: only its kind is told.
            return type(error).__name__
