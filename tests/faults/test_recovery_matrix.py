"""kill -9 of the saga service at every step boundary of both processes, and again while it recovers: each step once."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Iterator

import pytest

from deploy.local.system import WRITE
from tests.support.system import mortal
from tests.support.system.engines import Engines
from tests.support.system.mail import Mailbox
from tests.support.system.matrix import LEAVES, PATHS, Matrix
from tests.support.system.mortal import AT_RECOVERY, AT_STEP, Event, Fate
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

DIES_WITHIN_S = 30.0
RANDOM_KILLS, BATCH_KILLS = 1000, 50

# Every step is met on one path, with all that leads to it. A step that is refused without being sent has no places.
STEPS = {
    "completed": ("debit", "credit", "complete"),
    "refunded": ("refund", "fail"),
    "suspended": ("suspend",),
    "succeeded": ("reserve", "hold", "confirm"),
    "released": ("release", "fail"),
}
CELLS = [(path, step, place) for path, steps in STEPS.items() for step in steps for place in AT_STEP]
# Whether a statement on its way is carried out does not depend on the step: one of each type of process is enough.
CELLS_OFTEN = [
    pytest.param(*cell, marks=[pytest.mark.long] * (cell[2] == "saving" and cell[1] not in ("credit", "hold"))) for cell in CELLS
]


@pytest.fixture(scope="module")
def quiet(engines: Engines, shared_mailbox: Mailbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A system of which only the write service runs."""
    folder = tmp_path_factory.mktemp("matrix")
    stack = Stack(folder, engines.databases(), engines.postgres, engines.nats, shared_mailbox)

    async def start() -> None:
        stack.start(WRITE)
        await stack.wait_ready(WRITE)

    try:
        asyncio.run(start())
        yield stack
    finally:
        asyncio.run(stack.stop_all())


@pytest.fixture
async def matrix(quiet: Stack) -> AsyncIterator[Matrix]:
    """Processes on it."""
    async with quiet.channel(WRITE) as write:
        yield Matrix(quiet, write)


async def dies(matrix: Matrix, fate: Fate) -> None:
    """Runs the saga service until it has killed itself where it was told to."""
    process = mortal.start(matrix.environment, fate)
    await asyncio.to_thread(process.join, DIES_WITHIN_S)
    code = process.exitcode
    process.kill()
    assert code == -signal.SIGKILL, f"it did not come to {fate}"


def again_at(step: str, place: str, number: int) -> str:
    """A place that recovery passes after that death."""
    nothing_to_send = (step in ("debit", "reserve") and place == "decided") or place in ("saving", "over")
    passed = AT_RECOVERY[:3] if nothing_to_send else AT_RECOVERY
    return passed[number % len(passed)]


@pytest.mark.parametrize(("path", "step", "place"), CELLS_OFTEN)
async def test_killed_at_a_step_and_again_while_it_recovers(matrix: Matrix, path: str, step: str, place: str) -> None:
    """The third one ends the process; each step has left its event once."""
    process = await matrix.begin(path)
    refused = PATHS[path].refused
    await dies(matrix, Fate(place, step, refused=refused))
    await dies(matrix, Fate(again_at(step, place, CELLS.index((path, step, place))), refused=refused))
    with mortal.living(matrix.environment, Fate(refused=refused)):
        await matrix.all_ended()
    assert await matrix.left([process]) == {process: LEAVES[path]}


@pytest.mark.long
@pytest.mark.parametrize(("path", "step", "place"), CELLS)
async def test_the_database_is_lost_at_a_step(matrix: Matrix, path: str, step: str, place: str) -> None:
    """All its connections end there, the lease's too; the same process ends what it began, each step once."""
    process = await matrix.begin(path)
    fate = Fate(place, step, refused=PATHS[path].refused, event=Event.SEVER, admin_url=matrix.admin_url)
    with mortal.living(matrix.environment, fate) as living:
        await matrix.all_ended()
        assert living.is_alive()
    assert await matrix.left([process]) == {process: LEAVES[path]}


@pytest.mark.long
@pytest.mark.parametrize(("path", "step", "place"), CELLS)
async def test_restarted_at_a_step(matrix: Matrix, path: str, step: str, place: str) -> None:
    """It is told to stop there, while another already stands by, as in a rolling restart: that one goes on, each step once."""
    refused = PATHS[path].refused
    with mortal.living(matrix.environment, Fate(place, step, refused=refused, event=Event.STOP)) as stopping:
        await eventually(matrix.is_led)
        process = await matrix.begin(path)
        with mortal.living(matrix.environment, Fate(refused=refused)):
            await asyncio.to_thread(stopping.join, DIES_WITHIN_S)
            assert stopping.exitcode == 0, "it did not come to its place"
            await matrix.all_ended()
    assert await matrix.left([process]) == {process: LEAVES[path]}


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(RANDOM_KILLS // BATCH_KILLS))
async def test_killed_at_random_places_again_and_again(matrix: Matrix, seed: int) -> None:
    """A death after the other, with processes of all paths under way: all end, and each step has left its event once."""
    dice = random.Random(seed)
    paths = ("completed", "refunded", "succeeded") if seed % 2 else ("suspended", "released")
    refused = () if seed % 2 else (*PATHS["suspended"].refused, *PATHS["released"].refused)
    begun: dict[str, str] = {}
    for _ in range(BATCH_KILLS):
        for _ in range(dice.randint(0, 4)):
            path = dice.choice(paths)
            begun[await matrix.begin(path)] = path
        fate = Fate(dice.choice((*AT_STEP, *AT_RECOVERY)), count=dice.randint(1, 6), refused=refused)
        process = mortal.start(matrix.environment, fate)
        # A place that it does not come to is one where it dies by our hand.
        await asyncio.to_thread(process.join, dice.uniform(0.3, 1.5))
        process.kill()
        await asyncio.to_thread(process.join)
        assert process.exitcode == -signal.SIGKILL
    with mortal.living(matrix.environment, Fate(refused=refused)):
        await matrix.all_ended(120)
    assert await matrix.left(begun) == {process: LEAVES[path] for process, path in begun.items()}
