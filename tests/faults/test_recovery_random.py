"""A thousand leaders, one after the other, to each of which something happens at a random place."""

from __future__ import annotations

import random

import pytest

from tests.support.system.halting import AT_RECOVERY, AT_STEP, Halt, Life
from tests.support.system.matrix import PATHS, Matrix, World
from tests.support.system.waiting import eventually

OF_A_WORLD = 50
"""Faults that happen in one world."""
ASKED_AGAIN_S = 5.0
"""So soon a command is sent again that was not, because a leader was paused before it began its term, and began it too late."""
PLACES = (*AT_STEP, *AT_RECOVERY)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """As many worlds as the wanted number of faults takes."""
    metafunc.parametrize("seed", range(-(-metafunc.config.getoption("--random-faults") // OF_A_WORLD)))


@pytest.mark.long
@pytest.mark.timeout(3600)
async def test_whatever_happens_to_leaders_at_random_places(own_matrix: Matrix, seed: int) -> None:
    """With processes of all paths under way: all end, and each step has left its event once."""
    dice = random.Random(seed)
    matrix = own_matrix
    (world,) = await matrix.worlds(1, begin=False)
    try:
        for _ in range(OF_A_WORLD):
            begun = await matrix.begin((dice.choice(list(PATHS)), "") for _ in range(dice.randint(0, 4)))
            world.processes = [*world.processes, *begun]
            with Life(world.settings, somewhere(world, dice)) as life:
                # It may not come to its place: then it dies where it is.
                if await life.halts_within(dice.uniform(0.3, 1.5)):
                    await dice.choice((kill, stop, restart, pause))(matrix, world, life, dice)
        with Life(world.settings, world.halt(asked_again_s=ASKED_AGAIN_S)):
            await matrix.ended(world)
        await matrix.hold_to_paths([world])
    finally:
        await world.close()


def somewhere(world: World, dice: random.Random) -> Halt:
    """A random place."""
    return world.halt(dice.choice(PLACES), count=dice.randint(1, 6), asked_again_s=ASKED_AGAIN_S)


async def kill(matrix: Matrix, world: World, life: Life, dice: random.Random) -> None:
    """It is killed with -9."""
    life.kill()


async def stop(matrix: Matrix, world: World, life: Life, dice: random.Random) -> None:
    """As in a rolling restart."""
    life.terminate()
    assert await life.ends() == 0


async def restart(matrix: Matrix, world: World, life: Life, dice: random.Random) -> None:
    """The database is killed with -9 and starts again; the service lives on for a moment."""
    await matrix.restart_database()
    life.go_on()
    await life.halts_within(dice.uniform(0, 1))
    await eventually(matrix.answers, 120)


async def pause(matrix: Matrix, world: World, life: Life, dice: random.Random) -> None:
    """It loses its lease, and goes on when another leads; both live on for a moment."""
    led_by = await world.led_by()
    await world.sever()
    with Life(world.settings, somewhere(world, dice)) as other:
        await eventually(lambda: world.is_led_by_another_than(led_by), 120, every_s=0.05)
        life.go_on()
        await other.halts_within(dice.uniform(0, 1))
