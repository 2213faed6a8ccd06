"""The read service, with its callers and the accounts that most of its tests ask for."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

import pytest
from grpc import aio

from bank.v1 import account_pb2, account_query_pb2_grpc, person_query_pb2_grpc, totals_query_pb2_grpc
from deploy.bootstrap import Database
from foldline.v1 import projection_pb2_grpc
from shared.folds.errors import Refusal
from shared.line.consistency import Token, encode
from shared.platform.identity import Role
from shared.platform.tokens import DevelopmentIssuer
from shared.rpc.client import bearer
from shared.rpc.status import from_rpc_error
from tests.support.fakes.line import Store, StoreLine, uid
from tests.support.fakes.tables import filled
from tests.support.system.sealing import SEAL

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
