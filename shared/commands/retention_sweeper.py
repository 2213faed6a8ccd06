"""Boxes what the tenants' rules say is past its date: some aggregates a round, the tenants and their types by turns.

Killed anywhere: each aggregate is boxed or not (`boxing.py`), and the next round finds the others. Two at once: a box's command
has an id that follows from the aggregate and its version, so one of them does it and the other finds it done. An aggregate that
gets an event between the look and the box is left, since the box is for the version that was seen.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from datetime import datetime

from shared.commands import retention
from shared.commands.boxing import Boxer
from shared.commands.registry import CommandRegistry
from shared.commands.retention import RULES, RULES_ID
from shared.folds.errors import Refusal, Unavailable
from shared.platform.metrics import Metrics
from shared.platform.postgres import Reads
from shared.platform.telemetry import logger

EVERY_S = 60.0
BOXES_MAX = 100
"""In one round."""
EXAMINED_MAX = 20_000
"""Aggregates in one round."""
PAGE_EXAMINED = 1000
PAGE_BOXES = 20

log = logger(__name__)

# Every tenant that has events, by one step of the index each, and of those the ones that ever set a rule.
_TENANTS = """
WITH RECURSIVE walk AS (
  (SELECT e.tenant FROM events e ORDER BY e.tenant LIMIT 1)
  UNION ALL
  SELECT n.tenant FROM walk w CROSS JOIN LATERAL (
    SELECT e.tenant FROM events e WHERE e.tenant > w.tenant ORDER BY e.tenant LIMIT 1) n
)
SELECT w.tenant FROM walk w
WHERE EXISTS (SELECT FROM events e WHERE e.tenant = w.tenant AND e.category = %s AND e.aggregate_id = %s)
"""


class RetentionSweeper:
    """Boxes by the rules of all tenants. Several may run at once."""

    def __init__(self, boxer: Boxer, reads: Reads, registry: CommandRegistry, *, clock: Callable[[], datetime]) -> None:
        self._boxer = boxer
        self._reads = reads
        self._registry = registry
        self._clock = clock
        self._after: dict[tuple[str, str], str] = {}
        """How far the last rounds came, by tenant and type."""
        self._last = ("", "")
        self._boxed = self._examined = 0
        self._left: Counter[str] = Counter()

    def register(self, metrics: Metrics) -> None:
        """Makes the numbers part of what the process exports."""
        metrics.counter("foldline.retention.boxed", "Aggregates that a rule has boxed.", lambda: [(self._boxed, {})])
        metrics.counter(
            "foldline.retention.left",
            "Aggregates past their date that were left where they are, by reason.",
            lambda: [(count, {"reason": reason}) for reason, count in list(self._left.items())],
        )

    async def run(self) -> None:
        """Boxes until cancelled. Whatever goes wrong is logged and tried again in the next round."""
        while True:
            try:
                if boxed := await self.round():
                    log.info("retention_boxed", aggregates=boxed)
            except Refusal as refusal:
                log.warning("retention_waits", reason=refusal.reason)
            except Exception as error:  # noqa: BLE001 - it is tried again
                log.warning("retention_failed", error=type(error).__name__)
            await asyncio.sleep(EVERY_S)

    async def round(self) -> int:
        """Boxes what is past its date, up to BOXES_MAX aggregates; returns how many. Raises Unavailable or OverLimit."""
        pairs = await self._rules()
        self._after = {pair: at for pair, at in self._after.items() if pair in pairs}
        # Begins behind the rule that was the last of the round before.
        order = sorted(pairs, key=lambda pair: (pair <= self._last, pair))
        boxed = examined = 0
        while order and boxed < BOXES_MAX and examined < EXAMINED_MAX:
            pair, order = order[0], order[1:]
            self._last = pair
            count, more = await self._page(*pair, pairs[pair])
            boxed, examined = boxed + count, examined + PAGE_EXAMINED
            if more:
                order.append(pair)
        return boxed

    async def _rules(self) -> dict[tuple[str, str], int]:
        async with self._reads.connection() as connection:
            rows = await (await connection.execute(_TENANTS, (RULES.category, RULES_ID))).fetchall()
        found: dict[tuple[str, str], int] = {}
        for (tenant,) in rows:
            for category, days in (await retention.current(self._registry, self._reads, tenant)).items():
                found[tenant, category] = days
        return found

    async def _page(self, tenant: str, category: str, days: int) -> tuple[int, bool]:
        """Boxes what is past its date of the next page of a type; returns how many, and whether there is more of the type."""
        page = await retention.plan(
            self._boxer,
            self._reads,
            tenant,
            category,
            days,
            self._clock(),
            after=self._after.get((tenant, category), ""),
            examined=PAGE_EXAMINED,
            found_max=PAGE_BOXES,
        )
        boxed = 0
        for one in page.planned:
            if one.held_by:
                self._left[one.held_by] += 1
                continue
            try:
                await self._boxer.box_idle(one.key, one.version)
            except Unavailable:
                raise
            except Refusal as refusal:
                self._left[refusal.reason] += 1
                log.info("retention_left", tenant=tenant, category=category, aggregate_id=one.key[2], reason=refusal.reason)
                continue
            boxed += 1
            self._boxed += 1
        self._after[tenant, category] = page.after
        return boxed, bool(page.after)
