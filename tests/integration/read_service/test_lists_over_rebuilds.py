"""Lists over the switch of a rebuild: every page is answered, and none is of an earlier place of the line than one before."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

import pytest

from bank.v1 import account_query_pb2
from shared.projections import rebuild
from tests.support.fakes.line import Store, uid
from tests.support.system.query_service import Service
from tests.support.system.rebuilding import ALICE, FILL_S, at_end, bank, made, operator, serving, start, state
from tests.support.system.waiting import eventually
from tests.support.system.working import running

ACCOUNTS = [uid(100 + number) for number in range(40)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of a rebuild follow each other without long pauses."""
    monkeypatch.setattr(rebuild, "LOOK_S", 0.01)
    monkeypatch.setattr(rebuild, "STEP_S", 0.005)


async def page(service: Service, token: str = "", *, size: int = 15, order: str = "opened_at") -> Any:
    """A page of Alice's accounts."""
    wanted = account_query_pb2.AccountFilter(owner_id=ALICE)
    request = account_query_pb2.ListAccountsRequest(filter=wanted, order_by=order, page_size=size, page_token=token)
    return await service.accounts.ListAccounts(request, metadata=service.of(), timeout=FILL_S)


async def statement(service: Service, token: str = "") -> Any:
    """A page of the statement of the last account, which is at rest."""
    request = account_query_pb2.ListMovementsRequest(account_id=ACCOUNTS[-1], page_size=3, page_token=token)
    return await service.accounts.ListMovements(request, metadata=service.of(), timeout=FILL_S)


class Reader:
    """Reads all pages of the list again and again; an answer that is older than one before is an AssertionError."""

    def __init__(self, service: Service, order: str) -> None:
        self.service = service
        self.order = order
        self.seen: defaultdict[str, int] = defaultdict(int)
        self.lists = 0
        self.done = False

    async def run(self) -> None:
        """Until it is done."""
        while not self.done:
            token, ids = "", list[str]()
            while True:
                answer = await page(self.service, token, order=self.order)
                for it in answer.accounts:
                    assert it.version >= self.seen[it.account_id]
                    assert it.balance_minor == it.version + 3
                    self.seen[it.account_id] = it.version
                    ids.append(it.account_id)
                if not (token := answer.next_page_token):
                    break
            assert sorted(ids) == ACCOUNTS
            self.lists += 1


async def load(store: Store, readers: list[Reader]) -> None:
    """Deposits on all accounts but the last, while somebody reads."""
    balances = dict.fromkeys(ACCOUNTS[:-1], 5)
    while not all(reader.done for reader in readers):
        for account_id in balances:
            balances[account_id] += 1
            store.deposit("acme", account_id, ALICE, 1, balances[account_id])
            await asyncio.sleep(0.002)


async def test_lists_are_answered_over_a_switch_and_their_page_tokens_hold(service: Service) -> None:
    """Under load, both ways; a list and a statement go on by tokens of before the switch, also when the former tables went."""
    store = bank()
    for number in range(6):
        store.deposit("acme", ACCOUNTS[-1], ALICE, 1, 6 + number)
    readers = [Reader(service, "opened_at"), Reader(service, "opened_at desc")]
    async with running(made(service.database, store)), operator(service.database) as admin:
        await at_end(service.database, store)
        first, moved = await page(service), await statement(service)
        tasks = [asyncio.create_task(each) for each in (*(reader.run() for reader in readers), load(store, readers))]
        version = (await start(admin)).version
        await eventually(state(admin, "switched"), FILL_S)
        second, earlier = await page(service, first.next_page_token), await statement(service, moved.next_page_token)
        await admin.drop("accounts")
        await eventually(state(admin, ""), FILL_S)
        third, earliest = await page(service, second.next_page_token), await statement(service, earlier.next_page_token)
        lists = [reader.lists for reader in readers]
        await eventually(lambda: all(it.lists > before + 1 for it, before in zip(readers, lists, strict=True)), FILL_S)
        for reader in readers:
            reader.done = True
        await asyncio.gather(*tasks)
        assert serving(service.database)[0] == f"accounts@{version}"
    assert [it.account_id for answer in (first, second, third) for it in answer.accounts] == ACCOUNTS
    assert [len(answer.accounts) for answer in (first, second, third)] == [15, 15, 10]
    assert [it.version for answer in (moved, earlier, earliest) for it in answer.movements] == [8, 7, 6, 5, 4, 3, 2]
    assert third.next_page_token == earliest.next_page_token == ""
