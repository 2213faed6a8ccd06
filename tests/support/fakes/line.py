"""A line of bank events in memory, with an event store and a broker over it whose faults a test chooses.

They are doubles of peer services; the tables that are made from their events are real.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from datetime import UTC, datetime, timedelta

from google.protobuf.message import Message

from bank.v1 import account_pb2, person_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.line.follower import FeedAway, FeedPage, LineAway, LinePage

EPOCH = "11111111-1111-4111-8111-111111111111/1"
BEGIN = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def uid(number: int) -> str:
    """A UUID that is easy to read in a failure."""
    return str(uuid.UUID(int=number, version=4))


class Store:
    """A line that events are appended to; the double of the write service."""

    def __init__(self, epoch: str = EPOCH) -> None:
        self.epoch = epoch
        self.events: list[EventEnvelope] = []
        self.away = False
        self.reads = 0
        self._versions: dict[tuple[str, str], int] = {}

    def append(self, tenant: str, aggregate_id: str, event: Message, *, category: str = "account") -> EventEnvelope:
        """Appends one event."""
        version = self._versions[tenant, aggregate_id] = self._versions.get((tenant, aggregate_id), 0) + 1
        position = len(self.events) + 1
        envelope = EventEnvelope(
            position=position,
            event_id=str(uuid.uuid4()),
            tenant=tenant,
            aggregate_type=category,
            aggregate_id=aggregate_id,
            version=version,
            type=event.DESCRIPTOR.full_name,
            payload=event.SerializeToString(),
        )
        envelope.recorded_at.FromDatetime(BEGIN + timedelta(seconds=position))
        self.events.append(envelope)
        return envelope

    def person(self, tenant: str, person_id: str, name: str) -> EventEnvelope:
        """Registers a person."""
        event = person_pb2.PersonRegistered(person_id=person_id, name=name)
        return self.append(tenant, person_id, event, category="person")

    def rename(self, tenant: str, person_id: str, name: str) -> EventEnvelope:
        """Renames a person."""
        return self.append(tenant, person_id, person_pb2.PersonRenamed(person_id=person_id, name=name), category="person")

    def account(self, tenant: str, account_id: str, owner_id: str, currency: str = "USD", name: str = "blue") -> None:
        """Opens an account; two events, as the write service appends them."""
        opened = account_pb2.AccountOpened(account_id=account_id, owner_id=owner_id, currency=currency, name=name)
        self.append(tenant, account_id, opened)
        attached = person_pb2.AccountAttached(person_id=owner_id, account_id=account_id)
        self.append(tenant, owner_id, attached, category="person")

    def deposit(
        self, tenant: str, account_id: str, owner_id: str, amount: int, balance_after: int, currency: str = "USD"
    ) -> EventEnvelope:
        """Deposits money."""
        event = account_pb2.MoneyDeposited(
            account_id=account_id,
            owner_id=owner_id,
            amount_minor=amount,
            currency=currency,
            balance_after_minor=balance_after,
        )
        return self.append(tenant, account_id, event)

    def withdraw(
        self, tenant: str, account_id: str, owner_id: str, amount: int, balance_after: int, currency: str = "USD"
    ) -> EventEnvelope:
        """Withdraws money."""
        event = account_pb2.MoneyWithdrawn(
            account_id=account_id,
            owner_id=owner_id,
            amount_minor=amount,
            currency=currency,
            balance_after_minor=balance_after,
        )
        return self.append(tenant, account_id, event)


class StoreLine:
    """`shared.line.follower.Line` over a Store."""

    def __init__(self, store: Store, *, page: int = 500) -> None:
        self._store = store
        self._page = page

    async def read(self, from_position: int, events_max: int = 0) -> AsyncGenerator[LinePage, None]:
        """The events up to the head as it is when the reading begins, or `events_max` of them."""
        store = self._store
        if store.away:
            raise LineAway("told to be away")
        store.reads += 1
        head, begin, first = len(store.events), max(from_position, 1) - 1, True
        end = min(head, begin + events_max) if events_max else head
        while first or begin < end:
            await asyncio.sleep(0)
            yield LinePage(store.epoch, head, store.events[begin : min(begin + self._page, end)])
            begin, first = begin + self._page, False


class ScriptedFeed:
    """`shared.line.follower.Feed` that delivers a script, whatever was asked for, and then nothing."""

    def __init__(self, script: Sequence[Sequence[FeedPage]] = (), *, of: Store | None = None) -> None:
        """With `of`, a page is held back until that store has its events: what is published was committed before."""
        self.script = [list(part) for part in script]
        self._of = of
        self.opened = 0
        self.away = False

    async def open(self) -> None:
        """Counts how often a follower begins."""
        if self.away:
            raise FeedAway("told to be away")
        self.opened += 1

    async def fetch(self, timeout_s: float) -> list[FeedPage]:
        """The next part of the script."""
        if self.away:
            raise FeedAway("told to be away")
        if self.script:
            part = self.script.pop(0)
            return part if self._of is None else [it for it in part if _committed(it, self._of)]
        await asyncio.sleep(timeout_s)
        return []


def _committed(it: FeedPage, store: Store) -> bool:
    return all(event.position <= len(store.events) for event in it.events)


def delivery(*envelopes: EventEnvelope, epoch: str = EPOCH) -> FeedPage:
    """A page as the broker hands it out."""
    return FeedPage(epoch, envelopes)
