"""What the relay has published and the stream has not yet acknowledged."""

from __future__ import annotations

import asyncio
import contextlib
import time

import nats.errors
import orjson
from nats.aio.client import Client
from nats.aio.msg import Msg

from shared.line import broker

ACK_TIMEOUT_S = 5.0


class StreamOutOfSync(Exception):
    """The relay does not know where the stream ends: it must read the end and go on from there.

    `place` is the sequence at which the stream refused us, so that another message is there. 0 if the stream refused nothing.
    """

    def __init__(self, text: str, place: int = 0) -> None:
        super().__init__(text)
        self.place = place


class News:
    """What the loop waits for: that the line has grown, or that the broker has answered."""

    def __init__(self) -> None:
        self._grown = False
        self._came = asyncio.Event()

    def tell(self, *, grown: bool) -> None:
        """Ends the wait; `grown`: there are events to read."""
        self._grown |= grown
        self._came.set()

    def grown(self) -> bool:
        """Whether the line has grown since `reads`."""
        return self._grown

    def reads(self) -> None:
        """The loop is about to read whatever the line has."""
        self._grown = False

    def waits(self) -> None:
        """What came so far no longer ends the wait: for a loop that looks at everything between this and `wait`."""
        self._came.clear()

    async def wait(self, within_s: float) -> None:
        """Returns when something has come since `waits`, or after `within_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._came.wait()


class Window:
    """Publishes under way: the stream holds all events up to `_acked`. After a refusal it is out of sync.

    The client's own `publish_async` does not work here: up to 2.16 it ignores a refusal, and its future never ends. So
    replies go to an inbox of the window's own, and late replies to an older window do not reach this one.
    """

    def __init__(self, client: Client, shard: int, end: int, news: News) -> None:
        self._client = client
        self._stream = broker.stream_name(shard)
        self._pages = broker.pages_subject(shard)
        self._sent = self._acked = end
        self._doubt: StreamOutOfSync | None = None
        self._news = news
        self._heard_at = 0.0
        self._inbox = client.new_inbox()
        self._reconnects = client.stats["reconnects"]

    async def __aenter__(self) -> Window:
        self._subscription = await self._client.subscribe(self._inbox, cb=self._on_reply)
        return self

    async def __aexit__(self, *_: object) -> None:
        with contextlib.suppress(nats.errors.Error):
            await self._subscription.unsubscribe()

    async def publish(self, message: broker.Message) -> None:
        """Sends without waiting for the acknowledgement. Raises StreamOutOfSync.

        The client's publish waits while the broker is away, and ignores a cancellation meanwhile. So the connection is
        checked before each publish.
        """
        self._refuse_lost()
        if self._sent == self._acked:
            self._heard_at = time.monotonic()
        self._sent += 1
        await self._client.publish(message.subject, message.payload, self._inbox, message.encoded_headers())

    async def publish_page(self, page: bytes) -> None:
        """Sends a page to whoever listens. Raises StreamOutOfSync."""
        self._refuse_lost()
        await self._client.publish(self._pages, page)

    def _refuse_lost(self) -> None:
        if not self._client.is_connected:
            raise StreamOutOfSync("the connection was lost")

    async def acknowledged(self, position: int, *, unless_grown: bool = False) -> int:
        """Waits until the stream holds all events up to `position`; returns where it ends. Raises StreamOutOfSync.

        With `unless_grown` it returns as soon as there are events to read, too. Several calls that wait for the same answers wait
        ACK_TIMEOUT_S together, not each.
        """
        while True:
            self._news.waits()
            if self._doubt is not None:
                raise self._doubt
            if self._client.stats["reconnects"] != self._reconnects or not self._client.is_connected:
                raise StreamOutOfSync("the connection was lost")
            if self._acked >= position:
                return self._acked
            if time.monotonic() - self._heard_at > ACK_TIMEOUT_S:
                raise StreamOutOfSync(f"no acknowledgement for {ACK_TIMEOUT_S} s")
            if unless_grown and self._news.grown():
                return self._acked
            await self._news.wait(0.1)

    async def _on_reply(self, message: Msg) -> None:
        self._heard_at = time.monotonic()
        try:
            reply = orjson.loads(message.data)
            if "error" in reply or reply["stream"] != self._stream:
                self._refused(str(reply))
            else:
                # The stream accepts each event only behind its predecessor, so an acknowledgement covers all events before it.
                self._acked = reply["seq"]
        except (ValueError, KeyError):
            self._refused(f"{message.headers} {message.data[:200]!r}")
        self._news.tell(grown=False)

    def _refused(self, text: str) -> None:
        if self._doubt is None:
            self._doubt = StreamOutOfSync(text, place=self._acked + 1)
