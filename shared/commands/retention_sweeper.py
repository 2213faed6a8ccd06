"""Boxes and purges what the tenants' rules say is past its date: some aggregates a round, tenants, types and kinds by turns.

Killed anywhere: each aggregate is boxed or not (`boxing.py`), each purge begun or not (`aggregate_purging.py`), and the next
round finds the others. Two at once: the command has an id that follows from the aggregate and its version, so one of them does it
and the other finds it done. An aggregate that gets an event between the look and the deed is left, since it is for the version
that was seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import datetime

from shared.commands import retention, retention_plan
from shared.commands.aggregate_purging import AggregatePurger
from shared.commands.boxing import Boxer
from shared.commands.registry import CommandRegistry
from shared.commands.retention import RULES, RULES_ID
from shared.commands.retention_plan import Planned, PlannedPurge, Purges
from shared.folds.errors import Refusal, Unavailable
from shared.line.event_store import AggregateKey
from shared.platform.metrics import Metrics
from shared.platform.postgres import Reads
from shared.platform.rounds import Hindrances, rounds
from shared.platform.telemetry import logger

EVERY_S = 60.0
DONE_MAX = 100
"""Aggregates that are boxed or purged in one round, with those that go with them; the page that reaches it is the last."""
EXAMINED_MAX = 20_000
"""Aggregates in one round."""
PAGE_EXAMINED = 1000
PAGE_DONE = 20

BOX, PURGE = "box", "purge"

log = logger(__name__)

Turn = tuple[str, str, str]
"""Tenant, type, and whether it is to be boxed or purged."""

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
  AND NOT EXISTS (SELECT FROM tenant_purges p WHERE p.tenant = w.tenant)
"""


class RetentionSweeper:
    """Boxes and purges by the rules of all tenants. Several may run at once."""

    def __init__(
        self,
        boxer: Boxer,
        purges: Purges,
        purger: AggregatePurger,
        reads: Reads,
        registry: CommandRegistry,
        *,
        clock: Callable[[], datetime],
        boxes: bool = True,
    ) -> None:
        """`boxes`: whether there is an archive; without one nothing is boxed."""
        self._boxer = boxer
        self._purges = purges
        self._purger = purger
        self._reads = reads
        self._registry = registry
        self._clock = clock
        self._boxes = boxes
        self._after: dict[Turn, str] = {}
        """How far the last rounds came."""
        self._last: Turn = ("", "", "")
        self._done: Counter[str] = Counter()
        self._left: Counter[str] = Counter()

    def register(self, metrics: Metrics) -> None:
        """Makes the numbers part of what the process exports."""
        metrics.counter("foldline.retention.boxed", "Aggregates that a rule has boxed.", lambda: [(self._done[BOX], {})])
        metrics.counter(
            "foldline.retention.purged",
            "Aggregates that a rule has purged, without those that went with them.",
            lambda: [(self._done[PURGE], {})],
        )
        metrics.counter(
            "foldline.retention.left",
            "Aggregates past their date that were left where they are, by reason.",
            lambda: [(count, {"reason": reason}) for reason, count in list(self._left.items())],
        )

    async def run(self) -> None:
        """Works until cancelled. Whatever goes wrong is logged and tried again in the next round."""
        await rounds(Hindrances("retention_waits"), self.round, EVERY_S)

    async def round(self) -> int:
        """Boxes and purges what is past its date, up to DONE_MAX aggregates or a page more; returns how many, parts included.

        Raises Unavailable or OverLimit.
        """
        turns = await self._rules()
        self._after = {turn: at for turn, at in self._after.items() if turn in turns}
        # Begins behind the rule that was the last of the round before.
        order = sorted(turns, key=lambda turn: (turn <= self._last, turn))
        done = examined = 0
        while order and done < DONE_MAX and examined < EXAMINED_MAX:
            turn, order = order[0], order[1:]
            self._last = turn
            count, more = await self._page(turn, turns[turn])
            done, examined = done + count, examined + PAGE_EXAMINED
            if more:
                order.append(turn)
        if done:
            log.info("retention_done", aggregates=done)
        return done

    async def _rules(self) -> dict[Turn, int]:
        async with self._reads.connection() as connection:
            rows = await (await connection.execute(_TENANTS, (RULES.category, RULES_ID))).fetchall()
        found: dict[Turn, int] = {}
        for (tenant,) in rows:
            for category, rule in (await retention.current(self._registry, self._reads, tenant)).items():
                if rule.box_after_days and self._boxes:
                    found[tenant, category, BOX] = rule.box_after_days
                if rule.purge_after_days:
                    found[tenant, category, PURGE] = rule.purge_after_days
        return found

    async def _page(self, turn: Turn, days: int) -> tuple[int, bool]:
        """Does what is to be done of the next page of a type; returns with how many, and whether there is more of the type."""
        tenant, category, kind = turn
        after, now = self._after.get(turn, ""), self._clock()
        found: list[tuple[AggregateKey, int, str, Callable[[], Awaitable[object]]]]
        if kind == BOX:
            boxes = await retention_plan.plan(
                self._boxer, self._reads, tenant, category, days, now, after=after, examined=PAGE_EXAMINED, found_max=PAGE_DONE
            )
            found = [(each.key, each.parts, each.held_by, self._box(each)) for each in boxes.planned]
            self._after[turn] = boxes.after
        else:
            purges = await self._purges.plan(
                tenant, category, days, now, after=after, examined=PAGE_EXAMINED, found_max=PAGE_DONE
            )
            found = [(each.key, len(each.parts), each.held_by, self._purge(each)) for each in purges.planned]
            self._after[turn] = purges.after
        done = 0
        for key, parts, held_by, carry_out in found:
            if await self._one(kind, key, held_by, carry_out):
                done += 1 + parts
        return done, bool(self._after[turn])

    def _box(self, planned: Planned) -> Callable[[], Awaitable[object]]:
        return lambda: self._boxer.box_idle(planned.key, planned.version)

    def _purge(self, planned: PlannedPurge) -> Callable[[], Awaitable[object]]:
        return lambda: self._purger.begin(planned)

    async def _one(self, kind: str, key: AggregateKey, held_by: str, carry_out: Callable[[], Awaitable[object]]) -> bool:
        """Whether one was boxed or purged."""
        if held_by:
            self._left[held_by] += 1
            return False
        try:
            await carry_out()
        except Unavailable:
            raise
        except Refusal as refusal:
            self._left[refusal.reason] += 1
            log.info("retention_left", tenant=key[0], category=key[1], aggregate_id=key[2], reason=refusal.reason)
            return False
        self._done[kind] += 1
        return True
