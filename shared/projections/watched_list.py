"""A list that is watched, in memory: which rows are in it, and what each of its watchers has not been told yet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from enum import IntEnum
from typing import Any, NamedTuple

from google.protobuf.message import Message
from msgspec import Struct

from shared.folds.errors import OverLimit, Refusal
from shared.folds.summary import Condition
from shared.projections.changes import Place

ROWS_MAX = 1000
SUM_MODULUS = 2**64


class Kind(IntEnum):
    """What became of a row; the numbers are those of foldline.v1.ListChange."""

    ENTERED = 1
    CHANGED = 2
    LEFT = 3


class Found(NamedTuple):
    """A row of the tables: for conditions, as it is shown, and the digest of that."""

    id: str
    row: Any
    message: Message
    digest: int


class Change(NamedTuple):
    """What a watcher has not been told of a row; `message` is None if it left."""

    kind: Kind
    message: Message | None


class Begin(Struct, frozen=True):
    """Where a watcher goes on: the place, and the sum of the digests of what it has."""

    place: Place
    total: int


class Answer(NamedTuple):
    """What a watcher is told at once; without changes it is a heartbeat. `token` is where it is then."""

    begins_anew: bool
    changes: Mapping[str, Change]
    begin: Begin


class ListWatcher:
    """One who watches a list."""

    def __init__(self, query: Query, begin: Begin | None) -> None:
        self._query = query
        self.begin = begin
        self._pending: dict[str, Change] = {}
        self._begins_anew = False
        self._failure: Refusal | None = None
        self._news = asyncio.Event()

    def start(self, found: Mapping[str, Found], changed: set[str] | None) -> None:
        """Begins with the list as it was found, or goes on: `changed` are the ids that changed behind the caller's place."""
        begin, self.begin = self.begin, None
        if begin is None or (changed is None and begin.total != self._query.total):
            self._begins_anew = True
            self._pending = {id_: Change(Kind.ENTERED, it.message) for id_, it in found.items()}
        elif changed is not None:
            for id_ in changed:
                self._pending[id_] = Change(Kind.CHANGED, found[id_].message) if id_ in found else Change(Kind.LEFT, None)
        self._news.set()

    def tell(self, id_: str, change: Change) -> None:
        """Adds a change, over what the watcher has not been told yet of the row."""
        before = self._pending.get(id_)
        if before is not None and before.kind is Kind.ENTERED:
            if change.kind is Kind.LEFT:
                del self._pending[id_]
                return
            change = Change(Kind.ENTERED, change.message)
        elif before is not None and before.kind is Kind.LEFT:
            change = Change(Kind.CHANGED, change.message)
        self._pending[id_] = change
        self._news.set()

    def fail(self, failure: Refusal) -> None:
        """Ends it."""
        self._failure = failure
        self._news.set()

    async def next(self, timeout_s: float) -> Answer:
        """What it has not been told, as soon as there is something; no changes after the time. Raises the failure."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        self._news.clear()
        if self._failure is not None:
            raise self._failure
        pending, self._pending = self._pending, {}
        anew, self._begins_anew = self._begins_anew, False
        return Answer(anew, pending, Begin(self._query.place, self._query.total))


class Query:
    """A filter that somebody watches, and which rows pass it."""

    def __init__(self, tenant: str, conditions: Sequence[Condition], order: str, place: Callable[[], Place]) -> None:
        """`order`: one in which an index gives the rows. `place`: that of all queries which are not held."""
        self._place = place
        self.tenant = tenant
        self.conditions = conditions
        self.order = order
        self.members: dict[str, int] = {}
        self.total = 0
        self.watchers: set[ListWatcher] = set()
        self.joining: list[ListWatcher] = []
        self.held_at: Place | None = None
        """The place that it stays at until it is read whole."""

    @property
    def place(self) -> Place:
        """The place as of which `members` is the list."""
        return self.held_at or self._place()

    def takes(self, found: Found) -> bool:
        """Whether the row is in the list."""
        return all(condition.holds(found.row) for condition in self.conditions)

    def set(self, id_: str, found: Found | None) -> None:
        """Notes what the row is now, None if it is not in the list, and tells that."""
        before = self.members.get(id_)
        if found is None:
            if before is None:
                return
            del self.members[id_]
            change = Change(Kind.LEFT, None)
        elif before == found.digest:
            return
        else:
            self.members[id_] = found.digest
            change = Change(Kind.ENTERED if before is None else Kind.CHANGED, found.message)
        self.total = (self.total - (before or 0) + (0 if found is None else found.digest)) % SUM_MODULUS
        for watcher in self.watchers:
            watcher.tell(id_, change)
        if len(self.members) > ROWS_MAX:
            self.fail(too_long())

    def set_all(self, found: Mapping[str, Found]) -> None:
        """Notes what all rows of the list are now."""
        for id_ in self.members.keys() - found.keys():
            self.set(id_, None)
        for id_, it in found.items():
            self.set(id_, it)

    def fail(self, failure: Refusal) -> None:
        """Ends all watches of it."""
        for watcher in (*self.watchers, *self.joining):
            watcher.fail(failure)


def too_long() -> OverLimit:
    """The refusal of a list that is not watched."""
    return OverLimit("LIST_TOO_LONG", f"more than {ROWS_MAX} rows pass the filter: watch fewer, or list them by pages")
