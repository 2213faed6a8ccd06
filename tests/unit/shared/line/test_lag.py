"""How far behind a consumer is in seconds, whether or not the line answers."""

from __future__ import annotations

import pytest

from shared.line.follower import LineAway
from shared.line.lag import Lag, consumers_lag
from shared.platform.metrics import Metrics
from tests.support.fakes.line import BEGIN, Store, StoreLine, uid
from tests.support.system.gauges import page


def line_of(events: int) -> Store:
    """A line with an event a second."""
    store = Store()
    for number in range(1, events + 1):
        store.person("acme", uid(number), "Ada")
    return store


async def test_it_is_the_age_of_the_first_event_that_is_not_applied() -> None:
    """Which grows while nothing is asked; a consumer that goes on has none until the line is asked again."""
    store, places, now = line_of(5), {"accounts": 3, "people": 5}, [BEGIN.timestamp() + 64]

    async def recorded_at(position: int) -> object:
        return store.events[position].recorded_at.ToDatetime(BEGIN.tzinfo) if position < 5 else None

    lag = Lag(lambda: places, recorded_at, lambda: now[0])  # type: ignore[arg-type]
    assert lag.seconds() == {"accounts": 0, "people": 0}
    await lag.refresh()
    assert lag.seconds() == {"accounts": 60, "people": 0}
    now[0] += 10
    assert lag.seconds() == {"accounts": 70, "people": 0}
    places["accounts"] = 4
    assert lag.seconds() == {"accounts": 0, "people": 0}
    await lag.refresh()
    assert lag.seconds() == {"accounts": 69, "people": 0}


async def test_it_grows_while_the_event_store_is_away() -> None:
    """Since that is when nothing is applied. One event is read at a time, and none if nobody leads."""
    store, places = line_of(5), {"accounts": 3}
    metrics, line, now = Metrics(), StoreLine(store), [BEGIN.timestamp() + 104]
    leads = [line]
    consumers_lag(metrics, lambda: places, lambda: leads[0] if leads else None, 1, lambda: now[0])
    [refresh] = metrics._refreshers
    name = 'foldline_consumer_lag_seconds{foldline_consumer="accounts",foldline_shard="1"}'
    await refresh()
    assert (await page(metrics))[name] == 100
    store.away = True
    now[0] += 100
    with pytest.raises(LineAway):
        await refresh()
    assert (await page(metrics))[name] == 200
    leads.clear()
    places.clear()
    await refresh()
    assert name not in await page(metrics)
