"""What `save_round` saves: the answer to a transfer's debit, taken in one statement, beside the same taken in two steps.

A second way to save a round must be worth its upkeep. The two take turns on one connection, each round durable when it
returns, so that whatever slows the machine down slows both. The processor time is this process's; PostgreSQL's comes on top.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import AsyncGenerator
from typing import Any
from uuid import uuid4

from bank.v1 import transfer_pb2
from deploy.local.system import WRITE
from foldline.v1.event_store_pb2 import EventEnvelope
from saga_service.registry import PROCESSES
from shared.line import checkpoint as checkpoints
from shared.line.checkpoint import Checkpoint
from shared.platform.postgres import Connection, connect
from shared.processes.inputs import Inputs
from shared.processes.records import CommandResult, PendingCommand
from shared.processes.runner import CHECKPOINT, ProcessRunner
from tests.bench.row import Row, Sample
from tests.bench.stage import Stage

SECONDS = 2.0
NOW_S = 1_800_000_000


class Rounds:
    """A runner that is given its inputs, on a database of its own."""

    def __init__(self, connection: Connection) -> None:
        never: Any = None  # connects to nothing, follows nothing
        self._runner = ProcessRunner(PROCESSES, 1, follow=never, connect=never, dispatcher=never)
        self._connection = connection

    async def begin(self) -> None:
        """Makes the checkpoint."""
        await checkpoints.load(self._connection, CHECKPOINT, 1)

    async def begun(self) -> PendingCommand:
        """Begins a transfer; returns its debit."""
        transfer_id, position = str(uuid4()), self._runner.at.position + 1
        started = transfer_pb2.TransferStarted(transfer_id=transfer_id, from_account_id="a", to_account_id="b", amount_minor=1)
        envelope = EventEnvelope(
            position=position,
            event_id=str(uuid4()),
            tenant="acme",
            aggregate_type="transfer",
            aggregate_id=transfer_id,
            version=1,
            type=transfer_pb2.TransferStarted.DESCRIPTOR.full_name,
            payload=started.SerializeToString(),
        )
        envelope.recorded_at.seconds = NOW_S
        inputs = Inputs(batch=[envelope])
        self._runner._route(inputs)
        self._runner._seen = Checkpoint("epoch", position, envelope.event_id)
        [command] = await self._runner._round(self._connection, inputs)
        return command

    async def in_one_ms(self, command: PendingCommand) -> tuple[float, float]:
        """How long a round with the answer to a command takes in one statement, and its processor time."""
        return await self._took_ms(self._runner._from_memory, command)

    async def in_two_ms(self, command: PendingCommand) -> tuple[float, float]:
        """The same in two steps."""
        return await self._took_ms(self._runner._from_tables, command)

    async def _took_ms(self, take: Any, command: PendingCommand) -> tuple[float, float]:
        inputs = Inputs(answers=[CommandResult(command, None, "")])
        cpu_began, began = time.process_time(), time.perf_counter()
        done = await take(self._connection, inputs)
        took = 1000 * (time.perf_counter() - began), 1000 * (time.process_time() - cpu_began)
        if done is None:
            raise RuntimeError("the round was not saved")
        return took


async def lone_round(stage: Stage, scale: float) -> AsyncGenerator[Sample, None]:
    """Medians of as many pairs as fit in the time."""
    system = await stage.system(WRITE)
    async with await connect(system.databases.saga.app, application_name="bench") as connection:
        rounds = Rounds(connection)
        await rounds.begin()
        while True:
            one: list[tuple[float, float]] = []
            two: list[tuple[float, float]] = []
            end = time.perf_counter() + SECONDS * scale
            while time.perf_counter() < end:
                one.append(await rounds.in_one_ms(await rounds.begun()))
                two.append(await rounds.in_two_ms(await rounds.begun()))
            yield Sample(
                figure=statistics.median(took for took, _ in one),
                ceiling=statistics.median(took for took, _ in two),
                notes={
                    "cpu_ms": statistics.median(cpu for _, cpu in one),
                    "two_steps_cpu_ms": statistics.median(cpu for _, cpu in two),
                    "pairs": len(one),
                },
            )


ROW = Row(
    name="lone_round",
    title="a round of one answer, saved by save_round",
    unit=" ms",
    ceiling="read first, then saved",
    measure=lone_round,
    floor=0.8,
    less_is_better=True,
)
