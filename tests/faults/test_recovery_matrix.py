"""What may happen to a leader, at every step boundary of both processes and while it recovers, each once.

A cell is a step, a place and an event. At each place (`tests/support/system/halting.py`) a service stands with a process for
every step, so one event covers the cells of all steps. A place at a step is met in two ways: a service that has run the steps
before remembers the processes, and one that has taken over reads them first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.system.halting import ALIGNED, AT_RECOVERY, AT_STEP, WRITES_REFUSED, Halt, Life
from tests.support.system.matrix import STEPS, Matrix, World
from tests.support.system.waiting import eventually

# As many seconds as a machine may take that does much else.
pytestmark = pytest.mark.timeout(600)

ALL_STEPS = {(path, step) for path, steps in STEPS.items() for step in steps}
AT_ONCE = 4
"""Cells, as they take processor time; those whose time is spent on waiting for the end of a lease run all at once."""

ASKED_AGAIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Cell:
    """A place with all steps."""

    place: str
    # Whether the service has taken over from one that was killed.
    taken_over: bool


REMEMBERED = [Cell(place, taken_over=False) for place in AT_STEP]
# Between the commit and the answer nothing depends on how the round was made.
READ = [Cell(place, taken_over=True) for place in ("decided", "saving", "noted", "over")]
RECOVERY = [Cell(place, taken_over=True) for place in AT_RECOVERY]
CELLS = [*REMEMBERED, *READ, *RECOVERY]


async def halted(life: Life, world: World, cell: Cell) -> None:
    """Waits until it stands at its place, with all steps if that is at a step."""
    await life.halts()
    if cell.place in AT_STEP:
        assert world.met() == ALL_STEPS, cell


async def taken_over_from(world: World, cell: Cell) -> None:
    """Another has led before, and was killed with all processes near their steps, or at them."""
    if not cell.taken_over:
        return
    with Life(world.settings, world.halt(ALIGNED if cell.place in AT_STEP else "sending", aligned=True)) as life:
        await life.halts()


async def test_killed_and_again_at_every_place_of_recovery(matrix: Matrix) -> None:
    """Killed with -9 at each place at a step, then each further leader at a place of its recovery: the last one ends all."""

    async def killed(world: World, cell: Cell) -> None:
        await taken_over_from(world, cell)
        with Life(world.settings, at(world, cell)) as life:
            await halted(life, world, cell)
        for again in AT_RECOVERY:
            with Life(world.settings, world.halt(again)) as life:
                await life.halts()
        with Life(world.settings, world.halt()):
            await matrix.ended(world)

    await each(matrix, killed, [*REMEMBERED, *READ])


async def test_stopped_as_in_a_rolling_restart(matrix: Matrix) -> None:
    """A leader is told to stop at each place while another stands by: it ends by itself, and that one goes on."""

    async def stopped(world: World, cell: Cell) -> None:
        await taken_over_from(world, cell)
        # It has not lost its lease before the other stands by, however long that takes.
        with Life(world.settings, at(world, cell, lease_s=600.0)) as life:
            await halted(life, world, cell)
            with Life(world.settings, world.halt()):
                await eventually(world.is_stood_by, 120, every_s=0.05)
                life.terminate()
                assert await life.ends() == 0
                await matrix.ended(world)

    await each(matrix, stopped, [*REMEMBERED, *RECOVERY])


async def test_paused_past_its_lease(matrix: Matrix) -> None:
    """A leader is stopped at each place until another leads, and goes on beside it: each step is taken once.

    One that had not yet begun its term may begin it behind the other. What it then does not come to send, the other one does,
    when it is asked again.
    """

    async def paused(world: World, cell: Cell) -> None:
        await taken_over_from(world, cell)
        with Life(world.settings, at(world, cell, asked_again_s=ASKED_AGAIN_S)) as life:
            await halted(life, world, cell)
            led_by = await world.led_by()
            with Life(world.settings, world.halt(asked_again_s=ASKED_AGAIN_S)):
                await eventually(lambda: world.is_led_by_another_than(led_by), 120, every_s=0.05)
                life.go_on()
                await matrix.ended(world)
                assert life.is_alive

    await each(matrix, paused, CELLS, at_once=len(CELLS))


@pytest.mark.parametrize("ended", [False, True], ids=["has only taken over", "has ended all"])
async def test_what_one_writes_that_leads_no_more_is_refused(matrix: Matrix, ended: bool) -> None:
    """A leader is stopped at each place until another has come so far. It goes on as if it led: nothing changes.

    It does not look at its lease: so its writes come, as those in the moment before one that was stopped notices.
    """

    async def fenced(world: World, cell: Cell) -> None:
        await taken_over_from(world, cell)
        with Life(world.settings, at(world, cell, blind=True)) as life:
            await halted(life, world, cell)
            with Life(world.settings, world.halt("" if ended else "reclaimed")) as other:
                if not ended:
                    await other.halts()
                    await refused(life, world)
                    other.go_on()
                await matrix.ended(world)
            if ended:
                await refused(life, world)

    # One that has the lease and not yet begun its term may begin it, even behind another: then that one is refused.
    cells = CELLS if ended else [cell for cell in CELLS if cell.place != "leading"]
    await each(matrix, fenced, cells, at_once=len(cells))


async def test_the_database_restarts(own_matrix: Matrix) -> None:
    """PostgreSQL is killed with -9 while leaders stand at all places, and starts again: each goes on and ends what it began."""
    worlds = await own_matrix.worlds(len(CELLS))
    await asyncio.gather(*map(taken_over_from, worlds, CELLS))
    with ExitStack() as living:
        lives = [living.enter_context(Life(world.settings, at(world, cell))) for world, cell in zip(worlds, CELLS, strict=True)]
        await asyncio.gather(*map(halted, lives, worlds, CELLS))
        await own_matrix.restart_database()
        for life in lives:
            life.go_on()
        await eventually(own_matrix.answers, 120)
        await own_matrix.ended(*worlds)
        assert all(life.is_alive for life in lives)
    await own_matrix.hold_to_paths(worlds)
    for world in worlds:
        await world.close()


async def refused(life: Life, world: World) -> None:
    """Lets a leader go on that leads no more, and waits for its end: it changes nothing."""
    before = await world.all_rows()
    life.go_on()
    assert await life.ends() == WRITES_REFUSED
    assert await world.all_rows() == before


def at(world: World, cell: Cell, **more: Any) -> Halt:
    """A service that halts at the cell's place, with all steps if that is at a step."""
    return world.halt(cell.place, aligned=cell.place in AT_STEP, **more)


async def each(
    matrix: Matrix, run: Callable[[World, Cell], Coroutine[Any, Any, None]], cells: list[Cell], at_once: int = AT_ONCE
) -> None:
    """Runs all cells, each in a world of its own, and holds all processes to their paths."""
    worlds = await matrix.worlds(len(cells))
    few = asyncio.Semaphore(at_once)

    async def one(world: World, cell: Cell) -> None:
        async with few:
            try:
                await run(world, cell)
            except Exception as error:
                error.add_note(f"{cell}, commands left: {await world.left()}")
                raise

    try:
        async with asyncio.TaskGroup() as group:
            for world, cell in zip(worlds, cells, strict=True):
                group.create_task(one(world, cell))
        await matrix.hold_to_paths(worlds)
    finally:
        for world in worlds:
            await world.close()
