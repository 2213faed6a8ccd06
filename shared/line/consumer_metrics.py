"""What consumers of the line tell of themselves in metrics: where they are, and whether they go on."""

from __future__ import annotations

from collections.abc import Iterable

from shared.line.standing import Standing, ask_standings
from shared.platform.leader import LockClass
from shared.platform.metrics import Metrics
from shared.platform.probe import DatabaseProbe
from shared.platform.watched import Values, watch

DESCRIBED = {
    "foldline.consumer.position": ("1", "The position up to which a consumer has followed the line; foldline.head is its end."),
    "foldline.consumer.goes_on": ("1", "1 while a consumer follows the line, 0 if it stopped, meets errors or nobody leads."),
    "foldline.consumer.moved": ("s", "When a consumer's checkpoint last moved, in seconds since 1970."),
}


def watch_consumers(metrics: Metrics, probe: DatabaseProbe, lock_class: LockClass, shard: int, names: Iterable[str]) -> None:
    """Makes gauges of the consumers' checkpoints, whichever instance leads."""
    wanted = tuple(names)

    async def ask() -> Values:
        return values(await ask_standings(probe, lock_class, shard, wanted))

    watch(metrics, DESCRIBED, ask)


def values(standings: Iterable[Standing]) -> Values:
    """The gauges' values."""
    every = [({"foldline.consumer": it.name, "foldline.shard": str(it.shard)}, it) for it in standings]
    return {
        "foldline.consumer.position": [(it.checkpoint.position, labels) for labels, it in every],
        "foldline.consumer.goes_on": [(0 if it.trouble else 1, labels) for labels, it in every],
        "foldline.consumer.moved": [(it.moved_at.timestamp(), labels) for labels, it in every if it.moved_at],
    }
