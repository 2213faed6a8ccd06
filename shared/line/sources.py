"""The sources of a follower: the event store over gRPC, and the broker's stream of a shard.

The line is read with `EventStoreService.ReadAll` and a token with role `reader`. The token's file is read for every call, so
the token can be renewed while we run. The stream is read through an ephemeral pull consumer without acknowledgements: only
our checkpoint says what we have seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import nats.errors
import orjson
from grpc import aio
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import Error as JetStreamError

from foldline.v1 import event_store_pb2, event_store_pb2_grpc
from shared.line.broker import NotAnEvent, from_message, stream_name
from shared.line.broker_access import Broker, connect
from shared.line.follower import FeedAway, FeedMessage, LineAway, LinePage
from shared.platform.telemetry import logger
from shared.rpc.client import bearer

log = logger(__name__)

READ_TIMEOUT_S = 600.0
"""The time limit of one reading of the line, however long the line is. The connection's keepalive finds a dead peer sooner."""
FETCH_MAX = 500
INACTIVE_S = 30.0
"""The broker deletes a consumer that has not asked for messages for this time."""


class StoreLine:
    """The line of a shard, as the event store has it."""

    def __init__(self, channel: aio.Channel, token_file: Path, shard: int) -> None:
        self._stub = event_store_pb2_grpc.EventStoreServiceStub(channel)
        self._token_file = token_file
        self._shard = shard

    async def read(self, from_position: int) -> AsyncGenerator[LinePage, None]:
        """The events from that position up to the head, as one page or more. Raises LineAway."""
        request = event_store_pb2.ReadAllRequest(shard=self._shard, from_position=from_position)
        try:
            token = self._token_file.read_text().strip()
            call = self._stub.ReadAll(request, metadata=bearer(token), timeout=READ_TIMEOUT_S)
        except OSError as error:
            raise LineAway(f"no token: {error}") from error
        try:
            async for answer in call:
                yield LinePage(answer.epoch, answer.head_position, answer.events)
        except aio.AioRpcError as error:
            raise LineAway(f"{error.code().name}: {error.details()}") from error
        finally:
            call.cancel()


class StreamFeed:
    """The stream of a shard. One request for messages is always open, so an event comes when it is published."""

    def __init__(self, broker: Broker, shard: int, name: str) -> None:
        self._broker = broker
        self._shard = shard
        self._name = name
        self._client: Client | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._inbox: Subscription | None = None
        self._request_subject = ""
        self._arrived: list[FeedMessage] = []
        self._something = asyncio.Event()
        self._asked_at = 0.0
        self._owed = 0
        self._broken = ""
        self._reconnects = 0

    async def open(self, from_position: int) -> None:
        """Begins to receive messages from that position on. Raises FeedAway; connecting then goes on in the background."""
        client = self._connected()
        if self._inbox is not None:
            with contextlib.suppress(nats.errors.Error, OSError):
                await self._inbox.unsubscribe()
        self._arrived, self._owed, self._broken = [], 0, ""
        self._reconnects = client.stats["reconnects"]
        stream = stream_name(self._shard)
        wanted = ConsumerConfig(
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=from_position,
            ack_policy=AckPolicy.NONE,
            inactive_threshold=INACTIVE_S,
            mem_storage=True,
        )
        try:
            consumer = await client.jetstream(timeout=2).add_consumer(stream, wanted)
            inbox = client.new_inbox()
            self._inbox = await client.subscribe(inbox, cb=self._receive, pending_msgs_limit=-1, pending_bytes_limit=-1)
        except (nats.errors.Error, JetStreamError, TimeoutError, OSError) as error:
            raise FeedAway(repr(error)) from error
        finally:
            heed_cancellation()
        self._request_subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer.name}"

    async def fetch(self, timeout_s: float) -> list[FeedMessage]:
        """The messages since the last call, as soon as there is one; empty after `timeout_s`. Raises FeedAway."""
        client, inbox = self._connected(), self._inbox
        if inbox is None:
            raise FeedAway("not open")
        deadline = time.monotonic() + timeout_s
        while True:
            # After a reconnect messages may be missing: begin anew.
            if client.stats["reconnects"] != self._reconnects:
                raise FeedAway("the connection was lost for a moment")
            if self._broken:
                raise FeedAway(self._broken)
            left_s = deadline - time.monotonic()
            # The end of this request was lost, so it counts as over.
            if not self._arrived and left_s > 0 and (self._owed <= 0 or time.monotonic() - self._asked_at > 2 * timeout_s):
                await self._ask(client, inbox.subject, timeout_s)
            if self._arrived or left_s <= 0:
                arrived, self._arrived = self._arrived, []
                return arrived
            self._something.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._something.wait()

    async def close(self) -> None:
        """Ends the connection, or the attempts to get one."""
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
        if self._client is not None:
            with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
                await self._client.close()

    def _connected(self) -> Client:
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect())
        if self._client is None or not self._client.is_connected:
            raise FeedAway("not connected")
        return self._client

    async def _connect(self) -> None:
        while self._client is None:
            try:
                self._client = await connect(self._broker, self._name)
            except (nats.errors.Error, OSError, TimeoutError) as error:
                log.info("broker_awaited", connection=self._name, error=repr(error))
                await asyncio.sleep(1)

    async def _ask(self, client: Client, inbox: str, expires_s: float) -> None:
        self._owed, self._asked_at = FETCH_MAX, time.monotonic()
        request = {"batch": FETCH_MAX, "expires": int(expires_s * 1_000_000_000)}
        try:
            await client.publish(self._request_subject, orjson.dumps(request), inbox)
        except (nats.errors.Error, OSError) as error:
            raise FeedAway(repr(error)) from error
        heed_cancellation()

    async def _receive(self, message: Msg) -> None:
        status = (message.headers or {}).get("Status")
        if status in ("404", "408"):  # nothing there, or the request's time is over
            self._owed = 0
        elif status == "100":  # a heartbeat
            return
        elif status is not None:  # the consumer or its stream is gone
            self._broken = f"{status} {(message.headers or {}).get('Description', '')}"
        else:
            self._owed -= 1
            try:
                received = from_message(message)
                self._arrived.append(FeedMessage(received.epoch, received.envelope))
            except NotAnEvent as error:
                log.warning("not_an_event", connection=self._name, text=str(error))
                self._arrived.append(FeedMessage("", None))
        self._something.set()


def heed_cancellation() -> None:
    """Raises CancelledError if the task was cancelled.

    nats-py's publish, subscribe and unsubscribe wait for a full buffer and swallow a cancellation meanwhile
    (Client._flush_pending, seen in 2.16). Without this check, a follower that is cancelled then would never end.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
