"""Client spans: one for each call through a channel of ours, if its trace is recorded.

A call goes on with the trace of its metadata (`traceparent`), or begins one, which the sampler of this process decides on. The
server's span is below the client's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

from grpc import aio

from shared.platform import tracing
from shared.platform.telemetry import valid_traceparent

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_NOTHING: tuple[Sequence[str], dict[str, str | int]] = ((), {})
_known: ContextVar[tuple[Sequence[str], dict[str, str | int]]] = ContextVar("known", default=_NOTHING)


@contextmanager
def of_next_calls(*, links: Sequence[str], **attributes: str | int) -> Iterator[None]:
    """Spans of calls that begin in the block have these attributes and, if the call goes on with a trace, these links."""
    before = _known.set((links, attributes))
    try:
        yield
    finally:
        _known.reset(before)


class TracedMethod:
    """Makes the calls of one RPC with a span for each that is recorded.

    A wrapper and no interceptor of grpc.aio's: with one, each call would take two more tasks, recorded or not.
    """

    def __init__(self, name: str, target: str) -> None:
        """`name` is the RPC's, bank.v1.PersonService/RegisterPerson; `target` is what the channel leads to."""
        self._name = name
        self._attributes: dict[str, str | int] = {"rpc.system.name": "grpc", "rpc.method": name, **_server(target)}

    def call(self, method: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any]) -> Any:
        """Makes a call by a method of grpc.aio; returns the call."""
        metadata = tuple(named.get("metadata") or ())
        parent = next((value for key, value in metadata if key == "traceparent"), None)
        links, more = _known.get()
        attributes = {**self._attributes, **more} if more else self._attributes
        if parent is None:
            traceparent, span = tracing.begin(self._name, "client", attributes=attributes)
        elif valid_traceparent(parent) is None:
            return method(*arguments, **named)
        else:
            span = tracing.start(self._name, "client", parent=parent, attributes=attributes, links=links)
            traceparent = parent if span is None else tracing.traceparent_of(span)
        if traceparent is not parent:
            named["metadata"] = (*(pair for pair in metadata if pair[0] != "traceparent"), ("traceparent", traceparent))
        if span is None:
            return method(*arguments, **named)
        try:
            call = method(*arguments, **named)
        except BaseException as error:
            tracing.end(span, error=type(error).__name__)
            raise
        call.add_done_callback(partial(_end, span))
        return call


def _end(span: Span, call: aio.Call) -> None:
    """Ends the span of a call that is done. To a client any status but OK is an error."""
    code = _code(call)
    span.set_attribute("rpc.response.status_code", code)
    tracing.end(span, error="" if code == "OK" else code)


def _code(call: aio.Call) -> str:
    """The status code of a call that is done. Its coroutine then ends at the first step: a loop that ends needs no more tasks."""
    asked = call.code()
    try:
        asked.send(None)
    except StopIteration as done:
        code: str = done.value.name
        return code
    finally:
        asked.close()
    return "UNKNOWN"


def _server(target: str) -> dict[str, str | int]:
    """The address that a channel's target names: a host and its port, or what gRPC resolves."""
    host, _, port = target.removeprefix("dns:///").rpartition(":")
    if host and port.isdigit() and "," not in target:
        return {"server.address": host.removeprefix("[").removesuffix("]"), "server.port": int(port)}
    return {"server.address": target}
