"""Sends the commands of processes, a few over a stream, many in batches. Reports answers, and failures with when to try again.

The dispatcher stores nothing: every command has a row in process_commands, and the runner applies the results to it.
Killed anywhere, what is left? The rows. The next leader sends the commands again under the same ids; a command that was
carried out gets its first answer again. Two dispatchers at once: the same.
"""

from __future__ import annotations

import asyncio
import random
import traceback
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple, Protocol
from uuid import UUID

from google.protobuf.any_pb2 import Any as Packed
from grpc.aio import AioRpcError, Metadata

from foldline.v1 import command_pb2
from shared.folds.errors import Code, Refusal
from shared.platform.telemetry import logger
from shared.processes.command_stream import CommandStream
from shared.processes.records import (
    COMMAND_FAILED,
    COMMAND_UNKNOWN,
    CommandIdTaken,
    CommandResult,
    DeliveryFailure,
    PendingCommand,
    ProcessKey,
)
from shared.processes.spans import recorded_of
from shared.rpc.client import bearer
from shared.rpc.client_spans import of_next_calls
from shared.rpc.status import from_rpc_error, from_status

BATCH_COMMANDS_MAX = 256
BATCH_BYTES_MAX = 3 * 1024 * 1024
CALL_TIMEOUT_S = 15.0

# Answers that do not decide the command: it is sent again.
_LATER = frozenset({Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.CANCELLED})
# Refusals of a whole call that one of its commands may have caused: each command is then sent alone, to find that one.
_SUSPICIOUS = frozenset({Code.INVALID_ARGUMENT, Code.INTERNAL, Code.RESOURCE_EXHAUSTED})
# Refusals of a whole call before any command of it was accepted.
_UNTAKEN = frozenset({Code.UNAUTHENTICATED, Code.PERMISSION_DENIED, Code.RESOURCE_EXHAUSTED, Code.INVALID_ARGUMENT})
# Refusals that a write service of an older release gives, as during an upgrade, before it does anything. Not answers, and no
# failures: the command is sent again for as long as an upgrade may take.
_OLDER_RELEASE = frozenset({"UNKNOWN_COMMAND", "UNKNOWN_FIELD"})
# Cannot be true, because we send the same bytes under the same id. Not an answer.
_ABSURD = "COMMAND_ID_REUSED"

Told = CommandResult | DeliveryFailure | CommandIdTaken
"""The result of a command."""

REFUSED_TOLD_AFTER = timedelta(seconds=60)
"""When the write service has refused every call for so long, operators are told."""

PAUSED = "PAUSED: the type of process is paused"

log = logger(__name__)


class SendBatch(Protocol):
    """`CommandServiceStub.SendBatch`."""

    def __call__(
        self, request: command_pb2.SendBatchRequest, *, timeout: float, metadata: Metadata | tuple[tuple[str, str], ...]
    ) -> Awaitable[command_pb2.SendBatchResponse]: ...


class _Refused(NamedTuple):
    """Calls that were refused in a row, whatever their commands."""

    times: int
    since: datetime
    last: datetime
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """The pauses between tries, and when a command is given up.

    It is when the write service has failed on it so often (INTERNAL), or has not known it for so long.
    """

    first_s: float = 0.2
    longest_s: float = 30.0
    # While the write service is away or overloaded.
    away_longest_s: float = 5.0
    failures_max: int = 8
    # For so long the write service may not know a command before it is given up.
    unknown_s_max: float = 3600.0
    # Up to so many commands are sent at once, each in a call of its own if need be. While more are under way, the next gather: a
    # further call is made when `call_commands_min` wait, up to `calls_max` at a time.
    few: int = 8
    calls_max: int = 4
    call_commands_min: int = 64

    def wait_s(self, tries: int, *, away: bool) -> float:
        """The pause after this many tries: it doubles with each try, and has a random part."""
        longest_s = self.away_longest_s if away else self.longest_s
        return min(self.first_s * 2.0 ** min(tries - 1, 20), longest_s) * random.uniform(0.5, 1.0)  # noqa: S311


class Dispatcher:
    """Sends a few commands at once. While many are under way, in a few calls at most, further ones gather for the next batch."""

    def __init__(
        self,
        send_batch: SendBatch,
        token_file: Path,
        *,
        clock: Callable[[], datetime],
        news: asyncio.Event,
        patience: RetryPolicy | None = None,
        stream: CommandStream | None = None,
    ) -> None:
        """`news` is set when there is something to `take`. The token, of role `process`, is read anew for every call.

        A few commands go over `stream`, if there is one, when they are sent for the first time and no trace of them is recorded.
        """
        self._send_batch = send_batch
        self._stream = stream
        self._token_file = token_file
        self._clock = clock
        self._news = news
        self._patience = patience or RetryPolicy()
        self._queue: deque[PendingCommand] = deque()
        # Commands to send alone.
        self._suspects: deque[PendingCommand] = deque()
        # Commands that wait or are under way: `send` ignores a command that is in here.
        self._known: set[tuple[ProcessKey, UUID]] = set()
        # Since when the write service has not known them, the oldest first.
        self._unknown_since: dict[tuple[ProcessKey, UUID], datetime] = {}
        self._told: list[Told] = []
        # The calls under way, with the number of their commands.
        self._calls: dict[asyncio.Task[None], int] = {}
        self._work = asyncio.Event()
        self._refused: _Refused | None = None

    @property
    def backlog(self) -> int:
        """How many commands wait to be sent."""
        return len(self._queue) + len(self._suspects)

    def send(self, commands: Iterable[PendingCommand]) -> None:
        """Queues commands; does not wait."""
        for command in commands:
            if (name := (command.key, command.command_id)) not in self._known:
                self._known.add(name)
                self._queue.append(command)
        self._work.set()

    def hold(self, types: Collection[str]) -> None:
        """Takes the queued commands of these types of processes back. They count as failed tries that did nothing."""
        for queue in (self._queue, self._suspects) if types else ():
            held = [command for command in queue if command.type in types]
            if held:
                kept = [command for command in queue if command.type not in types]
                queue.clear()
                queue.extend(kept)
                self._tell(self._trouble(command, PAUSED, undone=True) for command in held)

    def take(self) -> list[Told]:
        """The results since the last call of `take`."""
        told, self._told = self._told, []
        return told

    def standstill(self) -> str:
        """Why no command is taken, CALLS_REFUSED and a sentence; empty unless every call has been refused for a minute."""
        refused, now = self._refused, self._clock()
        if refused is None or now - refused.since < REFUSED_TOLD_AFTER or now - refused.last > REFUSED_TOLD_AFTER:
            return ""
        return f"CALLS_REFUSED: since {refused.since:%Y-%m-%dT%H:%M:%SZ} the write service refuses every call as {refused.reason}"

    async def run(self) -> None:
        """Sends until cancelled. Calls under way are then cancelled too; their commands may still be carried out."""
        try:
            while True:
                await self._work.wait()
                self._work.clear()
                while self._may_call():
                    batch = self._next()
                    call = asyncio.create_task(self._call(batch))
                    self._calls[call] = len(batch)
                    call.add_done_callback(self._done)
        finally:
            for call in self._calls:
                call.cancel()
            await asyncio.gather(*self._calls, return_exceptions=True)
            if self._stream is not None:
                await self._stream.close()

    def _may_call(self) -> bool:
        calls, patience = len(self._calls), self._patience
        if not self.backlog or not calls:
            return self.backlog > 0
        if self._refused is not None:  # one call at a time is enough to find out when they are accepted again
            return False
        if sum(self._calls.values()) + self.backlog <= patience.few:
            return True
        return calls < patience.calls_max and len(self._queue) >= patience.call_commands_min

    def _done(self, call: asyncio.Task[None]) -> None:
        del self._calls[call]
        self._work.set()

    def _next(self) -> list[PendingCommand]:
        if self._suspects:
            return [self._suspects.popleft()]
        batch: list[PendingCommand] = []
        size = 0
        while self._queue and len(batch) < BATCH_COMMANDS_MAX:
            size += len(self._queue[0].payload) + 512
            if batch and size > BATCH_BYTES_MAX:
                break
            batch.append(self._queue.popleft())
        return batch

    async def _call(self, batch: Sequence[PendingCommand]) -> None:
        try:
            await self._try(batch)
        except Exception as defect:  # noqa: BLE001 (a defect of ours must not leave commands behind)
            # The exception's text may hold a command: its kind and its place are told.
            what, where = type(defect).__name__, traceback.format_tb(defect.__traceback__)[-4:]
            log.error("dispatch_defect", commands=len(batch), error=what, where=where)  # noqa: TRY400
            self._tell(self._trouble(command, f"DISPATCH_DEFECT: {what}", failed=True) for command in batch)

    async def _try(self, batch: Sequence[PendingCommand]) -> None:
        items = [_item(command) for command in batch]
        traces = recorded_of(batch)
        receipts = await self._stream.send(items) if self._stream is not None and self._streams(batch, traces) else None
        if receipts is None and (receipts := await self._sent(batch, items, traces)) is None:
            return
        self._refused = None
        if len(receipts) != len(batch):
            self._tell(self._trouble(command, "a receipt is missing", failed=True) for command in batch)
            return
        told = [self._judge(command, receipt) for command, receipt in zip(batch, receipts, strict=True)]
        _warn_of_older_release(it.error for it in told if isinstance(it, DeliveryFailure))
        self._tell(told)

    def _streams(self, batch: Sequence[PendingCommand], traces: Sequence[str]) -> bool:
        """Whether to send commands over the stream. A call is for many, for a span, and to learn why they are not taken."""
        few = len(batch) <= self._patience.few and all(command.tries <= 1 for command in batch)
        return few and not traces and self._refused is None

    async def _sent(
        self, batch: Sequence[PendingCommand], items: Sequence[command_pb2.BatchItem], traces: Sequence[str]
    ) -> Sequence[command_pb2.CommandReceipt] | None:
        """The receipts of a call. None if it failed, which is told."""
        try:
            token = self._token_file.read_text().strip()
        except OSError as error:
            await self._call_refused(batch, Refusal("NO_TOKEN", str(error)), Code.UNAUTHENTICATED)
            return None
        metadata = bearer(token, traceparent=traces[0] if traces else None)
        try:
            with of_next_calls(links=traces, **{"foldline.commands": len(batch)}):
                call = self._send_batch(command_pb2.SendBatchRequest(items=items), timeout=CALL_TIMEOUT_S, metadata=metadata)
            return (await call).receipts
        except AioRpcError as error:
            await self._call_refused(batch, from_rpc_error(error), error.code().value[0])
            return None

    def _judge(self, command: PendingCommand, receipt: command_pb2.CommandReceipt) -> Told:  # noqa: PLR0911 (a kind each)
        """The result that a receipt holds."""
        if receipt.status == command_pb2.COMMAND_STATUS_COMPLETED:
            return CommandResult(command, None, "")
        if not receipt.HasField("error"):
            return self._trouble(command, command_pb2.CommandStatus.Name(receipt.status), failed=True)
        refusal = from_status(receipt.error)
        if receipt.status == command_pb2.COMMAND_STATUS_FAILED:
            return self._trouble(command, _text(refusal), failed=True, undone=True)
        if refusal.reason in _OLDER_RELEASE:
            return self._unknown(command, _text(refusal))
        waits = refusal.code == Code.RESOURCE_EXHAUSTED and refusal.retry_after_s is not None
        if refusal.code in _LATER or waits:
            return self._trouble(command, _text(refusal), undone=waits, wait_s=refusal.retry_after_s)
        if refusal.reason == _ABSURD and refusal.facts.get("used_by") == "client":
            return CommandIdTaken(command)
        if refusal.reason == _ABSURD or receipt.status != command_pb2.COMMAND_STATUS_REJECTED:
            return self._trouble(command, _text(refusal), failed=True)
        return CommandResult(command, receipt.error, refusal.reason)

    async def _call_refused(self, batch: Sequence[PendingCommand], refusal: Refusal, code: int) -> None:
        """Handles a failed call. Unless one of its commands may be the cause, all commands wait, the later ones too."""
        text = _text(refusal)
        if code in _SUSPICIOUS and refusal.retry_after_s is None:
            if len(batch) > 1:
                self._suspects.extend(batch)
                self._work.set()
            elif refusal.reason in _OLDER_RELEASE:
                _warn_of_older_release([text])
                self._tell([self._unknown(batch[0], text)])
            else:
                self._tell([self._trouble(batch[0], text, failed=True, undone=code in _UNTAKEN)])
            return
        now, before = self._clock(), self._refused
        self._refused = _Refused(before.times + 1 if before else 1, before.since if before else now, now, refusal.reason)
        log.warning("commands_refused", commands=len(batch), error=text, times=self._refused.times)
        self._tell(self._trouble(command, text, undone=code in _UNTAKEN, wait_s=refusal.retry_after_s) for command in batch)
        await asyncio.sleep(self._patience.wait_s(self._refused.times, away=True))

    def _unknown(self, command: PendingCommand, error: str) -> DeliveryFailure:
        """The write service did not know the command: it is sent again until that has lasted for long."""
        now, longest = self._clock(), timedelta(seconds=self._patience.unknown_s_max)
        name = (command.key, command.command_id)
        since = self._unknown_since.setdefault(name, now)
        while (oldest := next(iter(self._unknown_since))) != name and now - self._unknown_since[oldest] > 2 * longest:
            del self._unknown_since[oldest]  # its process does without it
        failure = self._trouble(command, error, undone=True)
        return failure if now - since < longest else failure._replace(given_up=COMMAND_UNKNOWN)

    def _trouble(
        self, command: PendingCommand, error: str, *, undone: bool = False, failed: bool = False, wait_s: float | None = None
    ) -> DeliveryFailure:
        given_up = COMMAND_FAILED if failed and command.failures + 1 >= self._patience.failures_max else ""
        due_at = self._clock() + timedelta(seconds=max(self._patience.wait_s(command.tries, away=not failed), wait_s or 0))
        return DeliveryFailure(command, error, undone, failed, given_up, due_at)

    def _tell(self, what: Iterable[Told]) -> None:
        for told in what:
            name = (told.command.key, told.command.command_id)
            self._known.discard(name)
            if self._unknown_since and not (isinstance(told, DeliveryFailure) and _is_unknown(told)):
                self._unknown_since.pop(name, None)
            self._told.append(told)
        self._news.set()


def _item(command: PendingCommand) -> command_pb2.BatchItem:
    return command_pb2.BatchItem(
        command=Packed(type_url=f"type.googleapis.com/{command.command_type}", value=command.payload),
        tenant=command.tenant,
        on_behalf_of=command.on_behalf_of,
        causation_id=command.causation_id,
        traceparent=command.traceparent,
    )


def _is_unknown(failure: DeliveryFailure) -> bool:
    """Whether the write service did not know the command, which is tried again."""
    return not failure.given_up and failure.error.partition(":")[0] in _OLDER_RELEASE


def _warn_of_older_release(errors: Iterable[str]) -> None:
    """A line in the log for each such refusal of a call's commands, with their number: nobody is parked, so it is seen here."""
    unknown = Counter(error.partition(":")[0] for error in errors)
    for reason in sorted(_OLDER_RELEASE & unknown.keys()):
        log.warning("write_service_of_older_release", commands=unknown[reason], error=reason)


def _text(refusal: Refusal) -> str:
    return f"{refusal.reason}: {refusal.text}"
