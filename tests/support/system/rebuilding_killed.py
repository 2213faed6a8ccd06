"""A projector of accounts in a process that kills itself at a step of a rebuild.

`main` takes URL FILE STEP WHEN, and VERSION for a release of `rebuilding`; the line is in FILE, as `save` leaves it. The process
gets SIGKILL "before" the step, "during" it, when its statement was sent and the answer is not there, or "after" it.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from foldline.v1.event_store_pb2 import ReadAllResponse
from shared.platform import postgres
from shared.platform.postgres import Connection
from shared.projections import rebuild
from shared.projections.tables import Tables
from tests.support.fakes.line import Store
from tests.support.fakes.tables import ACCOUNT_TABLES
from tests.support.system import rebuilding

STATEMENTS = {
    "ask": "SELECT ask_release_rebuild(",
    "prepare": "SELECT prepare_rebuild(",
    "renew": "SELECT renew_rebuild(",
    "compare": "UPDATE projection_rebuilds SET compared_at",
    "wait": "UPDATE projection_rebuilds SET state = 'waiting'",
    "switch": "SELECT switch_rebuild(",
    "end": "SELECT end_rebuild(",
}
"""What the rebuilder sends at its steps."""
BATCHES = {"first batch": 1, "batch in between": 3}
"""Which of the batches that fill the new tables."""


def save(store: Store, file: Path) -> None:
    """Writes the line down for `main`."""
    file.write_bytes(ReadAllResponse(epoch=store.epoch, events=store.events).SerializeToString())


def _saved(file: Path) -> Store:
    read = ReadAllResponse.FromString(file.read_bytes())
    store = Store(read.epoch)
    store.events = list(read.events)
    return store


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def _at(when: str, work: Coroutine[Any, Any, Any]) -> None:
    """Dies before, during or after the work."""
    if when == "before":
        _die()
    task = asyncio.create_task(work)
    await asyncio.wait({task}, timeout=0.001 if when == "during" else None)
    _die()


async def main(url: str, file: str, step: str, when: str, version: str = "") -> None:
    """Projects and rebuilds until the step."""
    rebuild.LOOK_S, rebuild.STEP_S = 0.01, 0.005
    apply, left = Tables.apply, BATCHES.get(step, 0)

    async def applied(self: Tables, *arguments: Any) -> None:
        nonlocal left
        left -= not self.announced
        work = apply(self, *arguments)
        await (_at(when, work) if left == 0 and not self.announced else work)

    async def connect() -> Connection:
        connection = await postgres.connect(url, application_name="projector")
        execute = connection.execute

        async def executed(query: Any, *arguments: Any, **more: Any) -> Any:
            work = execute(query, *arguments, **more)
            if step in STATEMENTS and str(query).strip().startswith(STATEMENTS[step]):
                await _at(when, work)
            return await work

        connection.execute = executed  # type: ignore[method-assign]
        return connection

    Tables.apply = applied  # type: ignore[method-assign, assignment]
    group = rebuilding.release(int(version)) if version else ACCOUNT_TABLES
    await rebuilding.projecting(connect, _saved(Path(file)), group).run()
