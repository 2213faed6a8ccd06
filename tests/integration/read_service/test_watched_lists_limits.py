"""Limits of lists that are watched, over real gRPC and PostgreSQL: long and slow ones, slow readers, floods; others go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from grpc import aio

from bank.v1 import account_query_pb2, person_query_pb2, person_query_pb2_grpc
from deploy.bootstrap import Database
from shared.projections import resume, watch, watched_list, watched_lists
from shared.projections.summary import SummaryServicer
from shared.rpc import handlers
from tests.integration.read_service.test_watch import following, serving, told
from tests.integration.read_service.test_watched_lists import EVE, FILTERS, Reader
from tests.support.fakes.line import uid
from tests.support.fakes.tables import PERSON_TABLES
from tests.support.system.query_service import ALICE, BLUE, Service, bank, refused
from tests.support.system.waiting import eventually


@pytest.fixture
async def service(read_db: Database, tmp_path: Path) -> AsyncIterator[Service]:
    """One over a fresh database."""
    async with serving(read_db, tmp_path) as (made, _):
        yield made


async def test_heartbeats_come_while_a_list_stays_as_it_is(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without changes, with a token to go on with, which is of a later place if others' rows have changed."""
    monkeypatch.setattr(resume, "HEARTBEAT_S", 0.05)
    store = bank()
    async with following(service, store):
        reader = Reader(service, **FILTERS)
        reader.open()
        await reader.until({BLUE: 31})
        first, entered = reader.token, list(reader.told)
        for _ in range(3):
            await reader.read()
        assert (reader.told, reader.begun) == (entered, 1)
        store.account("acme", uid(1), EVE)

        async def moved() -> bool:
            await reader.read()
            return reader.token != first

        await eventually(moved)
        assert reader.told == entered
        reader.close()


async def test_a_reader_of_a_list_that_takes_nothing_is_cut_off_by_name(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When what is on its way is full; who reads the same list meanwhile has every change."""
    monkeypatch.setattr(resume, "WRITE_S", 0.2)
    monkeypatch.setattr(handlers, "LAST_WRITE_S", 0.2)
    monkeypatch.setattr(watch, "POLL_MIN_S", 0.001)
    store = bank()
    people = [uid(100 + number) for number in range(50)]
    for id_ in people:
        store.person("umbrella", id_, "One of many")
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
    request, who = person_query_pb2.WatchPersonsRequest(), service.of("umbrella")
    async with following(service, store, PERSON_TABLES), aio.insecure_channel(service.address, options=small) as channel:
        stub = person_query_pb2_grpc.PersonQueryServiceStub(channel)
        slow: Any = stub.WatchPersons(request, metadata=who, timeout=60)
        reader: Any = service.people.WatchPersons(request, metadata=who, timeout=60)
        await slow.read()
        names = {change.person_id: change.person.name for change in (await reader.read()).changes}
        for number in range(100):
            renamed = dict.fromkeys(people, f"{number:04}" + "\N{SNOWMAN}" * 196)
            for id_, name in renamed.items():
                store.rename("umbrella", id_, name)
            while not renamed.items() <= names.items():
                names |= {change.person_id: change.person.name for change in (await reader.read()).changes}
            if cut:
                break
        assert cut == ["WATCH_TOO_SLOW"]
        assert await told(slow) == "WATCH_TOO_SLOW"
        reader.cancel()


async def test_a_flood_of_watched_lists_has_its_tenants_share_and_others_go_on(read_db: Database, tmp_path: Path) -> None:
    """Of one list and of many: the rest is refused by name, another tenant is told its changes, and ended ones count no more."""
    store, limits = bank(), {"watches_per_tenant_max": 20, "watched_lists_per_tenant_max": 5}
    async with serving(read_db, tmp_path, **limits) as (service, _), following(service, store):

        def watching(owner: str) -> Any:
            request = account_query_pb2.WatchAccountsRequest(filter=account_query_pb2.AccountFilter(owner_id=owner))
            return service.accounts.WatchAccounts(request, metadata=service.of(), timeout=60)

        calls = [watching(ALICE) for _ in range(10)] + [watching(uid(1000 + number)) for number in range(4)]
        for call in calls:
            await call.read()
        assert "5 watched lists" in (await refused(watching(uid(2000)).read())).text
        more = [watching(ALICE) for _ in range(6)]
        for call in more:
            await call.read()
        assert "20 watches" in (await refused(watching(ALICE).read())).text
        flood = [watching(uid(1000 + number)) for number in range(100)] + [watching(ALICE) for _ in range(100)]
        other = Reader(service)
        other.open(tenant="umbrella")
        await other.until({BLUE: 7})
        store.deposit("umbrella", BLUE, ALICE, 3, 10)
        await other.until({BLUE: 10})
        got = account_query_pb2.GetAccountRequest(account_id=BLUE)
        assert (await service.accounts.GetAccount(got, metadata=service.of())).account.version == 3
        for call in (*flood, *more, *calls):
            call.cancel()

        async def free() -> bool:
            call = watching(uid(2000))
            try:
                return bool((await call.read()).resume_token)
            except aio.AioRpcError:
                return False
            finally:
                call.cancel()

        await eventually(free)
        other.close()


async def test_a_list_that_is_or_becomes_too_long_is_refused_by_name(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others go on."""
    monkeypatch.setattr(watched_list, "ROWS_MAX", 3)
    monkeypatch.setattr(watched_lists, "ROWS_MAX", 3)
    store = bank()
    for number in range(2):
        store.account("acme", uid(1 + number), ALICE)
    async with following(service, store):
        short, long = Reader(service, **FILTERS), Reader(service)
        long.open()
        assert (await refused(long.read())).reason == "LIST_TOO_LONG"
        short.open()
        await short.until({BLUE: 31, uid(1): 0, uid(2): 0})
        store.account("acme", uid(9), ALICE)
        with pytest.raises(aio.AioRpcError, match="more than 3 rows"):
            await short.until({})
        other = Reader(service, owner_id=EVE)
        other.open()
        await other.read()
        assert other.rows == {}
        other.close()


async def test_a_list_that_is_slow_to_read_ends_alone_and_holds_up_no_others(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who watch other lists hear of changes while it is read, and go on behind its end."""
    store, listed, begun = bank(), SummaryServicer.listed, asyncio.Event()

    async def slow(self: Any, connection: Any, tenant: str, *asked: Any) -> Any:
        if tenant == "umbrella":
            begun.set()
            await connection.execute("SELECT pg_sleep(60)")
        return await listed(self, connection, tenant, *asked)

    monkeypatch.setattr(SummaryServicer, "listed", slow)
    async with following(service, store):
        staying, ending = Reader(service, **FILTERS), Reader(service, **FILTERS)
        staying.open()
        await staying.until({BLUE: 31})
        ending.open(tenant="umbrella")
        end = asyncio.create_task(refused(ending.read()))
        await begun.wait()
        store.deposit("acme", BLUE, ALICE, 1, 32)
        await staying.until({BLUE: 32})
        assert not end.done()
        assert (await end).reason == "DATABASE_BUSY"
        store.deposit("acme", BLUE, ALICE, 1, 33)
        await staying.until({BLUE: 33})
        assert staying.begun == 1
        staying.close()


async def test_lists_of_a_tenant_are_limited_and_one_list_may_have_many_watchers(read_db: Database, tmp_path: Path) -> None:
    """The third filter of one tenant is refused, those of another are served, and of a filter that is over none is counted."""
    store = bank()
    async with serving(read_db, tmp_path, watched_lists_per_tenant_max=2) as (service, _), following(service, store):
        readers = [Reader(service, owner_id=owner) for owner in (ALICE, ALICE, EVE)]
        for reader in readers:
            reader.open()
            await reader.read()
        third = Reader(service)
        third.open()
        assert (await refused(third.read())).reason == "TOO_MANY_WATCHES"
        other = Reader(service)
        other.open(tenant="umbrella")
        await other.read()
        assert len(other.rows) == 1
        readers[2].close()

        async def free() -> bool:
            third.open()
            try:
                await third.read()
            except aio.AioRpcError:
                return False
            return True

        await eventually(free)
        for reader in (*readers[:2], third, other):
            reader.close()
