"""The load generator: reads orders as lines of JSON, puts load on a server, answers each with what it saw.

A process of its own, so that its cost is not the server's: grpc.aio on uvloop, one channel for each server, a number of
callers that each send their next request when the last one is answered. Answers are not decoded, neither Foldline's nor
the echo's: whether they were acceptances, the bench reads from the line, which must have grown by as many events.
"""

from __future__ import annotations

import asyncio
import json
import resource
import statistics
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import uvloop
from grpc import StatusCode, aio

from foldline.v1 import command_pb2
from tests.bench import workload
from tests.bench.workload import Ids, Template


@dataclass(slots=True, kw_only=True)
class Order:
    """What is to be done. `kind` is unary, batch, stream, paced, or set_up.

    `paced` sends `rate` calls a second whether or not earlier ones are answered: of one command each if `batch` is 1,
    else of batches. It counts refusals, where the other kinds raise.
    """

    kind: str
    target: str
    method: str = ""
    token: str = ""
    # The trace that each call belongs to; a new one each if empty.
    traceparent: str = workload.TRACEPARENT
    callers: int = 1
    seconds: float = 1.0
    accounts: int = 1000
    batch: int = 100
    # Calls a second, of a paced load.
    rate: float = 1.0
    # Calls under way at once on each stream.
    window: int = 8
    # Not counted: caches, connections and clocks of the processor settle.
    warm_s: float = 0.2


@dataclass(slots=True)
class Tally:
    """What happened: commands within the measured time, and all that were sent."""

    done: int = 0
    sent: int = 0
    took_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)


class Load:
    """Keeps channels open between orders."""

    def __init__(self) -> None:
        self._channels: dict[str, aio.Channel] = {}
        self._templates: dict[tuple[str, int, int], list[Template]] = {}
        self._ids = Ids()

    async def carry_out(self, order: Order) -> dict[str, float]:
        """Puts on the load that was ordered; raises AioRpcError if anything is refused."""
        channel = self._channels.get(order.target)
        if channel is None:
            options = (("grpc.max_receive_message_length", 64 * 1024 * 1024),)
            channel = self._channels[order.target] = aio.insecure_channel(order.target, options=options)
        if order.kind == "set_up":
            return await self._set_up(channel, order)
        shape = order.kind if order.kind != "paced" else "unary" if order.batch == 1 else "batch"
        key = (shape, order.accounts, order.batch)
        if key not in self._templates:
            self._templates[key] = workload.templates(*key)
        run = {"stream": self._stream, "paced": self._paced}.get(order.kind, self._calls)
        tally, began = Tally(), time.perf_counter()
        cpu_before = _cpu_s()
        opens, closes = began + order.warm_s, began + order.warm_s + order.seconds
        every = self._templates[key]
        shares = [every[nth :: order.callers] or every for nth in range(order.callers)]
        await asyncio.gather(*(run(channel, order, share, opens, closes, tally) for share in shares))
        took_ms = sorted(1000 * took for took in tally.took_s)
        refused_ms = sorted(1000 * took for took in tally.refused_s)
        return {
            "done": tally.done,
            "sent": tally.sent,
            "per_s": tally.done / order.seconds,
            "p50_ms": statistics.median(took_ms) if took_ms else 0.0,
            "p99_ms": took_ms[int(len(took_ms) * 0.99)] if took_ms else 0.0,
            "refused": len(refused_ms),
            "refused_p99_ms": refused_ms[int(len(refused_ms) * 0.99)] if refused_ms else 0.0,
            "cpu_us": 1e6 * (_cpu_s() - cpu_before) / max(tally.sent, 1),
        }

    async def _calls(
        self, channel: aio.Channel, order: Order, share: list[Template], opens: float, closes: float, tally: Tally
    ) -> None:
        """One caller."""
        call: Any = channel.unary_unary(order.method)  # without serializers: bytes go out and come in
        metadata = _bearer(order)
        clock, ids, nth = time.perf_counter, self._ids, 0
        while (started := clock()) < closes:
            template = share[nth % len(share)]
            nth += 1
            await call(template.fill(ids), metadata=metadata, timeout=30)
            ended = clock()
            tally.sent += template.commands
            if started >= opens and ended <= closes:
                tally.took_s.append(ended - started)
            if opens <= ended <= closes:
                tally.done += template.commands

    async def _paced(
        self, channel: aio.Channel, order: Order, share: list[Template], opens: float, closes: float, tally: Tally
    ) -> None:
        """Calls at their times, answered or not."""
        call: Any = channel.unary_unary(order.method)
        metadata, clock = _bearer(order), time.perf_counter

        async def one(template: Template, due: float) -> None:
            try:
                await call(template.fill(self._ids), metadata=metadata, timeout=30)
            except aio.AioRpcError as error:
                if error.code() is not StatusCode.RESOURCE_EXHAUSTED:
                    raise
                tally.refused_s.append(clock() - due)
                return
            ended = clock()
            tally.sent += template.commands
            if due >= opens:
                tally.took_s.append(ended - due)
            if opens <= ended <= closes:
                tally.done += template.commands

        due, nth = clock(), 0
        async with asyncio.TaskGroup() as calls:
            while due < closes:
                if (left_s := due - clock()) > 0:
                    await asyncio.sleep(left_s)
                elif nth % 8 == 0:
                    await asyncio.sleep(0)  # late: the answers are read all the same
                calls.create_task(one(share[nth % len(share)], due))
                due, nth = due + 1 / order.rate, nth + 1

    async def _stream(
        self, channel: aio.Channel, order: Order, share: list[Template], opens: float, closes: float, tally: Tally
    ) -> None:
        """One stream with a window of requests that are not answered yet."""
        clock, ids = time.perf_counter, self._ids
        room = asyncio.Semaphore(order.window)

        async def requests() -> AsyncIterator[bytes]:
            nth = 0
            while clock() < closes:
                await room.acquire()
                tally.sent += 1
                yield share[nth % len(share)].fill(ids)
                nth += 1

        open_stream: Any = channel.stream_stream(order.method)
        async for _ in open_stream(requests(), metadata=_bearer(order), timeout=60):
            room.release()
            if opens <= clock() <= closes:
                tally.done += 1

    async def _set_up(self, channel: aio.Channel, order: Order) -> dict[str, float]:
        """Registers as many people as there are accounts, and opens the accounts, one each."""
        people, accounts = workload.names("person", order.accounts), workload.names("account", order.accounts)
        send: Any = channel.unary_unary(workload.SEND_BATCH, response_deserializer=command_pb2.SendBatchResponse.FromString)
        sent = 0
        for requests in (
            [workload.register(person_id) for person_id in people],
            [workload.open_account(account_id, owner) for account_id, owner in zip(accounts, people, strict=True)],
        ):
            for batch in workload.batches(requests, order.batch):
                answer = await send(Template(batch).fill(self._ids), metadata=_bearer(order), timeout=30)
                if refused := [receipt.error for receipt in answer.receipts if receipt.HasField("error")]:
                    raise RuntimeError(f"the workload was refused: {refused[0]}")
                sent += len(batch.items)
        return {"sent": sent}


def _bearer(order: Order) -> tuple[tuple[str, str], ...] | None:
    if not order.token:
        return None
    bearer = ("authorization", f"Bearer {order.token}")
    return (bearer, ("traceparent", order.traceparent)) if order.traceparent else (bearer,)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def main() -> None:
    """Carries out orders until standard input ends."""
    loop, load = asyncio.get_running_loop(), Load()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        answer = await load.carry_out(Order(**json.loads(line)))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
