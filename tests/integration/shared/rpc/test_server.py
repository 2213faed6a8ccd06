"""The server as a caller sees it: real gRPC, real tokens; only the services behind it are the test's own."""

# ruff: noqa: N802 (methods are named as the RPCs are)

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from bank.v1 import person_pb2, person_pb2_grpc
from foldline.v1 import command_pb2, command_pb2_grpc, event_store_pb2_grpc
from shared.folds.errors import OverLimit, Refusal, Rejected
from shared.platform import telemetry
from shared.platform.identity import Call, Role, current_call
from shared.platform.settings import ServerSettings
from shared.platform.tokens import DevelopmentIssuer
from shared.rpc.behaviours import CallLog
from shared.rpc.client import bearer, channel
from shared.rpc.handlers import Misconfigured
from shared.rpc.places import OPEN_CALLS_MAX
from shared.rpc.server import Server
from shared.rpc.status import from_rpc_error
from tests.support.system.waiting import eventually

ID = "0190e4a0-0000-7000-8000-000000000000"
REGISTER, RENAME, CLOSE = (f"bank.v1.PersonService/{rpc}" for rpc in ("RegisterPerson", "RenamePerson", "ClosePerson"))
USERS = frozenset({Role.USER})
SECRET = "hunter2-is-a-secret"
REGISTER_ROUTE = f"/{REGISTER}"
OPTIONS = command_pb2.CommandOptions(command_id=ID)

Handler = Callable[[Any], Awaitable[command_pb2.CommandReceipt]]


async def receipt(request: Any) -> command_pb2.CommandReceipt:
    """The plainest handler."""
    return command_pb2.CommandReceipt(command_id=request.options.command_id)


class People(person_pb2_grpc.PersonServiceServicer):
    """Does what the test says."""

    def __init__(self) -> None:
        self.handle: Handler = receipt

    async def RegisterPerson(self, request: person_pb2.RegisterPersonRequest, context: Any) -> command_pb2.CommandReceipt:
        return await self.handle(request)

    async def RenamePerson(self, request: person_pb2.RenamePersonRequest, context: Any) -> command_pb2.CommandReceipt:
        return await self.handle(request)

    async def ClosePerson(self, request: person_pb2.ClosePersonRequest, context: Any) -> command_pb2.CommandReceipt:
        return await self.handle(request)


class World:
    """A server with its issuer, its log and a channel to it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.issuer = DevelopmentIssuer(folder)
        self.log = io.BytesIO()
        telemetry.configure("info", service="test", stream=self.log)
        self.people = People()
        self.settings = ServerSettings(jwks_file=self.issuer.jwks_file, **settings)
        self.server = Server(self.settings, roles={REGISTER: USERS, RENAME: USERS, CLOSE: USERS})
        self.server.add(person_pb2_grpc.add_PersonServiceServicer_to_server, self.people)
        self.channel: aio.Channel

    async def start(self) -> None:
        await self.server.start()
        self.channel = channel(f"127.0.0.1:{self.server.port}", retries=False)
        self.stub = person_pb2_grpc.PersonServiceStub(self.channel)

    def token(self, *roles: Role) -> str:
        return self.issuer.issue(tenant="acme", user_id="alice", roles=roles or USERS)

    def lines(self, event: str) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, self.log.getvalue().splitlines()) if line["event"] == event]

    async def register(self, name: str = "Alice", *, token: str | None = None, **call: Any) -> command_pb2.CommandReceipt:
        call.setdefault("timeout", 5)
        call.setdefault("metadata", bearer(self.token() if token is None else token))
        request = person_pb2.RegisterPersonRequest(options=OPTIONS, person_id=ID, name=name)
        return await self.stub.RegisterPerson(request, **call)

    async def send_bytes(self, raw: bytes) -> bytes:
        method: aio.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(REGISTER_ROUTE)
        return await method(raw, metadata=bearer(self.token()), timeout=20)


MakeWorld = Callable[..., Awaitable[World]]


@pytest.fixture
async def make_world(tmp_path: Path) -> AsyncIterator[MakeWorld]:
    """Makes servers with settings of the test's choice."""
    made: list[World] = []

    async def make(**settings: Any) -> World:
        world = World(tmp_path, **settings)
        await world.start()
        made.append(world)
        return world

    yield make
    for world in made:
        await world.channel.close()
        await world.server.drain()


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    """A server with the usual settings."""
    return await make_world()


async def refused(call: Awaitable[Any]) -> tuple[grpc.StatusCode, Refusal]:
    """What a call is refused with."""
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    return caught.value.code(), from_rpc_error(caught.value)


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


@pytest.mark.parametrize("timeout_s", [None, 3600])
async def test_a_missing_or_absurd_deadline_is_replaced(make_world: MakeWorld, timeout_s: float | None) -> None:
    """No call lasts longer than the server allows."""
    world = await make_world(deadline_default_s=0.05, deadline_max_s=0.1)

    async def handle(request: Any) -> command_pb2.CommandReceipt:
        await asyncio.Event().wait()
        raise AssertionError

    world.people.handle = handle
    code, refusal = await refused(world.register(timeout=timeout_s))
    assert (code, refusal.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")


FROZEN_CALLER = """
import sys, grpc
call = grpc.insecure_channel(sys.argv[1]).unary_unary(sys.argv[2])
call.future(bytes.fromhex(sys.argv[3]), timeout=1, metadata=(("authorization", "Bearer " + sys.argv[4]),)).exception()
"""


async def test_a_callers_own_deadline_is_kept_even_if_the_caller_is_frozen(world: World) -> None:
    """GRPC ends the handler at the caller's deadline by itself, which is why the server sets no timer then."""
    started, ended = asyncio.Event(), asyncio.Event()

    async def handle(request: Any) -> command_pb2.CommandReceipt:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    world.people.handle = handle
    request = person_pb2.RegisterPersonRequest(options=OPTIONS, person_id=ID, name="Alice")
    target = f"127.0.0.1:{world.server.port}"
    arguments = [target, REGISTER_ROUTE, request.SerializeToString().hex(), world.token()]
    caller = subprocess.Popen([sys.executable, "-c", FROZEN_CALLER, *arguments])
    try:
        await asyncio.wait_for(started.wait(), 20)
        caller.send_signal(19)
        await asyncio.wait_for(ended.wait(), 30)
    finally:
        caller.kill()
        caller.wait()


async def test_a_caller_that_goes_away_ends_its_handler(world: World) -> None:
    """Cancellation reaches the handler, and the log says CANCELLED."""
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def handle(request: Any) -> command_pb2.CommandReceipt:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError

    world.people.handle = handle
    call = asyncio.create_task(world.register())
    await started.wait()
    call.cancel()
    await asyncio.wait_for(cancelled.wait(), 30)
    await eventually(lambda: [line["code"] for line in world.lines("call")] == ["CANCELLED"])
    assert not world.lines("call_defect")


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


async def test_more_calls_than_it_takes_on_are_refused_by_name(make_world: MakeWorld) -> None:
    """A call that comes while two are under way is told to come again; when one has ended, it may."""
    world = await make_world(calls_at_once_max=2)
    inside, over = asyncio.Semaphore(0), asyncio.Event()

    async def wait(request: Any) -> command_pb2.CommandReceipt:
        inside.release()
        await over.wait()
        return await receipt(request)

    world.people.handle = wait
    async with asyncio.timeout(30), asyncio.TaskGroup() as calls:
        for _ in range(2):
            calls.create_task(world.register(timeout=30))
            await inside.acquire()
        code, refusal = await refused(world.register())
        assert (code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS")
        assert isinstance(refusal, OverLimit)
        assert refusal.retry_after_s
        assert len(world.lines("too_many_calls")) == 1
        over.set()
    assert (await world.register()).command_id == ID


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


async def test_health_and_reflection_answer_without_a_token(make_world: MakeWorld) -> None:
    """Probes and tools have none; neither says anything about data."""
    world = await make_world(reflection=True)
    health = health_pb2_grpc.HealthStub(world.channel)
    for service in ("", "bank.v1.PersonService"):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    asked = reflection_pb2_grpc.ServerReflectionStub(world.channel).ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5
    )
    names = {service.name async for one in asked for service in one.list_services_response.service}
    assert "bank.v1.PersonService" in names


async def test_health_says_not_serving_until_told(tmp_path: Path) -> None:
    """A process that listens but still waits for its database is not sent calls."""
    world = World(tmp_path)
    port = await world.server.start(serving=False)
    async with channel(f"127.0.0.1:{port}") as to_server:
        health = health_pb2_grpc.HealthStub(to_server)
        before = await health.Check(health_pb2.HealthCheckRequest(), timeout=20)
        await world.server.set_serving(True)
        after = await health.Check(health_pb2.HealthCheckRequest(), timeout=20)
    await world.server.drain()
    assert (before.status, after.status) == (
        health_pb2.HealthCheckResponse.NOT_SERVING,
        health_pb2.HealthCheckResponse.SERVING,
    )


async def test_a_table_of_roles_that_does_not_fit_stops_the_start(tmp_path: Path) -> None:
    """An RPC without a row is not open to all, and a row without an RPC is a misspelling: neither gets as far as serving."""
    settings = ServerSettings(jwks_file=DevelopmentIssuer(tmp_path).jwks_file)
    missing = Server(settings, roles={REGISTER: USERS})
    missing.add(person_pb2_grpc.add_PersonServiceServicer_to_server, People())
    with pytest.raises(Misconfigured, match="RenamePerson"):
        await missing.start()
    unknown = Server(settings, roles={REGISTER: USERS, RENAME: USERS, CLOSE: USERS, "bank.v1.PersonService/Typo": USERS})
    unknown.add(person_pb2_grpc.add_PersonServiceServicer_to_server, People())
    with pytest.raises(Misconfigured, match="Typo"):
        await unknown.start()


async def test_a_service_cannot_be_added_twice_or_unimplemented(tmp_path: Path) -> None:
    """The second would silently win, and a forgotten method would be found by its first caller."""
    server = Server(
        ServerSettings(jwks_file=DevelopmentIssuer(tmp_path).jwks_file), roles={REGISTER: USERS, RENAME: USERS, CLOSE: USERS}
    )
    server.add(person_pb2_grpc.add_PersonServiceServicer_to_server, People())
    with pytest.raises(Misconfigured, match="twice"):
        server.add(person_pb2_grpc.add_PersonServiceServicer_to_server, People())

    class Forgetful(event_store_pb2_grpc.EventStoreServiceServicer):
        async def ReadAll(self, request: Any, context: Any) -> Any:  # type: ignore[override]
            """Does nothing."""

    with pytest.raises(Misconfigured, match="ReadStream"):
        server.add(event_store_pb2_grpc.add_EventStoreServiceServicer_to_server, Forgetful())  # type: ignore[abstract]


async def test_draining_lets_calls_finish_before_it_closes_what_they_use(world: World) -> None:
    """A call in flight is answered; only then the callbacks run, the last registered first."""
    order: list[str] = []
    started, go_on = asyncio.Event(), asyncio.Event()

    async def handle(request: Any) -> command_pb2.CommandReceipt:
        started.set()
        await go_on.wait()
        await asyncio.sleep(0.5)  # the handler's work, longer than answers are waited for that are on their way
        order.append("call")
        return await receipt(request)

    async def close(name: str) -> None:
        order.append(name)

    world.people.handle = handle
    world.server.on_drained(lambda: close("pool"))
    world.server.on_drained(lambda: close("committer"))
    watching = health_pb2_grpc.HealthStub(world.channel).Watch(health_pb2.HealthCheckRequest())
    assert (await anext(aiter(watching))).status == health_pb2.HealthCheckResponse.SERVING
    call = asyncio.create_task(world.register())
    await started.wait()
    began = time.monotonic()
    draining = asyncio.create_task(world.server.drain())
    assert (await anext(aiter(watching))).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert order == []
    go_on.set()
    assert (await call).command_id == ID
    await draining
    assert order == ["call", "committer", "pool"]
    # Whoever watches health would hold it up for all of drain_calls_s.
    assert time.monotonic() - began < world.settings.drain_calls_s


async def test_draining_waits_for_handlers_that_grpc_has_given_up(make_world: MakeWorld) -> None:
    """`stop` returns while an aborted handler still cleans up; what it uses is closed after it, not under it."""
    world = await make_world(drain_calls_s=0.05, drain_s=5)
    order: list[str] = []
    started = asyncio.Event()

    async def handle(request: Any) -> command_pb2.CommandReceipt:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.5)  # the handler's cleaning up
            order.append("handler ended")
        raise AssertionError

    async def close() -> None:
        order.append("closed")

    world.people.handle = handle
    world.server.on_drained(close)
    call = asyncio.create_task(world.register())
    await started.wait()
    await world.server.drain()
    assert order == ["handler ended", "closed"]
    code, _ = await refused(call)
    assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


async def test_draining_ends_in_time_whatever_hangs(make_world: MakeWorld) -> None:
    """Neither a handler nor a callback that never ends keeps the process."""
    world = await make_world(drain_calls_s=0.05, drain_s=0.3)
    started, release, closed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def handle(request: Any) -> command_pb2.CommandReceipt:
        started.set()
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        return await receipt(request)

    async def close() -> None:
        closed.set()

    async def hang() -> None:
        await asyncio.Event().wait()

    world.people.handle = handle
    world.server.on_drained(close)
    world.server.on_drained(hang)
    call = asyncio.create_task(world.register())
    await started.wait()
    began = time.monotonic()
    await world.server.drain()
    assert time.monotonic() - began < 5.5
    release.set()
    await refused(call)


COMMAND_METHODS = [method.name for method in command_pb2.DESCRIPTOR.services_by_name["CommandService"].methods]


async def unused(self: Any, request: Any, context: Any) -> Any:
    """An RPC of the service that no test here calls."""
    raise NotImplementedError


class Streams(command_pb2_grpc.CommandServiceServicer):
    """Answers each item of a stream with its tenant as the command's id."""

    async def SendBatch(self, request: Any, context: Any) -> command_pb2.SendBatchResponse:
        return command_pb2.SendBatchResponse()

    async def SendStream(
        self, request_iterator: AsyncIterator[command_pb2.SendStreamRequest], context: Any
    ) -> AsyncIterator[command_pb2.SendStreamResponse]:
        async for request in request_iterator:
            if request.item.tenant == "raise":
                raise RuntimeError(SECRET)
            yield answer(request.item.tenant)


for method in set(COMMAND_METHODS) - set(vars(Streams)):
    setattr(Streams, method, unused)


class BusyStreams(Streams):
    """Holds up the event loop before each answer, so that the call's time is over while the answer is being written."""

    async def SendStream(
        self, request_iterator: AsyncIterator[command_pb2.SendStreamRequest], context: Any
    ) -> AsyncIterator[command_pb2.SendStreamResponse]:
        async for request in request_iterator:
            time.sleep(0.4)  # noqa: ASYNC251 (that is what it is for)
            yield answer(request.item.tenant)


class BusyWriting(Streams):
    """The same, with the other form of a streaming handler: it writes through its context."""

    async def SendStream(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        async for request in request_iterator:
            time.sleep(0.4)  # noqa: ASYNC251 (that is what it is for)
            await context.write(answer(request.item.tenant))


def answer(text: str) -> command_pb2.SendStreamResponse:
    """The answer to an item."""
    return command_pb2.SendStreamResponse(receipt=command_pb2.CommandReceipt(command_id=text))


def item(text: str) -> command_pb2.SendStreamRequest:
    """A message of a stream, with its text where the tenant belongs."""
    made = command_pb2.SendStreamRequest(item=command_pb2.BatchItem(tenant=text))
    made.item.command.Pack(person_pb2.RegisterPersonRequest())
    return made


SEND_STREAM = "foldline.v1.CommandService/SendStream"
COMMAND_RPCS = [f"foldline.v1.CommandService/{method}" for method in COMMAND_METHODS]


class StreamWorld:
    """A server with a streaming service."""

    def __init__(self, folder: Path, servicer: Streams, **settings: Any) -> None:
        self.issuer = issuer = DevelopmentIssuer(folder)
        telemetry.configure("info", service="test", stream=io.BytesIO())
        self.server = Server(
            ServerSettings(jwks_file=issuer.jwks_file, **settings),
            roles=dict.fromkeys(COMMAND_RPCS, USERS),
            sizes_max={"foldline.v1.CommandService/SendBatch": 4 * 1024 * 1024},
        )
        self.server.add(command_pb2_grpc.add_CommandServiceServicer_to_server, servicer)
        self.metadata = bearer(issuer.issue(tenant="acme", user_id="alice", roles=USERS))

    async def __aenter__(self) -> StreamWorld:
        await self.server.start()
        self.channel = channel(f"127.0.0.1:{self.server.port}", retries=False)
        self.stub = command_pb2_grpc.CommandServiceStub(self.channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        await self.server.drain()

    def stream(self, *messages: command_pb2.SendStreamRequest) -> Any:
        return self.stub.SendStream(iter(messages), metadata=self.metadata, timeout=20)


@pytest.fixture(params=[Streams])
async def streaming(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[StreamWorld]:
    """The streaming service."""
    async with StreamWorld(tmp_path, request.param()) as made:
        yield made


async def collect(call: Any) -> tuple[list[str], Refusal | None]:
    """What a stream answered, and what ended it."""
    got: list[str] = []
    try:
        async for one in call:
            got.append(one.receipt.command_id)  # noqa: PERF401 (what came before an error counts)
    except aio.AioRpcError as error:
        return got, from_rpc_error(error)
    return got, None


async def test_a_stream_passes_the_same_behaviours(streaming: StreamWorld) -> None:
    """Messages are decoded and answered in order, and a stream without a token gets nothing."""
    assert await collect(streaming.stream(item("one"), item("two"))) == (["one", "two"], None)
    got, refusal = await collect(streaming.stub.SendStream(iter([item("one")]), timeout=20))
    assert (got, refusal and refusal.reason) == ([], "TOKEN_MISSING")


async def test_a_bad_message_ends_a_stream_after_the_answers_to_the_good_ones(streaming: StreamWorld) -> None:
    """Every message of a stream is held to its rules, and refused like a request of its own."""
    got, refusal = await collect(streaming.stream(item("one"), command_pb2.SendStreamRequest(), item("three")))
    assert (got, refusal and refusal.reason) == (["one"], "INVALID_REQUEST")
    raw: Any = streaming.channel.stream_stream(f"/{SEND_STREAM}")
    with pytest.raises(aio.AioRpcError) as caught:
        async for _ in raw(iter([b"\xff\xff\xff\xff"]), metadata=streaming.metadata, timeout=20):
            pass
    assert from_rpc_error(caught.value).reason == "MALFORMED_MESSAGE"


async def test_a_defect_in_a_stream_says_nothing(streaming: StreamWorld) -> None:
    """As in a single call: INTERNAL, and no word of the exception."""
    got, refusal = await collect(streaming.stream(item("one"), item("raise")))
    assert (got, refusal and refusal.reason) == (["one"], "INTERNAL")
    assert refusal is not None
    assert SECRET not in str(refusal)


async def test_draining_ends_a_stream_that_waits_for_its_caller(streaming: StreamWorld) -> None:
    """What came is answered, then the caller is told to go on elsewhere; an idle stream does not hold up the end."""
    call = streaming.stub.SendStream(metadata=streaming.metadata, timeout=20)
    await call.write(item("one"))
    first: Any = await call.read()
    began = time.monotonic()
    await streaming.server.drain()
    assert time.monotonic() - began < 5.5
    code, refusal = await refused(call.read())
    assert (first.receipt.command_id, code, refusal.reason) == ("one", grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")


@pytest.mark.parametrize("servicer", [Streams, BusyStreams])
@pytest.mark.parametrize("deadline_s", [None, 60])
async def test_a_stream_ends_by_name_after_its_last_answer(
    tmp_path: Path, servicer: type[Streams], deadline_s: float | None
) -> None:
    """Whatever deadline it has: all that came is answered, and the caller is told to open another."""
    async with StreamWorld(tmp_path, servicer(), stream_s_max=0.3) as world:
        call = world.stub.SendStream(metadata=world.metadata, timeout=deadline_s)
        await call.write(item("one"))
        got, refusal = await collect(call)
    assert (got, refusal and refusal.reason) == (["one"], "STREAM_OVER")


@pytest.mark.parametrize("servicer", [BusyStreams, BusyWriting])
async def test_an_answer_that_is_being_written_does_not_keep_a_stream_from_ending(
    tmp_path: Path, servicer: type[Streams]
) -> None:
    """The call's time is over while its answer is written: the caller gets both, the answer and the status."""
    async with StreamWorld(tmp_path, servicer(), stream_s_max=0.1, deadline_default_s=0.1) as world:
        call = world.stub.SendStream(metadata=world.metadata)
        await call.write(item("one"))
        got, refusal = await collect(call)
    assert (got, refusal and refusal.reason) == (["one"], "DEADLINE_EXCEEDED")


async def test_a_larger_size_is_given_by_the_table(streaming: StreamWorld) -> None:
    """A batch may have four mebibytes, where other requests may have one."""
    request = command_pb2.SendBatchRequest()
    for _ in range(2):
        request.items.add(causation_id=ID).command.Pack(person_pb2.RegisterPersonRequest(name="x" * 1024 * 1024))
    await streaming.stub.SendBatch(request, metadata=streaming.metadata, timeout=20)
    request.items.add(causation_id=ID).command.Pack(person_pb2.RegisterPersonRequest(name="x" * 2 * 1024 * 1024))
    code, refusal = await refused(streaming.stub.SendBatch(request, metadata=streaming.metadata, timeout=20))
    assert (code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")


async def test_a_call_with_two_tokens_is_not_believed(make_world: MakeWorld) -> None:
    """Which one counts would depend on who reads them; other headers may come twice."""
    world = await make_world()
    token = bearer(world.token())
    code, refusal = await refused(world.register(metadata=(*token, *bearer("another"))))
    assert (code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID")
    await world.register(metadata=(*token, ("x-more", "1"), ("x-more", "2")))


async def test_a_call_without_a_token_holds_nothing(make_world: MakeWorld) -> None:
    """It is refused before its request has come; no number of them keeps others out."""
    world = await make_world()
    method: Any = world.channel.stream_unary(REGISTER_ROUTE)
    for _ in range(50):
        code, refusal = await refused(method(_silence(), timeout=20))
        assert (code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")


async def test_a_call_whose_request_does_not_come_is_ended(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, long before its deadline."""
    monkeypatch.setattr("shared.rpc.places.REQUEST_WITHIN_S", 0.3)
    world = await make_world(calls_at_once_max=1)
    method: Any = world.channel.stream_unary(REGISTER_ROUTE)
    code, refusal = await refused(method(_silence(), metadata=bearer(world.token()), timeout=50))
    assert (code, refusal.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "REQUEST_OVERDUE")
    assert (await world.register()).command_id == ID


async def _silence() -> AsyncIterator[bytes]:
    """The requests of a caller who sends none and does not go away."""
    await asyncio.Event().wait()
    yield b""


@pytest.mark.parametrize("servicer", [Streams])
async def test_idle_streams_of_one_tenant_give_way_to_another(tmp_path: Path, servicer: type[Streams]) -> None:
    """The oldest of them, told by name; the other tenant is served at once."""
    async with StreamWorld(tmp_path, servicer(), calls_at_once_max=4) as world:
        idle = []
        for number in range(4):
            call = world.stub.SendStream(metadata=world.metadata, timeout=50)
            await call.write(item(f"{number}"))
            await call.read()
            idle.append(call)
        other = bearer(world.issuer.issue(tenant="umbrella", user_id="bob", roles=USERS))
        await world.stub.SendBatch(command_pb2.SendBatchRequest(items=[item("x").item]), metadata=other, timeout=20)
        code, refusal = await refused(idle[0].read())
        assert (code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CALL_GAVE_WAY")
        assert refusal.retry_after_s
        for call in idle[1:]:
            await call.write(item("more"))
            more: Any = await call.read()
            assert more.receipt.command_id == "more"


async def test_health_is_answered_under_a_flood_of_watchers(make_world: MakeWorld) -> None:
    """Calls without a token have a few places; the oldest watcher is told to ask again."""
    world = await make_world(calls_at_once_max=1)
    stub = health_pb2_grpc.HealthStub(world.channel)
    watching = []
    for _ in range(OPEN_CALLS_MAX):
        call = stub.Watch(health_pb2.HealthCheckRequest(), timeout=50)
        await call.read()
        watching.append(call)
    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    code, refusal = await refused(watching[0].read())
    assert (code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "CALL_GAVE_WAY")
    assert (await world.register()).command_id == ID


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
