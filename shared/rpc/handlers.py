"""Between the servicers that are generated from contracts and gRPC: how methods are found, and in what form they are called."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any, TypeAlias, cast

import grpc
from grpc import aio

from shared.rpc.places import OPEN_CALL_S_MAX, OpenPlaces
from shared.rpc.status import to_status, trailers

AnyHandler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Serve: TypeAlias = Callable[[Any, Any], Awaitable[Any]]

LAST_WRITE_S = 5.0
"""How long the last write of a call that is ended may take: the caller may not be reading."""


class Misconfigured(Exception):
    """The server's tables contradict each other: a defect of whoever wrote them, told before anything is served."""


metadata: ContextVar[Sequence[tuple[str, str | bytes]]] = ContextVar("metadata", default=())
"""What came with a call. gRPC has decoded it to find the handler, and would again if its context were asked."""


class Table(grpc.GenericRpcHandler):
    """All methods, found by name as they are called, each in the task that then serves the call.

    Registered with gRPC one by one, they would be waited for one by one: grpc.aio then sets up and takes down as many
    waits as there are methods at every call, 10 us for the 20 of a service.
    """

    def __init__(self, services: Mapping[str, Mapping[str, AnyHandler]]) -> None:
        self._methods = {f"/{service}/{name}": each for service, methods in services.items() for name, each in methods.items()}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> AnyHandler | None:
        """The handler of a method; None if there is no such method."""
        metadata.set(handler_call_details.invocation_metadata or ())
        return self._methods.get(handler_call_details.method)


class Recorder:
    """Stands in for a server when a generated function registers a servicer."""

    def __init__(self) -> None:
        self.services: dict[str, dict[str, AnyHandler]] = {}

    def add_registered_method_handlers(self, service_name: str, method_handlers: dict[str, AnyHandler]) -> None:
        self.services[service_name] = method_handlers

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """The same handlers in another form, for older servers."""


def streaming_handler(serve: Serve, given: AnyHandler) -> AnyHandler:
    """A handler that gRPC calls as soon as a call begins, before its request has come, with raw bytes as requests."""
    kind = "stream_stream" if given.response_streaming else "stream_unary"
    made: AnyHandler = getattr(grpc, f"{kind}_rpc_method_handler")(serve, None, given.response_serializer)
    return made


def writing_handler(name: str, given: AnyHandler) -> Serve:
    """The servicer's method inside a handler; one that yields its answers writes them instead.

    Raises Misconfigured if it is not implemented.
    """
    handler = _method_of(given)
    if not _is_async(handler):
        raise Misconfigured(f"{name} is not implemented, or not by an async function")
    if not given.response_streaming:
        return cast("Serve", handler)

    async def write(request: Any, context: Any) -> None:
        context = _WholeWrites(context)
        if inspect.iscoroutinefunction(handler):
            await handler(request, context)
            return
        # Closed at once if the caller goes away, not when the collector finds it: it may hold a connection.
        async with aclosing(handler(request, context)) as parts:
            async for part in parts:
                await context.write(part)

    return write


class _WholeWrites:
    """A call's context whose answers are written whole, whatever ends the call meanwhile."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, part: Any) -> None:
        """Writes an answer."""
        await _whole(self._context.write(part))


async def _whole(write: Awaitable[None]) -> None:
    """Writes an answer. A call that is ended meanwhile ends when the answer is written, or after LAST_WRITE_S.

    gRPC sends no status while a write is under way, not even one that nobody waits for any more: the caller would hang.
    """
    writing = asyncio.ensure_future(write)
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait({writing}, timeout=LAST_WRITE_S)
        raise


def _method_of(given: AnyHandler) -> Any:
    """The servicer's method inside a handler."""
    return getattr(given, "_".join("stream" if each else "unary" for each in (given.request_streaming, given.response_streaming)))


def open_handlers(services: Mapping[str, Mapping[str, AnyHandler]], places: OpenPlaces) -> dict[str, dict[str, AnyHandler]]:
    """The handlers of services that need no token. What a servicer of gRPC's leaves out, as List of health, is left out."""
    return {
        service: {name: _open(each, places) for name, each in methods.items() if _is_async(_method_of(each))}
        for service, methods in services.items()
    }


def _is_async(handler: Any) -> bool:
    return inspect.iscoroutinefunction(handler) or inspect.isasyncgenfunction(handler)


def _open(given: AnyHandler, places: OpenPlaces) -> AnyHandler:
    """The handler of a method that needs no token: a few places for all of them, and a limit of time."""
    handle = writing_handler("a method without a token", given)
    decode = given.request_deserializer or bytes

    async def requests(context: Any) -> AsyncGenerator[Any, None]:
        while (raw := await context.read()) is not aio.EOF:
            yield decode(raw)

    async def answer(context: Any) -> Any:
        if given.request_streaming:
            async with aclosing(requests(context)) as stream:
                return await handle(stream, context)
        raw = await context.read()
        return None if raw is aio.EOF else await handle(decode(raw), context)

    async def serve(_: Any, context: Any) -> Any:
        place = places.take()
        try:
            async with asyncio.timeout(OPEN_CALL_S_MAX):
                return await answer(context)
        except TimeoutError:
            return await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "calls without a token end after a while: ask again")
        except asyncio.CancelledError as error:
            if (refusal := place.answer(error)) is None:
                raise
            return await context.abort(*trailers(to_status(refusal)))
        finally:
            places.give_back(place)

    return streaming_handler(serve, given)
