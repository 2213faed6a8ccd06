"""The one way a process serves gRPC: behaviours around every RPC, roles checked at start-up, health, draining.

    server = Server(settings, roles=ROLES)
    server.add(add_PersonServiceServicer_to_server, PersonApi(commands))
    server.on_drained(pool.close)
    await server.run()                  # until SIGTERM or SIGINT, then drained

gRPC's own machinery of interceptors is not used: it hands over messages that are already decoded, so malformed ones
never get that far. Instead the generated `add_..._to_server` functions register with a recorder, and what it recorded
is registered with the real server, wrapped in the behaviours and with raw bytes as requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

from google.protobuf import descriptor_pool, message_factory
from grpc import aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from shared.folds.errors import Late, Refusal, Unavailable
from shared.platform.identity import Role
from shared.platform.program import stop_requested
from shared.platform.settings import MESSAGE_SIZE_MAX, ServerSettings
from shared.platform.telemetry import logger
from shared.platform.tokens import open_verifier
from shared.rpc.behaviours import (
    CallContext,
    RequestHook,
    ResponseHook,
    Rpc,
    answer_error,
    nobody_waits,
    read_request,
    standard_behaviours,
)
from shared.rpc.handlers import (
    AnyHandler,
    Misconfigured,
    Recorder,
    Table,
    metadata,
    open_handlers,
    streaming_handler,
    writing_handler,
)
from shared.rpc.held import hold_grpc
from shared.rpc.places import OpenPlaces, Places
from shared.rpc.probes import Probes
from shared.rpc.status import to_status, trailers
from shared.rpc.tls import listen
from shared.rpc.validation import load_validator

ServicerT = TypeVar("ServicerT")
OnDrained = Callable[[], Awaitable[None]]

BATCH_SIZE_MAX = MESSAGE_SIZE_MAX
# What is a little too large is refused by us, with a name; what is much too large by gRPC, before it is all in memory.
_SLACK = 64 * 1024
# For gRPC's own limit, which has no name and should never be met: calls of processes, of health, and those being refused.
_OTHER_CALLS_MAX = 1000
_CALLS_OF_A_CONNECTION_MAX = 1000
_QUIET_S, _QUIET_MAX_S = 0.05, 0.5
_LAST_ANSWERS_S = 0.3
_PREPARE_AFTER_S = 20.0
_COMMAND_OPTIONS = "foldline.v1.CommandOptions"

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", BATCH_SIZE_MAX + _SLACK),
    ("grpc.max_send_message_length", BATCH_SIZE_MAX + _SLACK),
    # A second process on the same port is a mistake that should be seen.
    ("grpc.so_reuseport", 0),
    # One connection cannot hold the places of all others.
    ("grpc.max_concurrent_streams", _CALLS_OF_A_CONNECTION_MAX),
    # A cut network is noticed within 30 s; clients may ask every 5 s whether we are there (ours do every 15 s).
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 5),
)

log = logger(__name__)


class Server:
    """A gRPC server whose every call passes the behaviours."""

    def __init__(
        self,
        settings: ServerSettings,
        *,
        roles: Mapping[str, Iterable[Role]],
        sizes_max: Mapping[str, int] | None = None,
        deadlines_max: Mapping[str, float] | None = None,
        probes: Probes | None = None,
    ) -> None:
        """`roles` has a row for every RPC, by its full name, bank.v1.PersonService/RegisterPerson; any one will do.

        `sizes_max` has a row for each RPC whose requests may have more bytes than usual, `deadlines_max` for each whose calls
        may take longer than usual, in seconds: streams that a caller follows, and long ones. Raises CannotStart if the keys that
        tokens are believed by cannot be read.
        """
        hold_grpc()
        self._settings = settings
        self._roles = {name: frozenset(allowed) for name, allowed in roles.items()}
        self._sizes_max = dict(sizes_max or {})
        self._deadlines_max = dict(deadlines_max or {})
        self.probes = probes or Probes(settings)
        self._places = Places(settings.calls_at_once_max)
        self._open_places = OpenPlaces()
        verifier = open_verifier(settings)
        self._keys = verifier.keys
        self._behaviours = standard_behaviours(verifier, settings, self.probes.metrics, self._places)
        self._handlers: dict[str, dict[str, AnyHandler]] = {}
        calls_max = settings.calls_at_once_max * 11 // 10 + _OTHER_CALLS_MAX
        self._server = aio.server(options=OPTIONS, maximum_concurrent_rpcs=calls_max)
        self._on_drained: list[OnDrained] = []
        self._on_draining: list[Callable[[Refusal], None]] = []
        self._in_flight = 0
        # Set when the last call ends; who waits for that clears it first.
        self._idle = asyncio.Event()
        self._readers: set[_Reader] = set()
        self._beside: list[asyncio.Task[None]] = []
        self._draining = False
        self._set_up = False
        self.probes.readiness.add("start", self._start)
        self.probes.readiness.add("keys", self._keys.failure)
        self._refused_at = 0.0
        self.port = 0

    def add(self, register: Callable[[ServicerT, aio.Server], None], servicer: ServicerT) -> None:
        """Adds a service: `server.add(add_PersonServiceServicer_to_server, PersonApi(...))`."""
        recorder = Recorder()
        register(servicer, cast("aio.Server", recorder))
        for service, methods in recorder.services.items():
            if service in self._handlers:
                raise Misconfigured(f"{service} is added twice")
            self._handlers[service] = {method: self._wrap(service, method, it) for method, it in methods.items()}

    def on_draining(self, callback: Callable[[Refusal], None]) -> None:
        """Registers what ends calls that would last, when the server begins to drain; it gets what to tell their callers."""
        self._on_draining.append(callback)

    def on_drained(self, callback: OnDrained, *, last: bool = False) -> None:
        """Registers what to do when no call is left: the last registered is called first, what is `last` at the end."""
        self._on_drained.insert(0 if last else len(self._on_drained), callback)

    async def start(self, *, serving: bool = True) -> int:
        """Listens; returns the port. Health says NOT_SERVING until `set_serving` if not `serving`.

        Raises Misconfigured if an RPC has no row in a table, or a row no RPC; CannotStart if an address is taken.
        """
        rpcs = {f"{service}/{method}" for service, methods in self._handlers.items() for method in methods}
        for name, table in (
            ("roles", set(self._roles)),
            ("sizes", set(self._sizes_max) | rpcs),
            ("deadlines", set(self._deadlines_max) | rpcs),
        ):
            if missing := sorted(rpcs - table):
                raise Misconfigured(f"no {name} are given for {', '.join(missing)}")
            if unknown := sorted(table - rpcs):
                raise Misconfigured(f"{name} are given for unknown RPCs: {', '.join(unknown)}")
        plain = Recorder()
        health_pb2_grpc.add_HealthServicer_to_server(self.probes.servicer, cast("aio.Server", plain))
        if self._settings.reflection:
            names = (*self._handlers, *plain.services, reflection.SERVICE_NAME)
            reflecting = reflection.aio.ReflectionServicer(names)
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflecting, cast("aio.Server", plain))
        self._server.add_generic_rpc_handlers((Table({**self._handlers, **open_handlers(plain.services, self._open_places)}),))
        await self.set_serving(serving)
        self.port = listen(self._server, self._settings)
        await self.probes.open()
        await self._server.start()
        log.info("listening", address=self._settings.listen, port=self.port)
        self._beside = [asyncio.create_task(each) for each in (_prepare(), self._places.end_overdue(), self._keys.run())]
        return self.port

    async def set_serving(self, serving: bool) -> None:
        """What the health service says of this process and of each of its services."""
        self._set_up = serving
        await self.probes.set_serving(("", *self._handlers), serving=serving)

    async def _start(self) -> str:
        return "" if self._set_up else "it waits for what it needs to start"

    async def run(self) -> None:
        """Starts unless started, serves until SIGTERM or SIGINT, then drains."""
        stop = stop_requested()
        if not self.port:
            await self.start()
        await stop.wait()
        await self.drain()

    async def drain(self) -> None:
        """Ends within `drain_s`: no new calls, those in flight finish, then the registered callbacks are called.

        New calls are refused by us at first, with UNAVAILABLE, and gRPC stops only when it has become quiet: a call that
        reaches a stopping server of gRPC is told CANCELLED, which no client takes for a reason to try again.
        `stop` of grpc.aio returns while handlers that it aborted are still running, so ours are counted, and nothing
        that a handler may be using is closed before the last one ended.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + self._settings.drain_s
        log.info("draining", in_flight=self._in_flight)
        self._draining = True
        self._refused_at = loop.time()
        for task in self._beside:
            task.cancel()
        await self.probes.drain(("", *self._handlers))
        for reader in self._readers:
            reader.end()
        for end in self._on_draining:
            end(_shutting_down())
        calls_until = loop.time() + self._settings.drain_calls_s
        await self._until_idle(self._settings.drain_calls_s)
        await self._until_quiet(min(_QUIET_MAX_S, calls_until - loop.time()))
        stopping = asyncio.ensure_future(self._server.stop(max(calls_until - loop.time(), 0)))
        await asyncio.wait({stopping}, timeout=_LAST_ANSWERS_S)  # a handler ends before its answer is on its way
        await self._server.stop(0)  # what is left: watchers of health, and calls that took too long
        await stopping
        if not await self._until_idle(max(until - loop.time(), 0) / 2):
            log.error("calls_do_not_end", in_flight=self._in_flight)
        for callback in (*reversed(self._on_drained), self.probes.close):
            try:
                async with asyncio.timeout_at(until):
                    await callback()
            except Exception:
                log.exception("close_failed", what=getattr(callback, "__qualname__", repr(callback)))
        log.info("drained")

    async def _until_quiet(self, timeout_s: float) -> None:
        """Waits until no new call has come for a moment."""
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        while (now := loop.time()) < until and (left_s := self._refused_at + _QUIET_S - now) > 0:  # noqa: ASYNC110
            await asyncio.sleep(min(left_s, until - now))

    async def _until_idle(self, timeout_s: float) -> bool:
        if not self._in_flight:
            return True
        self._idle.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _wrap(self, service: str, method: str, given: AnyHandler) -> AnyHandler:
        """The handler that the real server gets: through the behaviours to the servicer's method.

        To gRPC every request is a stream, so that a call is known, and refused, before its request has come.
        """
        name = f"{service}/{method}"
        described = descriptor_pool.Default().FindServiceByName(service).methods_by_name[method]
        options = described.input_type.fields_by_name.get("options")
        rpc = Rpc(
            name=name,
            roles=self._roles.get(name, frozenset()),
            request_type=message_factory.GetMessageClass(described.input_type),
            size_max=self._sizes_max.get(name, self._settings.request_size_max),
            streams_requests=bool(given.request_streaming),
            deadline_max_s=self._deadlines_max.get(name),
            is_command=bool(options and options.message_type and options.message_type.full_name == _COMMAND_OPTIONS),
        )
        handle = writing_handler(name, given)
        entering = [behaviour.enter for behaviour in self._behaviours if isinstance(behaviour, RequestHook)]
        leaving = [behaviour.leave for behaviour in reversed(self._behaviours) if isinstance(behaviour, ResponseHook)]

        async def serve(request: Any, context: Any) -> Any:
            if (refusal := self._turned_away()) is not None:
                return await context.abort(*trailers(to_status(refusal)))
            came = metadata.get()
            known = dict(came)
            call = CallContext(rpc, request, context, time.perf_counter(), known, len(known) < len(came))
            if rpc.streams_requests:
                call.request = self._while_serving(call, request)
            self._in_flight += 1
            response, failure = None, None
            try:
                try:
                    for enter in entering:
                        enter(call)
                    await read_request(call, self._places)
                    if call.within_s is None:
                        response = await handle(call.request, context)
                    else:
                        response = await _within(call.within_s, handle(call.request, context))
                    if call.cut_short:
                        raise _shutting_down() if self._draining else _stream_over()
                except BaseException as error:  # noqa: BLE001 (answered below, where it is not the context of what gRPC may log)
                    failure = error
                failure = _on_way_out(leaving, call, failure)
                if failure is None:
                    return response
                if nobody_waits(failure):
                    raise failure
                return await answer_error(call, failure)
            finally:
                failure = None  # it knows this frame
                self._in_flight -= 1
                if not self._in_flight:
                    self._idle.set()

        return streaming_handler(serve, given)

    def _turned_away(self) -> Refusal | None:
        """Why no further call is let in; None if it is."""
        if self._draining:
            self._refused_at = asyncio.get_running_loop().time()
            return _shutting_down()
        return None

    async def _while_serving(self, call: CallContext, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The caller's messages. They end early when the server is drained, or the stream's time is over.

        What came is answered, then the stream ends with a status that says so.
        """
        reader, stream = _Reader(), aiter(requests)
        self._readers.add(reader)
        over = asyncio.get_running_loop().call_later(self._settings.stream_s_max, reader.end)
        try:
            while not (reader.ended or self._draining):
                reader.waits = True
                raw = await anext(stream, None)
                reader.waits = False
                if raw is None:
                    return
                yield raw
        except asyncio.CancelledError:
            if not reader.takes_back():
                raise
        finally:
            over.cancel()
            self._readers.discard(reader)
        call.cut_short = True


async def _prepare() -> None:
    """Loads what the first invalid request will need, a while after the start, in another thread."""
    await asyncio.sleep(_PREPARE_AFTER_S)
    await asyncio.to_thread(load_validator)


def _on_way_out(
    behaviours: Sequence[Callable[[CallContext, BaseException | None], None]],
    call: CallContext,
    failure: BaseException | None,
) -> BaseException | None:
    """Tells the behaviours how the call ended; returns that, or what one of them raised instead."""
    for leave in behaviours:
        try:
            leave(call, failure)
        except Exception as error:  # noqa: BLE001 (answered as any other defect)
            failure = error
    return failure


async def _within(seconds: float, answer: Awaitable[Any]) -> Any:
    """The answer; raises Late if it takes longer."""
    try:
        async with asyncio.timeout(seconds) as scope:
            return await answer
    except TimeoutError:
        if not scope.expired():
            raise  # somebody's own, let out by mistake
        raise Late("DEADLINE_EXCEEDED", "the call took longer than it may; it may still have happened") from None


def _shutting_down() -> Unavailable:
    return Unavailable("SHUTTING_DOWN", "this instance is being stopped: go on with another")


def _stream_over() -> Late:
    return Late("STREAM_OVER", "a stream may take no longer; all that came was answered: open another")


class _Reader:
    """The task that reads a client's stream. It can be told to read no more; a timeout for each message would cost time."""

    def __init__(self) -> None:
        self.waits = False
        self.ended = False
        self._task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._cancelled = False

    def end(self) -> None:
        """Lets it read no more, and cancels the wait for the next message if there is one."""
        self.ended = True
        if self.waits:
            self._cancelled = self._task.cancel()

    def takes_back(self) -> bool:
        """Whether nobody else has cancelled the task: then it goes on as if it had not been."""
        return self._cancelled and self._task.uncancel() == 0
