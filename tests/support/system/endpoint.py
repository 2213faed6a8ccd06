"""A real HTTP server in this process that takes webhooks, and whose answers a test chooses."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

OK = b"HTTP/1.1 204 No Content\r\n\r\n"
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Request:
    """A request that arrived; header names are in lower case."""

    line: str
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class Endpoint:
    """What arrived, in its order, and how the server answers: by default with 204."""

    port: int = 0
    scheme: str = "http"
    requests: list[Request] = field(default_factory=list)
    answer: Answer | None = None

    @property
    def url(self) -> str:
        """Its URL."""
        return f"{self.scheme}://localhost:{self.port}/hook"

    def answers(self, content: bytes) -> None:
        """Lets the server answer with these bytes from now on."""

        async def write(writer: asyncio.StreamWriter) -> None:
            writer.write(content)

        self.answer = write

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection with one request."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:]) if name}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            self.requests.append(Request(head[0], headers, body))
            if self.answer is None:
                writer.write(OK)
            else:
                await self.answer(writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def taking(tls: ssl.SSLContext | None = None) -> AsyncIterator[Endpoint]:
    """Runs an endpoint, over TLS with the given certificate."""
    endpoint = Endpoint(scheme="http" if tls is None else "https")
    server = await asyncio.start_server(endpoint.take, "127.0.0.1", 0, ssl=tls)
    endpoint.port = server.sockets[0].getsockname()[1]
    try:
        yield endpoint
    finally:
        server.close()
