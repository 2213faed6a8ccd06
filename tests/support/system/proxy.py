"""A TCP proxy that can stop reading from its clients, like a network or a peer that is stuck for a while."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit


class Proxy:
    """Passes bytes on in both directions, and holds those from clients where it is told to."""

    def __init__(self, url: str) -> None:
        self._target = urlsplit(url)
        self._left: int | None = None
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.stuck = asyncio.Event()
        self.url = ""

    def hold_after(self, size: int) -> None:
        """Passes this many more bytes from clients, then sets `stuck` and stops reading."""
        self._left = size

    def release(self) -> None:
        """Passes on everything again."""
        self._left = None
        self._flowing.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._target.hostname, self._target.port)
        try:
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._up(reader, far_writer))
                pumps.create_task(self._down(far_reader, writer))
        except* (OSError, EOFError):
            pass
        finally:
            for each in (writer, far_writer):
                each.close()

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await self._flowing.wait()
            data = await _some(reader)
            if self._left is not None:
                self._left -= len(data)
                if self._left <= 0:
                    self._flowing.clear()
                    self.stuck.set()
            writer.write(data)
            await writer.drain()

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(self.answer(await _some(reader)))
            await writer.drain()

    def answer(self, data: bytes) -> bytes:
        """What is passed on to a client for some bytes of the target: as it came."""
        return data

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Proxy]:
        """At `url`, which is the target's but for the port."""
        listener = socket.create_server(("127.0.0.1", 0))
        # Small, so that what is held stays with the client.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        server = await asyncio.start_server(self._serve, sock=listener, limit=64 * 1024)
        who = self._target.netloc.rpartition("@")[0]
        self.url = urlunsplit(self._target._replace(netloc=f"{who}@127.0.0.1:{listener.getsockname()[1]}"))
        try:
            yield self
        finally:
            server.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(server.wait_closed(), 2)


async def _some(reader: asyncio.StreamReader) -> bytes:
    data = await reader.read(64 * 1024)
    if not data:
        raise EOFError
    return data
