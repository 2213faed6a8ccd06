"""A row whose event cannot be applied, in the running system: what callers and operators see, and how it ends."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest

from bank.v1 import account_query_pb2, person_query_pb2
from cli import parked_calls
from cli.calls import Refused
from cli.endpoints import Endpoints
from deploy.local.system import PROJECTOR, READ, WRITE
from foldline.v1 import projection_pb2, projection_pb2_grpc
from shared.platform.identity import Role
from shared.rpc.client import bearer
from tests.support.clients.bank import Bank, channels, refused
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually


async def test_a_parked_row_says_so_and_comes_back(stack: Stack) -> None:
    """A lost row parks its key over kill -9; it is shown as stale, all else goes on; mended and retried it is as it should be."""
    await stack.start_all()
    known = Endpoints(
        write=stack.programs[WRITE].address,
        read=stack.programs[READ].address,
        saga="",
        tokens={"operator": stack.token("operators", "olga", [Role.OPERATOR])},
    )
    async with channels(stack) as (write, read):
        bank = Bank(write, read, stack.token())
        alice, _ = await bank.register("Alice")
        blue, _ = await bank.open(alice)
        token = (await bank.deposit(blue, 100)).consistency_token
        assert not (await bank.person(alice, token)).stale

        await stack.stop(PROJECTOR)
        with psycopg.connect(stack.databases.read.app) as tables:
            totals = tables.execute("DELETE FROM person_totals RETURNING *").fetchone()
            account = tables.execute("DELETE FROM accounts RETURNING *").fetchone()
        stack.start(PROJECTOR)
        for amount in (5, 6):
            token = (await bank.deposit(blue, amount)).consistency_token
        person = await bank.person(alice, token)
        assert (person.stale, list(person.total_balances)) == (True, [])
        assert await trailers(bank, alice) == {"foldline-stale": "true"}
        assert (await refused(bank.account(blue, token))).reason == "ROW_PARKED"
        # What is another's goes on, and so does this one's statement.
        bob, receipt = await bank.register("Bob")
        assert not (await bank.person(bob, receipt.consistency_token)).stale
        await stack.kill9(PROJECTOR)
        stack.start(PROJECTOR)
        token = (await bank.deposit(blue, 7)).consistency_token
        assert (await bank.person(alice, token)).stale

        found, _ = await parked_calls.find(known, "", "", 50)
        assert [(it["projection"], it["table"], it["events"]) for it in sorted(found, key=lambda it: str(it["table"]))] == [
            ("accounts", "accounts", 3),
            ("people", "person_totals", 3),
        ]
        ids = {it["table"]: it["parked_id"] for it in found}
        still = await parked_calls.retry(known, ids["person_totals"])
        assert (still["released"], still["applied"], still["parked"]["events"]) == (False, 0, 3)
        assert still["parked"]["error"].endswith("raised ValueError")

        with psycopg.connect(stack.databases.read.app) as tables:
            for table, row in (("person_totals", totals), ("accounts", account)):
                assert row is not None
                tables.execute(f"INSERT INTO {table} VALUES ({', '.join(['%s'] * len(row))})", row)
        done = await parked_calls.retry(known, ids["person_totals"])
        assert (done["released"], done["applied"]) == (True, 3)
        person = await bank.person(alice, token)
        assert [(it.currency, it.total_minor) for it in person.total_balances] == [("USD", "118")]
        assert (person.stale, await trailers(bank, alice)) == (False, {})

        # Asked for while no projector runs, it is done when one does, once. What is discarded is said.
        await stack.kill9(PROJECTOR)
        stub = projection_pb2_grpc.ProjectionServiceStub(read)
        request = projection_pb2.DiscardParkedRequest(parked_id=ids["accounts"])
        refusal = await refused(stub.DiscardParked(request, metadata=bearer(known.token("operator")), timeout=1))
        assert refusal.reason == "PROJECTOR_AWAY"
        stack.start(PROJECTOR)

        async def released() -> bool:
            return (await parked_calls.find(known, "accounts", "acme", 50))[0] == []

        await eventually(released, 20)
        assert (await bank.account(blue, token)).balance_minor == 118
        request_ = account_query_pb2.ListMovementsRequest(account_id=blue)
        statement = await bank.call(bank.account_queries.ListMovements, request_)
        assert ([it.amount_minor for it in statement.movements], statement.stale) == ([7, 6, 5, 100], False)
        with pytest.raises(Refused) as gone:
            await parked_calls.discard(known, ids["accounts"], all_events=True)
        assert gone.value.refusal.reason == "PARKED_NOT_FOUND"
    lines = [json.loads(line) for line in stack.log(READ).read_text().splitlines() if '"parked_asked"' in line]
    assert [(it["action"], it["user_id"]) for it in lines] == [
        (action, "olga") for action in ("retry", "retry", "discard", "discard")
    ]


async def trailers(bank: Bank, person_id: str) -> dict[str, Any]:
    """What the trailers of GetPerson say of its answer."""
    call = bank.person_queries.GetPerson(person_query_pb2.GetPersonRequest(person_id=person_id), metadata=bank.who, timeout=20)
    await call
    return {name: value for name, value in await call.trailing_metadata() if name.startswith("foldline")}
