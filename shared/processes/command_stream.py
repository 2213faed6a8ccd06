"""One open SendStream call to the write service, for commands that come a few at a time.

A message of a stream takes half as long as a call of its own, there and back, and half the processor time of both sides. Nothing
rests on the stream: whatever ends it, its unanswered commands are sent again in a call, under the same ids, and that call tells
why they cannot be taken. So the ways to refuse a call are looked at in one place, the dispatcher.

Killed anywhere, what is left? Nothing that was here before: commands have rows in process_commands.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from grpc import aio

from foldline.v1 import command_pb2
from shared.platform.telemetry import logger
from shared.rpc.client import bearer

LIFE_S = 30.0
"""After so long another stream takes over, under the token that the file has then."""
HELD_UP_S = 0.05
"""While a receipt has been waited for longer, commands are sent in calls. Receipts come in the order of the commands, so those
behind would wait for it as well: of another tenant, for example, of whose commands many wait."""
ANSWER_S = 1.0
"""How long receipts may take before their commands are sent in a call."""
PAUSE_S = 1.0
"""For so long no stream is opened after one that did not answer."""

log = logger(__name__)

_Receipt = command_pb2.CommandReceipt


class SendStream(Protocol):
    """`CommandServiceStub.SendStream`."""

    def __call__(
        self, *, metadata: tuple[tuple[str, str], ...]
    ) -> aio.StreamStreamCall[command_pb2.SendStreamRequest, command_pb2.SendStreamResponse]: ...


class CommandStream:
    """Sends commands over a stream that is opened when it is needed."""

    def __init__(self, send_stream: SendStream, token_file: Path) -> None:
        self._send_stream = send_stream
        self._token_file = token_file
        self._stream: _Stream | None = None
        self._not_before = 0.0
        # Streams that another has taken over from, which still have commands to answer.
        self._ending: set[asyncio.Task[None]] = set()

    async def send(self, items: Sequence[command_pb2.BatchItem]) -> Sequence[_Receipt] | None:
        """The receipts of commands, in order. None if they must be sent in a call; they may have been carried out."""
        if (stream := self._usable()) is None:
            return None
        receipts = await stream.send(items)
        if receipts is None:
            self._not_before = asyncio.get_running_loop().time() + PAUSE_S
        return receipts

    async def close(self) -> None:
        """Ends the stream. Commands under way may still be carried out."""
        for task in self._ending:
            task.cancel()
        await asyncio.gather(*self._ending, return_exceptions=True)
        if self._stream is not None:
            await self._stream.close()
            self._stream = None

    def _usable(self) -> _Stream | None:
        now = asyncio.get_running_loop().time()
        stream = self._stream
        if stream is not None and not stream.over and now - stream.began > LIFE_S:
            ending = asyncio.create_task(stream.finish())
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
            stream = None
        if stream is None or stream.over:
            stream = self._opened(now) if now >= self._not_before else None
        self._stream = stream
        return None if stream is None or stream.held_up(now) else stream

    def _opened(self, now: float) -> _Stream | None:
        try:
            token = self._token_file.read_text().strip()
        except OSError:
            return None  # the call will tell
        return _Stream(self._send_stream(metadata=bearer(token)), now)


class _Stream:
    """One stream: receipts come in the order of the commands. `over` when no further command can be sent."""

    def __init__(self, call: aio.StreamStreamCall[Any, Any], began: float) -> None:
        self.began = began
        self.over = False
        self._call = call
        # For each command, in order: when it was sent, and its receipt, or None when that will not come any more.
        self._waiting: deque[tuple[float, asyncio.Future[_Receipt | None]]] = deque()
        self._writing = asyncio.Lock()
        self._reading = asyncio.create_task(self._read())

    async def send(self, items: Sequence[command_pb2.BatchItem]) -> Sequence[_Receipt] | None:
        """The receipts of the items; None if the stream ended before, or took too long, which ends it."""
        try:
            async with asyncio.timeout(ANSWER_S):
                answers = await self._write(items)
                receipts = [receipt for answer in answers if (receipt := await answer) is not None]
        except (aio.AioRpcError, asyncio.InvalidStateError, TimeoutError) as error:
            log.info("command_stream_lost", commands=len(items), error=type(error).__name__)
            self._end()
            return None
        return receipts if len(receipts) == len(items) else None

    def held_up(self, now: float) -> bool:
        """Whether the first receipt of those that wait is late."""
        return bool(self._waiting) and now - self._waiting[0][0] > HELD_UP_S

    async def finish(self) -> None:
        """Sends nothing more, and ends when all that was sent is answered, or takes too long."""
        try:
            async with asyncio.timeout(ANSWER_S):
                async with self._writing:
                    await self._call.done_writing()
                await asyncio.shield(self._reading)
        except (aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
            pass
        finally:
            await self.close()

    async def close(self) -> None:
        """Ends the stream at once."""
        self._end()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def _write(self, items: Sequence[command_pb2.BatchItem]) -> list[asyncio.Future[_Receipt | None]]:
        loop = asyncio.get_running_loop()
        answers = [loop.create_future() for _ in items]
        async with self._writing:
            if self.over:
                raise asyncio.InvalidStateError("the stream is over")
            for item, answer in zip(items, answers, strict=True):
                self._waiting.append((loop.time(), answer))
                await self._call.write(command_pb2.SendStreamRequest(item=item))
        return answers

    async def _read(self) -> None:
        try:
            while isinstance(answer := await self._call.read(), command_pb2.SendStreamResponse) and self._waiting:
                _, waiting = self._waiting.popleft()
                if not waiting.done():
                    waiting.set_result(answer.receipt)
        except aio.AioRpcError as error:
            log.debug("command_stream_ended", code=error.code().name, commands=len(self._waiting))
        finally:
            self._end()

    def _end(self) -> None:
        self.over = True
        self._call.cancel()
        for _, waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
        self._waiting.clear()
