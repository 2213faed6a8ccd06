"""The query RPCs over real gRPC and PostgreSQL, as `read_service.app.build` makes them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import psycopg
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import aio

from bank.v1 import account_query_pb2, person_query_pb2, totals_query_pb2, transfer_pb2
from foldline.v1 import projection_pb2
from read_service import totals
from shared.line.consistency import Token, encode
from shared.platform.identity import Role
from shared.platform.leader import LockClass, hold_lease
from tests.support.fakes.line import EPOCH, StoreLine, uid
from tests.support.fakes.tables import PERSON_TABLES, projector, reached
from tests.support.system.query_service import ALICE, BLUE, NOBODY, RED, Service, bank, refused
from tests.support.system.sealing import SEAL
from tests.support.system.working import running


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


@pytest.mark.parametrize("table", ["people", "checkpoints"])
async def test_tables_that_are_not_there_are_not_a_database_that_is_away(service: Service, table: str) -> None:
    """A release whose bootstrap was not run says so, with and without a token; when it was run, all is well without a restart."""
    store = bank()
    token = await service.holds(store)
    request = person_query_pb2.GetPersonRequest(person_id=ALICE, consistency_token=token)
    with psycopg.connect(service.database.owner, autocommit=True) as owner:
        owner.execute(f"ALTER TABLE {table} RENAME TO next_year".encode())
        assert (await refused(service.people.GetPerson(request, metadata=service.of(), timeout=20))).reason == "SCHEMA_TOO_OLD"
        owner.execute(f"ALTER TABLE next_year RENAME TO {table}".encode())
    assert (await service.people.GetPerson(request, metadata=service.of(), timeout=20)).person.person_id == ALICE


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
