"""The server as a caller sees it: real gRPC, real tokens; only the services behind it are the test's own."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import pytest
from grpc import aio
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from foldline.v1 import command_pb2
from shared.folds.errors import Rejected
from shared.platform import telemetry, tracing
from shared.platform.identity import Call, Role, current_call
from shared.rpc.behaviours import CallLog
from shared.rpc.client import bearer
from shared.rpc.status import from_rpc_error
from tests.support.system.people import ID, REGISTER, SECRET, USERS, MakeWorld, World, receipt, refused
from tests.support.system.waiting import eventually


async def test_a_handler_finds_who_is_calling(world: World) -> None:
    """The identity of the token, the method and the caller's trace are the handler's to read."""
    seen: list[Call] = []
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

    async def handle(request: Any) -> command_pb2.CommandReceipt:
        seen.append(current_call.get())
        return await receipt(request)

    world.people.handle = handle
    assert (await world.register(metadata=bearer(world.token(), traceparent=trace))).command_id == ID
    [call] = seen
    assert (call.identity.tenant, call.identity.user_id, call.identity.roles) == ("acme", "alice", USERS)
    assert (call.method, call.traceparent) == (REGISTER, trace)


@pytest.mark.parametrize("given", ["", "garbage", f"00-{'0' * 32}-b7ad6b7169203331-01", f"ff-{'a' * 32}-{'b' * 16}-01"])
async def test_a_trace_context_that_is_none_is_replaced_by_a_new_root(world: World, given: str) -> None:
    """No caller can put its own text where a trace context belongs."""
    seen: list[str] = []

    async def handle(request: Any) -> command_pb2.CommandReceipt:
        seen.append(current_call.get().traceparent)
        return await receipt(request)

    world.people.handle = handle
    await world.register(metadata=bearer(world.token(), traceparent=given))
    assert seen[0] != given
    assert telemetry.valid_traceparent(seen[0]) == seen[0]


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ((), "TOKEN_MISSING"),
        ((("authorization", "Basic YWxpY2U6eA=="),), "TOKEN_MISSING"),
        ((("authorization", "Bearer "),), "TOKEN_MISSING"),
        ((("authorization", "Bearer rubbish"),), "TOKEN_INVALID"),
    ],
)
async def test_a_call_without_a_believable_token_is_unauthenticated(world: World, metadata: Any, reason: str) -> None:
    """Nobody is served who does not say who they are."""
    code, refusal = await refused(world.register(metadata=metadata))
    assert (code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, reason)


async def test_a_call_without_a_needed_role_is_denied(world: World) -> None:
    """A valid token is not enough: the table of roles decides."""
    code, refusal = await refused(world.register(token=world.token(Role.READER)))
    assert (code, refusal.reason) == (grpc.StatusCode.PERMISSION_DENIED, "ROLE_MISSING")


async def test_bytes_that_are_no_message_are_refused_with_a_violation(world: World) -> None:
    """Malformed protobuf is the caller's mistake and is told so, not UNKNOWN as gRPC would."""
    code, refusal = await refused(world.send_bytes(b"\xff\xff\xff\xff"))
    assert (code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")
    assert refusal.violations == (("", "these bytes are not a bank.v1.RegisterPersonRequest"),)


async def test_a_field_that_breaks_its_rule_is_named(world: World) -> None:
    """The rules in the .proto are checked before the handler is called."""
    code, refusal = await refused(world.register(""))
    assert (code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert [field for field, _ in refusal.violations] == ["name"]


async def test_a_request_of_two_mebibytes_is_too_large(world: World) -> None:
    """The refusal has a name and says how much is allowed."""
    code, refusal = await refused(world.register("x" * 2 * 1024 * 1024))
    assert (code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")
    assert refusal.facts["size_max"] == "1048576"


async def test_a_request_of_five_mebibytes_is_refused_by_grpc(world: World) -> None:
    """What is far too large never gets into memory; gRPC's own refusal has no reason but its code's name."""
    code, refusal = await refused(world.register("x" * 5 * 1024 * 1024))
    assert (code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RESOURCE_EXHAUSTED")


async def test_a_defect_reaches_the_log_and_nobody_else(world: World) -> None:
    """An exception's text may hold anything, so the caller is told INTERNAL and nothing of it."""

    async def handle(request: Any) -> command_pb2.CommandReceipt:
        raise RuntimeError(SECRET)

    world.people.handle = handle
    with pytest.raises(aio.AioRpcError) as caught:
        await world.register()
    error = caught.value
    assert error.code() is grpc.StatusCode.INTERNAL
    assert from_rpc_error(error).reason == "INTERNAL"
    told = f"{error.details()} {error.debug_error_string()} {list(error.trailing_metadata() or ())} {error.initial_metadata()}"
    assert SECRET not in told
    assert "Traceback" not in told
    [line] = world.lines("call_defect")
    assert SECRET in line["exception"]
    assert (line["tenant"], line["command_id"]) == ("acme", ID)


async def test_a_defect_on_the_way_out_is_one_too(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log cannot be written, for one: gRPC would tell the caller why."""

    def fail(self: CallLog, exchange: object, error: BaseException | None) -> None:
        raise OSError("secret")

    monkeypatch.setattr(CallLog, "leave", fail)
    world = await make_world()
    code, refusal = await refused(world.register())
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in str(refusal)


async def test_a_cancellation_that_nobody_asked_for_is_answered(world: World) -> None:
    """grpc.aio alone would leave the caller waiting for ever."""

    async def handle(request: Any) -> command_pb2.CommandReceipt:
        raise asyncio.CancelledError

    world.people.handle = handle
    code, refusal = await refused(world.register())
    assert (code, refusal.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")


async def test_a_refusal_arrives_with_all_it_says(world: World) -> None:
    """Code, reason, text, facts and when to try again travel in google.rpc.Status."""

    async def handle(request: Any) -> command_pb2.CommandReceipt:
        raise Rejected("INSUFFICIENT_FUNDS", "there is not enough money", retry_after_s=1.5, balance_minor=100)

    world.people.handle = handle
    code, refusal = await refused(world.register())
    assert (code, refusal.reason, refusal.text) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "INSUFFICIENT_FUNDS",
        "there is not enough money",
    )
    assert (refusal.facts, refusal.retry_after_s) == ({"balance_minor": "100"}, 1.5)


async def test_a_refusal_that_says_too_much_still_arrives(world: World) -> None:
    """Trailers are limited; what is cut is never the reason."""

    async def handle(request: Any) -> command_pb2.CommandReceipt:
        facts: dict[str, Any] = {f"fact_{n}": "v" * 600 for n in range(20)}
        raise Rejected("TALKATIVE", "🙂" * 5000, violations=(("f" * 500, "🙂" * 500),) * 50, **facts)

    world.people.handle = handle
    code, refusal = await refused(world.register())
    assert (code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "TALKATIVE")


@pytest.mark.parametrize("route", ["/bank.v1.PersonService/BurnPerson", "/no.such.Service/Method"])
async def test_an_unknown_method_is_unimplemented_whoever_asks(world: World, route: str) -> None:
    """Nothing is learnt from it, with a token or without."""
    for metadata in ((), bearer(world.token())):
        method: aio.UnaryUnaryMultiCallable[bytes, bytes] = world.channel.unary_unary(route)
        code, _ = await refused(method(b"", metadata=metadata, timeout=20))
        assert code is grpc.StatusCode.UNIMPLEMENTED


async def test_each_call_is_one_line_without_content_or_token(world: World) -> None:
    """The line says who, what, how it ended; the request's content and the token are in none."""
    token = world.token()
    await world.register("Alice Liddell", token=token)
    [line] = await eventually(lambda: world.lines("call"))
    assert {key: line[key] for key in ("method", "code", "tenant", "user", "command_id", "level")} == {
        "method": REGISTER,
        "code": "OK",
        "tenant": "acme",
        "user": "alice",
        "command_id": ID,
        "level": "info",
    }
    assert len(line["trace_id"]) == 32
    text = world.log.getvalue().decode()
    assert "Liddell" not in text
    assert token not in text


async def test_a_slow_call_is_a_warning(make_world: MakeWorld) -> None:
    """A call that takes longer than it should stands out in the log."""
    world = await make_world(slow_call_ms=1)

    async def handle(request: Any) -> command_pb2.CommandReceipt:
        began = time.perf_counter()
        while time.perf_counter() - began < 0.002:
            pass
        return await receipt(request)

    world.people.handle = handle
    await world.register()
    [line] = world.lines("slow_call")
    assert line["level"] == "warning"
    assert line["took_ms"] >= 2


async def test_a_call_with_two_tokens_is_not_believed(make_world: MakeWorld) -> None:
    """Which one counts would depend on who reads them; other headers may come twice."""
    world = await make_world()
    token = bearer(world.token())
    code, refusal = await refused(world.register(metadata=(*token, *bearer("another"))))
    assert (code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID")
    await world.register(metadata=(*token, ("x-more", "1"), ("x-more", "2")))


async def test_every_call_is_counted_by_method_and_status(make_world: MakeWorld) -> None:
    """Those that are refused on their way in as well."""
    world = await make_world()
    await world.register()
    await world.register()
    with pytest.raises(aio.AioRpcError):
        await world.register(token="nobody")
    _, text = await world.server.probes.metrics.render()

    def count(code: str) -> list[str]:
        series = f'{{rpc_method="{REGISTER}",rpc_response_status_code="{code}",rpc_system_name="grpc"}}'
        return [line for line in text.decode().splitlines() if line.startswith(f"rpc_server_call_duration_seconds_count{series}")]

    assert [line.rpartition(" ")[2] for code in ("OK", "UNAUTHENTICATED") for line in count(code)] == ["2.0", "1.0"]


async def test_the_duration_of_a_recorded_call_leads_to_its_trace(make_world: MakeWorld) -> None:
    """The histogram's page names the trace that the call was in, as OpenMetrics does; a call that is not recorded leaves it."""
    world = await make_world()
    exporter = InMemorySpanExporter()
    tracing.configure("test", exporter)
    try:
        root = "00-" + "a" * 32 + "-" + "b" * 16
        await world.register(metadata=(*bearer(world.token()), ("traceparent", f"{root}-01")))
        await world.register(metadata=(*bearer(world.token()), ("traceparent", f"00-{'c' * 32}-{'d' * 16}-00")))
    finally:
        tracing.shutdown()
    [span] = [it for it in exporter.get_finished_spans() if it.name == REGISTER and it.kind is SpanKind.SERVER]
    _, text = await world.server.probes.metrics.render("application/openmetrics-text")
    [line] = [
        it for it in text.decode().splitlines() if it.startswith("rpc_server_call_duration_seconds_bucket") and " # {" in it
    ]
    assert f'rpc_method="{REGISTER}"' in line
    assert f'trace_id="{"a" * 32}"' in line
    assert f'span_id="{span.context.span_id:016x}"' in line
