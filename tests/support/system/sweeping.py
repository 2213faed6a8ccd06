"""A round of retention in a process that kills itself at a step of its boxes (`tests/support/system/boxing.py`).

`main` takes URL FOLDER DAYS_AHEAD STEP.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from shared.commands import boxing
from shared.commands.retention import add_retention
from shared.platform.identity import Role
from tests.support.domains.trial import build_registry
from tests.support.system.boxing import SteppedStore, Steps, boxer, files_in
from tests.support.system.retention import sweeper_of


async def main(url: str, folder: str, days: str, last: str) -> None:
    """One round, as far as it gets."""
    steps, call = Steps(int(last)), boxing._call

    async def stepped(*arguments: Any) -> int:
        steps.step()
        head = await call(*arguments)
        steps.step()
        return head

    boxing._call = stepped  # type: ignore[assignment]
    registry = build_registry()
    add_retention(registry, roles=frozenset({Role.USER}))
    async with boxer(url, SteppedStore(files_in(Path(folder)), steps.step), registry) as one:
        clock = lambda: datetime.now(UTC) + timedelta(days=float(days))  # noqa: E731 - shorter than a function
        await sweeper_of(one, registry, clock).round()
