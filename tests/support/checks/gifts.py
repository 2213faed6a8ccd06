"""What is to be found when gifts have gone their way."""

from __future__ import annotations

from tests.support.domains.gifts import World
from tests.support.fakes.line import uid
from tests.support.system.waiting import eventually

HAPPY = [
    ("event", "AccountOpened"),
    ("command", "gift"),
    ("timer_set", "late"),
    ("answer", "gift"),
    ("command", "bonus"),
    ("answer", "bonus"),
]


async def all_ended(world: World, count: int, deadline_s: float = 10.0) -> None:
    """Waits for so many processes to have ended."""

    async def ended() -> bool:
        return (await world.statuses())["ended"] == count

    await eventually(ended, deadline_s)


async def everything_once(world: World, *numbers: int) -> None:
    """Each account got its gift and its bonus, once; each process has the history of one that met nothing."""
    assert world.write.carried_out == {(uid(number), amount): 1 for number in numbers for amount in (500, 100)}
    for number in numbers:
        assert await world.history(number) == HAPPY
    assert await world.query("SELECT step FROM process_commands") == []
    assert await world.query("SELECT name FROM process_timers") == []
