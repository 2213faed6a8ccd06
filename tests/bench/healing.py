"""How long a process is missed that was killed with -9: from its start anew to a deposit answered and seen by a query.

The ceiling is no bare machinery but a promise: within 5 s. Most of it is a Python process that starts.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

from deploy.local.system import PROJECTOR, READ, RELAY, WRITE, System
from tests.bench.row import Row, Sample
from tests.bench.stage import Stage
from tests.support.clients.bank import Bank, channels, round_trip
from tests.support.system.waiting import eventually

PROMISED_S = 5.0
GIVE_UP_S = 60.0
PROGRAMS = (WRITE, RELAY, READ, PROJECTOR)


async def healing(stage: Stage, scale: float) -> AsyncGenerator[Sample, None]:
    """Each of the four processes in turn; the figure is the slowest. Nothing else is asked of the system meanwhile."""
    system = await stage.system(*PROGRAMS)
    token = system.token()
    async with channels(system) as (write, read):
        bank = Bank(write, read, token)
        person_id, _ = await bank.register("Ada")
        account_id, _ = await bank.open(person_id)
    while True:
        took_s = {name: await _killed(system, name, token, account_id) for name in PROGRAMS}
        yield Sample(figure=max(took_s.values()), ceiling=PROMISED_S, notes={f"{name}_s": s for name, s in took_s.items()})


async def _killed(system: System, name: str, token: str, account_id: str) -> float:
    """Kills a process, starts it again, and returns after how many seconds everything worked."""
    await system.kill9(name)
    began = time.monotonic()
    system.start(name)
    async with channels(system) as (write, read):
        bank = Bank(write, read, token)
        try:
            await eventually(lambda: round_trip(bank, account_id), GIVE_UP_S, every_s=0.02)
        except AssertionError as error:
            raise RuntimeError(f"{name} was not back after {GIVE_UP_S:.0f} s") from error
        return time.monotonic() - began


ROW = Row(
    name="heal_after_kill",
    title="a process killed with -9, until all is well: the slowest of four",
    unit=" s",
    ceiling="promised",
    measure=healing,
    floor=1.0,
    less_is_better=True,
)
