"""Lists that are watched, over real gRPC and PostgreSQL: what enters, changes and leaves, resuming, and costs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from grpc import aio

from bank.v1 import account_pb2, account_query_pb2, person_query_pb2
from deploy.bootstrap import Database
from foldline.v1.watch_pb2 import LIST_CHANGE_CHANGED, LIST_CHANGE_ENTERED, LIST_CHANGE_LEFT
from read_service.projections.accounts import ACCOUNT, ACTIVE
from shared.line.consistency import Token, encode
from shared.line.follower import Follower
from shared.platform.postgres import Reads, connect
from shared.projections import changes, resume, watch, watched_list, watched_lists
from shared.projections.groups import GroupProjector
from shared.projections.rebuild_admin import RebuildAdmin
from tests.integration.read_service.test_watch import following, serving, watched
from tests.support.fakes.line import Store, StoreLine, uid
from tests.support.fakes.tables import ACCOUNT_TABLES, PERSON_TABLES, folded
from tests.support.system.query_service import ALICE, BLUE, RED, Service, bank, refused
from tests.support.system.sealing import SEAL
from tests.support.system.waiting import eventually
from tests.support.system.working import running


@pytest.fixture
async def service(read_db: Database, tmp_path: Path) -> AsyncIterator[Service]:
    """One over a fresh database."""
    async with serving(read_db, tmp_path) as (made, _):
        yield made


EVE = uid(0xEE)
FILTERS = {"owner_id": ALICE, "status": account_query_pb2.ACCOUNT_STATUS_ACTIVE}


class Reader:
    """A client that keeps a list by what it is told, strictly: it resumes where it was, and what it is told must fit."""

    def __init__(self, service: Service, **asked: Any) -> None:
        self.service = service
        self.filter = account_query_pb2.AccountFilter(**asked)
        self.rows: dict[str, account_query_pb2.AccountSummary] = {}
        self.token = ""
        self.told: list[tuple[int, str]] = []
        self.begun = 0
        self._call: Any = None
        self._resumed = False

    def open(self, *, consistent: str = "", tenant: str = "acme") -> None:
        """Watches, from where it was."""
        request = account_query_pb2.WatchAccountsRequest(
            filter=self.filter, resume_token=self.token, consistency_token=consistent
        )
        self._call = self.service.accounts.WatchAccounts(request, metadata=self.service.of(tenant), timeout=60)
        self._resumed = bool(self.token)

    def close(self) -> None:
        """Goes away."""
        self._call.cancel()

    async def read(self) -> None:
        """The changes up to the next place of the line."""
        while True:
            answer = await self._call.read()
            assert answer is not aio.EOF
            if answer.begins_anew:
                assert self.begun == 0 or self._resumed
                self.begun += 1
                self.rows = {}
            for change in answer.changes:
                self._take(change)
            if answer.resume_token:
                self.token = answer.resume_token
                self._resumed = False
                return

    def _take(self, change: account_query_pb2.AccountChange) -> None:
        before = self.rows.get(change.account_id)
        self.told.append((change.kind, change.account_id))
        if change.kind == LIST_CHANGE_LEFT:
            assert before is not None or self._resumed
            assert not change.HasField("account")
            self.rows.pop(change.account_id, None)
            return
        assert change.account != before
        if not self._resumed:
            assert (before is None) == (change.kind == LIST_CHANGE_ENTERED)
        self.rows[change.account_id] = change.account

    async def until(self, expected: dict[str, int]) -> None:
        """Reads until it has these balances."""
        async with asyncio.timeout(20):
            while {id_: row.balance_minor for id_, row in self.rows.items()} != expected:
                await self.read()


def of_fold(store: Store, owner: str = ALICE) -> dict[str, int]:
    """The balances of an owner's active accounts, folded from the line."""
    rows = [ACCOUNT.source.row(*row) for row in folded(store.events, ACCOUNT_TABLES)["accounts"]]
    return {
        row.account_id: row.balance_minor for row in rows if (row.tenant, row.owner_id, row.status) == ("acme", owner, ACTIVE)
    }


def sealed(store: Store) -> str:
    """The consistency token of the store's end."""
    return encode(Token(1, store.epoch, len(store.events)), SEAL, "acme")


def freeze(store: Store, account_id: str, *, thaw: bool = False) -> None:
    """The account leaves the list of active ones, or enters it."""
    kind = account_pb2.AccountUnfrozen if thaw else account_pb2.AccountFrozen
    store.append("acme", account_id, kind(account_id=account_id, owner_id=ALICE))


async def test_what_enters_changes_and_leaves_is_told_as_such(service: Service) -> None:
    """Each once, and nothing of other owners, states and tenants."""
    store = bank()
    async with following(service, store):
        reader = Reader(service, **FILTERS)
        reader.open()
        await reader.until({BLUE: 31})
        assert (reader.begun, reader.told) == (1, [(LIST_CHANGE_ENTERED, BLUE)])
        freeze(store, RED, thaw=True)
        await reader.until({BLUE: 31, RED: 0})
        store.deposit("acme", RED, ALICE, 5, 5, "EUR")
        await reader.until({BLUE: 31, RED: 5})
        store.account("acme", uid(1), EVE)
        store.deposit("umbrella", BLUE, ALICE, 3, 10)
        freeze(store, BLUE)
        await reader.until({RED: 5})
        assert reader.told[1:] == [(LIST_CHANGE_ENTERED, RED), (LIST_CHANGE_CHANGED, RED), (LIST_CHANGE_LEFT, BLUE)]
        assert reader.begun == 1
        reader.close()


@asynccontextmanager
async def keeping(database: Database, store: Store) -> AsyncIterator[GroupProjector]:
    """The projector of a group as the process has it, with its rebuilder."""
    follow = Follower(StoreLine(store), None, silence_s=0.002).follow
    it = GroupProjector(ACCOUNT_TABLES, 1, follow, lambda: connect(database.app, application_name="foldline-projector"))
    async with running(it):
        yield it


async def rebuilt(database: Database) -> None:
    """Has the tables rebuilt and switched."""
    assert database.query
    reads = Reads(database.query, application_name="test")
    await reads.open()
    try:
        admin = RebuildAdmin(reads, 1, ["accounts"])
        await admin.start("accounts", only_if_same=False, user_id="olga")

        async def switched() -> bool:
            return (await admin.get("accounts")).state == "switched"

        await eventually(switched, 30)
    finally:
        await reads.close()


async def test_a_random_history_ends_in_the_fold_over_restarts_and_a_rebuild(read_db: Database, tmp_path: Path) -> None:
    """Readers that stay, go and come back, the projector broken off, an instance replaced, the tables rebuilt and switched."""
    chance = random.Random(15)
    store = bank()
    accounts, frozen, balances = [BLUE, RED], {RED}, {BLUE: 31, RED: 0}

    def happen(count: int) -> None:
        for _ in range(count):
            draw = chance.random()
            if draw < 0.1:
                accounts.append(uid(1000 + len(accounts)))
                balances[accounts[-1]] = 0
                store.account("acme", accounts[-1], ALICE if chance.random() < 0.7 else EVE)
                continue
            it = chance.choice(accounts)
            if draw < 0.3:
                freeze(store, it, thaw=it in frozen)
                frozen.symmetric_difference_update({it})
            else:
                balances[it] += 1
                store.deposit("acme", it, ALICE, 1, balances[it])

    async with serving(read_db, tmp_path) as (service, server):
        async with keeping(read_db, store):
            staying, resuming = Reader(service, **FILTERS), Reader(service, **FILTERS)
            for reader in (staying, resuming):
                reader.open()
                await reader.until(of_fold(store))
            for step in range(12):
                happen(chance.randrange(1, 30))
                if step % 3 == 1:
                    resuming.close()
                    happen(chance.randrange(1, 30))
                    resuming.open()
                if step == 6:
                    await rebuilt(read_db)
                await staying.until(of_fold(store))
                await resuming.until(of_fold(store))
        happen(10)
        async with keeping(read_db, store):  # another leads
            await staying.until(of_fold(store))
            await resuming.until(of_fold(store))
            assert staying.begun == 1
            begun = resuming.begun
            assert begun <= 2  # the rebuild may have come while it was away
            draining = asyncio.create_task(server.drain())
            assert (await refused(staying.read())).reason == "SHUTTING_DOWN"
            await draining
            happen(10)
            async with serving(read_db, tmp_path) as (after, _):
                staying.service = resuming.service = after
                for reader in (staying, resuming):
                    reader.open()
                    await reader.until(of_fold(store))
                    reader.close()
            assert (staying.begun, resuming.begun) == (1, begun)


async def test_who_resumes_after_nothing_has_changed_is_told_nothing(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the changes behind the place are not known any more; if something has changed, the list begins anew."""
    monkeypatch.setattr(changes, "BYTES_MAX", 0)
    store = bank()
    async with following(service, store):
        reader = Reader(service, **FILTERS)
        reader.open()
        await reader.until({BLUE: 31})
        reader.close()
        store.account("acme", uid(1), EVE)
        reader.open(consistent=sealed(store))
        await reader.read()
        assert (reader.begun, len(reader.told)) == (1, 1)
        reader.close()
        store.deposit("acme", BLUE, ALICE, 1, 32)
        reader.open(consistent=sealed(store))
        await reader.until({BLUE: 32})
        assert reader.begun == 2
        reader.close()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("no token", "RESUME_TOKEN_INVALID"),
        ("another filter's", "RESUME_TOKEN_INVALID"),
        ("another tenant's", "RESUME_TOKEN_INVALID"),
        ("a row's", "RESUME_TOKEN_INVALID"),
        ("not yet", "NOT_YET_CONSISTENT"),
        ("beyond", "TOKEN_UNREACHABLE"),
        ("another epoch's", "TOKEN_OF_ANOTHER_HISTORY"),
        ("another shard's", "CONSISTENCY_TOKEN_OF_ANOTHER_SHARD"),
    ],
)
async def test_a_token_of_something_else_is_refused_by_name(
    service: Service, kind: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a place that the tables do not reach."""
    monkeypatch.setattr(resume, "WAIT_MAX_S", 0.3)
    store = bank()
    async with following(service, store):

        async def token_of(tenant: str = "acme", **asked: Any) -> str:
            reader = Reader(service, **asked)
            reader.open(tenant=tenant)
            await reader.read()
            reader.close()
            return reader.token

        texts = (f"p.owner_id = {{0}} {ALICE}", "p.status = {} active", "", "", "")
        name = "\0".join(("ListAccounts", *texts))

        def token_at(position: int, epoch: str = store.epoch, shard: int = 1) -> str:
            place = changes.Place(1, "x", Token(shard, epoch, position))
            return watched_lists.encode(SEAL, "acme", name, watched_list.Begin(place, 0))

        at = watch.Shown(0, Token(1, store.epoch, 1), account_query_pb2.AccountSummary(), "0" * 16)
        token = {
            "no token": "nonsense",
            "another filter's": await token_of(owner_id=EVE),
            "another tenant's": await token_of("umbrella", **FILTERS),
            "a row's": watch.encode(SEAL, ("acme", BLUE), at),
            "not yet": token_at(len(store.events) + 1),
            "beyond": token_at(2**62),
            "another epoch's": token_at(1, "nobody/1"),
            "another shard's": token_at(1, shard=2),
        }[kind]
        reader = Reader(service, **FILTERS)
        reader.token = token
        reader.open()
        assert (await refused(reader._call.read())).reason == reason


async def test_persons_are_watched_by_what_two_tables_say_of_them(service: Service) -> None:
    """A deposit changes a person's totals."""
    store = bank()
    async with following(service, store, PERSON_TABLES):
        request = person_query_pb2.WatchPersonsRequest(filter=person_query_pb2.PersonFilter(name_prefix="ALICE"))
        call: Any = service.people.WatchPersons(request, metadata=service.of(), timeout=30)
        assert [it.person.name for it in (await call.read()).changes] == ["Alice Cooper"]
        store.deposit("acme", BLUE, ALICE, 9, 40)
        [change] = (await call.read()).changes
        assert (change.kind, change.person.total_balances[1].total_minor) == (LIST_CHANGE_CHANGED, "40")
        store.rename("acme", ALICE, "Bob")
        [change] = (await call.read()).changes
        assert (change.kind, change.person_id) == (LIST_CHANGE_LEFT, ALICE)
        call.cancel()


async def test_a_commit_costs_as_much_as_it_changes_rows(service: Service) -> None:
    """200 watchers of 20 lists: a commit of one row makes the process read one row, once."""
    store = bank()
    async with following(service, store), watched(service) as servicer:
        lists = servicer.watches.lists
        told: asyncio.Queue[int] = asyncio.Queue()

        async def one(number: int) -> None:
            conditions = ACCOUNT.filters["owner_id"].conditions(ALICE if number % 20 == 0 else uid(number % 20))
            async with lists.watching("acme", str(number % 20), conditions, None) as watcher:
                await servicer.watches.started()
                await watcher.next(10)
                await told.put(0)
                while not (answer := await watcher.next(10)).changes:
                    pass
                await told.put(len(answer.changes))

        async with asyncio.timeout(20):
            tasks = [asyncio.create_task(one(number)) for number in range(200)]
            for _ in tasks:
                await told.get()
            before = lists.rows_read
            store.deposit("acme", BLUE, ALICE, 5, 36)
            assert [await told.get() for _ in range(10)] == [1] * 10
            assert lists.rows_read - before == 1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
