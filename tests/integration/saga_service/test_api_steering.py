"""What operators steer, over gRPC: skip, retry many, acknowledge with two people; and a runner that is stuck, for all to see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cli.status import consumer_row, exit_code
from cli.status_calls import placed
from deploy.bootstrap import Database
from foldline.v1 import process_pb2
from foldline.v1.process_pb2 import (
    AskAcknowledgementRequest,
    ConfirmAcknowledgementRequest,
    ListRunnersRequest,
    RejectAcknowledgementRequest,
    RetryProcessesRequest,
    SkipStepRequest,
)
from shared.folds.errors import InternalError, Unavailable
from shared.platform.leader import LockClass, hold_lease
from shared.processes.runners import STUCK_AFTER
from tests.support.domains.gifts import GIFT, frozen
from tests.support.fakes.line import uid
from tests.support.logs import capture_logs
from tests.support.system.saga import ids, moved, name, refused, serving
from tests.support.system.waiting import eventually


async def test_a_step_is_skipped_once_by_whoever_skips_it_again(saga_db: Database, tmp_path: Path) -> None:
    """The process goes on to its next step and is told by the answer; the same person again is refused, now and after the end."""
    manager = replace(GIFT, skippable=frozenset({"gift", "bonus"}))
    async with serving(saga_db, tmp_path, manager) as service:
        service.world.write.decide = lambda command: InternalError()
        service.world.open(1)

        def skip(step: str) -> SkipStepRequest:
            return SkipStepRequest(**name(1), step=step, reason="paid by hand")

        async with service.world.running(service.world.runner(manager=manager)):
            await moved(service, 1, "parked")
            skipped = await service.stub.SkipStep(skip("gift"), metadata=service.of(), timeout=10)
            assert (skipped.process.phase, skipped.process.status) == ("topping up", process_pb2.PROCESS_STATUS_RUNNING)
            assert (await refused(service.stub.SkipStep(skip("gift"), metadata=service.of(), timeout=10))).reason == (
                "STEP_NOT_WAITING"
            )
            await moved(service, 1, "parked")
            ended = await service.stub.SkipStep(skip("bonus"), metadata=service.of(), timeout=10)
            assert (ended.process.phase, ended.process.status) == ("given", process_pb2.PROCESS_STATUS_ENDED)
        for step in ("bonus", "gift"):
            assert (await refused(service.stub.SkipStep(skip(step), metadata=service.of(), timeout=10))).reason == "PROCESS_ENDED"
        told = [it for it in (await service.get(1)).history if it.kind == "operator"]
        assert [(it.name, it.step, it.id, it.note) for it in told] == [
            ("skip", "gift", "olga", "paid by hand"),
            ("skip", "bonus", "olga", "paid by hand"),
        ]
        assert service.world.write.carried_out == {}


async def test_all_parked_ones_of_a_reason_are_retried_page_by_page(saga_db: Database, tmp_path: Path) -> None:
    """Each once, with its history; those of another reason or type are not touched."""
    async with serving(saga_db, tmp_path) as service:
        service.world.write.decide = lambda command: InternalError()
        service.world.open(1, 2, 3)
        async with service.world.running():
            await moved(service, 3, "parked")
            other = RetryProcessesRequest(type="gift", reason="COMMAND_REFUSED")
            assert (await service.stub.RetryProcesses(other, metadata=service.of(), timeout=10)).retried == 0
            service.world.write.decide = lambda command: None
            asked = RetryProcessesRequest(type="gift", reason="COMMAND_FAILED", page_size=2)
            first = await service.stub.RetryProcesses(asked, metadata=service.of(), timeout=10)
            assert (first.retried, first.parked_again, bool(first.next_page_token)) == (2, 0, True)
            asked.page_token = first.next_page_token
            second = await service.stub.RetryProcesses(asked, metadata=service.of(), timeout=10)
            assert (second.retried, second.parked_again, second.next_page_token) == (1, 0, "")
            await moved(service, 3, "ended")
        for number in (1, 2, 3):
            told = [(it.name, it.id) for it in (await service.get(number)).history if it.kind == "operator"]
            assert told == [("retry", "olga")]
        assert set(service.world.write.carried_out.values()) == {1}


async def test_what_was_rejected_may_be_asked_for_anew(saga_db: Database, tmp_path: Path) -> None:
    """The process asks for attention until another person confirms; who rejected and why is in its history."""
    async with serving(saga_db, tmp_path) as service:
        service.world.write.decide = frozen
        service.world.open(1)
        async with service.world.running():
            await moved(service, 1, "ended")
        ask = AskAcknowledgementRequest(**name(1), attention="GIFT_REFUSED", resolution="sent by post")
        asked = await service.stub.AskAcknowledgement(ask, metadata=service.of(), timeout=10)
        assert (asked.acknowledgement.asked_by, asked.acknowledgement.resolution) == ("olga", "sent by post")
        assert ids((await service.find(acknowledged=True)).processes) == []
        reject = RejectAcknowledgementRequest(**name(1), reason="it came back")
        rejected = await service.stub.RejectAcknowledgement(reject, metadata=service.of(user="otto"), timeout=10)
        assert rejected.process.attention == "GIFT_REFUSED"
        assert not (await service.get(1)).HasField("acknowledgement")
        assert ids((await service.find(attention=True)).processes) == [uid(1)]
        again = service.stub.RejectAcknowledgement(reject, metadata=service.of(user="otto"), timeout=10)
        assert (await refused(again)).reason == "NOT_ASKED"
        ask.resolution = "handed over"
        await service.stub.AskAcknowledgement(ask, metadata=service.of(user="otto"), timeout=10)
        confirm = ConfirmAcknowledgementRequest(**name(1))
        with capture_logs() as logs:
            done = await service.stub.ConfirmAcknowledgement(confirm, metadata=service.of(), timeout=10)
        [line] = [line for line in logs if line["event"] == "acknowledgement_confirmed"]
        assert (line["user_id"], line["process_tenant"], line["process_id"]) == ("olga", "acme", uid(1))
        assert done.process.attention == ""
        assert ids((await service.find(acknowledged=True)).processes) == [uid(1)]
        assert ids((await service.find(attention=True)).processes) == []
        told = [(it.name, it.id, it.note) for it in (await service.get(1)).history if it.kind == "operator"]
        assert told == [
            ("ask", "olga", "GIFT_REFUSED: sent by post"),
            ("reject", "otto", "it came back"),
            ("ask", "otto", "GIFT_REFUSED: handed over"),
            ("confirm", "olga", "GIFT_REFUSED: handed over"),
        ]


@pytest.mark.parametrize("due", [True, False], ids=["with due work", "with nothing due"])
async def test_a_leader_that_hangs_is_seen(saga_db: Database, tmp_path: Path, due: bool) -> None:
    """With due work it is STUCK, for ListRunners, for readiness and for `foldline status`, which ends with 1.

    With nothing due the saga database knows of no work: the distance to the head of the line tells it, and since when it stands.
    """
    async with serving(saga_db, tmp_path) as service:
        service.world.write.decide = lambda command: Unavailable("AWAY", "away") if due else None
        service.world.open(1)
        async with service.world.running():
            await moved(service, 1, "running" if due else "ended")
        async with hold_lease(saga_db.app, LockClass.SAGA, 1):
            service.world.clock.ahead = 10 * STUCK_AFTER
            [runner] = (await service.stub.ListRunners(ListRunnersRequest(), metadata=service.of(), timeout=10)).runners
            stuck = runner.state == process_pb2.RUNNER_STATE_STUCK
            assert (stuck, runner.HasField("due_since")) == (due, due)
            failures = {"processes": "processes: stuck"} if due else {}
            await eventually(lambda: service.server.probes.readiness.failures == failures, 10)
        state = process_pb2.RunnerState.Name(runner.state)
        told = {"name": runner.name, "position": runner.position, "state": state, "reason": "", "epoch": runner.epoch}
        moved_at = runner.moved_at.ToJsonString()
        line = {"head_position": 8, "epoch": runner.epoch}
        consumer = placed({**told, "moved_at": moved_at}, line)
        *_, shown, reason = consumer_row("processes", consumer)
        assert (shown, reason) == (state.rpartition("_")[2], "")
        old = placed({**told, "moved_at": "2026-01-02T03:04:05Z"}, line)
        assert consumer_row("processes", old)[-1] == ("" if due else "stands still since 2026-01-02T03:04:05Z")
        found = {"services": [], "line": line, "projections": [], "runners": [consumer]}
        assert exit_code(found) == (1 if due else 0)
