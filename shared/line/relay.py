"""Copies the line of events from PostgreSQL into a JetStream stream, in order, without a gap.

The stream's sequence *is* the position: the stream is created with `first_seq` = head + 1, and every publish names the
sequence that must be the last one before it. So the stream accepts only the right event at the right place.

The races that this defeats:
- A relay is stopped (SIGSTOP, a paused machine) with publishes in its buffers. Another relay gets the lease and publishes.
  Then the first wakes up and sends its buffers. Each of its publishes expects a sequence that has passed, so the stream
  refuses it. Two relays that both believe to lead take turns, and the stream is still in order.
- An acknowledgement is lost (time-out, reconnect), so the event may be stored or not. The relay does not send it again: it
  reads where the stream ends and goes on from there.
- Another program's message takes the place of an event. The stream refuses ours; the relay looks at that place and creates
  the stream anew. Message ids for de-duplication would not help: after a purge the broker answers "duplicate" and stores
  nothing. Atomic batches would not help either: one duplicate refuses the whole batch.

Deleting a stream is not fenced: a relay that was stopped between the look at the stream and the deletion deletes a good one.
Nothing is lost, because consumers check every message and read the event store instead.

Killed anywhere, what is left? The stream, which is the only checkpoint: the next relay reads its end. An event that was
published without an acknowledgement is in the stream, or is published again at the same place. Killed between deleting and
creating: there is no stream, and the next relay creates it at the head.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import nats.errors
import psycopg
from nats.aio.client import Client
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig, StreamInfo
from nats.js.errors import NotFoundError

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.line import broker
from shared.line.broker_access import refuse_old
from shared.line.ends import CLOSED, part
from shared.line.event_store import TABLES, Head, StoredEvent, envelope, read_event_id, read_head, read_line
from shared.line.notifier import CHANNEL
from shared.line.spans import sent
from shared.line.window import ACK_TIMEOUT_S, News, StreamOutOfSync, Window
from shared.platform.cancellation import heed_cancellation
from shared.platform.postgres import Connection, connect, refuse_unsafe
from shared.platform.telemetry import logger

log = logger(__name__)

BATCH_EVENTS_MAX = 250
"""So many are read at once. A batch goes out twice, as pages and as messages, and must be through within ACK_TIMEOUT_S."""
WINDOW_EVENTS_MAX = 2048
API_TIMEOUT_S = 5.0
POLL_S = 0.1
CHECK_S = 1.0  # how often an idle relay looks whether its stream is still there and its own
RETRY_MIN_S, RETRY_MAX_S = 0.02, 1.0
REPEAT_LOG_S = 10.0
EMPTY_BEHIND_MAX = 10_000  # an empty stream that is further behind is made anew: consumers read the store faster


class WrongShard(Exception):
    """The database holds another shard than the settings say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How much of the line the stream keeps: the newest messages within both limits. The event store has all events."""

    age_max_s: float = 24 * 3600.0
    bytes_max: int = 1024 * 1024 * 1024
    replicas: int = 1


class Relay:
    """Copies one shard's line. Its only state is the stream itself."""

    def __init__(self, database_url: str, client: Client, shard: int, retention: Retention | None = None) -> None:
        self.database_url = database_url
        self.client = client
        self.shard = shard
        self.retention = retention or Retention()
        self.published = 0  # events that this relay has seen acknowledged, for whoever watches
        self.position = 0  # the end of the stream, as far as this relay has seen it
        self.follows = False  # whether it has found that end

    async def run(self, stopping: asyncio.Event) -> None:
        """Copies until `stopping` is set. While the database or the broker is away, it tries again.

        Raises WrongShard, UnsafeDatabase and BrokerTooOld, because waiting does not help.
        """
        told, told_at, pause_s, place = "", 0.0, RETRY_MIN_S, 0
        while not stopping.is_set():
            began = self.published
            try:
                async with _opened(self.database_url) as store, _hints(self.database_url) as news:
                    await self._copy(store, news, stopping, place)
                return
            except StreamOutOfSync as doubt:
                what, error, place = "relay_in_doubt", str(doubt), doubt.place
            except psycopg.Error as failure:
                what, error = "relay_waits_for_database", str(failure).strip()
            except (nats.errors.Error, TimeoutError, OSError) as failure:
                what, error = "relay_waits_for_broker", str(failure) or repr(failure)
            if self.published > began:
                told = ""  # it worked meanwhile, so this is a new trouble
            if what != told or time.monotonic() - told_at > REPEAT_LOG_S:
                told, told_at = what, time.monotonic()
                log.warning(what, shard=self.shard, error=error)
            pause_s = RETRY_MIN_S if self.published > began else min(2 * pause_s, RETRY_MAX_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):  # `wait_for` of Python 3.11 may swallow a cancellation
                    await stopping.wait()

    async def _copy(self, store: Connection, news: News, stopping: asyncio.Event, place: int) -> None:
        """The loop. Raises StreamOutOfSync and errors of the database and the broker; then the caller begins it again."""
        # 1. Find the end of the stream: the next event goes behind it.
        epoch, sent = await self._fit(store, place)
        self.position, self.follows = sent, True
        log.info("relay_follows", shard=self.shard, position=sent, epoch=epoch)
        async with Window(self.client, self.shard, sent, news) as window:
            checked_at = time.monotonic()
            while not stopping.is_set():
                # 2. Publish the next events of the line. The stream accepts each only directly behind its predecessor.
                heed_cancellation()
                news.reads()
                events = await read_line(store, after=sent, limit=BATCH_EVENTS_MAX)
                found = len(events)
                if events and events[-1].position - sent != len(events):
                    # Events that were not published yet were boxed. The stream is filled up to there, then created anew at
                    # the head: consumers read from the store what it does not bring.
                    events = [event for nth, event in enumerate(events, sent + 1) if event.position == nth]
                    if not events:
                        raise StreamOutOfSync("the next events of the line were boxed")
                boxed = len(events) < found
                while events and not stopping.is_set():
                    size = part(events, BATCH_EVENTS_MAX)
                    batch, events = events[:size], events[size:]
                    async with asyncio.timeout(ACK_TIMEOUT_S):
                        if batch[0].type == CLOSED:
                            await self._forget(window, batch[0])
                        await self._publish(window, epoch, [envelope(event) for event in batch])
                    sent = batch[-1].position
                    # 3. At most one window of publishes waits for acknowledgements.
                    self._seen(await window.acknowledged(sent - WINDOW_EVENTS_MAX))
                if found == BATCH_EVENTS_MAX or boxed or news.grown():
                    continue  # there is more to read
                # 4. Nothing more: wait for a notification, which may be lost. The events behind it need not wait until the last
                # ones are acknowledged. Now and then check that the stream is still ours.
                self._seen(await window.acknowledged(sent, unless_grown=True))
                if news.grown():
                    continue
                if time.monotonic() - checked_at > CHECK_S:
                    checked_at = time.monotonic()
                    if await self._fit(store) != (epoch, sent):
                        raise StreamOutOfSync("the stream does not end where we left it")
                await news.wait(POLL_S)
            self._seen(await window.acknowledged(sent))

    def _seen(self, end: int) -> None:
        """Notes where the stream ends by its acknowledgements."""
        self.published += end - self.position
        self.position = end

    async def _forget(self, window: Window, end: StoredEvent) -> None:
        """Deletes a tenant's messages, before the event that ends the tenant is published. Their sequences stay taken.

        Killed before that event is in the stream: the next relay does it again.
        """
        self._seen(await window.acknowledged(end.position - 1))
        streams = self.client.jetstream(timeout=API_TIMEOUT_S)
        await streams.purge_stream(broker.stream_name(self.shard), subject=broker.tenant_subjects(self.shard, end.tenant))
        log.info("relay_forgot_tenant", shard=self.shard, tenant=end.tenant, position=end.position)

    async def _publish(self, window: Window, epoch: str, events: Sequence[EventEnvelope]) -> None:
        """Publishes events that follow each other, as pages and as messages of the stream."""
        with sent(self.shard, events):
            for page in broker.to_pages(self.shard, epoch, events, self.client.max_payload):
                await window.publish_page(page)
            for event in events:
                await window.publish(broker.to_message(self.shard, event))

    async def _fit(self, store: Connection, place: int = 0) -> tuple[str, int]:
        """The epoch, and the position at which the stream ends. A stream that is no copy of our line is created anew.

        The stream must hold our event at its end, and also at `place` if that is given.

        The stream is read before the line. The line only grows, so a stream that ends beyond the line was beyond it before,
        and was not just filled by a faster relay.
        """
        refuse_old(self.client)
        streams = self.client.jetstream(timeout=API_TIMEOUT_S)
        name = broker.stream_name(self.shard)
        info: StreamInfo | None
        try:
            info = await streams.stream_info(name)
        except NotFoundError:
            info = None
        head = await read_head(store)
        if head.shard != self.shard:
            raise WrongShard(f"the database holds shard {head.shard}, the relay was started for shard {self.shard}")
        if info is not None:
            misfit = await self._misfit(store, info, head, place)
            if misfit is None:
                if (info.config.max_age, info.config.max_bytes) != (self.retention.age_max_s, self.retention.bytes_max):
                    await streams.update_stream(info.config, max_age=self.retention.age_max_s, max_bytes=self.retention.bytes_max)
                return head.epoch, info.state.last_seq
            log.warning("relay_recreates_stream", shard=self.shard, position=head.position, reason=misfit)
            await streams.delete_stream(name)
        await streams.add_stream(self._config(head))
        log.info("relay_created_stream", shard=self.shard, position=head.position, epoch=head.epoch)
        return head.epoch, head.position

    def _config(self, head: Head) -> StreamConfig:
        return StreamConfig(
            name=broker.stream_name(self.shard),
            subjects=[broker.stream_subjects(self.shard)],
            first_seq=head.position + 1,
            metadata={broker.STREAM_EPOCH: head.epoch},
            retention=RetentionPolicy.LIMITS,
            discard=DiscardPolicy.OLD,
            storage=StorageType.FILE,
            max_age=self.retention.age_max_s,
            max_bytes=self.retention.bytes_max,
            num_replicas=self.retention.replicas,
        )

    async def _misfit(self, store: Connection, info: StreamInfo, head: Head, place: int) -> str | None:
        """Why the stream is not a copy of our line up to its end; None if it is."""
        end, behind = info.state.last_seq, head.position - info.state.last_seq
        epoch = (info.config.metadata or {}).get(broker.STREAM_EPOCH)
        if epoch != head.epoch:
            return f"it copies the history {epoch}, ours is {head.epoch}"
        wanted = self._config(head)
        for name in ("subjects", "retention", "discard", "storage", "no_ack", "sealed"):
            if getattr(info.config, name) != getattr(wanted, name):
                return f"its {name} is {getattr(info.config, name)}"
        if behind < 0:
            return f"it ends at {end}, the line at {head.position}"
        boxed = behind > 0 and (await read_line(store, after=end, limit=1))[0].position != end + 1
        if boxed or (info.state.messages == 0 and behind > EMPTY_BEHIND_MAX):
            return f"it holds {info.state.messages} events and is {behind} behind" + ", of which some were boxed" * boxed
        for sequence in {end, min(place, end)} - {0}:
            try:
                message = await self.client.jetstream(timeout=API_TIMEOUT_S).get_msg(info.config.name or "", sequence)
            except NotFoundError:  # none yet, or purged, expired or deleted since: its sequence stays taken
                continue
            found = (message.headers or {}).get(broker.ID)
            stored = await read_event_id(store, sequence)
            if found != str(stored):
                return f"at {sequence} it holds {found}, the line {stored}"
        return None


@contextlib.asynccontextmanager
async def _opened(database_url: str) -> AsyncIterator[Connection]:
    """A connection with a role that can read the line and cannot change it."""
    connection = await connect(database_url, application_name="foldline-relay")
    try:
        await refuse_unsafe(connection, tables=TABLES)
        yield connection
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def _hints(database_url: str) -> AsyncIterator[News]:
    """Tells when the line has grown. Notifications may be lost, so the caller must poll as well."""
    news = News()

    async def listen() -> None:
        while True:
            with contextlib.suppress(psycopg.Error):
                async with await connect(database_url, application_name="foldline-relay-hints") as connection:
                    await connection.execute(f"LISTEN {CHANNEL}")
                    async for _ in connection.notifies():
                        news.tell(grown=True)
            await asyncio.sleep(RETRY_MAX_S)

    listening = asyncio.create_task(listen())
    try:
        yield news
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
