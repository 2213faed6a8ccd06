"""How many deliveries are dead, and since when the oldest one waits: for operators, and as gauges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, LiteralString, NamedTuple

from shared.platform.metrics import Metrics
from shared.platform.postgres import Connection
from shared.platform.probe import DatabaseProbe
from shared.platform.watched import Values, watch

DEAD_MAX = 10_000
"""At most so many dead deliveries are counted."""

# Both by the index of status and number. A lower number was saved earlier.
_READ: LiteralString = f"""
SELECT (SELECT count(*) FROM (SELECT FROM deliveries WHERE status = 'dead' LIMIT {DEAD_MAX}) AS d),
  (SELECT created_at FROM deliveries WHERE status = 'pending' ORDER BY number LIMIT 1)
"""  # noqa: S608 (our own number)

METRICS = {
    "foldline.deliveries.dead": ("1", f"Deliveries that were given up and wait for an operator, {DEAD_MAX} at the most."),
    "foldline.delivery.waiting": ("s", "For how long the oldest delivery that was not given up has waited."),
}


class Backlog(NamedTuple):
    """What has not arrived."""

    dead: int
    # When the oldest delivery was made that is still tried; None if there is none.
    waiting_since: datetime | None


async def read(connection: Connection) -> Backlog:
    """The deliveries that have not arrived."""
    cursor = await connection.execute(_READ)
    return _backlog(await cursor.fetchall())


def watch_deliveries(metrics: Metrics, probe: DatabaseProbe, clock: Callable[[], datetime]) -> None:
    """Makes gauges of the deliveries that have not arrived."""

    async def ask() -> Values:
        dead, since = _backlog(await probe.rows(_READ))
        return {
            "foldline.deliveries.dead": [(dead, {})],
            "foldline.delivery.waiting": [(0.0 if since is None else max((clock() - since).total_seconds(), 0.0), {})],
        }

    watch(metrics, METRICS, ask)


def _backlog(rows: Sequence[Any]) -> Backlog:
    [(dead, since)] = rows
    return Backlog(dead, since)
