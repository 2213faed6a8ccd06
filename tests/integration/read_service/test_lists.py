"""Lists of the read service: pages, filters, orders and ranges."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from bank.v1 import account_query_pb2, person_query_pb2
from foldline.v1 import range_pb2
from read_service import statement as read_statement
from tests.support.fakes.line import Store, StoreLine, uid
from tests.support.fakes.tables import ACCOUNT_TABLES, projector, reached
from tests.support.system.query_service import ALICE, BLUE, NOBODY, Service, bank, refused
from tests.support.system.working import running

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


async def test_who_watches_an_account_knows_when_its_statement_grows(service: Service) -> None:
    """On each answer of the watch the statement has whatever moved up to the account's version."""
    store, who = bank(), service.of()
    async with running(projector(service.database, StoreLine(store), silence_s=0.002, group=ACCOUNT_TABLES)) as it:
        await reached(it, len(store.events))
        request = account_query_pb2.WatchAccountRequest(account_id=BLUE)
        watch: Any = service.accounts.WatchAccount(request, metadata=who, timeout=60)
        version = 0
        while version < 8:
            answer = await watch.read()
            if answer.HasField("account"):
                version = answer.account.version
                statement = account_query_pb2.ListMovementsRequest(account_id=BLUE)
                listed = await service.accounts.ListMovements(statement, metadata=who)
                assert [it.version for it in listed.movements] == list(range(version, 1, -1))
                store.deposit("acme", BLUE, ALICE, 1, 29 + version)
        watch.cancel()
