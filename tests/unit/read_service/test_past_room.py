"""Who waits for events of the past holds up nobody who has them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from foldline.v1.as_of_pb2 import AsOf
from read_service.projections.accounts import ACCOUNT
from shared.platform.fairness import FOLDS_MAX, Room
from shared.platform.identity import Call, Identity, Role, current_call
from shared.projections.past_events import PastPage
from shared.projections.time_travel import TimeTravel
from tests.support.fakes.tables import ACCOUNT_TABLES
from tests.support.system.waiting import eventually


class SlowEvents:
    """Events of the past, which for one tenant do not come."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def read(self, *_: Any, **__: Any) -> AsyncGenerator[PastPage, None]:
        """A page without events, or none for ever."""
        tenant = current_call.get().identity.tenant
        self.asked.append(tenant)
        if tenant == "slow":
            await asyncio.Event().wait()
        yield PastPage("epoch", ())


async def test_waiting_for_events_takes_no_place_of_those_that_fold() -> None:
    """More readings wait for the write service than may fold at once; another tenant is answered."""
    events = SlowEvents()
    past: TimeTravel[Any] = TimeTravel(ACCOUNT, ACCOUNT_TABLES, events, Room())  # type: ignore[arg-type]

    async def ask(tenant: str) -> Any:
        current_call.set(Call(Identity(tenant=tenant, user_id="test", roles=frozenset({Role.USER})), "test", ""))
        return await past.as_of("a", AsOf(), None)

    waiting = [asyncio.create_task(ask("slow")) for _ in range(FOLDS_MAX + 1)]
    try:
        await asyncio.wait_for(asyncio.create_task(ask("quick")), 5)
        await eventually(lambda: events.asked.count("slow") == FOLDS_MAX + 1, 5)
    finally:
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
