"""The query RPCs over real gRPC and PostgreSQL, as `read_service.app.build` makes them."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import aio
from psycopg.pq import TransactionStatus

from bank.v1 import (
    account_pb2,
    account_query_pb2,
    account_query_pb2_grpc,
    person_query_pb2,
    person_query_pb2_grpc,
    totals_query_pb2,
    totals_query_pb2_grpc,
    transfer_pb2,
)
from deploy.bootstrap import Database
from foldline.v1 import projection_pb2, projection_pb2_grpc, range_pb2
from read_service import statement as read_statement
from read_service import totals
from read_service.app import TABLES as WATCHED
from read_service.app import ReadSettings, build
from read_service.registry import PERSON_TABLES
from shared.folds.errors import Refusal
from shared.line.consistency import Token, encode
from shared.platform.identity import Role
from shared.platform.leader import LockClass, hold_lease
from shared.platform.postgres import Reads, UnsafeDatabase
from shared.platform.startup import until_safe
from shared.platform.tokens import DevelopmentIssuer
from shared.projections.summary import in_tenant
from shared.rpc.client import bearer
from shared.rpc.status import from_rpc_error
from tests.support.fakes.line import EPOCH, Store, StoreLine, uid
from tests.support.fakes.tables import filled, projector, reached, running
from tests.support.system.sealing import KEYS, SEAL

ALICE, BLUE, RED, NOBODY = uid(0xA11CE), uid(0xB10E), uid(0x4ED), uid(0xF00)


@dataclass
class Service:
    """A running read service, its database and its issuer."""

    database: Database
    issuer: DevelopmentIssuer
    channel: aio.Channel
    address: str = ""

    @property
    def people(self) -> person_query_pb2_grpc.PersonQueryServiceStub:
        return person_query_pb2_grpc.PersonQueryServiceStub(self.channel)

    @property
    def accounts(self) -> account_query_pb2_grpc.AccountQueryServiceStub:
        return account_query_pb2_grpc.AccountQueryServiceStub(self.channel)

    @property
    def totals(self) -> totals_query_pb2_grpc.TotalsQueryServiceStub:
        return totals_query_pb2_grpc.TotalsQueryServiceStub(self.channel)

    @property
    def projections(self) -> projection_pb2_grpc.ProjectionServiceStub:
        return projection_pb2_grpc.ProjectionServiceStub(self.channel)

    def of(self, tenant: str = "acme", *roles: Role) -> Any:
        """The metadata of a caller."""
        return bearer(self.issuer.issue(tenant=tenant, user_id="tester", roles=roles or (Role.USER,)))

    async def holds(self, store: Store) -> str:
        """Lets the tables follow the store; returns the token of its end."""
        await filled(self.database, StoreLine(store), len(store.events))
        return encode(Token(1, store.epoch, len(store.events)), SEAL, "acme")


@pytest.fixture
async def service(read_db: Database, tmp_path: Path) -> AsyncIterator[Service]:
    """The service over a fresh database."""
    issuer = DevelopmentIssuer(tmp_path)
    settings = ReadSettings(query_database_url=read_db.query, jwks_file=issuer.jwks_file, seal_keys=KEYS)  # type: ignore[call-arg, arg-type]
    assert read_db.query
    reads = Reads(read_db.query, application_name="foldline-read")
    await reads.open()
    await until_safe(reads, tables=WATCHED)
    server = build(settings, reads)
    server.on_drained(reads.close)
    port = await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Service(read_db, issuer, channel)
    await server.drain()


async def refused(call: Awaitable[Any]) -> Refusal:
    """The refusal that a call is answered with."""
    with pytest.raises(aio.AioRpcError) as error:
        await call
    return from_rpc_error(error.value)


def bank() -> Store:
    """Alice with a blue account in dollars and a red one in euros; another tenant has the same ids, and other money."""
    store = Store()
    store.person("acme", ALICE, "Alice O'Wonderland")
    store.account("acme", BLUE, ALICE)
    store.account("acme", RED, ALICE, "EUR", "red")
    store.deposit("acme", BLUE, ALICE, 100, 100)
    store.withdraw("acme", BLUE, ALICE, 69, 31)
    store.rename("acme", ALICE, "Alice Cooper")
    store.append("acme", RED, account_pb2.AccountFrozen(account_id=RED, owner_id=ALICE))
    store.person("umbrella", ALICE, "Alice Abernathy")
    store.account("umbrella", BLUE, ALICE)
    store.deposit("umbrella", BLUE, ALICE, 7, 7)
    return store


async def test_a_person_is_shown_with_all_totals(service: Service) -> None:
    """Name, count, one total for each currency, and the version of the person's own stream."""
    token = await service.holds(bank())
    request = person_query_pb2.GetPersonRequest(person_id=ALICE.upper(), consistency_token=token)
    person = (await service.people.GetPerson(request, metadata=service.of())).person
    assert (person.person_id, person.name, person.open_account_count, person.version) == (ALICE, "Alice Cooper", 2, 4)
    assert [(it.currency, it.total_minor) for it in person.total_balances] == [("EUR", "0"), ("USD", "31")]
    assert person.registered_at.ToJsonString() == "2026-01-02T03:04:06.678901Z"


async def test_an_account_is_shown_with_its_statement(service: Service) -> None:
    """The newest movement first, in pages."""
    await service.holds(bank())
    request = account_query_pb2.GetAccountRequest(account_id=BLUE)
    account = (await service.accounts.GetAccount(request, metadata=service.of())).account
    assert (account.owner_id, account.name, account.currency, account.balance_minor) == (ALICE, "blue", "USD", 31)
    assert (account.status, account.version) == (account_query_pb2.ACCOUNT_STATUS_ACTIVE, 3)
    statement = account_query_pb2.ListMovementsRequest(account_id=BLUE.upper(), page_size=1)
    first = await service.accounts.ListMovements(statement, metadata=service.of())
    assert [(it.version, it.amount_minor, it.balance_after_minor) for it in first.movements] == [(3, -69, 31)]
    statement.page_token = first.next_page_token
    second = await service.accounts.ListMovements(statement, metadata=service.of())
    assert [(it.version, it.amount_minor, it.balance_after_minor) for it in second.movements] == [(2, 100, 100)]
    assert second.next_page_token == ""


STATEMENT = [(2, 50, 0), (3, -7, 10), (4, 50, 10), (9, 3, 10), (10, -7, 40), (17, 8, 41), (18, 50, 90)]
"""Version, amount, and the seconds at which it moved: versions are left out, and moments and amounts come again."""


@pytest.mark.parametrize("read_max", [1, 3, 1000])
async def test_a_statement_is_listed_by_ranges_in_pages(service: Service, read_max: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges of moments and of amounts, both ways, in pages of several sizes, against the plain list."""
    monkeypatch.setattr(read_statement, "READ_MAX", read_max)
    store, begin = bank(), datetime(2026, 3, 4, tzinfo=UTC)
    store.account("acme", uid(77), ALICE)
    await service.holds(store)
    with psycopg.connect(service.database.app) as app:
        for version, amount, at_s in STATEMENT:
            row = ("acme", uid(77), version, amount, 0, begin + timedelta(seconds=at_s))
            app.execute("INSERT INTO movements VALUES (%s, %s, %s, %s, %s, %s)", row)
    moments = list(itertools.combinations_with_replacement([None, -1, 0, 1, 10, 11, 40, 42, 90, 91], 2))
    amounts = list(itertools.product([None, -8, -7, 3, 8, 50, 51], repeat=2))
    asked = (
        [(it, (None, None)) for it in moments]
        + [((None, None), it) for it in amounts]
        + list(zip(moments, amounts, strict=False))
    )
    for nth, ((since, before), (least, most)) in enumerate(asked):
        order = ("", "moved_at", "moved_at desc")[nth % 3]
        request = account_query_pb2.ListMovementsRequest(account_id=uid(77), order_by=order, page_size=1 + nth // 3 % 3)
        for field, moment_s in (("since", since), ("before", before)):
            if moment_s is not None:
                getattr(request.filter.moved_at, field).FromDatetime(begin + timedelta(seconds=moment_s))
        request.filter.amount_minor.CopyFrom(range_pb2.WholeRange(min=least, max=most))
        expected = [
            version
            for version, amount, at_s in STATEMENT
            if (since is None or at_s >= since)
            and (before is None or at_s < before)
            and (least is None or amount >= least)
            and (most is None or amount <= most)
        ]
        shown: list[int] = []
        while True:
            answer = await service.accounts.ListMovements(request, metadata=service.of())
            assert len(answer.movements) <= request.page_size
            shown += [it.version for it in answer.movements]
            if not (token := answer.next_page_token):
                break
            request.page_token = token
        assert shown == (expected if order == "moved_at" else expected[::-1]), request


async def test_an_answer_has_the_fields_that_were_asked_for(service: Service) -> None:
    """Of one, of each of a list, of a statement; none named means all, and one within another is named by its path."""
    await service.holds(bank())
    accounts, who = service.accounts, service.of()

    def mask(*paths: str) -> FieldMask:
        return FieldMask(paths=paths)

    request = account_query_pb2.GetAccountRequest(account_id=BLUE, read_mask=mask("name", "opened_at.seconds"))
    account = (await accounts.GetAccount(request, metadata=who)).account
    assert account == account_query_pb2.AccountSummary(name="blue", opened_at=Timestamp(seconds=account.opened_at.seconds))
    assert account.opened_at.seconds > 0
    request.read_mask.CopyFrom(mask())
    assert (await accounts.GetAccount(request, metadata=who)).account.version == 3
    listing = account_query_pb2.ListAccountsRequest(page_size=1, read_mask=mask("balance_minor"))
    listed = await accounts.ListAccounts(listing, metadata=who)
    assert [*listed.accounts] == [account_query_pb2.AccountSummary(balance_minor=31)]
    assert listed.next_page_token
    lines = account_query_pb2.ListMovementsRequest(account_id=BLUE, read_mask=mask("version"))
    statement = await accounts.ListMovements(lines, metadata=who)
    assert [*statement.movements] == [account_query_pb2.Movement(version=3), account_query_pb2.Movement(version=2)]
    for wrong in ("nonsense", "name.length", "", "*"):
        request.read_mask.CopyFrom(mask("name", wrong))
        told = await refused(accounts.GetAccount(request, metadata=who))
        assert (told.reason, told.violations[0][0]) == ("INVALID_REQUEST", "read_mask")


async def totals_of(service: Service, tenant: str = "acme", **asked: str) -> totals_query_pb2.TenantTotals:
    """GetTenantTotals."""
    request = totals_query_pb2.GetTenantTotalsRequest(**asked)
    return (await service.totals.GetTenantTotals(request, metadata=service.of(tenant, Role.TENANT_ADMIN))).totals


async def test_a_tenants_totals_are_those_of_its_rows(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """By status and currency, of one tenant; of more than are counted it says so, and gives no sums."""
    store = bank()
    started = transfer_pb2.TransferStarted(from_account_id=BLUE, to_account_id=RED, amount_minor=1, currency="USD")
    for number in range(3):
        started.transfer_id = uid(500 + number)
        store.append("acme", started.transfer_id, started, category="transfer")
    store.append("acme", uid(500), transfer_pb2.TransferFailed(transfer_id=uid(500), reason="X"), category="transfer")
    store.account("acme", uid(77), ALICE)
    store.deposit("acme", uid(77), ALICE, 2**63 - 1, 2**63 - 1)
    token = await service.holds(store)
    found = await totals_of(service, consistency_token=token)
    numbers = {field.name: value.count for field, value in found.ListFields() if isinstance(value, totals_query_pb2.StatusCount)}
    assert {name: number for name, number in numbers.items() if number} == {
        "active_persons": 1,
        "active_accounts": 2,
        "frozen_accounts": 1,
        "started_transfers": 2,
        "failed_transfers": 1,
    }
    dollars = str(2**63 - 1 + 31)
    assert [(it.currency, it.accounts, it.total_minor) for it in found.balances] == [("EUR", 1, "0"), ("USD", 2, dollars)]
    assert [found.balances_left_out, found.stale, found.active_accounts.more] == [False] * 3
    other = await totals_of(service, "umbrella")
    assert (other.active_accounts.count, [it.total_minor for it in other.balances]) == (1, ["7"])
    assert (await totals_of(service, "nobody")).active_persons.count == 0
    monkeypatch.setattr(totals, "COUNTED_MAX", 2)
    capped = await totals_of(service)
    assert (capped.active_accounts.count, capped.active_accounts.more, capped.balances_left_out) == (2, False, True)
    assert (len(capped.balances), capped.started_transfers.more) == (0, False)
    monkeypatch.setattr(totals, "COUNTED_MAX", 1)
    capped = await totals_of(service)
    assert (capped.active_accounts.count, capped.active_accounts.more, capped.frozen_accounts.more) == (1, True, False)


async def test_absent_and_foreign_are_not_told_apart(service: Service) -> None:
    """The same status, reason and text for what is nowhere and for what is another tenant's."""
    store = bank()
    store.person("umbrella", NOBODY, "Umbrella's own")
    store.account("umbrella", RED, NOBODY)
    await service.holds(store)
    get = account_query_pb2.GetAccountRequest
    statement = account_query_pb2.ListMovementsRequest
    person = person_query_pb2.GetPersonRequest
    for call, reason, text in (
        (service.people.GetPerson(person(person_id=NOBODY), metadata=service.of("acme")), "PERSON_NOT_FOUND", "person"),
        (service.people.GetPerson(person(person_id=NOBODY), metadata=service.of("other")), "PERSON_NOT_FOUND", "person"),
        (service.accounts.GetAccount(get(account_id=NOBODY), metadata=service.of("acme")), "ACCOUNT_NOT_FOUND", "account"),
        (
            service.accounts.ListMovements(statement(account_id=BLUE), metadata=service.of("other")),
            "ACCOUNT_NOT_FOUND",
            "account",
        ),
    ):
        refusal = await refused(call)
        assert (type(refusal).__name__, refusal.reason) == ("NotFound", reason)
        assert refusal.text in (f"there is no {text} {NOBODY}", f"there is no {text} {BLUE}")


async def test_an_account_without_movements_has_an_empty_statement(service: Service) -> None:
    """It is there, so it is no error."""
    await service.holds(bank())
    answer = await service.accounts.ListMovements(account_query_pb2.ListMovementsRequest(account_id=RED), metadata=service.of())
    assert (list(answer.movements), answer.next_page_token) == ([], "")


async def everybody(service: Service, **fields: Any) -> list[str]:
    """The names of all pages of ListPersons."""
    request, names = person_query_pb2.ListPersonsRequest(**fields), list[str]()
    while True:
        page = await service.people.ListPersons(request, metadata=service.of())
        names.extend(person.name for person in page.persons)
        if not page.next_page_token:
            return names
        request.page_token = page.next_page_token


@pytest.mark.parametrize("page_size", [1, 2, 3, 100])
async def test_people_are_listed_in_pages_in_any_order(service: Service, page_size: int) -> None:
    """Each once, whatever the size of a page, equal names included."""
    store = Store()
    for number, name in enumerate(["Bob", "alice", "Carol", "ALICE", "Bob"]):
        store.person("acme", uid(number), name)
    store.person("umbrella", uid(9), "Aaron")
    await service.holds(store)
    listed = {
        order: await everybody(service, page_size=page_size, order_by=order)
        for order in ("", "name desc", "registered_at", "registered_at desc")
    }
    assert listed == {
        "": ["alice", "ALICE", "Bob", "Bob", "Carol"],
        "name desc": ["Carol", "Bob", "Bob", "ALICE", "alice"],
        "registered_at": ["Bob", "alice", "Carol", "ALICE", "Bob"],
        "registered_at desc": ["Bob", "ALICE", "Carol", "alice", "Bob"],
    }


async def test_names_are_found_by_prefix_without_regard_to_case(service: Service) -> None:
    """Ligatures, accents and case fold away; wildcards are characters like any other."""
    store = Store()
    for number, name in enumerate(["Straße", "STRASSE 2", "Stra%", "str_x", "Åse", "Zoë", "\U0001f600 Smile"]):
        store.person("acme", uid(number), name)
    await service.holds(store)
    found = {
        prefix: await everybody(service, filter=person_query_pb2.PersonFilter(name_prefix=prefix))
        for prefix in ("strass", "STRA%", "str_", "a\u030a", "as", "zoe\u0308", "zoe", "\U0001f600", "%", "x")
    }
    assert found == {
        "strass": ["Straße", "STRASSE 2"],
        "STRA%": ["Stra%"],
        "str_": ["str_x"],
        "a\u030a": ["Åse"],
        "as": ["Åse"],
        "zoe\u0308": ["Zoë"],
        "zoe": ["Zoë"],
        "\U0001f600": ["\U0001f600 Smile"],
        "%": [],
        "x": [],
    }


async def test_accounts_are_filtered_and_sorted(service: Service) -> None:
    """By owner, status and currency, together; by balance in both directions."""
    store = bank()
    store.person("acme", uid(7), "Ted")
    for number, amount in ((11, 5), (12, 500), (13, 50)):
        store.account("acme", uid(number), uid(7))
        store.deposit("acme", uid(number), uid(7), amount, amount)
    await service.holds(store)

    async def balances(order: str = "", **fields: Any) -> list[int]:
        shown, token = list[int](), ""
        while True:
            request = account_query_pb2.ListAccountsRequest(
                filter=account_query_pb2.AccountFilter(**fields), order_by=order, page_size=2, page_token=token
            )
            page = await service.accounts.ListAccounts(request, metadata=service.of())
            shown.extend(account.balance_minor for account in page.accounts)
            token = page.next_page_token
            if not token:
                return shown

    assert await balances() == [31, 0, 5, 500, 50]
    assert await balances("opened_at desc") == [50, 500, 5, 0, 31]
    assert await balances("balance_minor") == [0, 5, 31, 50, 500]
    assert await balances("balance_minor desc") == [500, 50, 31, 5, 0]
    assert await balances(owner_id=uid(7).upper()) == [5, 500, 50]
    assert await balances(currency="EUR") == [0]
    assert await balances(status=account_query_pb2.ACCOUNT_STATUS_FROZEN) == [0]
    both: dict[str, Any] = {"status": account_query_pb2.ACCOUNT_STATUS_FROZEN, "currency": "USD"}
    assert await balances(owner_id=uid(0xEE), **both) == []
    assert (await refused(balances(**both))).reason == "FILTER_NEEDS_ORDER"


async def test_a_page_token_of_another_query_is_bad_input(service: Service) -> None:
    """Of another filter, another order or another tenant: INVALID_ARGUMENT, with the field named."""
    store = Store()
    for number in range(3):
        store.person("acme", uid(number), f"Alice {number}")
    await service.holds(store)
    page = person_query_pb2.ListPersonsRequest(page_size=1)
    token = (await service.people.ListPersons(page, metadata=service.of())).next_page_token
    for request, tenant in (
        (person_query_pb2.ListPersonsRequest(page_token=token, order_by="name desc"), "acme"),
        (person_query_pb2.ListPersonsRequest(page_token=token, filter=person_query_pb2.PersonFilter(name_prefix="a")), "acme"),
        (person_query_pb2.ListPersonsRequest(page_token=token), "umbrella"),
        (person_query_pb2.ListPersonsRequest(page_token="garbage"), "acme"),
    ):
        refusal = await refused(service.people.ListPersons(request, metadata=service.of(tenant)))
        assert (refusal.reason, refusal.violations[0][0]) == ("PAGE_TOKEN_INVALID", "page_token")


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (person_query_pb2.ListPersonsRequest(page_size=-1), "page_size"),
        (person_query_pb2.ListPersonsRequest(page_size=501), "page_size"),
        (person_query_pb2.ListPersonsRequest(order_by="password"), "order_by"),
        (person_query_pb2.ListPersonsRequest(consistency_token="x" * 513), "consistency_token"),
        (person_query_pb2.ListPersonsRequest(consistency_token="garbage"), "consistency_token"),
        (person_query_pb2.GetPersonRequest(person_id="1' OR true --"), "person_id"),
    ],
)
async def test_bad_input_names_its_field(service: Service, request_: Any, field: str) -> None:
    """INVALID_ARGUMENT with a violation of that field."""
    call = service.people.GetPerson if isinstance(request_, person_query_pb2.GetPersonRequest) else service.people.ListPersons
    refusal = await refused(call(request_, metadata=service.of()))
    assert (type(refusal).__name__, [violation[0] for violation in refusal.violations]) == ("Invalid", [field])


async def test_a_query_waits_for_its_token(service: Service) -> None:
    """A call made before its tables are there is answered as soon as they are, with the write in it."""
    store = bank()
    token = encode(Token(1, EPOCH, len(store.events)), SEAL, "acme")
    request = person_query_pb2.GetPersonRequest(person_id=ALICE, consistency_token=token)
    waiting = asyncio.ensure_future(service.people.GetPerson(request, metadata=service.of(), timeout=10))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await service.holds(store)
    assert (await waiting).person.name == "Alice Cooper"


async def test_a_query_that_waits_in_vain_is_told_the_lag(service: Service) -> None:
    """FAILED_PRECONDITION NOT_YET_CONSISTENT before the deadline, and not DEADLINE_EXCEEDED after it."""
    store = bank()
    await service.holds(store)
    token = encode(Token(1, EPOCH, len(store.events) + 5), SEAL, "acme")
    request = person_query_pb2.GetPersonRequest(person_id=ALICE, consistency_token=token)
    refusal = await refused(service.people.GetPerson(request, metadata=service.of(), timeout=3))
    assert (refusal.code, refusal.reason, refusal.facts["lag"]) == (9, "NOT_YET_CONSISTENT", "8")


async def test_reading_ones_writes_costs_little(service: Service) -> None:
    """The answer comes with the tables' move, not at the end of the wait (the median of 20)."""
    store = bank()
    took: list[float] = []
    async with running(projector(service.database, StoreLine(store), silence_s=0.001, group=PERSON_TABLES)) as it:
        await reached(it, len(store.events))
        for number in range(20):
            store.rename("acme", ALICE, f"Alice {number}")
            begun = time.monotonic()
            request = person_query_pb2.GetPersonRequest(
                person_id=ALICE, consistency_token=encode(Token(1, EPOCH, len(store.events)), SEAL, "acme")
            )
            person = (await service.people.GetPerson(request, metadata=service.of(), timeout=10)).person
            took.append(time.monotonic() - begun)
            assert person.name == f"Alice {number}"
    assert sorted(took)[10] < 5


async def test_roles(service: Service) -> None:
    """A reader of the line may not ask for people, a user not for projections, and nobody anything without a token."""
    person, projections = person_query_pb2.GetPersonRequest(person_id=ALICE), projection_pb2.ListProjectionsRequest()
    for call, reason in (
        (service.people.GetPerson(person, metadata=service.of("acme", Role.READER)), "PERMISSION_DENIED"),
        (service.people.GetPerson(person, metadata=service.of("acme", Role.PROCESS)), "PERMISSION_DENIED"),
        (service.projections.ListProjections(projections, metadata=service.of("acme", Role.USER)), "PERMISSION_DENIED"),
        (service.projections.ListProjections(projections, metadata=service.of("acme", Role.TENANT_ADMIN)), "PERMISSION_DENIED"),
        (service.people.GetPerson(person), "UNAUTHENTICATED"),
    ):
        with pytest.raises(aio.AioRpcError) as error:
            await call
        assert error.value.code() is grpc.StatusCode[reason]


@pytest.mark.parametrize("length", [60, 200])
async def test_names_that_are_long_when_folded_can_be_paged_through(service: Service, length: int) -> None:
    """One letter that becomes eighteen: the token of such a page is taken back."""
    store = Store()
    for number in range(1, 4):
        store.person("acme", uid(number), "\ufdfa" * length)
    await service.holds(store)
    seen, token = [], ""
    while True:
        page = person_query_pb2.ListPersonsRequest(page_size=1, page_token=token)
        answer = await service.people.ListPersons(page, metadata=service.of())
        seen += [person.person_id for person in answer.persons]
        token = answer.next_page_token
        if not token:
            break
    assert seen == [uid(1), uid(2), uid(3)]


async def test_an_operator_sees_where_the_projections_are_and_whether_they_go_on(service: Service) -> None:
    """ListProjections shows position, epoch, state and reason: also of what was never filled, and when nobody leads."""
    operator = service.of("acme", Role.OPERATOR)

    async def shown() -> tuple[str, int, str, int, int, str]:
        answer = await service.projections.ListProjections(projection_pb2.ListProjectionsRequest(), metadata=operator)
        it = answer.projections[0]
        assert [each.name for each in answer.projections] == ["accounts", "people", "transfers", "users"]
        return it.name, it.shard, it.epoch, it.position, it.state, it.reason

    assert await shown() == ("accounts", 1, "", 0, projection_pb2.PROJECTION_STATE_AWAY, "")
    store = bank()
    await service.holds(store)
    at = ("accounts", 1, EPOCH, len(store.events))
    assert await shown() == (*at, projection_pb2.PROJECTION_STATE_AWAY, "")
    async with hold_lease(service.database.app, LockClass.PROJECTOR, 1):
        assert await shown() == (*at, projection_pb2.PROJECTION_STATE_RUNNING, "")
    with psycopg.connect(service.database.app, autocommit=True) as connection:
        for reason, state in (
            ("PROJECTION_FAILED: told", projection_pb2.PROJECTION_STATE_STOPPED),
            ("HISTORY_DIVERGED: told", projection_pb2.PROJECTION_STATE_DIVERGED),
        ):
            connection.execute("UPDATE checkpoints SET state = 'stopped', reason = %s", (reason,))
            assert await shown() == (*at, state, reason)


# --- tenants ---

TABLES = ("people", "person_totals", "accounts", "movements")


@pytest.mark.parametrize("table", TABLES)
async def test_a_forgotten_where_shows_nothing_of_another_tenant(service: Service, table: str) -> None:
    """Under the query role a bare SELECT has the rows of the tenant that the transaction named, and no others."""
    await service.holds(bank())
    assert service.database.query
    with psycopg.connect(service.database.query, autocommit=True) as connection:

        def seen() -> list[Any]:
            return connection.execute(f"SELECT DISTINCT tenant FROM {table}").fetchall()

        assert seen() == []
        for tenant in ("acme", "umbrella"):
            with connection.transaction():
                connection.execute("SELECT set_config('app.tenant', %s, true)", [tenant])
                assert seen() == [(tenant,)]
        # After the transaction the setting reads as the empty string, which is no tenant.
        assert connection.execute("SELECT current_setting('app.tenant', true)").fetchone() == ("",)
        assert seen() == []
    with psycopg.connect(service.database.admin) as admin:  # the control: the rows are there
        assert len(admin.execute(f"SELECT DISTINCT tenant FROM {table}").fetchall()) == 2


async def test_a_connection_that_goes_back_after_an_error_takes_no_tenant_along(service: Service) -> None:
    """Whatever ended the transaction, the next borrower of the same connection sees nothing until it names a tenant."""
    await service.holds(bank())
    assert service.database.query
    reads = Reads(service.database.query, application_name="test", size_max=1)
    await reads.open()
    cancelled = "SELECT pg_cancel_backend(pg_backend_pid())"
    for bad in ("SELECT 1 / 0", "SELECT nothing FROM accounts", "DELETE FROM accounts", cancelled):
        with pytest.raises((psycopg.Error, Refusal)):
            await in_tenant(reads, "acme", bad, {})
        async with reads.connection() as connection:
            assert await (await connection.execute("SELECT count(*) FROM accounts")).fetchone() == (0,)
            assert connection.info.transaction_status == TransactionStatus.IDLE
        # The control: with a tenant its rows are there, on the same connection, and no other's.
        rows = await in_tenant(reads, "umbrella", "SELECT tenant FROM accounts", {})
        assert set(rows) == {("umbrella",)}
    await reads.close()


@pytest.mark.parametrize("secure", [True, False])
async def test_a_view_shows_the_rows_of_the_tenant_that_the_transaction_named(service: Service, secure: bool) -> None:
    """A view with security_invoker is under the tables' policies as its caller; one without is under its owner's: nothing."""
    await service.holds(bank())
    assert service.database.query
    with psycopg.connect(service.database.owner, autocommit=True) as owner:
        option = "WITH (security_invoker = true)" if secure else ""
        owner.execute(f"CREATE VIEW rich {option} AS SELECT tenant, account_id FROM accounts WHERE balance_minor > 0")
        owner.execute("GRANT SELECT ON rich TO foldline_read_query")
    with psycopg.connect(service.database.query) as connection:
        assert connection.execute("SELECT * FROM rich").fetchall() == []
        connection.execute("SELECT set_config('app.tenant', 'umbrella', true)")
        assert connection.execute("SELECT * FROM rich").fetchall() == ([("umbrella", BLUE)] if secure else [])


@pytest.mark.parametrize("table", [*TABLES, "checkpoints"])
async def test_the_query_role_writes_nothing(service: Service, table: str) -> None:
    """Every way of changing a row is refused by PostgreSQL itself."""
    assert service.database.query
    for statement in (
        f"DELETE FROM {table}",
        f"TRUNCATE {table}",
        f"UPDATE {table} SET {'state' if table == 'checkpoints' else 'tenant'} = 'x'",
        f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY",
    ):
        with psycopg.connect(service.database.query) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(statement)


async def test_every_table_of_rows_is_under_policies(read_db: Database) -> None:
    """No table that queries read is without row-level security, forced on its owner but for what operators see of all."""
    with psycopg.connect(read_db.owner) as owner:
        bare = owner.execute(
            """SELECT relname FROM pg_class WHERE relkind IN ('r', 'p', 'v', 'm') AND relnamespace = 'public'::regnamespace
               AND NOT (relrowsecurity AND relforcerowsecurity) ORDER BY relname"""
        ).fetchall()
        readable = owner.execute(
            """SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace
               AND has_table_privilege('foldline_read_query', oid, 'SELECT') AND NOT relrowsecurity"""
        ).fetchall()
    shared = ("alembic_version", "checkpoints")
    parked = ("parked_events", "parked_keys", "parked_requests")
    of_operators = ("forgotten_tenants", *parked, "projection_rebuilds", "row_change_heads", "row_changes")
    assert [name for (name,) in bare] == sorted((*shared, *of_operators))
    assert sorted(readable) == [("checkpoints",), ("row_change_heads",)]


@pytest.mark.parametrize("role", ["admin", "app", "owner"])
async def test_it_refuses_to_serve_as_anybody_else(read_db: Database, role: str) -> None:
    """As superuser, or as a role that may write the tables, nothing is served."""
    reads = Reads(getattr(read_db, role), application_name="test")
    await reads.open()
    try:
        with pytest.raises(UnsafeDatabase):
            await until_safe(reads, tables=WATCHED)
    finally:
        await reads.close()


async def test_ranges_of_amounts_and_moments(service: Service) -> None:
    """Both ends, one end and none; in the order that an index gives, which an empty order means; another is refused by name."""
    store = bank()
    for number, balance in enumerate((10, 20, 30), 1):
        store.account("acme", uid(number), NOBODY)
        store.deposit("acme", uid(number), NOBODY, balance, balance)
    await service.holds(store)
    opened = {it.aggregate_id: it.recorded_at for it in store.events if it.type == "bank.v1.AccountOpened"}

    async def listed(order_by: str = "", **asked: Any) -> list[str]:
        wanted = account_query_pb2.AccountFilter(owner_id=NOBODY, **asked)
        request = account_query_pb2.ListAccountsRequest(filter=wanted, order_by=order_by, page_size=2)
        found: list[str] = []
        while True:
            answer = await service.accounts.ListAccounts(request, metadata=service.of())
            found += [it.account_id for it in answer.accounts]
            request.page_token = answer.next_page_token
            if not request.page_token:
                return found

    assert await listed(balance_minor=range_pb2.WholeRange(min=20)) == [uid(2), uid(3)]
    assert await listed("balance_minor desc", balance_minor=range_pb2.WholeRange(max=20)) == [uid(2), uid(1)]
    assert await listed(balance_minor=range_pb2.WholeRange(min=11, max=19)) == []
    assert await listed(balance_minor=range_pb2.WholeRange()) == [uid(1), uid(2), uid(3)]
    since = range_pb2.TimeRange(since=opened[uid(2)])
    assert await listed("opened_at desc", opened_at=since) == [uid(3), uid(2)]
    assert await listed(opened_at=range_pb2.TimeRange(since=opened[uid(1)], before=opened[uid(2)])) == [uid(1)]
    for order_by, asked in (
        ("opened_at", {"balance_minor": {"min": 1}}),
        ("", {"balance_minor": {"min": 1}, "opened_at": since}),
    ):
        error = await refused(listed(order_by, **asked))
        assert (error.reason, error.violations[0][0]) == ("FILTER_NEEDS_ORDER", "order_by")
    beyond = range_pb2.TimeRange(since={"seconds": 2**62})  # type: ignore[arg-type]
    error = await refused(listed(opened_at=beyond))
    assert (error.reason, error.violations[0][0]) == ("INVALID_REQUEST", "filter.opened_at")
