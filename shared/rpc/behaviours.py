"""What every call passes on its way to the handler and back: the small behaviours in the list `standard_behaviours`.

Unary and streaming calls pass the same behaviours: a streaming handler writes its answers through its context.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from google.protobuf.message import DecodeError, Message
from grpc.aio import EOF, AbortError, ServicerContext
from msgspec import Struct

from shared.folds.errors import Forbidden, Invalid, OverLimit, Refusal, Unauthenticated
from shared.platform import tracing
from shared.platform.identity import Call, Identity, Role, current_call
from shared.platform.instruments import SECONDS, Histogram
from shared.platform.metrics import Metrics
from shared.platform.settings import ServerSettings
from shared.platform.telemetry import call_facts, logger, new_traceparent, span_id, trace_id, valid_traceparent
from shared.platform.tokens import Verifier
from shared.rpc.bounds import refuse_uncounted
from shared.rpc.places import Place, Places
from shared.rpc.status import to_status, trailers
from shared.rpc.validation import refuse_invalid

if TYPE_CHECKING:
    from opentelemetry.trace import Span

log = logger(__name__)

Context = ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rpc:
    """What is known of an RPC before it is called."""

    # As in the table of roles: bank.v1.PersonService/RegisterPerson.
    name: str
    # Any one of these will do.
    roles: frozenset[Role]
    request_type: type[Message]
    # Of each request message, in bytes.
    size_max: int
    streams_requests: bool
    # How long a call may take, in seconds, if not as long as any other.
    deadline_max_s: float | None = None
    # Whether the request begins with foldline.v1.CommandOptions.
    is_command: bool


class CallContext(Struct, eq=False):
    """One call on its way: what came, and what the behaviours made of it.

    `request` is what the handler will get, once `read_request` has read it: a message, or for a client's stream an async
    iterator, of bytes first and of messages then.
    """

    rpc: Rpc
    request: Any
    context: Context
    # As time.perf_counter says.
    began: float
    # What came with the call, and whether any of it came more than once.
    metadata: dict[str, str | bytes]
    repeats_metadata: bool = False
    traceparent: str = ""
    # How long the handler may take, if that is for us to see to.
    within_s: float | None = None
    # Set if the caller's stream was ended by us.
    cut_short: bool = False
    # If the call's trace is recorded.
    span: Span | None = None
    # Held while the call is served.
    place: Place | None = None


@runtime_checkable
class RequestHook(Protocol):
    """Called for every request, in the order of the list. Raises a Refusal to refuse; any other exception is a defect."""

    def enter(self, call: CallContext) -> None: ...


@runtime_checkable
class ResponseHook(Protocol):
    """Called for every response, in reverse order: `error` is the exception of the handler or of a request hook."""

    def leave(self, call: CallContext, error: BaseException | None) -> None: ...


Behaviour = RequestHook | ResponseHook
"""Plain functions, because a coroutine around each handler would cost time at its start and at each wait."""


def standard_behaviours(verifier: Verifier, settings: ServerSettings, metrics: Metrics, places: Places) -> tuple[Behaviour, ...]:
    """What every call passes before its request is read (`read_request`), and after it was served."""
    return (
        CallLog(settings.slow_call_ms),
        CallMetrics(metrics),
        Deadline(settings.deadline_default_s, settings.deadline_max_s, settings.stream_s_max),
        TraceContext(),
        Authentication(verifier),
        Authorization(),
        Admission(places),
    )


def nobody_waits(error: BaseException) -> bool:
    """Whether an error needs no answer: the caller has one or is gone, or the process is ending."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0  # else nobody asked for it, and it is a defect
    return isinstance(error, AbortError) or not isinstance(error, Exception)


async def answer_error(call: CallContext, error: BaseException) -> Any:
    """Answers any exception with a status of ours. For a defect the caller learns only that there was one.

    gRPC itself would send the exception's text to the caller, and would not answer after a CancelledError that nobody asked
    for. Raises AbortError, which gRPC expects.
    """
    if not isinstance(error, Refusal):
        log.error("call_defect", method=call.rpc.name, exc_info=error)
    code, text, trailing = trailers(to_status(error))
    return await call.context.abort(code, text, trailing)


class TraceContext:
    """Uses the caller's trace context, or begins a new trace. Makes a span for the call if the trace is recorded."""

    def enter(self, call: CallContext) -> None:
        given = call.metadata.get("traceparent")
        parent = valid_traceparent(given if isinstance(given, str) else None)
        if not tracing.on():
            call.traceparent = parent or new_traceparent()
        else:
            name, known = call.rpc.name, {"rpc.system.name": "grpc", "rpc.method": call.rpc.name}
            if parent is None:
                call.traceparent, call.span = tracing.begin(name, "server", attributes=known)
            else:
                call.span = tracing.start(name, "server", parent=parent, attributes=known)
                call.traceparent = parent if call.span is None else tracing.traceparent_of(call.span)
        call_facts.set({"trace_id": trace_id(call.traceparent), "span_id": span_id(call.traceparent)})

    def leave(self, call: CallContext, error: BaseException | None) -> None:
        if call.span is None:
            return
        code = "OK" if error is None else _code(error)
        call.span.set_attribute("rpc.response.status_code", code)
        if (known := current_call.get(None)) is not None:
            call.span.set_attribute("foldline.tenant", known.identity.tenant)
        if isinstance(error, Refusal):
            call.span.set_attribute("foldline.refusal", error.reason)
        tracing.end(call.span, error=code if code in tracing.SERVER_FAULTS else "")


class CallLog:
    """One line for each call: which, how it ended, how long it took. A warning if it was slow or met a defect.

    A stream that a client sends to lasts as long as the client wants, and an RPC with a deadline of its own as long as that.
    """

    def __init__(self, slow_ms: float) -> None:
        self._slow_ms = slow_ms

    def leave(self, call: CallContext, error: BaseException | None) -> None:
        took_ms = (time.perf_counter() - call.began) * 1000
        code = "OK" if error is None else _code(error)
        slow = took_ms > self._slow_ms and call.rpc.deadline_max_s is None and not call.rpc.streams_requests
        facts: dict[str, Any] = {"method": call.rpc.name, "code": code, "took_ms": round(took_ms, 2)}
        if isinstance(error, Refusal):
            facts["reason"] = error.reason
        if slow or code == "INTERNAL":
            log.warning("slow_call" if slow else "call", **facts)
        else:
            log.info("call", **facts)


class CallMetrics:
    """Rate, errors and duration of each RPC."""

    def __init__(self, metrics: Metrics) -> None:
        self._durations = Histogram(
            "rpc.server.call.duration",
            "How long calls took that this process served.",
            unit="s",
            bounds=SECONDS,
            labels=("rpc.system.name", "rpc.method", "rpc.response.status_code"),
        )
        metrics.add(self._durations)

    def leave(self, call: CallContext, error: BaseException | None) -> None:
        code = "OK" if error is None else _code(error)
        example = "" if call.span is None else call.traceparent
        self._durations.observe(time.perf_counter() - call.began, ("grpc", call.rpc.name, code), traceparent=example)


def _code(error: BaseException) -> str:
    if isinstance(error, Refusal):
        return error.code.name
    if isinstance(error, asyncio.CancelledError):
        return "CANCELLED"
    return "ABORTED_BY_HANDLER" if isinstance(error, AbortError) else "INTERNAL"


class Authentication:
    """Verifies the bearer token. The handler finds the caller in `shared.platform.identity.current_call`."""

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier

    def enter(self, call: CallContext) -> None:
        if call.repeats_metadata and sum(name == "authorization" for name, _ in call.context.invocation_metadata() or ()) > 1:
            raise Unauthenticated("TOKEN_INVALID", "the token is not believed: it is one of several")
        header = call.metadata.get("authorization", "")
        scheme, _, token = header.partition(" ") if isinstance(header, str) else ("", "", "")
        identity: Identity = self._verifier.verify(token.strip() if scheme.lower() == "bearer" else "")
        current_call.set(Call(identity, call.rpc.name, call.traceparent))


class Authorization:
    """Refuses a caller without any of the roles that the service's table names for the RPC."""

    def enter(self, call: CallContext) -> None:
        if call.rpc.roles.isdisjoint(current_call.get().identity.roles):
            needed = ", ".join(sorted(call.rpc.roles))
            raise Forbidden("ROLE_MISSING", f"this needs one of the roles: {needed}", roles=needed)


class Deadline:
    """Bounds the time of every call: a missing or too long deadline is replaced by ours.

    A client's stream is ended by its reader (`stream_s_max`), after the last answer; what is left then has the usual time.

    gRPC itself cancels the handler at any other deadline. A timer of our own for each call would cost time, and the caller
    has DEADLINE_EXCEEDED by then anyway.
    """

    def __init__(self, default_s: float, max_s: float, stream_s_max: float) -> None:
        self._default_s = default_s
        self._max_s = max_s
        self._stream_s_max = stream_s_max + default_s

    def enter(self, call: CallContext) -> None:
        asked_s = cast("float | None", call.context.time_remaining())
        if call.rpc.streams_requests:
            call.within_s = self._stream_s_max
            return
        max_s = call.rpc.deadline_max_s or self._max_s
        if asked_s is None:
            call.within_s = min(call.rpc.deadline_max_s or self._default_s, max_s)
        elif asked_s > max_s:
            call.within_s = max_s


class Admission:
    """Gives each call a place, or refuses it: see shared/rpc/places.py."""

    def __init__(self, places: Places) -> None:
        self._places = places

    def enter(self, call: CallContext) -> None:
        call.place = self._places.take(current_call.get().identity)
        if not call.rpc.streams_requests:
            self._places.awaits_request(call.place)

    def leave(self, call: CallContext, error: BaseException | None) -> None:
        if call.place is not None:
            self._places.give_back(call.place)
            if refusal := call.place.answer(error):
                raise refusal


async def read_request(call: CallContext, places: Places) -> None:
    """Reads the request and holds it to the rules of its `.proto`; a client's stream is read as the handler asks for it.

    Raises Invalid (MALFORMED_MESSAGE, INVALID_REQUEST) or OverLimit (MESSAGE_TOO_LARGE).
    """
    rpc = call.rpc
    if rpc.streams_requests:
        call.request = _messages(rpc, call.request)
        return
    raw = await call.context.read()
    if call.place is not None:
        places.has_request(call.place)
    began_ns = 0 if call.span is None else time.time_ns()
    try:
        call.request = read_message(rpc, b"" if raw is EOF else raw)
    finally:
        if began_ns and (span := tracing.start("validate", "internal", parent=call.traceparent, start_ns=began_ns)):
            tracing.end(span)
    if rpc.is_command:
        call_facts.get()["command_id"] = call.request.options.command_id


def read_message(rpc: Rpc, raw: bytes) -> Any:
    """The message that came as `raw`. Raises OverLimit (MESSAGE_TOO_LARGE) or Invalid (MALFORMED_MESSAGE, ...)."""
    if len(raw) > rpc.size_max:
        raise OverLimit(
            "MESSAGE_TOO_LARGE",
            f"the request has {len(raw)} bytes, {rpc.size_max} are allowed",
            size=len(raw),
            size_max=rpc.size_max,
        )
    refuse_uncounted(rpc.request_type, raw)
    try:
        message = rpc.request_type.FromString(raw)
    except (DecodeError, ValueError, RecursionError):
        kind = rpc.request_type.DESCRIPTOR.full_name
        raise Invalid(
            "MALFORMED_MESSAGE", "the request cannot be read", violations=(("", f"these bytes are not a {kind}"),)
        ) from None
    refuse_invalid(message)
    return message


async def _messages(rpc: Rpc, stream: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for raw in stream:
        yield read_message(rpc, raw)
