"""Live queries over real gRPC and PostgreSQL: snapshot and changes, resuming, limits, slow readers, and what a change costs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from grpc import aio

from bank.v1 import account_query_pb2, person_query_pb2, person_query_pb2_grpc
from deploy.bootstrap import Database
from read_service.app import ReadSettings, build
from read_service.registry import RPCS
from shared.folds.projection import Group
from shared.line.consistency import ConsistencyGate, Reached, Token, encode
from shared.platform.postgres import Reads, connect
from shared.platform.tokens import DevelopmentIssuer
from shared.projections import changes, resume, watch
from shared.projections.projector import BATCH_MAX, Projector
from shared.projections.summary import SummaryServicer
from shared.rpc import handlers
from shared.rpc.server import Server
from shared.rpc.status import from_rpc_error
from tests.support.fakes.line import Store, StoreLine, uid
from tests.support.fakes.tables import ACCOUNT_TABLES, PERSON_TABLES, projector, reached
from tests.support.system.query_service import ALICE, BLUE, NOBODY, RED, Service, bank, refused
from tests.support.system.sealing import KEYS, SEAL
from tests.support.system.waiting import eventually
from tests.support.system.working import running


@asynccontextmanager
async def serving(database: Database, folder: Path, **settings: Any) -> AsyncIterator[tuple[Service, Server]]:
    """A read service; settings by name."""
    issuer = DevelopmentIssuer(folder)
    made = ReadSettings(query_database_url=database.query, jwks_file=issuer.jwks_file, seal_keys=KEYS, **settings)  # type: ignore[arg-type]
    assert database.query
    reads = Reads(database.query, application_name="foldline-read")
    await reads.open()
    server = build(made, reads)
    server.on_drained(reads.close)
    port = await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Service(database, issuer, channel, f"127.0.0.1:{port}"), server
    await server.drain()


@pytest.fixture
async def service(read_db: Database, tmp_path: Path) -> AsyncIterator[Service]:
    """One over a fresh database."""
    async with serving(read_db, tmp_path) as (made, _):
        yield made


@asynccontextmanager
async def following(service: Service, store: Store, group: Group = ACCOUNT_TABLES) -> AsyncIterator[Projector]:
    """A projector that has reached the end of the store, and follows it."""
    async with running(projector(service.database, StoreLine(store), silence_s=0.002, group=group)) as it:
        await reached(it, len(store.events))
        yield it


def account(service: Service, resume: str = "", *, tenant: str = "acme", account_id: str = BLUE, consistent: str = "") -> Any:
    """A watch of an account."""
    request = account_query_pb2.WatchAccountRequest(account_id=account_id, resume_token=resume, consistency_token=consistent)
    return service.accounts.WatchAccount(request, metadata=service.of(tenant), timeout=30)


async def until_version(call: Any, version: int) -> list[account_query_pb2.WatchAccountResponse]:
    """The answers up to a version of the account."""
    seen = []
    while True:
        answer = await call.read()
        assert answer is not aio.EOF
        if answer.HasField("account"):
            seen.append(answer)
            if answer.account.version >= version:
                return seen


async def test_a_snapshot_then_changes_in_order_end_in_the_fold(service: Service) -> None:
    """Each state once, none older than the one before, and the last is that of the line; statements of others bring nothing."""
    store = bank()
    async with following(service, store):
        calls = [account(service, account_id=BLUE.upper()) for _ in range(3)]
        for call in calls:
            assert [(it.account.version, it.account.balance_minor) for it in await until_version(call, 3)] == [(3, 31)]
        for number in range(40):
            store.deposit("acme", BLUE, ALICE, 1, 32 + number)
            store.deposit("umbrella", BLUE, ALICE, 5, 12 + 5 * number)
            await asyncio.sleep(0.003 * (number % 3))
        for call in calls:
            seen = [(it.account.version, it.account.balance_minor) for it in await until_version(call, 43)]
            assert seen == sorted(set(seen))
            assert seen[-1] == (43, 71)
            assert all(balance == 28 + version for version, balance in seen)
            call.cancel()


async def test_who_resumes_misses_nothing_and_sees_nothing_twice(service: Service) -> None:
    """While it was away nothing changed, and it gets a heartbeat; then something did, and it gets that."""
    store = bank()
    async with following(service, store):
        call = account(service)
        token = (await until_version(call, 3))[0].resume_token
        call.cancel()
        call = account(service, token)
        answer = await call.read()
        assert (answer.HasField("account"), answer.resume_token) == (False, token)
        call.cancel()
        store.deposit("acme", BLUE, ALICE, 9, 40)
        store.deposit("acme", BLUE, ALICE, 1, 41)
        after = encode(Token(1, store.epoch, len(store.events)), SEAL, "acme")
        call = account(service, token, consistent=after)
        assert [it.account.balance_minor for it in await until_version(call, 5)] == [41]
        call.cancel()


async def test_a_restart_is_invisible_to_who_resumes(read_db: Database, tmp_path: Path) -> None:
    """The instance that stops says so at once; at the next one the watch goes on where it was."""
    store = bank()
    async with serving(read_db, tmp_path) as (service, server), following(service, store):
        call = account(service)
        token = (await until_version(call, 3))[0].resume_token
        draining = asyncio.create_task(server.drain())
        assert (await refused(call.read())).reason == "SHUTTING_DOWN"
        await asyncio.wait_for(draining, 5)
        store.deposit("acme", BLUE, ALICE, 9, 40)
        async with serving(read_db, tmp_path) as (after, _):
            call = account(after, token)
            assert [it.account.balance_minor for it in await until_version(call, 4)] == [40]
            call.cancel()


async def test_changes_of_many_rows_and_of_other_tables_are_seen(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of more rows than are named, and a person's totals, which another table has."""
    monkeypatch.setattr(changes, "ROWS_MAX", 100)
    store = bank()
    async with following(service, store, PERSON_TABLES):
        request = person_query_pb2.WatchPersonRequest(person_id=ALICE)
        call: Any = service.people.WatchPerson(request, metadata=service.of(), timeout=30)
        assert (await call.read()).person.name == "Alice Cooper"
        store.deposit("acme", BLUE, ALICE, 9, 40)
        assert [it.total_minor for it in (await call.read()).person.total_balances] == ["0", "40"]
        events = Store(store.epoch)
        events.events = list(store.events)
        for number in range(150):
            events.person("acme", uid(1000 + number), "One of many")
        events.rename("acme", ALICE, "Alice Abernathy")
        events.events[-1].version = 9
        store.events.extend(events.events[len(store.events) :])
        assert (await call.read()).person.name == "Alice Abernathy"
        call.cancel()


async def test_a_row_that_is_parked_is_shown_as_stale(service: Service) -> None:
    """At once, to who watches it."""
    store = bank()
    async with following(service, store):
        call = account(service, account_id=BLUE)
        assert not (await until_version(call, 3))[0].account.stale
        store.deposit("acme", BLUE, ALICE, 9, 40).payload = b"\xff\xff"
        store.deposit("acme", BLUE, ALICE, 1, 41)
        answer = await call.read()
        assert (answer.account.stale, answer.account.version) == (True, 3)
        call.cancel()


async def test_heartbeats_come_while_nothing_changes(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the last resume token."""
    monkeypatch.setattr(resume, "HEARTBEAT_S", 0.05)
    store = bank()
    async with following(service, store):
        call = account(service)
        token = (await until_version(call, 3))[0].resume_token
        for _ in range(3):
            answer = await call.read()
            assert (answer.HasField("account"), answer.resume_token) == (False, token)
        call.cancel()


@pytest.mark.parametrize(
    "kind",
    [
        *("absent", "foreign", "no token", "another row's", "another tenant's"),
        *("not yet", "beyond", "another epoch's", "another shard's"),
    ],
)
async def test_what_cannot_be_watched_is_refused_by_name(service: Service, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, but for a place that the tables have not reached."""
    monkeypatch.setattr(resume, "WAIT_MAX_S", 0.3)
    store = bank()
    async with following(service, store):

        async def token_of(account_id: str, tenant: str) -> str:
            call = account(service, tenant=tenant, account_id=account_id)
            token: str = (await call.read()).resume_token
            call.cancel()
            return token

        def token_at(position: int, epoch: str, shard: int = 1) -> str:
            state = watch.Shown(0, Token(shard, epoch, position), account_query_pb2.AccountSummary(), "0" * 16)
            return watch.encode(SEAL, ("acme", BLUE), state)

        others, foreign = await token_of(RED, "acme"), await token_of(BLUE, "umbrella")
        made: tuple[Callable[[], Any], str] = {
            "absent": (lambda: account(service, account_id=NOBODY), "ACCOUNT_NOT_FOUND"),
            "foreign": (lambda: account(service, account_id=RED, tenant="umbrella"), "ACCOUNT_NOT_FOUND"),
            "no token": (lambda: account(service, "nonsense"), "RESUME_TOKEN_INVALID"),
            "another row's": (lambda: account(service, others), "RESUME_TOKEN_INVALID"),
            "another tenant's": (lambda: account(service, foreign), "RESUME_TOKEN_INVALID"),
            "not yet": (lambda: account(service, token_at(len(store.events) + 1, store.epoch)), "NOT_YET_CONSISTENT"),
            "beyond": (lambda: account(service, token_at(2**62, store.epoch)), "TOKEN_UNREACHABLE"),
            "another epoch's": (lambda: account(service, token_at(1, "nobody/1")), "TOKEN_OF_ANOTHER_HISTORY"),
            "another shard's": (lambda: account(service, token_at(1, store.epoch, 2)), "CONSISTENCY_TOKEN_OF_ANOTHER_SHARD"),
        }[kind]
        assert (await refused(made[0]().read())).reason == made[1]


async def test_a_tenants_watches_are_limited_and_others_go_on(read_db: Database, tmp_path: Path) -> None:
    """A flood of one tenant: it has its share, the rest is refused; others are served; ended ones count no more."""
    store = bank()
    async with serving(read_db, tmp_path, watches_per_tenant_max=20) as (service, _), following(service, store):
        calls = [account(service) for _ in range(20)]
        for call in calls:
            await until_version(call, 3)
        for _ in range(3):
            assert (await refused(account(service).read())).reason == "TOO_MANY_WATCHES"
        flood = [account(service) for _ in range(200)]
        other = account(service, tenant="umbrella")
        assert (await until_version(other, 2))[-1].account.balance_minor == 7
        request = account_query_pb2.GetAccountRequest(account_id=BLUE)
        assert (await service.accounts.GetAccount(request, metadata=service.of())).account.version == 3
        for call in (*flood, other, *calls):
            call.cancel()

        async def free() -> bool:
            call: Any = account(service)
            try:
                return bool((await call.read()).account.version == 3)
            except aio.AioRpcError:
                return False
            finally:
                call.cancel()

        await eventually(free)


async def test_a_reader_that_takes_nothing_is_cut_off_by_name(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """When what is on its way is full; who reads meanwhile has every change, and the server holds one state for each."""
    monkeypatch.setattr(resume, "WRITE_S", 0.2)
    monkeypatch.setattr(handlers, "LAST_WRITE_S", 0.2)
    monkeypatch.setattr(watch, "POLL_MIN_S", 0.001)
    store = bank()
    cut: list[str] = []
    in_time = resume.in_time

    async def noted(writing: Any) -> None:
        try:
            await in_time(writing)
        except Exception as error:
            cut.append(getattr(error, "reason", type(error).__name__))
            raise

    monkeypatch.setattr(resume, "in_time", noted)
    small = (("grpc.http2.lookahead_bytes", 16_384), ("grpc.http2.bdp_probe", 0))
    request = person_query_pb2.WatchPersonRequest(person_id=ALICE)
    async with following(service, store, PERSON_TABLES), aio.insecure_channel(service.address, options=small) as channel:
        stub = person_query_pb2_grpc.PersonQueryServiceStub(channel)
        slow: Any = stub.WatchPerson(request, metadata=service.of(), timeout=60)
        reader: Any = service.people.WatchPerson(request, metadata=service.of(), timeout=60)
        await slow.read()
        assert (await reader.read()).person.name == "Alice Cooper"
        for number in range(1000):
            store.rename("acme", ALICE, f"{number:04}" + "\N{SNOWMAN}" * 196)
            assert (await reader.read()).person.name[:4] == f"{number:04}"
            if cut:
                break
        assert cut == ["WATCH_TOO_SLOW"]
        assert await told(slow) == "WATCH_TOO_SLOW"
        reader.cancel()


async def told(call: Any) -> str:
    """The reason for which a stream ended, whatever came before."""
    try:
        while await call.read() is not aio.EOF:
            pass
    except aio.AioRpcError as error:
        return from_rpc_error(error).reason
    return ""


async def test_a_watch_outlasts_other_calls_and_has_a_limit_of_its_own(read_db: Database, tmp_path: Path) -> None:
    """The longest deadline of other calls does not end it; its own does, and then it is resumed."""
    store = bank()
    settings = {"deadline_default_s": 0.2, "deadline_max_s": 0.2, "watch_s_max": 1.0}
    async with serving(read_db, tmp_path, **settings) as (service, _), following(service, store):
        request = account_query_pb2.WatchAccountRequest(account_id=BLUE)
        for timeout in (None, 30):
            began = time.monotonic()
            call: Any = service.accounts.WatchAccount(request, metadata=service.of(), timeout=timeout)
            request.resume_token = (await call.read()).resume_token
            assert await told(call) == "DEADLINE_EXCEEDED"
            assert 0.9 < time.monotonic() - began < 5


@asynccontextmanager
async def watched(service: Service) -> AsyncIterator[SummaryServicer[Any]]:
    """The accounts' servicer, by whom the caller watches in this process."""
    assert service.database.query
    reads = Reads(service.database.query, application_name="test")
    await reads.open()

    async def progress() -> Reached:
        return Reached("", 0)

    try:
        yield SummaryServicer(RPCS[1], reads, ConsistencyGate(1, progress, SEAL, wait_max_s=1))
    finally:
        await reads.close()


async def test_a_full_batch_names_its_rows(service: Service) -> None:
    """2,000 events, each of another account: of them, only the row that is watched is read."""
    store = bank()
    for number in range(BATCH_MAX):
        store.account("acme", uid(1000 + number), ALICE)
    async with following(service, store), watched(service) as servicer:
        watches = servicer.watches
        async with watches.watching(("acme", BLUE)) as other, watches.watching(("acme", uid(1000))) as watcher:
            before = watches.rows_read
            filled = Store(store.epoch)
            filled.events = list(store.events)
            for number in range(BATCH_MAX):
                filled.deposit("acme", uid(1000 + number), ALICE, 5, 5)
            store.events.extend(filled.events[len(store.events) :])
            assert await watcher.next(10) is not None
            assert (watches.rows_read - before, other.state) == (1, None)


async def test_who_is_far_behind_reads_no_names(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of what changed are read up to a number of bytes; beyond it, all may have changed."""
    store = bank()
    async with following(service, store), await connect(service.database.query or "", application_name="test") as connection:
        last, changed = await changes.since(connection, ACCOUNT_TABLES.name, 1, 0)
        assert changed is not None
        assert ("acme", BLUE) in changed
        monkeypatch.setattr(changes, "BYTES_MAX", 30)
        assert await changes.since(connection, ACCOUNT_TABLES.name, 1, 0) == (last, None)
        assert await changes.since(connection, ACCOUNT_TABLES.name, 1, last) == (last, set())


async def test_all_watched_rows_are_read_at_most_four_times_a_second(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """While changes come that do not name their rows; the last of them is shown all the same."""
    monkeypatch.setattr(changes, "ROWS_MAX", 0)
    store = bank()
    async with following(service, store), watched(service) as servicer, servicer.watches.watching(("acme", BLUE)) as watcher:
        before, began, balance = servicer.watches.rows_read, time.monotonic(), 31
        while time.monotonic() < began + 1:
            balance += 1
            store.deposit("acme", BLUE, ALICE, 1, balance)
            await asyncio.sleep(0.01)
        while (state := await watcher.next(5)) is not None:
            if state.message.balance_minor == balance:  # type: ignore[attr-defined]
                break
        assert state is not None
        assert servicer.watches.rows_read - before <= (time.monotonic() - began) / watch.ALL_READ_S + 1


@pytest.mark.parametrize("rows", [1, 200])
async def test_a_commit_costs_as_much_as_it_changes_rows(service: Service, rows: int) -> None:
    """Of 200 watchers, of one row or of a row each: a commit of one row makes the process read one row, once."""
    store = bank()
    for number in range(rows):
        store.account("acme", uid(1000 + number), ALICE)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(following(service, store))
        servicer = await stack.enter_async_context(watched(service))
        watchers = [
            await stack.enter_async_context(servicer.watches.watching(("acme", uid(1000 + number % rows))))
            for number in range(200)
        ]
        before = servicer.watches.rows_read
        store.deposit("acme", uid(1000), ALICE, 5, 5)
        told = [await watcher.next(5) for watcher in watchers[:: rows or 1]]
        assert all(state is not None and state.message.balance_minor == 5 for state in told)  # type: ignore[attr-defined]
        assert servicer.watches.rows_read - before == 1
        if rows > 1:
            assert all(watcher.state is None for watcher in watchers[1:])
