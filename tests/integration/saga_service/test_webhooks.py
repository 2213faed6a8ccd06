"""Webhooks through the saga service as it is wired: an event or a notice, a fold, the sender, a receiver over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from grpc import aio
from standardwebhooks import Webhook as Verifier

from bank.v1 import account_pb2
from deploy.bootstrap import Database
from foldline.v1 import delivery_pb2, delivery_pb2_grpc, process_pb2, process_pb2_grpc
from foldline.v1.event_store_pb2 import EventEnvelope
from saga_service.app import Leading, SagaSettings, build
from shared.folds.delivery import EVERY_TENANT, Announcements, Notice, Outgoing, Webhook
from shared.folds.process import Answer, Step
from shared.platform.clock import utc_now
from shared.platform.identity import Role
from shared.platform.instruments import Number
from shared.platform.metrics import Metrics
from shared.platform.postgres import Reads
from shared.platform.probe import DatabaseProbe
from shared.platform.tokens import DevelopmentIssuer
from shared.processes.delivery_backlog import watch_deliveries
from shared.rpc.client import bearer
from tests.support.domains.gifts import GIFT, Gift, World
from tests.support.fakes.line import uid
from tests.support.fakes.write_server import writing
from tests.support.system.endpoint import OK, Endpoint, taking
from tests.support.system.waiting import eventually

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

GIVEN = "gift_given"


@dataclass
class Folds:
    """The announcements of this test, and a defect that it may set."""

    broken: bool = False
    made: Announcements = field(default_factory=Announcements)

    def __post_init__(self) -> None:
        self.made.event(EVERY_TENANT, "account-frozen-hook", account_pb2.AccountFrozen, self.frozen)
        self.made.notice("acme", "gift-hook", GIFT.type, GIVEN, self.given)

    def frozen(self, event: account_pb2.AccountFrozen, envelope: EventEnvelope) -> Sequence[Outgoing]:
        """A webhook for each frozen account."""
        if self.broken:
            raise KeyError("secret")
        return [Webhook(to="audit", type="com.example.account.frozen", data={"position": envelope.position}, key="frozen")]

    def given(self, notice: Notice) -> Sequence[Outgoing]:
        """A webhook for each gift."""
        return [Webhook(to="audit", type="com.example.gift.given", data=notice.data, subject=str(notice.data["account_id"]))]


def telling(state: Gift, answer: Answer) -> Step[Gift]:
    """The fold of gifts, with a notice at the end."""
    step = GIFT.on_answer(state, answer)
    return replace(step, notify=(Notice(name=GIVEN, data={"account_id": state.account_id}),)) if step.ended else step


@dataclass
class Service:
    """The running service, and what an operator asks it."""

    world: World
    folds: Folds
    stub: delivery_pb2_grpc.DeliveryServiceStub
    processes: process_pb2_grpc.ProcessServiceStub
    metadata: Any

    async def found(self, status: delivery_pb2.DeliveryStatus.ValueType = delivery_pb2.DELIVERY_STATUS_UNSPECIFIED) -> list[Any]:
        """Deliveries, the oldest first."""
        request = delivery_pb2.ListDeliveriesRequest(filter=delivery_pb2.DeliveryFilter(status=status))
        answer = await self.stub.ListDeliveries(request, metadata=self.metadata, timeout=10)
        return list(reversed(answer.deliveries))

    async def are(self, *errors: str, status: delivery_pb2.DeliveryStatus.ValueType) -> list[Any]:
        """Waits until the deliveries of a status have these last errors."""

        async def reached() -> bool:
            return [it.last_error for it in await self.found(status)] == list(errors)

        await eventually(reached, 20, every_s=0.1)
        return await self.found(status)

    async def backlog(self) -> process_pb2.DeliveryBacklog:
        """What has not arrived."""
        answer = await self.processes.ListRunners(process_pb2.ListRunnersRequest(), metadata=self.metadata, timeout=10)
        return answer.deliveries

    async def gauges(self) -> list[float]:
        """Dead deliveries, and for how long the oldest other one has waited: asked for now, not as the service has them."""
        metrics, probe = Metrics("test"), DatabaseProbe(self.world.database.app, application_name="test-gauges")
        watch_deliveries(metrics, probe, utc_now)
        asking = asyncio.create_task(metrics.watch_loop())

        def values() -> list[float]:
            return [value for number in metrics.every() if isinstance(number, Number) for value, _ in number.read()]

        try:
            await eventually(values, 10)
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await probe.close()
        return values()

    async def retry(self, delivery_id: str) -> Any:
        """An operator sends one again."""
        request = delivery_pb2.RetryDeliveryRequest(delivery_id=delivery_id)
        return await self.stub.RetryDelivery(request, metadata=self.metadata, timeout=10)


DEAD, PENDING, SENT = (
    delivery_pb2.DELIVERY_STATUS_DEAD,
    delivery_pb2.DELIVERY_STATUS_PENDING,
    delivery_pb2.DELIVERY_STATUS_SENT,
)


@asynccontextmanager
async def serving(saga_db: Database, folder: Path, endpoint: Endpoint, **more: Any) -> AsyncIterator[Service]:
    """The service with one contact, leading, over a write service of this test's and without a broker."""
    issuer, world, folds = DevelopmentIssuer(folder), World(saga_db, folder / "token"), Folds()
    world.token_file.write_text("t0ken")
    contacts = folder / "contacts.json"
    contacts.write_text(json.dumps({"acme": {"audit": {"url": endpoint.url, "secret": SECRET}}}))
    definitions = [replace(GIFT, on_answer=telling)]
    reads = Reads(saga_db.app, application_name="test-saga-webhooks")
    await reads.open()
    async with writing(world.store, world.write) as address:
        settings = SagaSettings(
            database_url=saga_db.app,  # type: ignore[arg-type]
            jwks_file=issuer.jwks_file,
            write_address=address,
            nats_url="nats://127.0.0.1:1",  # type: ignore[arg-type]
            token_file=world.token_file,
            contacts_file=contacts,
            **more,
        )
        leading = Leading(settings, definitions, folds.made)
        server = build(settings, reads, definitions, folds.made, wake=leading.wake)
        server.on_drained(reads.close)
        port, stopping = await server.start(), asyncio.Event()
        running = asyncio.create_task(leading.run(stopping))
        try:
            async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                operator = bearer(issuer.issue(tenant="operators", user_id="olga", roles=[Role.OPERATOR]))
                stubs = delivery_pb2_grpc.DeliveryServiceStub(channel), process_pb2_grpc.ProcessServiceStub(channel)
                yield Service(world, folds, *stubs, operator)
        finally:
            stopping.set()
            await running
            await server.drain()


async def test_events_and_notices_reach_a_receiver_that_fails_at_first(saga_db: Database, tmp_path: Path) -> None:
    """A refusal is tried again under the same id, signed anew; the next of the same key waits for it; both come once."""
    async with taking() as endpoint, serving(saga_db, tmp_path, endpoint, webhooks_private=True) as service:
        endpoint.answers(b"HTTP/1.1 503 Busy\r\n\r\n")
        service.world.freeze(1)
        service.world.freeze(1)
        service.world.open(2)
        await eventually(lambda: len(endpoint.requests) >= 2, 20)
        backlog = await service.backlog()
        assert (backlog.dead, backlog.waiting_since) == (0, (await service.found(PENDING))[0].created_at)
        dead, waiting_s = await service.gauges()
        assert dead == 0
        assert 0 < waiting_s < 60
        endpoint.answers(OK)
        await service.are("", "", "", status=SENT)
    told = [Verifier(SECRET).verify(it.body, it.headers) for it in endpoint.requests]
    frozen = [it["data"]["position"] for it in told if it["type"] == "com.example.account.frozen"]
    assert frozen == sorted(frozen)
    assert frozen[-1] == 2
    assert frozen.count(1) >= 2
    ids = {it.headers["webhook-id"] for it in endpoint.requests}
    assert len(ids) == 3
    [given] = {(it["source"], it["subject"], it["data"]["account_id"]) for it in told if it["type"] == "com.example.gift.given"}
    assert given == ("/foldline/acme", uid(2), uid(2))


async def test_a_delivery_that_is_refused_for_good_is_dead_until_an_operator_retries_it(
    saga_db: Database, tmp_path: Path
) -> None:
    """410 is final, and so are the last of the tries; retried over the API it arrives under its id."""
    async with (
        taking() as endpoint,
        serving(saga_db, tmp_path, endpoint, webhooks_private=True, delivery_tries_max=2) as service,
    ):
        endpoint.answers(b"HTTP/1.1 410 Gone\r\n\r\n")
        service.world.freeze(1)
        [gone] = await service.are("WEBHOOK_REFUSED: 410", status=DEAD)
        endpoint.answers(b"HTTP/1.1 500 Oops\r\n\r\n")
        service.world.freeze(1)
        [_, tried] = await service.are("WEBHOOK_REFUSED: 410", "WEBHOOK_REFUSED: 500", status=DEAD)
        backlog = await service.backlog()
        assert (backlog.dead, backlog.HasField("waiting_since")) == (2, False)
        assert await service.gauges() == [2, 0]
        assert (gone.tries, tried.tries, gone.channel, gone.name) == (1, 2, "webhook", "account-frozen-hook")
        endpoint.answers(OK)
        await service.retry(gone.delivery_id)
        await service.retry(tried.delivery_id)
        await service.are("", "", status=SENT)
    arrived = [it.headers["webhook-id"] for it in endpoint.requests]
    assert arrived[-2:] == [gone.delivery_id, tried.delivery_id]


async def test_an_event_whose_fold_raised_is_announced_when_it_is_mended(saga_db: Database, tmp_path: Path) -> None:
    """The event is kept, the processes go on meanwhile; retried too early it fails again, then it comes once."""
    async with taking() as endpoint, serving(saga_db, tmp_path, endpoint, webhooks_private=True) as service:
        service.folds.broken = True
        service.world.freeze(1)
        service.world.open(2)
        [kept] = await service.are("FOLD_FAILED: KeyError", status=DEAD)
        assert (kept.channel, kept.name) == ("fold", "account-frozen-hook")
        await eventually(lambda: len(endpoint.requests) == 1, 20)
        with pytest.raises(aio.AioRpcError):
            await service.retry(kept.delivery_id)
        service.folds.broken = False
        [made] = (await service.retry(kept.delivery_id)).deliveries
        assert made.channel == "webhook"
        await service.are("", "", status=SENT)
        assert await service.found(DEAD) == []
    assert json.loads(endpoint.requests[-1].body)["data"] == {"position": 1}
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize(("scheme", "reason"), [("http", "WEBHOOK_NOT_HTTPS"), ("https", "WEBHOOK_ADDRESS_PRIVATE")])
async def test_private_addresses_and_plain_http_are_refused_unless_the_setting_allows_them(
    saga_db: Database, tmp_path: Path, scheme: str, reason: str
) -> None:
    """FOLDLINE_WEBHOOKS_PRIVATE is off by default: nothing reaches the receiver on this machine."""
    async with taking() as endpoint:
        endpoint.scheme = scheme
        async with serving(saga_db, tmp_path, endpoint) as service:
            service.world.freeze(1)

            async def refused() -> bool:
                return [it.last_error.partition(":")[0] for it in await service.found(DEAD)] == [reason]

            await eventually(refused, 20)
    assert endpoint.requests == []
