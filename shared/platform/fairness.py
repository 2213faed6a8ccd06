"""Shares between tenants: deficit round robin over waiting items, and over slices of work on the event loop.

Shares are no counts: a tenant that is alone gets everything; of two that both want all, each gets half.
The algorithm is Shreedhar and Varghese, "Efficient fair queueing using deficit round robin" (SIGCOMM 1995).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, KeysView
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from shared.folds.errors import OverLimit, Refusal
from shared.platform.shares import Shares

ItemT = TypeVar("ItemT")

FOLDS_MAX = 2
READINGS_MAX = 32
WAITING_MAX = 64


class FairQueue(Generic[ItemT]):
    """Items in order within a tenant, and by deficit round robin between tenants.

    Each turn gives a tenant `quantum` of credit, and an item takes its cost from that. So an item of a tenant that waits
    for nothing else is preceded by at most one quantum, and one item, of every other tenant, however many items those have.
    """

    def __init__(self, quantum: int) -> None:
        self._quantum = quantum
        self._lines: dict[str, deque[tuple[ItemT, int]]] = {}
        # The tenants that wait, in the order of their turns. The first has had its quantum of this turn.
        self._turns: deque[str] = deque()
        self._credit: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._lines)

    @property
    def tenants(self) -> KeysView[str]:
        """The tenants that wait."""
        return self._lines.keys()

    def put(self, tenant: str, item: ItemT, cost: int = 1) -> None:
        """Adds an item behind the others of its tenant."""
        self._line(tenant).append((item, cost))

    def first(self) -> ItemT:
        """The item that `pop` will return, unless `put_back` is called first. Raises IndexError if the queue is empty."""
        turns, credit = self._turns, self._credit
        item, cost = self._lines[turns[0]][0]
        while credit[turns[0]] < cost:
            turns.rotate(-1)
            credit[turns[0]] += self._quantum
            item, cost = self._lines[turns[0]][0]
        return item

    def pop(self) -> ItemT:
        """Removes and returns the next item. A tenant with no further item loses the rest of its credit."""
        item = self.first()
        tenant = self._turns[0]
        line = self._lines[tenant]
        self._credit[tenant] -= line.popleft()[1]
        if not line:
            self._turns.popleft()
            del self._lines[tenant], self._credit[tenant]
            if self._turns:
                self._credit[self._turns[0]] += self._quantum
        return item

    def put_back(self, items: Iterable[tuple[str, ItemT, int]]) -> None:
        """Returns items that were taken, in the order in which they were taken, to the front of their tenants' lines."""
        for tenant, item, cost in reversed(list(items)):
            self._line(tenant).appendleft((item, cost))
            self._credit[tenant] += cost

    def _line(self, tenant: str) -> deque[tuple[ItemT, int]]:
        line = self._lines.get(tenant)
        if line is None:
            line = self._lines[tenant] = deque()
            self._credit[tenant] = 0 if self._turns else self._quantum
            self._turns.append(tenant)
        return line


class Turns:
    """Admits one slice of work at each turn of the event loop, fairly between tenants.

    Between two slices the loop serves everything else that is ready. So callers with much work delay a caller with
    little by one slice at each turn, however many they are.
    """

    def __init__(self) -> None:
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue(quantum=1)
        self._busy = False

    async def next(self, tenant: str) -> None:
        """Returns when the tenant may do a slice of work; at once if nobody else has done one at this turn of the loop."""
        loop = asyncio.get_running_loop()
        if not self._busy:
            self._busy = True
            loop.call_soon(self._admit)
            return
        admitted: asyncio.Future[None] = loop.create_future()
        self._waiting.put(tenant, admitted)
        await admitted

    def _admit(self) -> None:
        while self._waiting:
            admitted = self._waiting.pop()
            if not admitted.done():  # else its caller is gone
                admitted.set_result(None)
                asyncio.get_running_loop().call_soon(self._admit)
                return
        self._busy = False


class Slots:
    """A few slots for long work, given by turns between tenants, and a limit on how many wait for one.

    One tenant alone may take all slots, and all room to wait. When that is full, a tenant that has less than its share of
    it gets the place of the newest that waits for the tenant with most.
    """

    def __init__(self, slots: int, waiting_max: int, refusal: Callable[[], Refusal]) -> None:
        """`refusal` makes what is raised when there is no room to wait."""
        self._free = slots
        self._refusal = refusal
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue(quantum=1)
        self._waiting: Shares[asyncio.Future[None]] = Shares(waiting_max)

    @asynccontextmanager
    async def one(self, tenant: str) -> AsyncIterator[None]:
        """A slot for the block. Raises the refusal if there is no room to wait for one."""
        if self._free:
            self._free -= 1
        else:
            await self._wait(tenant)
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, tenant: str) -> None:
        self._make_room(tenant)
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.take(tenant, granted)
        self._queue.put(tenant, granted)
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                self._pass_on()  # it was given in the moment when the caller left
            raise
        finally:
            self._waiting.give_back(tenant, granted)

    def _make_room(self, tenant: str) -> None:
        if not self._waiting.may_have(tenant):
            raise self._refusal()
        if self._waiting.full:
            greediest, futures = self._waiting.most()
            newest = next(reversed(futures))
            self._waiting.give_back(greediest, newest)
            newest.set_exception(self._refusal())

    def _pass_on(self) -> None:
        while self._queue:
            granted = self._queue.pop()
            if not granted.done():
                granted.set_result(None)
                return
        self._free += 1


class Room:
    """What keeps the folding of long streams from holding up everything else on the event loop.

    FOLDS_MAX fold at once, each a page at a time; tenants take turns at both. Who waits long for each page, since another
    service reads it, has one of `readings`, READINGS_MAX at once, and a slot only while it folds.
    """

    def __init__(self) -> None:
        self.readings = Slots(READINGS_MAX, WAITING_MAX, _too_many)
        self.slots = Slots(FOLDS_MAX, WAITING_MAX, _too_many)
        self.turns = Turns()


def _too_many() -> OverLimit:
    return OverLimit("TOO_MANY_PAST_STATES", "the states of too many aggregates are being folded", retry_after_s=1.0)
