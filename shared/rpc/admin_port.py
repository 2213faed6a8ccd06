"""The admin port: `/healthz`, `/readyz` and `/metrics` over HTTP, for probes and Prometheus, on one port of every process.

Small on purpose: GET and HEAD, one request a connection, and a bound on everything that a client can make grow. The port
is for the operator's network (loopback unless told otherwise): it needs no token, and answers with nothing but numbers
and the names of checks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from http import HTTPStatus

import orjson

from shared.platform.settings import CannotStart
from shared.platform.telemetry import logger
from shared.rpc.readiness import Readiness

CONNECTIONS_MAX = 32
REQUEST_BYTES_MAX = 8 * 1024
REQUEST_S = 5.0

log = logger(__name__)

Render = Callable[[str], Awaitable[tuple[str, bytes]]]
"""Given the Accept header, returns the content type and the text of all metrics."""


def host_and_port(listen: str) -> tuple[str, int]:
    """The parts of "127.0.0.1:9464" or "[::1]:9464"; raises ValueError."""
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise ValueError(f"not an address to listen on, such as 127.0.0.1:9464: {listen!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


class AdminPort:
    """An HTTP server of three pages."""

    def __init__(self, listen: str, readiness: Readiness, render: Render) -> None:
        self._listen = listen
        self._readiness = readiness
        self._render = render
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.port = 0

    async def open(self) -> int:
        """Listens; returns the port. Raises CannotStart if the address is taken, ValueError if it is none."""
        host, port = host_and_port(self._listen)
        try:
            self._server = await asyncio.start_server(self._accept, host, port, limit=REQUEST_BYTES_MAX)
        except OSError as error:
            raise CannotStart(f"FOLDLINE_ADMIN_LISTEN: {self._listen} cannot be listened on: {error.strerror}") from None
        self.port = self._server.sockets[0].getsockname()[1]
        log.info("admin_port_listening", address=self._listen, port=self.port)
        return self.port

    async def close(self) -> None:
        """Stops listening and ends what is open."""
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # asyncio runs each connection in a task
        if len(self._connections) >= CONNECTIONS_MAX:
            writer.transport.abort()
            return
        self._connections.add(task)
        try:
            async with asyncio.timeout(REQUEST_S):
                writer.write(await self._answer(reader))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.CancelledError):
            pass  # a client that is slow or gone; or we are closing, and nobody waits for this task's result
        finally:
            self._connections.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            method, target, _ = head.partition("\r\n")[0].split(" ")
        except (asyncio.LimitOverrunError, asyncio.IncompleteReadError, ValueError):
            return _response(HTTPStatus.BAD_REQUEST, "text/plain", b"not a request that is answered here\n")
        if method not in ("GET", "HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"GET or HEAD\n")
        try:
            status, kind, body = await self._page(target.partition("?")[0], _accepts(head))
        except Exception as defect:  # noqa: BLE001 (a page that cannot be made must not end the process)
            log.error("admin_page_failed", page=target[:100], error=type(defect).__name__)  # noqa: TRY400 (nor its text be told)
            status, kind, body = HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", b"the page could not be made\n"
        return _response(status, kind, body, with_body=method == "GET")

    async def _page(self, path: str, accept: str) -> tuple[HTTPStatus, str, bytes]:
        if path == "/healthz":  # that the event loop comes to answer this is all that it says
            return HTTPStatus.OK, "text/plain", b"ok\n"
        if path == "/readyz":
            failures = self._readiness.failures
            status = HTTPStatus.SERVICE_UNAVAILABLE if failures else HTTPStatus.OK
            return status, "application/json", orjson.dumps({"ready": not failures, "waits_for": failures}) + b"\n"
        if path == "/metrics":
            return HTTPStatus.OK, *(await self._render(accept))
        return HTTPStatus.NOT_FOUND, "text/plain", b"/healthz, /readyz, /metrics\n"


def _accepts(head: str) -> str:
    for line in head.split("\r\n")[1:]:
        name, _, value = line.partition(":")
        if name.lower() == "accept":
            return value.strip()
    return ""


def _response(status: HTTPStatus, kind: str, body: bytes, *, with_body: bool = True) -> bytes:
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (body if with_body else b"")
