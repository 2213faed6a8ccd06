"""Questions about the past: their limits, who else must be there, and events that cannot be applied."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import psycopg
import pytest
from pydantic import SecretStr

from bank.legacy.v1 import person_pb2 as person_legacy_pb2
from bank.v1 import account_pb2, account_query_pb2, person_pb2, person_query_pb2, transfer_pb2, transfer_query_pb2
from deploy.bootstrap import Database
from foldline.v1 import as_of_pb2, event_store_pb2, tenant_pb2, tenant_pb2_grpc
from read_service import app as read_app
from read_service.registry import RPCS
from shared.line.event_store import envelope
from shared.platform import fairness, postgres
from shared.platform.identity import Role
from shared.platform.postgres import Reads
from shared.platform.tokens import DevelopmentIssuer
from shared.projections.tables import Tables
from shared.projections.time_travel import Folded
from shared.rpc.server import Server
from tests.support.clients.bank import Bank, item, new_id, read_refusal, refused
from tests.support.fakes.line import Store, uid
from tests.support.fakes.name_server import name_server
from tests.support.fakes.tables import Id, stepwise
from tests.support.system.sealing import KEYS
from tests.support.system.waiting import eventually
from write_service import api as write_api
from write_service import app as write_app

EVENTS_MAX = 5
WAITING_MAX = 8


@dataclass
class Services:
    """A write and a read service that fold from EVENTS_MAX events at the most, and their issuer."""

    issuer: DevelopmentIssuer
    write: Server
    to_write: grpc.aio.Channel
    to_read: grpc.aio.Channel
    settings: read_app.ReadSettings
    """Those of the read service."""
    written: write_app.WriteSettings
    """Those of the write service, with the port that it has."""

    def by(self, *roles: Role, tenant: str = "acme", user_id: str = "alice") -> Bank:
        """A caller."""
        token = self.issuer.issue(tenant=tenant, user_id=user_id, roles=roles or (Role.USER, Role.TENANT_ADMIN))
        return Bank(self.to_write, self.to_read, token, timeout_s=30)


@asynccontextmanager
async def served(url: str, build: Callable[[Reads], Server]) -> AsyncIterator[tuple[Server, int]]:
    """A server over a database, and its port."""
    reads = Reads(url, application_name="test")
    await reads.open()
    server = build(reads)
    server.on_drained(reads.close)
    port = await server.start()
    try:
        yield server, port
    finally:
        await server.drain()


@pytest.fixture
async def services(
    write_db: Database, read_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Services]:
    """Both over fresh databases; no projector runs."""
    monkeypatch.setattr(fairness, "WAITING_MAX", WAITING_MAX)
    monkeypatch.setattr(postgres, "LOCK_TIMEOUT", "20s")  # what a test holds is waited for
    issuer = DevelopmentIssuer(tmp_path)
    common: Any = {"jwks_file": issuer.jwks_file, "seal_keys": KEYS}
    written = write_app.WriteSettings(database_url=write_db.app, **common)  # type: ignore[arg-type]
    assert read_db.query
    async with served(write_db.app, lambda reads: write_app.build(written, reads)) as (write, write_port):
        address = f"127.0.0.1:{write_port}"
        settings = read_app.ReadSettings(
            query_database_url=read_db.query,  # type: ignore[arg-type]
            write_address=address,
            history_events_max=EVENTS_MAX,
            **common,
        )
        async with (
            served(read_db.query, lambda reads: read_app.build(settings, reads)) as (_, read_port),
            grpc.aio.insecure_channel(address) as to_write,
            grpc.aio.insecure_channel(f"127.0.0.1:{read_port}") as to_read,
        ):
            written = written.model_copy(update={"listen": address})
            yield Services(issuer, write, to_write, to_read, settings, written)


def now() -> as_of_pb2.AsOf:
    """As of whatever has happened."""
    made = as_of_pb2.AsOf()
    made.moment.FromJsonString("2100-01-01T00:00:00Z")
    return made


async def account(bank: Bank, account_id: str, as_of: as_of_pb2.AsOf | None = None) -> account_query_pb2.AccountSummary:
    """An account as of then."""
    request = account_query_pb2.GetAccountRequest(account_id=account_id, as_of=as_of or now())
    return (await bank.call(bank.account_queries.GetAccount, request)).account


async def told(call: Awaitable[object]) -> tuple[str, str]:
    """Code and reason of a refusal."""
    refusal = await refused(call)
    return refusal.code, refusal.reason


async def test_a_history_is_folded_up_to_its_limit(services: Services) -> None:
    """One event more is refused, also to be explained; as of the last that fits, the same account is shown."""
    bank = services.by()
    owner, _ = await bank.register("Alice")
    blue, _ = await bank.open(owner)
    for _ in range(EVENTS_MAX - 2):
        await bank.deposit(blue, 1)
    last = await bank.deposit(blue, 1)
    assert (await account(bank, blue)).version == EVENTS_MAX
    await bank.deposit(blue, 1)
    assert await told(account(bank, blue)) == ("RESOURCE_EXHAUSTED", "HISTORY_TOO_LONG")
    explain = account_query_pb2.ExplainAccountRequest(account_id=blue)
    assert await told(bank.call(bank.account_queries.ExplainAccount, explain)) == ("RESOURCE_EXHAUSTED", "HISTORY_TOO_LONG")
    assert (await account(bank, blue, as_of_pb2.AsOf(token=last.consistency_token))).version == EVENTS_MAX


async def test_of_busy_accounts_only_the_time_of_a_transfer_counts(services: Services) -> None:
    """What moved on them before it began and behind its end is not read."""
    bank, saga = services.by(), services.by(Role.PROCESS)
    owner, _ = await bank.register("Alice")
    blue, red = [(await bank.open(owner))[0] for _ in range(2)]
    for _ in range(EVENTS_MAX + 1):
        await bank.deposit(blue, 10)
    transfer_id, _ = await bank.transfer(blue, red, 7)
    moves: list[Any] = [
        account_pb2.WithdrawMoneyRequest(account_id=blue, amount_minor=7, currency="USD", transfer_id=transfer_id),
        account_pb2.DepositMoneyRequest(account_id=red, amount_minor=7, currency="USD", transfer_id=transfer_id),
    ]
    for move in [*moves, transfer_pb2.CompleteTransferRequest(transfer_id=transfer_id)]:
        move.options.command_id = new_id()
        [receipt] = await saga.batch(item(move, tenant="acme"))
        assert not receipt.HasField("error"), receipt
    for _ in range(EVENTS_MAX + 1):
        await bank.deposit(red, 10)
    request = transfer_query_pb2.GetTransferRequest(transfer_id=transfer_id, as_of=now())
    shown = (await bank.call(bank.transfer_queries.GetTransfer, request)).transfer
    assert [step.name for step in shown.steps] == ["started", "debited", "credited", "completed"]


async def test_without_the_write_service_only_the_past_is_away(services: Services, write_db: Database) -> None:
    """By name; Get answers as before. The first question after the write service is back is answered."""
    bank = services.by()
    owner, _ = await bank.register("Alice")
    blue, _ = await bank.open(owner)
    await services.write.drain()
    assert await told(account(bank, uid(1))) == ("UNAVAILABLE", "WRITE_SERVICE_UNAVAILABLE")
    request = account_query_pb2.GetAccountRequest(account_id=uid(1))
    assert await told(bank.call(bank.account_queries.GetAccount, request)) == ("NOT_FOUND", "ACCOUNT_NOT_FOUND")
    async with served(write_db.app, lambda reads: write_app.build(services.written, reads)):
        assert (await account(bank, blue)).version == 1


async def test_a_name_that_is_not_known_for_a_moment(services: Services, read_db: Database) -> None:
    """Is looked up again, as long as a question may take: gRPC by itself would refuse it at once."""
    bank = services.by()
    owner, _ = await bank.register("Alice")
    blue, _ = await bank.open(owner)
    assert read_db.query
    assert services.settings.write_address
    port = services.settings.write_address.rpartition(":")[2]
    async with name_server() as names:
        other = services.settings.model_copy(update={"write_address": f"dns://127.0.0.1:{names.port}/write.test:{port}"})
        async with (
            served(read_db.query, lambda reads: read_app.build(other, reads)) as (_, to),
            grpc.aio.insecure_channel(f"127.0.0.1:{to}") as to_other,
        ):
            assert (await account(Bank(services.to_write, to_other, bank.token), blue)).version == 1
        assert names.refused


async def test_keys_that_differ_are_named(services: Services, read_db: Database) -> None:
    """A read service that cannot open what the write service seals says so, to its caller and in its log."""
    bank = services.by()
    owner, _ = await bank.register("Alice")
    blue, _ = await bank.open(owner)
    other = services.settings.model_copy(update={"seal_keys": SecretStr("7" * 64)})
    assert read_db.query
    async with (
        served(read_db.query, lambda reads: read_app.build(other, reads)) as (_, port),
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as to_other,
    ):
        asked = account(Bank(services.to_write, to_other, bank.token), blue)
        assert await told(asked) == ("UNAVAILABLE", "SEAL_KEYS_DIFFER")


async def test_a_closed_tenant_has_no_past(services: Services) -> None:
    """From its closing on, whatever of it is purged yet."""
    bank = services.by()
    owner, _ = await bank.register("Alice")
    blue, _ = await bank.open(owner)
    await account(bank, blue)
    operator = services.by(Role.OPERATOR, tenant="operators")
    stub = tenant_pb2_grpc.TenantServiceStub(services.to_write)
    await operator.call(stub.PurgeTenant, tenant_pb2.PurgeTenantRequest(tenant="acme", confirmed_tenant="acme"))
    assert await told(account(bank, blue)) == ("FAILED_PRECONDITION", "TENANT_CLOSED")


async def test_a_write_service_of_an_older_release_may_hand_out_older_events(
    services: Services, write_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The read service, which is updated before it, folds them all the same."""
    monkeypatch.setattr(write_api.EventStoreService, "_shown", lambda _, events: [*map(envelope, events)])
    old = person_legacy_pb2.PersonAdded(person_id=new_id(), last_and_first_name="Liddell, Alice")
    async with await psycopg.AsyncConnection.connect(write_db.admin) as admin:
        await admin.execute(
            """INSERT INTO events
                 (position, event_id, tenant, category, aggregate_id, version, type, payload, recorded_at, metadata)
               VALUES (1, gen_random_uuid(), 'acme', 'person', %s, 1, %s, %s, now(), '')""",
            (old.person_id, old.DESCRIPTOR.full_name, old.SerializeToString()),
        )
    bank = services.by()
    request = person_query_pb2.GetPersonRequest(person_id=old.person_id, as_of=now())
    assert (await bank.call(bank.person_queries.GetPerson, request)).person.name == "Alice Liddell"


async def test_by_whom_events_were_made_is_not_told_to_every_user(services: Services) -> None:
    """Neither with one stream nor with several, nor in the reason of a row; an administrator is told, and whoever it was."""
    owner, _ = await services.by().register("Alice")
    one = event_store_pb2.ReadStreamRequest(aggregate_type="person", aggregate_id=owner)
    several = event_store_pb2.ReadStreamsRequest(events_max=5)
    several.aggregates.add(aggregate_type="person", aggregate_id=owner)
    explain = person_query_pb2.ExplainPersonRequest(person_id=owner)
    for role, user_id, told in (
        (Role.USER, "mallory", ""),
        (Role.USER, "alice", "alice"),
        (Role.TENANT_ADMIN, "mallory", "alice"),
        (Role.OPERATOR, "mallory", "alice"),
        (Role.PROCESS, "mallory", "alice"),
    ):
        bank = services.by(role, user_id=user_id)
        [answer] = await bank.collect(bank.events.ReadStream, one)
        [more] = await bank.collect(bank.events.ReadStreams, several)
        assert [event.metadata.user_id for event in (*answer.events, *more.events)] == [told, told]
        if role is not Role.PROCESS:
            [change] = (await bank.call(bank.person_queries.ExplainPerson, explain)).changes
            assert change.user_id == told


async def test_more_questions_than_wait_are_refused(services: Services, write_db: Database) -> None:
    """While two are folded and as many as may wait do; those are answered when their turn comes."""
    bank = services.by()
    owner, _ = await bank.register("Alice")
    blue, _ = await bank.open(owner)
    async with await psycopg.AsyncConnection.connect(write_db.admin) as holder:
        await holder.execute("LOCK TABLE tenant_purges IN ACCESS EXCLUSIVE MODE")
        asked = [asyncio.create_task(account(bank, blue)) for _ in range(40)]
        refusals = 40 - fairness.FOLDS_MAX - WAITING_MAX
        await eventually(lambda: sum(each.done() for each in asked) == refusals, 20)
    answers = await asyncio.gather(*asked, return_exceptions=True)
    refused_ones = [read_refusal(answer) for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert {(told.code, told.reason) for told in refused_ones} == {("RESOURCE_EXHAUSTED", "TOO_MANY_PAST_STATES")}
    assert len(refused_ones) == refusals


async def test_more_readings_of_streams_than_wait_are_refused(services: Services, write_db: Database) -> None:
    """Two look for positions, so that they leave connections to all other calls."""
    bank = services.by()
    owner, _ = await bank.register("Alice")
    request = event_store_pb2.ReadStreamsRequest(events_max=5)
    request.aggregates.add(aggregate_type="person", aggregate_id=owner)
    async with await psycopg.AsyncConnection.connect(write_db.admin) as holder:
        await holder.execute("LOCK TABLE tenant_purges IN ACCESS EXCLUSIVE MODE")
        asked = [asyncio.create_task(bank.collect(bank.events.ReadStreams, request)) for _ in range(40)]
        refusals = 40 - fairness.FOLDS_MAX - WAITING_MAX
        await eventually(lambda: sum(each.done() for each in asked) == refusals, 20)
        read = event_store_pb2.ReadStreamRequest(aggregate_type="person", aggregate_id=owner)
        assert await bank.collect(bank.events.ReadStream, read)
    answers = await asyncio.gather(*asked, return_exceptions=True)
    refused_ones = [read_refusal(answer) for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert {(told.code, told.reason) for told in refused_ones} == {("RESOURCE_EXHAUSTED", "TOO_MANY_PAST_STATES")}
    assert len(refused_ones) == refusals


def broken_line(seed: int) -> tuple[Store, list[Id]]:
    """People and accounts whose events are sometimes such that they cannot be applied, or not even read."""
    chance, store = random.Random(seed), Store()
    people, accounts = [uid(nth) for nth in (1, 2, 3)], [uid(nth) for nth in (11, 12, 13, 14, 15)]
    for person in people[:2]:
        store.person("acme", person, "Alice")
    for nth, each in enumerate(accounts[:4]):
        store.account("acme", each, people[nth % 3], "USD" if nth % 2 else "EUR")
    for nth in range(40):
        which, owner = chance.choice(accounts), chance.choice(people)
        if chance.random() < 0.1:
            store.rename("acme", owner, f"Name {nth}")
        elif chance.random() < 0.1:
            store.append("acme", which, account_pb2.AccountFrozen(account_id=which, owner_id=owner))
        elif chance.random() < 0.1:
            store.account("acme", which, owner)
        elif chance.random() < 0.1:
            store.append("acme", owner, person_pb2.PersonClosed(person_id=owner), category="person").payload = b"\xff"
        elif chance.random() < 0.1:
            store.deposit("acme", which, owner, 1, 1).type = "bank.v1.OfTheFuture"
        else:
            store.deposit("acme", which, owner, nth, nth, chance.choice(["USD", "EUR"]))
    return store, [("person", each) for each in people] + [("account", each) for each in accounts]


async def test_an_event_that_cannot_be_applied_stops_the_row_here_as_there(
    read_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind every event: the row as it was before, and that it is stale; or that it is parked, if there is none."""
    monkeypatch.setattr("shared.projections.parked.KEYS_PER_MINUTE_MAX", 1000)
    store, ids = broken_line(1)
    named = {rpcs.summary.name: rpcs for rpcs in RPCS}
    folds = {(name, id_): Folded(Tables(named[name].group), named[name].summary, id_) for name, id_ in ids}
    stale = parked = 0
    async with stepwise(read_db, "acme") as (apply, shown):
        for envelope in store.events:
            await apply(envelope)
            for (name, id_), folded in folds.items():
                before = folded.row, folded.stale
                folded.add(envelope)
                if (folded.row, folded.stale) == before and id_ != envelope.aggregate_id and envelope is not store.events[-1]:
                    continue
                expected = await shown((name, id_))
                if folded.row is None:
                    assert expected == ("ROW_PARKED" if folded.stale else None), (envelope, name, id_)
                    parked += folded.stale
                else:
                    made: Any = named[name].summary.view(folded.row)
                    made.stale = folded.stale
                    assert made == expected, (envelope, name, id_)
                    stale += folded.stale
    assert stale > 5
    assert parked > 0
