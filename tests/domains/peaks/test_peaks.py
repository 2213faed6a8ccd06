"""A summary is its `.proto`, one projection file and one row of the registry: the read service does all else with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import psycopg
import pytest

from bank.v1 import account_pb2
from deploy.bootstrap import Database
from foldline.v1 import as_of_pb2, projection_pb2
from foldline.v1.range_pb2 import TimeRange, WholeRange
from foldline.v1.watch_pb2 import LIST_CHANGE_CHANGED, LIST_CHANGE_ENTERED, LIST_CHANGE_LEFT
from read_service import app as read_app
from read_service.registry import RPCS
from shared.line.fanout import FanOut
from shared.line.follower import Follower
from shared.line.sources import StoreLine
from shared.platform.identity import Role
from shared.platform.postgres import connect
from shared.platform.tokens import DevelopmentIssuer
from shared.projections import rebuild
from shared.projections.groups import GroupProjector
from shared.projections.summary_rpcs import orders_of
from shared.rpc.client import bearer
from tests.domains.peaks.peak_query_pb2 import (
    PEAK_STATUS_CLOSED,
    PEAK_STATUS_OPEN,
    ExplainPeakRequest,
    GetPeakRequest,
    ListPeaksRequest,
    PeakFilter,
    PeakSummary,
    WatchPeakRequest,
    WatchPeaksRequest,
)
from tests.domains.peaks.peak_query_pb2_grpc import PeakQueryServiceStub
from tests.domains.peaks.peaks import PEAK, peaks
from tests.domains.peaks.registry import ROW
from tests.integration.read_service.test_past import served
from tests.support.clients.bank import Bank, close, new_id, refused
from tests.support.system.sealing import KEYS
from tests.support.system.waiting import eventually
from upcasters import UPCASTERS
from write_service import app as write_app


@dataclass
class World:
    """A write service, a projector of the table and a read service with the summary; what has happened on three accounts."""

    issuer: DevelopmentIssuer
    bank: Bank
    peaks: PeakQueryServiceStub
    low: str = ""
    """Had 5, then none."""
    high: str = ""
    """Had 70, has 60; another owner's, in euros."""
    gone: str = ""
    """Had 30, then none, and is closed."""
    owner: str = ""
    token: str = ""
    """Of the last of the commands."""

    async def get(self, id_: str, **asked: Any) -> PeakSummary:
        return (await self.bank.call(self.peaks.GetPeak, GetPeakRequest(peak_id=id_, **asked))).peak

    async def listed(self, order_by: str = "", **wanted: Any) -> list[str]:
        """The ids of a list, by pages of one."""
        ids: list[str] = []
        token = ""
        while True:
            request = ListPeaksRequest(page_size=1, page_token=token, order_by=order_by, filter=PeakFilter(**wanted))
            request.consistency_token = self.token
            answer = await self.bank.call(self.peaks.ListPeaks, request)
            ids += [each.peak_id for each in answer.peaks]
            if not (token := answer.next_page_token):
                return ids

    async def happened(self) -> None:
        """Opens the accounts, moves money and closes one."""
        self.owner, _ = await self.bank.register("Alice")
        other, _ = await self.bank.register("Bob")
        self.low, _ = await self.bank.open(self.owner, name="low")
        self.high, _ = await self.bank.open(other, "EUR", name="high")
        self.gone, _ = await self.bank.open(self.owner, name="lower")
        await self.bank.deposit(self.low, 5)
        await self.bank.withdraw(self.low, 5)
        await self.bank.deposit(self.high, 70, "EUR")
        await self.bank.withdraw(self.high, 10, "EUR")
        await self.bank.deposit(self.gone, 30)
        await self.bank.withdraw(self.gone, 30)
        receipt = await self.bank.call(self.bank.accounts.CloseAccount, close(self.gone))
        self.token = receipt.consistency_token


@asynccontextmanager
async def projecting(database: Database, channel: grpc.aio.Channel, token_file: Path) -> AsyncIterator[None]:
    """The projector of the row's group, as the service builds one for each row."""

    def follower() -> Follower:
        return Follower(StoreLine(channel, token_file, 1), None, silence_s=0.01, upcasters=UPCASTERS)

    fan_out = FanOut(follower().follow, lambda: follower().follow)
    projector = GroupProjector(ROW.group, 1, fan_out.follow, lambda: connect(database.app, application_name="projector"))
    task = asyncio.create_task(projector.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def world(write_db: Database, read_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """All of it, over fresh databases; the table is made by what the drafted migration says."""
    monkeypatch.setattr(rebuild, "LOOK_S", 0.01)
    monkeypatch.setattr(rebuild, "STEP_S", 0.005)
    with psycopg.connect(read_db.owner) as owner:
        owner.execute(peaks.definition().encode())
        owner.execute("SELECT secure_query_table('peaks', 'foldline_read_app', 'foldline_read_query')")
    issuer = DevelopmentIssuer(tmp_path)
    reader = tmp_path / "reader"
    reader.write_text(issuer.issue(tenant="acme", user_id="projector", roles=[Role.READER]))
    common: Any = {"jwks_file": issuer.jwks_file, "seal_keys": KEYS}
    written = write_app.WriteSettings(database_url=write_db.app, **common)  # type: ignore[arg-type]
    assert read_db.query
    async with served(write_db.app, lambda reads: write_app.build(written, reads)) as (_, write_port):
        address = f"127.0.0.1:{write_port}"
        settings = read_app.ReadSettings(query_database_url=read_db.query, write_address=address, **common)  # type: ignore[arg-type]
        async with (
            served(read_db.query, lambda reads: read_app.build(settings, reads, (*RPCS, ROW))) as (_, read_port),
            grpc.aio.insecure_channel(address) as to_write,
            grpc.aio.insecure_channel(f"127.0.0.1:{read_port}") as to_read,
            projecting(read_db, to_write, reader),
        ):
            bank = Bank(to_write, to_read, issuer.issue(tenant="acme", user_id="alice", roles=[Role.USER, Role.TENANT_ADMIN]))
            made = World(issuer, bank, PeakQueryServiceStub(to_read))
            await made.happened()
            yield made


async def test_it_is_shown_and_listed_in_each_order_and_by_each_filter(world: World) -> None:
    """To those that its row names, and to nobody of another tenant."""
    shown = await world.get(world.low, consistency_token=world.token)
    assert (shown.owner_id, shown.name, shown.currency) == (world.owner, "low", "USD")
    assert (shown.highest_minor, shown.status, shown.stale) == (5, PEAK_STATUS_OPEN, False)
    assert shown.HasField("opened_at")
    assert shown.HasField("emptied_at")
    low, high, gone = world.low, world.high, world.gone
    ordered = {
        "": [low, high, gone],
        "opened_at": [low, high, gone],
        "opened_at desc": [gone, high, low],
        "highest_minor": [low, gone, high],
        "highest_minor desc": [high, gone, low],
    }
    assert ordered.keys() == orders_of(PEAK).keys()
    assert {order: await world.listed(order) for order in ordered} == ordered
    of_high = (await world.get(high)).opened_at
    filtered: dict[str, tuple[Any, list[str]]] = {
        "owner_id": (world.owner.upper(), [low, gone]),
        "name_prefix": ("low", [low, gone]),
        "currency": ("EUR", [high]),
        "status": (PEAK_STATUS_CLOSED, [gone]),
        "highest_minor": (WholeRange(min=5, max=30), [low, gone]),
        "opened_at": (TimeRange(since=of_high), [high, gone]),
        "emptied": (True, [low, gone]),
    }
    assert filtered.keys() == PEAK.filters.keys()
    assert {name: await world.listed(**{name: value}) for name, (value, _) in filtered.items()} == {
        name: ids for name, (_, ids) in filtered.items()
    }

    told = await refused(world.bank.call(world.peaks.GetPeak, GetPeakRequest(peak_id=new_id())))
    assert told.reason == "PEAK_NOT_FOUND"
    for tenant, role, reason in (("acme", Role.READER, "ROLE_MISSING"), ("umbrella", Role.USER, "PEAK_NOT_FOUND")):
        other = bearer(world.issuer.issue(tenant=tenant, user_id="bob", roles=[role]))
        call = world.peaks.GetPeak(GetPeakRequest(peak_id=low), metadata=other, timeout=20)
        assert (await refused(call)).reason == reason


async def test_it_is_watched(world: World) -> None:
    """One row, and a list of those that were never emptied of more than 50."""
    wanted = PeakFilter(highest_minor=WholeRange(min=50))
    one: Any = world.peaks.WatchPeak(
        WatchPeakRequest(peak_id=world.high, consistency_token=world.token), metadata=world.bank.who, timeout=60
    )
    many: Any = world.peaks.WatchPeaks(
        WatchPeaksRequest(filter=wanted, consistency_token=world.token), metadata=world.bank.who, timeout=60
    )

    async def next_change(call: Any) -> tuple[int, str, int]:
        """The next change of a list, behind heartbeats."""
        while not (answer := await call.read()).changes:
            pass
        [change] = answer.changes
        return change.kind, change.peak_id, change.peak.highest_minor

    assert (await one.read()).peak.highest_minor == 70
    assert await next_change(many) == (LIST_CHANGE_ENTERED, world.high, 70)
    await world.bank.deposit(world.high, 30, "EUR")
    assert await next_change(many) == (LIST_CHANGE_CHANGED, world.high, 90)
    while (answer := await one.read()).peak.highest_minor != 90:
        assert not answer.HasField("peak")
    receipt = await world.bank.deposit(world.low, 51)
    assert await next_change(many) == (LIST_CHANGE_ENTERED, world.low, 51)
    one.cancel()
    many.cancel()

    opened: Any = world.peaks.WatchPeaks(
        WatchPeaksRequest(
            filter=PeakFilter(status=PEAK_STATUS_OPEN, currency="USD"), consistency_token=receipt.consistency_token
        ),
        metadata=world.bank.who,
        timeout=60,
    )
    assert await next_change(opened) == (LIST_CHANGE_ENTERED, world.low, 51)
    await world.bank.withdraw(world.low, 51)
    await world.bank.call(world.bank.accounts.CloseAccount, close(world.low))
    told = await next_change(opened)
    while told == (LIST_CHANGE_CHANGED, world.low, 51):
        told = await next_change(opened)
    assert told == (LIST_CHANGE_LEFT, world.low, 0)
    opened.cancel()


async def test_its_past_is_folded_and_explained(world: World) -> None:
    """By its History, from the write service's events."""
    request = ExplainPeakRequest(peak_id=world.gone)
    changes = (await world.bank.call(world.peaks.ExplainPeak, request)).changes
    closed, emptied, highest, opened = changes
    assert [change.type for change in changes] == [
        kind.DESCRIPTOR.full_name
        for kind in (account_pb2.AccountClosed, account_pb2.MoneyWithdrawn, account_pb2.MoneyDeposited, account_pb2.AccountOpened)
    ]
    [raised] = highest.fields
    assert (raised.field, raised.from_json, raised.to_json) == ("highest_minor", '"0"', '"30"')
    assert [field.field for field in emptied.fields] == ["emptied_at"]
    assert [field.field for field in closed.fields] == ["status"]
    was = await world.get(world.gone, as_of=as_of_pb2.AsOf(token=opened.origin.token))
    assert (was.highest_minor, was.status) == (0, PEAK_STATUS_OPEN)
    now = await world.get(world.gone, as_of=as_of_pb2.AsOf(token=closed.origin.token))
    assert now == await world.get(world.gone, consistency_token=world.token)


async def test_it_is_rebuilt_beside_and_comes_out_the_same(world: World) -> None:
    """Compared row by row, then switched; queries answer on."""
    before = [await world.get(id_, consistency_token=world.token) for id_ in (world.low, world.high, world.gone)]
    who = bearer(world.issuer.issue(tenant="acme", user_id="olga", roles=[Role.OPERATOR]))
    projections = world.bank.projections
    started = projection_pb2.StartRebuildRequest(name="peaks", only_if_same=True)
    await projections.StartRebuild(started, metadata=who, timeout=20)

    async def switched() -> projection_pb2.Rebuild | None:
        call: Any = projections.WatchRebuild(projection_pb2.WatchRebuildRequest(name="peaks"), metadata=who, timeout=20)
        found: projection_pb2.Rebuild = (await call.read()).rebuild
        call.cancel()
        return found if found.state == projection_pb2.REBUILD_STATE_SWITCHED else None

    ended = await eventually(switched, 60)
    assert ended
    assert (ended.diff.rows_before, ended.diff.rows_after, ended.diff.rows_differing) == (3, 3, 0)
    assert [await world.get(id_) for id_ in (world.low, world.high, world.gone)] == before
    listed = await projections.ListProjections(projection_pb2.ListProjectionsRequest(), metadata=who, timeout=20)
    assert [(each.name, each.version) for each in listed.projections if each.name == "peaks"] == [("peaks", ended.version)]
