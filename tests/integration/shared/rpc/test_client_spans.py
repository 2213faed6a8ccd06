"""Calls through a channel of ours are client spans: what they say, what goes on below them, and what is not recorded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from grpc import aio
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from shared.platform import tracing
from shared.platform.certificates import TlsFiles
from shared.rpc.client import bearer, channel
from shared.rpc.client_spans import of_next_calls
from tests.support.system.authority import Authority
from tests.support.system.waiting import eventually

SAMPLED = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
UNSAMPLED = SAMPLED[:-2] + "00"
SECRET = "a-token"


class Told:
    """The traceparents that a server was called with, and when its calls may end."""

    def __init__(self) -> None:
        self.traceparents: list[str | None] = []
        self.may_end = asyncio.Event()
        self.may_end.set()


@asynccontextmanager
async def serving(credentials: grpc.ServerCredentials | None = None) -> AsyncIterator[tuple[int, Told]]:
    """A server whose `One` answers, whose `No` refuses, and whose `Many` answers twice; its port."""
    told = Told()

    async def one(request: Empty, context: Any) -> Empty:
        told.traceparents.append(dict(context.invocation_metadata()).get("traceparent"))
        await told.may_end.wait()
        return Empty()

    async def no(request: Empty, context: Any) -> Empty:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "Zaphod Beeblebrox")
        return Empty()

    async def many(request: Empty, context: Any) -> AsyncIterator[Empty]:
        yield Empty()
        await told.may_end.wait()
        yield Empty()

    codec: dict[str, Any] = {"request_deserializer": Empty.FromString, "response_serializer": Empty.SerializeToString}
    handlers = {
        "One": grpc.unary_unary_rpc_method_handler(one, **codec),
        "No": grpc.unary_unary_rpc_method_handler(no, **codec),
        "Many": grpc.unary_stream_rpc_method_handler(many, **codec),
    }
    server = aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", handlers),))
    address = "127.0.0.1:0"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    await server.start()
    yield port, told
    await server.stop(0)


class Methods:
    """What a stub would have."""

    def __init__(self, through: aio.Channel) -> None:
        self.one = through.unary_unary("/test.Service/One", Empty.SerializeToString, Empty.FromString)
        self.no = through.unary_unary("/test.Service/No", Empty.SerializeToString, Empty.FromString)
        self.many = through.unary_stream("/test.Service/Many", Empty.SerializeToString, Empty.FromString)


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Records into memory."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    exporter = InMemorySpanExporter()
    tracing.configure("test", exporter)
    yield exporter
    tracing.shutdown()


def recorded(exporter: InMemorySpanExporter) -> Sequence[ReadableSpan]:
    """The spans that were ended."""
    tracing.shutdown()
    return exporter.get_finished_spans()


def attributes(span: ReadableSpan) -> dict[str, Any]:
    """What a span says."""
    return dict(span.attributes or {})


async def test_a_call_is_a_span_above_the_servers(exporter: InMemorySpanExporter) -> None:
    """A new trace begins with it; the server is told of it, and nothing of the request or the token is in it."""
    async with serving() as (port, told), channel(f"127.0.0.1:{port}") as through:
        await Methods(through).one(Empty(), metadata=bearer(SECRET), timeout=10)
    [span] = recorded(exporter)
    assert (span.name, span.kind.name, span.parent, span.status.is_ok) == ("test.Service/One", "CLIENT", None, True)
    assert attributes(span) == {
        "rpc.system.name": "grpc",
        "rpc.method": "test.Service/One",
        "rpc.response.status_code": "OK",
        "server.address": "127.0.0.1",
        "server.port": port,
    }
    assert told.traceparents == [f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-01"]


async def test_a_call_goes_on_with_the_trace_that_it_is_given(exporter: InMemorySpanExporter) -> None:
    """The one `traceparent` of its metadata, with the links and attributes of whoever makes it; later calls have none of them."""
    async with serving() as (port, told), channel(f"127.0.0.1:{port}") as through:
        methods, metadata = Methods(through), bearer(SECRET, traceparent=SAMPLED)
        with of_next_calls(links=[SAMPLED], **{"foldline.commands": 3}):
            call = methods.one(Empty(), metadata=metadata, timeout=10)
        await call
        await methods.one(Empty(), metadata=aio.Metadata(*metadata), timeout=10)
    first, second = recorded(exporter)
    for span, traceparent in zip((first, second), told.traceparents, strict=True):
        assert span.parent is not None
        assert f"{span.parent.span_id:016x}" == "00f067aa0ba902b7"
        assert traceparent == f"00-4bf92f3577b34da6a3ce929d0e0e4736-{span.context.span_id:016x}-01"
    assert ([f"{link.context.span_id:016x}" for link in first.links], first.attributes["foldline.commands"]) == (  # type: ignore[index]
        ["00f067aa0ba902b7"],
        3,
    )
    assert (len(second.links), "foldline.commands" in attributes(second)) == (0, False)


async def test_a_refusal_is_an_error_of_the_client_without_its_text(exporter: InMemorySpanExporter) -> None:
    """Its code is in the span; what the server said is not, for it may name somebody."""
    async with serving() as (port, _), channel(f"127.0.0.1:{port}") as through:
        with pytest.raises(aio.AioRpcError):
            await Methods(through).no(Empty(), timeout=10)
    [span] = recorded(exporter)
    assert attributes(span)["error.type"] == attributes(span)["rpc.response.status_code"] == "FAILED_PRECONDITION"
    assert not span.status.is_ok
    assert "Zaphod" not in span.to_json()


async def test_the_span_of_a_call_that_is_given_up_ends(exporter: InMemorySpanExporter) -> None:
    """By a cancelled task, by its deadline, or by an answer that nobody is there to give."""
    async with serving() as (port, told), channel(f"127.0.0.1:{port}", retries=False) as through:
        told.may_end.clear()
        waiting = asyncio.create_task(_one(through))
        await eventually(lambda: bool(told.traceparents), 20)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        with pytest.raises(aio.AioRpcError):
            await Methods(through).one(Empty(), timeout=0.05)
    async with channel(f"127.0.0.1:{port}", retries=False) as through:
        with pytest.raises(aio.AioRpcError):
            await Methods(through).one(Empty(), timeout=10)
    codes = [attributes(span)["error.type"] for span in recorded(exporter)]
    assert codes == ["CANCELLED", "DEADLINE_EXCEEDED", "UNAVAILABLE"]


async def _one(through: aio.Channel) -> None:
    await Methods(through).one(Empty(), timeout=60)


async def test_a_stream_is_one_span_until_its_last_answer(exporter: InMemorySpanExporter) -> None:
    """Also one whose reader has seen enough."""
    async with serving() as (port, told), channel(f"127.0.0.1:{port}") as through:
        assert len([answer async for answer in Methods(through).many(Empty(), timeout=10)]) == 2
        told.may_end.clear()
        call = Methods(through).many(Empty(), timeout=60)
        await anext(aiter(call))
        assert not exporter.get_finished_spans()[1:]
        call.cancel()
    assert [attributes(span)["rpc.response.status_code"] for span in recorded(exporter)] == ["OK", "CANCELLED"]


async def test_calls_over_tls_are_recorded_too(exporter: InMemorySpanExporter, tmp_path: Any) -> None:
    """The address is without the scheme."""
    authority = Authority(tmp_path)
    files = authority.issue()
    credentials = grpc.ssl_server_credentials([(files.key.read_bytes(), files.cert.read_bytes())])
    async with (
        serving(credentials) as (port, told),
        channel(f"grpcs://localhost:{port}", tls=TlsFiles(authority.ca)) as through,
    ):
        await Methods(through).one(Empty(), timeout=10)
    [span] = recorded(exporter)
    assert (attributes(span)["server.address"], attributes(span)["server.port"]) == ("localhost", port)
    assert told.traceparents == [f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-01"]


@pytest.mark.parametrize("given", [UNSAMPLED, "garbage"])
async def test_a_trace_that_is_not_recorded_goes_on_as_it_came(exporter: InMemorySpanExporter, given: str) -> None:
    """There is no span; the server is sent what the caller gave."""
    async with serving() as (port, told), channel(f"127.0.0.1:{port}") as through:
        await Methods(through).one(Empty(), metadata=bearer(SECRET, traceparent=given), timeout=10)
    assert (recorded(exporter), told.traceparents) == ((), [given])


async def test_the_client_decides_whether_a_new_trace_is_recorded(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """By its sampler; the server is told that it is not, so that it makes no trace of a part."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    exporter = request.getfixturevalue("exporter")
    async with serving() as (port, told), channel(f"127.0.0.1:{port}") as through:
        await Methods(through).one(Empty(), timeout=10)
    assert recorded(exporter) == ()
    [traceparent] = told.traceparents
    assert traceparent is not None
    assert traceparent.endswith("-00")


async def test_nothing_is_added_where_nothing_is_recorded() -> None:
    """A process that exports no traces sends what its caller gives, and no trace of its own."""
    async with serving() as (port, told), channel(f"127.0.0.1:{port}") as through:
        await Methods(through).one(Empty(), timeout=10)
        await Methods(through).one(Empty(), metadata=bearer(SECRET, traceparent=SAMPLED), timeout=10)
    assert told.traceparents == [None, SAMPLED]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("write:50051", {"server.address": "write", "server.port": 50051}),
        ("dns:///write:50051", {"server.address": "write", "server.port": 50051}),
        ("[::1]:50051", {"server.address": "::1", "server.port": 50051}),
        ("ipv4:10.0.0.1:1,10.0.0.2:2", {"server.address": "ipv4:10.0.0.1:1,10.0.0.2:2"}),
        ("unix:/run/write.sock", {"server.address": "unix:/run/write.sock"}),
    ],
)
async def test_the_servers_address_is_what_the_channel_leads_to(
    exporter: InMemorySpanExporter, target: str, said: dict[str, Any]
) -> None:
    """A host and its port, or what gRPC resolves to several."""
    async with channel(target, retries=False) as through:
        Methods(through).one(Empty(), timeout=0.001).cancel()
    [span] = recorded(exporter)
    assert {name: value for name, value in attributes(span).items() if name.startswith("server.")} == said
