"""The load generator of `transfers_vs_dbos`: starts transfers over gRPC and sees them complete, a process of its own.

Sustained: the clock stops when TransferQueryService, which must know of the starts by then, has no transfer left that
is under way, so the projector's tables have caught up with all. That is asked every 20 ms, once all are started: it
costs next to nothing. Then the line is read, and every transfer must have its TransferCompleted.

Paced: each is completed when its TransferCompleted has come to a subscriber of the stream, as other teams subscribe. The way
through relay and broker, and the subscriber's cost on the same two cores, are part of the times. Then the line is read as well.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from dataclasses import dataclass
from random import Random
from uuid import uuid4

import nats
import uvloop
from google.protobuf.message import Message
from grpc import aio
from nats.aio.msg import Msg
from nats.js.api import ConsumerConfig, DeliverPolicy

from bank.v1 import account_pb2, transfer_pb2, transfer_pb2_grpc, transfer_query_pb2, transfer_query_pb2_grpc
from foldline.v1 import command_pb2, command_pb2_grpc, event_store_pb2, event_store_pb2_grpc
from tests.bench import workload
from tests.bench.load import Order as Load
from tests.bench.load import _bearer, _cpu_s

ACCOUNTS = 1000
BALANCE = 10**9
ASK_TABLES_S = 0.02
ASK_LINE_S = 0.02
GIVE_UP_S = 60.0
COMPLETED = f"foldline.events.1.{workload.TENANT}.transfer.TransferCompleted"


@dataclass(slots=True, kw_only=True)
class Order:
    """What is to be done. `kind` is set_up, sustained (by `callers` as they are answered) or paced (`per_s`)."""

    kind: str
    transfers: int = 0
    callers: int = 64
    per_s: float = 50.0


class Transfers:
    """A caller of both services, a subscriber of the stream and a reader of the line."""

    def __init__(self, write: aio.Channel, read: aio.Channel, nats_url: str, token: str) -> None:
        self._nats_url = nats_url
        self._commands = command_pb2_grpc.CommandServiceStub(write)
        self._line = event_store_pb2_grpc.EventStoreServiceStub(write)
        self._transfers = transfer_pb2_grpc.TransferServiceStub(write)
        self._queries = transfer_query_pb2_grpc.TransferQueryServiceStub(read)
        self._who = _bearer(Load(kind="", target="", token=token))
        self._accounts = workload.names("account", ACCOUNTS)
        self._random = Random(1)
        self._ids = workload.Ids()
        self._next = 1

    async def carry_out(self, order: Order) -> dict[str, float]:
        """Carries out an order; raises RuntimeError if a transfer failed or did not end."""
        if order.kind == "set_up":
            return await self._set_up()
        if order.kind == "sustained":
            return await self._sustained(order)
        return await self._paced(order)

    async def _sustained(self, order: Order) -> dict[str, float]:
        """Callers that each start their next transfer when the last one's start is answered."""
        cpu_before, began = _cpu_s(), time.perf_counter()
        left = iter(range(order.transfers))
        last = ""

        async def call() -> None:
            nonlocal last
            for _ in left:
                last = await self._start(str(uuid4()))

        await asyncio.gather(*(call() for _ in range(order.callers)))
        all_started_s = time.perf_counter() - began
        # All starts are in the line before the end of the one that was answered last.
        await self._none_under_way(last)
        lasted_s = time.perf_counter() - began
        cpu_us = 1e6 * (_cpu_s() - cpu_before) / order.transfers
        return {
            "done": len(await self._completions(order.transfers)),
            "sent": order.transfers,
            "per_s": order.transfers / lasted_s,
            "starts_per_s": order.transfers / all_started_s,
            "cpu_us": cpu_us,
        }

    async def _paced(self, order: Order) -> dict[str, float]:
        """Transfers that each start when they are due, whatever became of the others."""
        due: dict[str, float] = {}
        completed: dict[str, float] = {}
        all_are = asyncio.Event()

        async def receive(message: Msg) -> None:
            transfer_id = (message.headers or {})["ce-subject"]
            completed.setdefault(transfer_id, time.perf_counter())
            if len(completed) == order.transfers:
                all_are.set()

        client = await nats.connect(self._nats_url)
        new = ConsumerConfig(deliver_policy=DeliverPolicy.NEW)
        await client.jetstream().subscribe(COMPLETED, ordered_consumer=True, config=new, cb=receive)
        cpu_before, began = _cpu_s(), time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for nth in range(order.transfers):
                due_at = began + nth / order.per_s
                await asyncio.sleep(max(due_at - time.perf_counter(), 0))
                transfer_id = str(uuid4())
                due[transfer_id] = due_at
                tasks.create_task(self._start(transfer_id))
        async with asyncio.timeout(GIVE_UP_S):
            await all_are.wait()
        cpu_us = 1e6 * (_cpu_s() - cpu_before) / order.transfers
        await client.close()
        await self._completions(order.transfers)
        took_ms = sorted(1000 * (completed[transfer_id] - due_at) for transfer_id, due_at in due.items())
        return {
            "done": len(completed),
            "sent": order.transfers,
            "p50_ms": statistics.median(took_ms),
            "p99_ms": took_ms[int(len(took_ms) * 0.99)],
            "cpu_us": cpu_us,
        }

    async def _start(self, transfer_id: str) -> str:
        """Starts a transfer; returns the token of its receipt."""
        source, target = self._random.sample(self._accounts, 2)
        request = transfer_pb2.StartTransferRequest(
            options=command_pb2.CommandOptions(command_id=self._ids().decode()),
            transfer_id=transfer_id,
            from_account_id=source,
            to_account_id=target,
            amount_minor=1,
            currency=workload.CURRENCY,
        )
        return (await self._transfers.StartTransfer(request, metadata=self._who, timeout=30)).consistency_token

    async def _completions(self, transfers: int) -> dict[str, float]:
        """When each transfer was seen to be completed, in the order of the line."""
        seen: dict[str, float] = {}
        give_up_at = time.monotonic() + GIVE_UP_S
        while len(seen) < transfers:
            request = event_store_pb2.ReadAllRequest(from_position=self._next)
            async for answer in self._line.ReadAll(request, metadata=self._who, timeout=30):
                now = time.perf_counter()
                for event in answer.events:
                    self._next = event.position + 1
                    if event.type == transfer_pb2.TransferCompleted.DESCRIPTOR.full_name:
                        seen[event.aggregate_id] = now
                    elif event.type == transfer_pb2.TransferFailed.DESCRIPTOR.full_name:
                        raise RuntimeError(f"a transfer failed: {transfer_pb2.TransferFailed.FromString(event.payload)}")
            if time.monotonic() > give_up_at:
                raise RuntimeError(f"{transfers - len(seen)} of {transfers} transfers have not ended within {GIVE_UP_S:.0f} s")
            await asyncio.sleep(ASK_LINE_S)
        return seen

    async def _none_under_way(self, token: str) -> None:
        """Waits until the query tables, not older than the token, hold no transfer that is under way."""
        under_way = transfer_query_pb2.TransferFilter(status=transfer_query_pb2.TRANSFER_STATUS_STARTED)
        request = transfer_query_pb2.ListTransfersRequest(page_size=1, filter=under_way, consistency_token=token)
        give_up_at = time.monotonic() + GIVE_UP_S
        while time.monotonic() < give_up_at:
            if not (await self._queries.ListTransfers(request, metadata=self._who, timeout=30)).transfers:
                return
            await asyncio.sleep(ASK_TABLES_S)
        raise RuntimeError(f"transfers are under way after {GIVE_UP_S:.0f} s")

    async def _set_up(self) -> dict[str, float]:
        """Accounts with money on them. What is in the line so far is not looked at again."""
        people = workload.names("person", ACCOUNTS)
        opened = zip(self._accounts, people, strict=True)
        waves: list[list[Message]] = [
            [workload.register(person_id) for person_id in people],
            [workload.open_account(account_id, owner) for account_id, owner in opened],
            [_funds(account_id) for account_id in self._accounts],
        ]
        for requests in waves:
            for batch in workload.batches(requests, 250):
                filled = command_pb2.SendBatchRequest.FromString(workload.Template(batch).fill(self._ids))
                answer = await self._commands.SendBatch(filled, metadata=self._who, timeout=30)
                if refused := [receipt.error for receipt in answer.receipts if receipt.HasField("error")]:
                    raise RuntimeError(f"the workload was refused: {refused[0]}")
        self._next = len(waves) * ACCOUNTS + 1
        return {"sent": len(waves) * ACCOUNTS}


def _funds(account_id: str) -> account_pb2.DepositMoneyRequest:
    deposit = workload.deposit(account_id)
    deposit.amount_minor = BALANCE
    return deposit


async def main() -> None:
    """Carries out orders until standard input ends. Arguments: the addresses of write and read service, NATS, a token."""
    write_address, read_address, nats_url, token = sys.argv[1:]
    loop = asyncio.get_running_loop()
    async with aio.insecure_channel(write_address) as write, aio.insecure_channel(read_address) as read:
        transfers = Transfers(write, read, nats_url, token)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            answer = await transfers.carry_out(Order(**json.loads(line)))
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
