"""Deliveries on a saga database: saved as the runner does, sent by senders over channels that a test chooses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid4

from deploy.bootstrap import Database
from shared.folds.delivery import Announcements, Email, Notice, Outgoing
from shared.platform import postgres
from shared.platform.postgres import Reads
from shared.processes import announce, delivery_store
from shared.processes.channels import Contact, Contacts, NotDelivered
from shared.processes.deliveries import DeliveryPolicy, DeliverySender
from shared.processes.delivery_admin import DeliveryAdmin
from shared.processes.delivery_store import Delivery
from tests.support.system.waiting import eventually
from tests.support.system.working import running

QUICK = DeliveryPolicy(first_s=0.05, longest_s=0.2, tries_max=4)
"""Four tries within a second."""


class Post:
    """A saga database with its deliveries, and senders over it."""

    def __init__(self, database: Database, contacts: Path) -> None:
        self.database = database
        self.contacts = contacts
        self.announcements = Announcements()

    async def connect(self) -> postgres.Connection:
        """A connection of the application's role."""
        return await postgres.connect(self.database.app, application_name="test")

    async def put(self, *messages: Outgoing) -> list[UUID]:
        """Saves deliveries as the runner does; returns their ids."""
        told = Announcements()
        told.notice("umbrella", "test", "test", "told", lambda notice: messages)
        cause = announce.Cause(("test", str(uuid4())), "umbrella", "source", "correlation", "")
        made = announce.of_notice(told, cause, "test", Notice(name="told", data={}))
        assert announce.FOLD not in {it.channel for it in made}
        async with await self.connect() as connection:
            await delivery_store.insert(connection, made, datetime.now(UTC))
        return [it.delivery_id for it in made]

    async def rows(self) -> list[tuple[str, int, str, bool]]:
        """Status, tries, last error and whether it is being sent, of each delivery."""
        async with await self.connect() as connection:
            cursor = await connection.execute("SELECT status, tries, last_error, sending FROM deliveries ORDER BY number")
            return list(await cursor.fetchall())

    async def statuses(self) -> list[str]:
        """The status of each delivery."""
        return [row[0] for row in await self.rows()]

    def sender(self, channel: object, policy: DeliveryPolicy = QUICK) -> DeliverySender:
        """A sender that may send."""
        may_send = asyncio.Event()
        may_send.set()
        channels = {announce.EMAIL: channel}
        return DeliverySender(
            1,
            connect=self.connect,
            channels=channels,  # type: ignore[arg-type]  # doubles of a channel
            contacts=Contacts(self.contacts),
            may_send=may_send,
            policy=policy,
        )

    @asynccontextmanager
    async def sending(self, channel: object, policy: DeliveryPolicy = QUICK) -> AsyncIterator[DeliverySender]:
        """A sender that runs."""
        async with running(self.sender(channel, policy)) as it:
            yield it

    @asynccontextmanager
    async def operator(self) -> AsyncIterator[DeliveryAdmin]:
        """An operator's view."""
        reads = Reads(self.database.app, application_name="test")
        await reads.open()
        try:
            yield DeliveryAdmin(reads, self.announcements, 1)
        finally:
            await reads.close()


def mail(subject: str, *, to: str = "owner", key: str = "", html: str = "") -> Email:
    """An e-mail."""
    return Email(to=to, subject=subject, text=f"about {subject}", html=html, key=key)


class Scripted:
    """A channel whose answers a test chooses, for the moments that a server cannot be brought into at will."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.fails: dict[str, list[NotDelivered]] = {}
        self.hold: asyncio.Event | None = None
        self.entered = asyncio.Event()

    async def send(self, delivery: Delivery, contact: Contact) -> None:
        """Takes it, unless told otherwise."""
        content = announce.load(delivery.channel, delivery.content)
        assert isinstance(content, Email)
        self.entered.set()
        if self.hold is not None:
            await self.hold.wait()
        if fails := self.fails.get(content.subject):
            raise fails.pop(0)
        self.sent.append(content.subject)


async def all_are(post: Post, *statuses: str) -> None:
    """Waits for the deliveries to have these statuses."""

    async def reached() -> None:
        assert await post.statuses() == list(statuses)

    await eventually(lambda: true(reached), 15)


async def true(check: object) -> bool:
    """True when a check of assertions passes; for `eventually`."""
    await check()  # type: ignore[operator]
    return True
