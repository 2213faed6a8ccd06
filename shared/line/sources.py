"""The sources of a follower: the event store over gRPC, and the pages that the relay publishes on NATS.

The line is read with `EventStoreService.ReadAll` and a token with role `reader`. The token's file is read for every call, so
the token can be renewed while we run. Pages are received as they are published: nobody keeps them, and nothing is acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator
from pathlib import Path

import nats.errors
from google.protobuf.message import DecodeError
from grpc import aio
from nats.aio.client import Client
from nats.aio.msg import Msg

from foldline.v1 import event_store_pb2, event_store_pb2_grpc
from shared.line.broker import pages_subject
from shared.line.broker_access import Broker, connect
from shared.line.follower import BATCH_MAX, FeedAway, FeedPage, LineAway, LinePage
from shared.platform.cancellation import heed_cancellation
from shared.platform.telemetry import logger
from shared.rpc.client import bearer

log = logger(__name__)

READ_TIMEOUT_S = 600.0
"""The time limit of one reading of the line, however long the line is. The connection's keepalive finds a dead peer sooner."""
WAITING_BYTES_MAX = 16 * 1024 * 1024
"""So many bytes of pages wait for a consumer that is slower than the relay. More are dropped, and read from the store."""
WAITING_PAGE_BYTES = 200
"""What a page that waits takes beside its content, about. It counts, so that empty pages are bounded too."""
ANSWER_S = 2
"""How long the broker may take to say that it has subscribed us."""


class StoreLine:
    """The line of a shard, as the event store has it."""

    def __init__(self, channel: aio.Channel, token_file: Path, shard: int) -> None:
        self._stub = event_store_pb2_grpc.EventStoreServiceStub(channel)
        self._token_file = token_file
        self._shard = shard

    async def read(self, from_position: int, events_max: int = 0) -> AsyncGenerator[LinePage, None]:
        """The events from that position up to the head, or `events_max` of them, as one page or more. Raises LineAway."""
        request = event_store_pb2.ReadAllRequest(shard=self._shard, from_position=from_position, events_max=events_max)
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


class PageFeed:
    """The pages of a shard's line, as the relay publishes them."""

    def __init__(self, broker: Broker, shard: int, name: str, *, batch_max: int = BATCH_MAX) -> None:
        """As soon as `batch_max` events were fetched, no further page is decoded."""
        self._broker = broker
        self._batch_max = batch_max
        self._shard = shard
        self._name = name
        self._client: Client | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._subscribed = False
        self._reconnects = 0
        # Pages are decoded when they are fetched, so those that wait take no more than their bytes.
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._something = asyncio.Event()

    async def open(self) -> None:
        """Receives the pages that are published from now on, and drops earlier ones.

        Raises FeedAway; connecting then goes on in the background.
        """
        client = self._connected()
        try:
            if not self._subscribed:
                await client.subscribe(pages_subject(self._shard), cb=self._receive)
                self._subscribed = True  # the client subscribes again by itself when it has reconnected
                # nats-py writes a flush's PING ahead of commands that wait (seen in 2.16), so the first may overtake the
                # subscription. While its answer comes that is written, and the second follows it.
                await client.flush(ANSWER_S)
            await client.flush(ANSWER_S)
        except (nats.errors.Error, TimeoutError, OSError) as error:
            raise FeedAway(repr(error)) from error
        finally:
            heed_cancellation()
        self._reconnects = client.stats["reconnects"]
        self._drop()

    async def fetch(self, timeout_s: float) -> list[FeedPage]:
        """The next pages, as soon as there is one; none after `timeout_s`. Raises FeedAway.

        A page without events is the last: behind it the store is read, so however many there are, they take no time.
        """
        # After a reconnect pages may be missing: begin anew.
        if self._connected().stats["reconnects"] != self._reconnects:
            raise FeedAway("the connection was lost for a moment")
        if not self._waiting:
            self._something.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._something.wait()
        pages: list[FeedPage] = []
        events = 0
        while self._waiting and events < self._batch_max:
            raw = self._waiting.popleft()
            self._waiting_bytes -= len(raw) + WAITING_PAGE_BYTES
            page = self._read(raw)
            pages.append(page)
            if not page.events:
                break
            events += len(page.events)
        return pages

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

    async def _receive(self, message: Msg) -> None:
        if self._waiting_bytes > WAITING_BYTES_MAX:
            self._drop()  # the gap sends the reader to the store
        self._waiting.append(message.data)
        self._waiting_bytes += len(message.data) + WAITING_PAGE_BYTES
        self._something.set()

    def _drop(self) -> None:
        self._waiting.clear()
        self._waiting_bytes = 0

    def _read(self, raw: bytes) -> FeedPage:
        try:
            page = event_store_pb2.ReadAllResponse.FromString(raw)
        except DecodeError as error:
            log.warning("not_a_page", connection=self._name, error=repr(error))
            return FeedPage("", ())
        return FeedPage(page.epoch, page.events if page.shard == self._shard else ())
