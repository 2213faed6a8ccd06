"""ProcessService over real gRPC and PostgreSQL, as `saga_service.app.build` makes it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest

from deploy.bootstrap import Database
from foldline.v1 import process_pb2
from foldline.v1.process_pb2 import (
    CancelProcessRequest,
    GetProcessRequest,
    ListProcessesRequest,
    ListRunnersRequest,
    PauseProcessesRequest,
    ProcessSummary,
    ResumeProcessesRequest,
    RetryProcessRequest,
    RunnerState,
)
from shared.folds.errors import InternalError
from shared.folds.ids import step_id
from shared.platform import versions
from shared.platform.identity import Role
from shared.platform.leader import LockClass, hold_lease
from shared.platform.postgres import Reads, UnsafeDatabase
from shared.platform.startup import until_safe
from shared.processes.store import TABLES
from shared.rpc.status import from_status
from tests.support.domains.gifts import frozen
from tests.support.fakes.line import EPOCH, uid
from tests.support.logs import capture_logs
from tests.support.system.saga import Service, ids, moved, name, refused, serving
from tests.support.system.waiting import eventually


@pytest.fixture
async def service(saga_db: Database, tmp_path: Path) -> AsyncIterator[Service]:
    """The service over a fresh database."""
    async with serving(saga_db, tmp_path) as it:
        yield it


async def test_a_process_tells_all_that_happened_to_it(service: Service) -> None:
    """Event, commands, timer and answers, with ids, tries and phases; its state; nothing pending at the end."""
    service.world.open(1)
    async with service.world.running():
        await moved(service, 1, "ended")
    answer = await service.get(1)
    told = answer.process
    assert (told.tenant, told.type, told.process_id, told.status) == ("acme", "gift", uid(1), process_pb2.PROCESS_STATUS_ENDED)
    assert (told.attention, told.phase, told.stuck) == ("", "given", False)
    assert told.started_at.ToDatetime() <= told.moved_at.ToDatetime()
    assert orjson.loads(answer.state_json) == {"phase": "given", "account_id": uid(1), "renames": []}
    gift, bonus = str(step_id("gift", uid(1), "gift")), str(step_id("gift", uid(1), "bonus"))
    deposit = "bank.v1.DepositMoneyRequest"
    assert [(it.kind, it.name, it.step, it.id, it.position, it.attempts, it.phase) for it in answer.history] == [
        ("event", "bank.v1.AccountOpened", "", service.world.store.events[0].event_id, 1, 0, "giving"),
        ("command", deposit, "gift", gift, 0, 0, "giving"),
        ("timer_set", "late", "", "", 0, 0, "giving"),
        ("answer", deposit, "gift", gift, 0, 1, "topping up"),
        ("command", deposit, "bonus", bonus, 0, 0, "topping up"),
        ("answer", deposit, "bonus", bonus, 0, 1, "given"),
    ]
    assert (list(answer.commands), list(answer.timers)) == ([], [])


async def test_a_process_comes_with_the_diagram_of_its_type_and_is_found_by_its_id_alone(service: Service) -> None:
    """The same arrows as in the documentation. An id that processes of two types have names neither."""
    service.world.open(1)
    async with service.world.running():
        await moved(service, 1, "ended")
    answer = await service.get(1)
    begin, first, *_ = answer.diagram
    assert (begin.source, begin.label, begin.target, begin.ends) == ("", "AccountOpened", "giving", False)
    assert (first.source, first.label, first.target, first.ends) == ("giving", "gift accepted", "topping up", False)
    assert {(it.label, it.target) for it in answer.diagram if it.ends} >= {("bonus accepted", "given")}
    untyped = {**name(1), "type": ""}
    assert await service.stub.GetProcess(GetProcessRequest(**untyped), metadata=service.of(), timeout=10) == answer
    await service.world.query(
        'INSERT INTO processes SELECT (jsonb_populate_record(p, \'{"type": "order"}\')).* FROM processes p RETURNING 1'
    )
    refusal = await refused(service.stub.GetProcess(GetProcessRequest(**untyped), metadata=service.of(), timeout=10))
    assert (refusal.reason, refusal.facts["types"]) == ("PROCESS_AMBIGUOUS", "gift, order")
    strange = GetProcessRequest(**{**untyped, "process_id": uid(2)})
    refusal = await refused(service.stub.GetProcess(strange, metadata=service.of(), timeout=10))
    assert refusal.reason == "PROCESS_NOT_FOUND"
    other = await service.stub.GetProcess(GetProcessRequest(**{**name(1), "type": "order"}), metadata=service.of(), timeout=10)
    assert [(it.source, it.target) for it in other.diagram][:2] == [("", "reserve"), ("reserve", "pay")]


async def test_what_a_process_waits_for_is_told(service: Service) -> None:
    """The pending command with its tries and the last error, the timer; parked, until an operator lets it go on."""
    service.world.write.decide = lambda command: InternalError()
    service.world.open(1)
    async with service.world.running():
        await moved(service, 1, "parked")
        answer = await service.get(1)
        [command], [timer] = answer.commands, answer.timers
        assert (command.step, command.attempt, command.tries) == ("gift", 1, 3)
        assert command.last_error == "INTERNAL: the service met a defect; its log has the details"
        assert not command.HasField("due_at")
        assert timer.name == "late"
        assert (answer.process.status, answer.process.attention) == (process_pb2.PROCESS_STATUS_PARKED, "COMMAND_FAILED")
        assert from_status(answer.history[-1].error).text.startswith("INTERNAL")
        service.world.write.decide = lambda command: None
        retried = await service.stub.RetryProcess(RetryProcessRequest(**name(1)), metadata=service.of(), timeout=10)
        assert (retried.process.status, retried.process.attention) == (process_pb2.PROCESS_STATUS_RUNNING, "")
        await moved(service, 1, "ended")
    refusal = await refused(service.stub.RetryProcess(RetryProcessRequest(**name(1)), metadata=service.of(), timeout=10))
    assert refusal.reason == "NOTHING_TO_RETRY"


async def test_cancel(service: Service) -> None:
    """The process is told CANCELLED_BY_OPERATOR and compensates; ended, there is nothing to cancel."""
    service.world.write.decide = lambda command: InternalError() if command.amount_minor == 500 else None
    service.world.open(1)
    async with service.world.running():
        await moved(service, 1, "parked")
        answer = await service.stub.CancelProcess(CancelProcessRequest(**name(1)), metadata=service.of(), timeout=10)
        assert answer.process.phase == "sorry: CANCELLED_BY_OPERATOR"
        await moved(service, 1, "ended")
    history = (await service.get(1)).history
    assert ("operator", "cancel") in [(it.kind, it.name) for it in history]
    assert [from_status(it.error).reason for it in history if it.kind == "answer" and it.HasField("error")] == [
        "CANCELLED_BY_OPERATOR"
    ]
    refusal = await refused(service.stub.CancelProcess(CancelProcessRequest(**name(1)), metadata=service.of(), timeout=10))
    assert refusal.reason == "PROCESS_ENDED"


async def test_the_list_in_pages_the_youngest_first(service: Service) -> None:
    """Every process once, also of those that began in the same round; the token goes with its query."""
    service.world.open(*range(1, 8))
    async with service.world.running():
        await moved(service, 7, "ended")
        service.world.open(8)
        await moved(service, 8, "ended")
    seen, token = [], ""
    while page := (answer := await service.find(size=3, token=token)).processes:
        seen += ids(page)
        if not (token := answer.next_page_token):
            break
    assert seen == [uid(number) for number in (8, 7, 6, 5, 4, 3, 2, 1)]
    first = await service.find(size=3)
    refusal = await refused(service.find(size=3, token=first.next_page_token, tenant="acme"))
    assert refusal.reason == "PAGE_TOKEN_INVALID"


async def test_the_list_by_tenant_type_status_and_attention(service: Service) -> None:
    """What an operator should look at: parked, stuck, or said so by the process itself, ended or not."""
    world = service.world
    world.write.decide = lambda command: (
        InternalError() if command.account_id == uid(1) else frozen(command) if command.account_id == uid(2) else None
    )
    world.open(1, 2, 3)
    async with world.running():
        await moved(service, 2, "ended")
        await moved(service, 1, "parked")
    world.open(4)
    world.write.before = lambda request: asyncio.Event().wait()
    async with world.running():
        await moved(service, 1, "running")
    assert ids((await service.find(attention=True)).processes) == [uid(2), uid(1)]
    assert ids((await service.find(status=process_pb2.PROCESS_STATUS_ENDED)).processes) == [uid(3), uid(2)]
    assert ids((await service.find(status=process_pb2.PROCESS_STATUS_RUNNING)).processes) == [uid(4)]
    assert ids((await service.find(tenant="umbrella")).processes) == []
    assert ids((await service.find(type="transfer")).processes) == []
    assert len((await service.find(tenant="acme", type="gift")).processes) == 4
    [summary] = [it for it in (await service.find()).processes if it.process_id == uid(2)]
    assert isinstance(summary, ProcessSummary)
    assert summary.attention == "GIFT_REFUSED"
    await world.query("UPDATE processes SET moved_at = moved_at - %s RETURNING 1", timedelta(hours=2))
    stuck = (await service.find(attention=True)).processes
    assert ids(stuck) == [uid(4), uid(2), uid(1)]
    assert [it.stuck for it in stuck] == [True, False, False]


@pytest.mark.parametrize("method", ["GetProcess", "RetryProcess", "CancelProcess"])
async def test_a_process_that_is_not_there(service: Service, method: str) -> None:
    """PROCESS_NOT_FOUND, also where nothing has ever run."""
    request = {"GetProcess": GetProcessRequest, "RetryProcess": RetryProcessRequest, "CancelProcess": CancelProcessRequest}[
        method
    ]
    refusal = await refused(getattr(service.stub, method)(request(**name(1)), metadata=service.of(), timeout=10))
    assert refusal.reason == "PROCESS_NOT_FOUND"


async def test_a_runner_that_does_not_go_on_is_seen(service: Service, saga_db: Database) -> None:
    """Never run, led, in trouble, stopped, on another history: by ListRunners, and by readiness in few words."""

    async def ready(failures: dict[str, str]) -> None:
        await eventually(lambda: service.server.probes.readiness.failures == failures, 10)

    async def shown() -> tuple[str, int, str, str]:
        [it] = (await service.stub.ListRunners(ListRunnersRequest(), metadata=service.of(), timeout=10)).runners
        assert (it.name, it.shard) == ("processes", 1)
        return it.epoch, it.position, RunnerState.Name(it.state).removeprefix("RUNNER_STATE_"), it.reason

    assert await shown() == ("", 0, "AWAY", "")
    await ready({"processes": "processes: away"})
    service.world.open(1, 2)
    async with hold_lease(saga_db.app, LockClass.SAGA, 1):
        async with service.world.running():
            await moved(service, 2, "ended")
        assert await shown() == (EPOCH, 2, "RUNNING", "")
        await ready({})
        for change, state, reason in (
            ("reason = 'RETRYING: of acme'", "RUNNING", "RETRYING"),
            ("state = 'stopped', reason = 'PROCESSES_FAILED: of acme'", "STOPPED", "PROCESSES_FAILED"),
            ("state = 'stopped', reason = 'HISTORY_DIVERGED: of acme'", "DIVERGED", "HISTORY_DIVERGED"),
        ):
            await service.world.query(f"UPDATE checkpoints SET {change} RETURNING 1")
            assert await shown() == (EPOCH, 2, state, f"{reason}: of acme")
            await ready({"processes": f"processes: {state.lower()} {reason}"})
    # Whoever stopped itself and then ended is stopped still.
    assert (await shown())[2] == "DIVERGED"


@pytest.mark.parametrize("method", ["GetProcess", "ListProcesses", "RetryProcess", "CancelProcess", "ListRunners"])
async def test_operators_alone_may_call(service: Service, method: str) -> None:
    """No other role will do, and none at all even less."""
    request: Any = {"ListProcesses": ListProcessesRequest(), "ListRunners": ListRunnersRequest()}.get(method)
    if request is None:
        request = getattr(process_pb2, f"{method}Request")(**name(1))
    others = set(Role) - {Role.OPERATOR}
    refusal = await refused(getattr(service.stub, method)(request, metadata=service.of(*others), timeout=10))
    assert refusal.reason == "ROLE_MISSING"
    refusal = await refused(getattr(service.stub, method)(request, timeout=10))
    assert refusal.code.name == "UNAUTHENTICATED"


async def test_it_refuses_to_run_as_somebody_who_may_do_anything(saga_db: Database) -> None:
    """A superuser's URL is a mistake that is told at once."""
    reads = Reads(saga_db.admin, application_name="test")
    await reads.open()
    try:
        with pytest.raises(UnsafeDatabase):
            await until_safe(reads, written=TABLES)
    finally:
        await reads.close()


async def test_it_refuses_a_server_that_is_too_old_before_it_waits_for_tables(
    saga_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody will make them: the bootstrap refuses that server too."""
    monkeypatch.setattr(versions, "POSTGRES_MIN", 99)
    reads = Reads(saga_db.app, application_name="test")
    await reads.open()
    try:
        with pytest.raises(UnsafeDatabase, match="POSTGRES_TOO_OLD"):
            await asyncio.wait_for(until_safe(reads, written=["not_there"]), 30)
    finally:
        await reads.close()


async def test_pausing_and_resuming_are_in_the_log(service: Service) -> None:
    """Who paused a type and why, and who resumed it: no process has either in its history."""
    with capture_logs() as logs:
        await service.stub.PauseProcesses(PauseProcessesRequest(type="gift", reason="wrong amounts"), metadata=service.of())
        await service.stub.ResumeProcesses(ResumeProcessesRequest(type="gift"), metadata=service.of())
    told = {line["event"]: line for line in logs if line["event"] in ("processes_paused", "processes_resumed")}
    paused, resumed = told["processes_paused"], told["processes_resumed"]
    assert (paused["type"], paused["reason"], paused["user_id"]) == ("gift", "wrong amounts", "olga")
    assert (resumed["type"], resumed["was_reason"], resumed["was_paused_by"]) == ("gift", "wrong amounts", "olga")
