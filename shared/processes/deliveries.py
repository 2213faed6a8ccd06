"""Sends deliveries (e-mails and webhooks), in order within a line, and tries again until they arrive or are given up.

    1. Claim due deliveries and commit. From here on a message may have arrived.
    2. Send them outside a transaction: contacts in parallel, the messages of one line in order.
    3. Note the results and claim the next deliveries, in one transaction.

Killed anywhere, what is left? Before the commit of 1, nothing was sent. Between 1 and 3 a message may have arrived: the next
sender sends it again under the same id (the Message-ID, the webhook-id). Only here can a receiver get a second copy, as in
every protocol whose receiver does not commit together with the sender. A lost database causes no second copy: results stay
in memory until the database is back.
Two at once: each transaction begins with a check of the sender's number (delivery_store), and a replaced sender fails it.
Repeated: a result names its try, and changes nothing once that try is noted.
"""

from __future__ import annotations

import asyncio
import random
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import NamedTuple

import psycopg

from shared.line.checkpoint import Fenced
from shared.platform.cancellation import heed_cancellation
from shared.platform.postgres import Connection
from shared.platform.telemetry import logger
from shared.processes import delivery_store as store
from shared.processes.channels import Channel, Contacts, NotDelivered
from shared.processes.delivery_store import Delivery

log = logger(__name__)

RECONNECT_S = 0.5
# The pause after a check found another sender. It is longer than a process can hold a lease that it has lost.
REPLACED_S = 5.0
LOOK_S = 1.0
WINDOW = 200
FORGET_EVERY_S = 60.0
FORGET_MAX = 1000
# From the order to stop until messages under way are given up.
DRAIN_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryPolicy:
    """The number of tries of a message, the pauses between them, and how many messages are sent at once."""

    first_s: float = 1.0
    longest_s: float = 3600.0
    # The pauses double from a second to an hour, so twenty tries take about nine hours.
    tries_max: int = 20
    at_once_max: int = 32
    contact_at_once_max: int = 8
    # Sent and discarded deliveries are deleted after this time. Dead ones stay until an operator decides.
    retention: timedelta = timedelta(days=30)

    def wait_s(self, tries: int) -> float:
        """The pause after this many tries: it doubles with each try, and has a random part."""
        return min(self.first_s * 2.0 ** min(tries - 1, 20), self.longest_s) * random.uniform(0.5, 1.0)  # noqa: S311


class Outcome(NamedTuple):
    """The result of one try, and the claimed deliveries of the same line that were not tried because of it."""

    delivery: Delivery
    failure: NotDelivered | None
    untried: Sequence[Delivery] = ()


class DeliverySender:
    """Sends for a shard, as long as it leads."""

    def __init__(
        self,
        shard: int,
        *,
        connect: Callable[[], Awaitable[Connection]],
        channels: Mapping[str, Channel],
        contacts: Contacts,
        may_send: asyncio.Event,
        policy: DeliveryPolicy | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`may_send` is set while the event store is known to hold the events that deliveries come from."""
        self._shard = shard
        self._connect = connect
        self._channels = channels
        self._contacts = contacts
        self._may_send = may_send
        self._policy = policy or DeliveryPolicy()
        self._clock = clock
        self._news = asyncio.Event()
        self._outcomes: list[Outcome] = []
        # The running tasks, and the deliveries that each sends.
        self._tasks: dict[asyncio.Task[None], Sequence[Delivery]] = {}
        self._term = 0
        self._forget_at = 0.0

    def wake(self) -> None:
        """Makes the sender look for due deliveries now, rather than within the second."""
        self._news.set()

    async def run(self) -> None:
        """Sends until cancelled. Messages under way then get a few seconds to end, and their results are noted."""
        try:
            while True:
                await self._may_send.wait()
                try:
                    async with await self._connect() as connection:
                        await self._take_term(connection)
                        while self._may_send.is_set():
                            await self._turn(connection)
                except Fenced as error:
                    log.warning("sender_fenced", text=str(error))
                    await asyncio.sleep(REPLACED_S)
                except psycopg.Error as error:
                    log.warning("sender_lost_database", error=str(error).strip())
                    await asyncio.sleep(RECONNECT_S)
                except Exception as defect:  # noqa: BLE001 (whatever it is, it is tried again, loudly)
                    where = traceback.format_tb(defect.__traceback__)[-4:]
                    log.error("sender_defect", error=type(defect).__name__, where=where)  # noqa: TRY400
                    await asyncio.sleep(REPLACED_S)
        finally:
            await self._drain()

    async def _take_term(self, connection: Connection) -> None:
        """Becomes the sender. Notes the results of its own tries first; all other deliveries being sent become due again."""
        under_way = [delivery.number for deliveries in self._tasks.values() for delivery in deliveries]
        outcomes, self._outcomes = self._outcomes, []
        try:
            async with connection.transaction():
                self._term = await store.take_term(connection, self._shard)
                await self._note(connection, outcomes)
                await store.take_over(connection, under_way, self._clock())
        except BaseException:
            self._outcomes = outcomes + self._outcomes
            raise

    async def _turn(self, connection: Connection) -> None:
        """Notes results, claims due deliveries, and waits for either."""
        self._news.clear()
        now = self._clock()
        outcomes, self._outcomes = self._outcomes, []
        busy = {delivery.contact for deliveries in self._tasks.values() for delivery in deliveries}
        room = self._policy.at_once_max - sum(map(len, self._tasks.values()))
        try:
            async with connection.transaction():
                await store.hold_term(connection, self._shard, self._term)
                await self._note(connection, outcomes)
                claimed = await store.claim(
                    connection, now, list(busy), each=self._policy.contact_at_once_max, limit=max(room, 0), window=WINDOW
                )
        except BaseException:
            self._outcomes = outcomes + self._outcomes
            raise
        self._start(claimed)
        loop = asyncio.get_running_loop()
        if loop.time() >= self._forget_at:
            self._forget_at = loop.time() + FORGET_EVERY_S
            await store.forget(connection, now - self._policy.retention, FORGET_MAX)
        if claimed or self._outcomes:
            return
        due_at = await store.next_due(connection, now)
        wait_s = LOOK_S if due_at is None else min(max((due_at - now).total_seconds(), 0.0), LOOK_S)
        try:
            async with asyncio.timeout(wait_s):
                await self._news.wait()
        except TimeoutError:
            pass

    def _start(self, claimed: Iterable[Delivery]) -> None:
        for _, line in groupby(sorted(claimed, key=lambda it: (*it.line, it.number)), key=lambda it: it.line):
            deliveries = list(line)
            task = asyncio.create_task(self._send_line(deliveries))
            self._tasks[task] = deliveries
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        self._news.set()

    async def _send_line(self, deliveries: Sequence[Delivery]) -> None:
        """Sends the messages of a line in order. A message that must be tried again holds up those behind it."""
        for place, delivery in enumerate(deliveries):
            heed_cancellation()
            failure = await self._try(delivery)
            if failure is not None and not self._is_final(delivery, failure):
                self._tell(Outcome(delivery, failure, deliveries[place + 1 :]))
                return
            self._tell(Outcome(delivery, failure))

    async def _try(self, delivery: Delivery) -> NotDelivered | None:
        try:
            contact = self._contacts.find(delivery.tenant, delivery.recipient)
            channel = self._channels.get(delivery.channel)
            if channel is None:
                return NotDelivered("CHANNEL_NOT_SET_UP", delivery.channel)
            await channel.send(delivery, contact)
        except NotDelivered as failure:
            return failure
        except Exception as defect:  # noqa: BLE001 (a defect in a channel is the trouble of this message alone)
            # The exception's text may hold an address: its kind and its place are told.
            where = traceback.format_tb(defect.__traceback__)[-4:]
            log.error("delivery_defect", delivery_id=str(delivery.delivery_id), error=type(defect).__name__, where=where)  # noqa: TRY400
            return NotDelivered("DELIVERY_DEFECT", type(defect).__name__)
        return None

    def _tell(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        self._news.set()

    def _is_final(self, delivery: Delivery, failure: NotDelivered) -> bool:
        return failure.final or delivery.tries >= self._policy.tries_max

    async def _note(self, connection: Connection, outcomes: Sequence[Outcome]) -> None:
        now = self._clock()
        for delivery, failure, untried in outcomes:
            facts = {"delivery_id": str(delivery.delivery_id), "tenant": delivery.tenant, "announcement": delivery.name}
            if failure is None:
                await store.end(connection, delivery, "sent", "", now)
                log.info("delivery_sent", channel=delivery.channel, tries=delivery.tries, **facts)
            elif self._is_final(delivery, failure):
                await store.end(connection, delivery, "dead", str(failure), now)
                log.error("delivery_dead", error=str(failure), tries=delivery.tries, **facts)
            else:
                wait_s = max(self._policy.wait_s(delivery.tries), failure.retry_after_s)
                due_at = now + timedelta(seconds=wait_s)
                await store.later(connection, delivery, str(failure), due_at)
                await store.release(connection, untried, due_at)
                log.warning("delivery_failed", error=str(failure), tries=delivery.tries, **facts)

    async def _drain(self) -> None:
        """Lets messages under way end, notes their results, and gives up the rest."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=DRAIN_S)
        outcomes = self._outcomes
        if outcomes:
            try:
                # The last connection may have been cancelled in the middle of a statement.
                async with await self._connect() as connection, connection.transaction():
                    await store.hold_term(connection, self._shard, self._term)
                    await self._note(connection, outcomes)
            except (Fenced, psycopg.Error) as error:
                log.warning("outcomes_not_noted", deliveries=len(outcomes), error=str(error).strip())
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
