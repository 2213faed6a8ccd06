"""The ceiling of the pipeline's broker: one client that publishes to a stream, and one loop that pulls from it.

Publishing has a window of messages without an acknowledgement; what acknowledgements say is not read. Pulling has two requests of
500 open. Nothing is encoded or decoded, and nobody checks the order.

`python -m tests.bench.bare_stream NATS_URL` reads orders as lines of JSON: `{"messages": 60000, "bytes": 250}`.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from typing import Any
from uuid import uuid4

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, StorageType

WINDOW = 4000
PULL = 500


class Counter:
    """Counts messages, and wakes who waits for so many."""

    def __init__(self) -> None:
        self.count = 0
        self._changed = asyncio.Event()

    async def take(self, message: Msg) -> None:
        """One more."""
        self.count += 1
        self._changed.set()

    async def reached(self, count: int) -> None:
        """Waits until there were so many."""
        while self.count < count:
            self._changed.clear()
            await self._changed.wait()


async def publish(client: Client, subject: str, payload: bytes, messages: int) -> None:
    """Publishes so many messages; returns when all are acknowledged."""
    acknowledged, inbox = Counter(), client.new_inbox()
    subscription = await client.subscribe(inbox, cb=acknowledged.take, pending_msgs_limit=-1, pending_bytes_limit=-1)
    for number in range(messages):
        if number % 100 == 0:
            await acknowledged.reached(number - WINDOW)
        await client.publish(subject, payload, inbox)
    await acknowledged.reached(messages)
    await subscription.unsubscribe()


async def consume(client: Client, stream: str, messages: int) -> None:
    """Takes so many messages."""
    taken, inbox = Counter(), client.new_inbox()
    consumer = await client.jetstream().add_consumer(stream, ConsumerConfig(ack_policy=AckPolicy.NONE, mem_storage=True))
    subscription = await client.subscribe(inbox, cb=taken.take, pending_msgs_limit=-1, pending_bytes_limit=-1)
    request = json.dumps({"batch": PULL, "expires": 10_000_000_000}).encode()
    for asked in range(0, messages, PULL):
        await taken.reached(asked - PULL)
        await client.publish(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer.name}", request, inbox)
    await taken.reached(messages)
    await subscription.unsubscribe()


async def measure(url: str, messages: int, size: int) -> dict[str, float]:
    """Processor time for each message, published and consumed."""
    client = await nats.connect(url, pending_size=-1)
    stream = f"bare-{uuid4().hex}"
    await client.jetstream().add_stream(name=stream, subjects=[stream], storage=StorageType.FILE)
    try:
        began, before = time.perf_counter(), _cpu_s()
        await publish(client, stream, b"x" * size, messages)
        between = _cpu_s()
        await consume(client, stream, messages)
        after, took_s = _cpu_s(), time.perf_counter() - began
    finally:
        await client.jetstream().delete_stream(stream)
        await client.close()
    return {
        "sent": messages,
        "per_s": messages / took_s,
        "publish_us": 1e6 * (between - before) / messages,
        "consume_us": 1e6 * (after - between) / messages,
    }


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Answers orders until its input ends."""
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        print(json.dumps(asyncio.run(measure(sys.argv[1], order["messages"], order["bytes"]))), flush=True)


if __name__ == "__main__":
    main()
