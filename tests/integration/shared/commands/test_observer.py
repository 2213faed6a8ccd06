"""What a committer tells in metrics is what it did: values, not only names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest
from msgspec.structs import replace

from deploy.bootstrap import Database
from shared.commands.committer import Committer
from shared.commands.decide import Command
from shared.platform import metrics as module
from shared.platform.instruments import Number
from shared.platform.metrics import Metrics
from tests.support.domains.trial import Add, build_registry
from tests.support.fakes.replica import make_command, replica
from tests.support.logs import capture_logs
from tests.support.system.gauges import asking, page
from tests.support.system.waiting import eventually

BUS = build_registry()
ADD = "trial.Add"


def adding(amount: int, counter_id: str = "a", *, tenant: str = "acme", waited_s: float = 0) -> Command:
    """A command that came so long ago."""
    made = make_command(BUS, Add(counter_id=counter_id, amount=amount), tenant=tenant)
    return replace(made, received_at=datetime.now(UTC) - timedelta(seconds=waited_s))


@asynccontextmanager
async def told(committer: Committer, database: Database, tenants: tuple[str, ...] = ()) -> AsyncIterator[Metrics]:
    """The metrics of a committer, refreshed all the while."""
    async with asking(database.app) as (metrics, probe):
        committer.observer.register(metrics, tenants, probe, committer.waiting)
        yield metrics


async def test_commands_batches_waits_and_the_cache_are_counted(write_db: Database) -> None:
    """A batch of four and a lone refusal: by type and outcome, by size, by how long they waited and by what was in memory."""
    committer = Committer(write_db.app, BUS, shard=1, clock=lambda: datetime.now(UTC))
    async with told(committer, write_db, ("acme",)) as metrics:
        replies = committer.submit([[adding(1, waited_s=3)], [adding(1)], [adding(2, "b")], [adding(1, tenant="umbrella")]])
        assert (await page(metrics))['foldline_tenant_commands_waiting{tenant="acme"}'] == 3
        running = asyncio.create_task(committer.run())
        await replies
        await committer.submit([[adding(-9)]])
        found = await page(metrics)
        committer.close()
        await running
    assert found[f'foldline_commands_total{{outcome="completed",type="{ADD}"}}'] == 4
    assert found[f'foldline_commands_total{{outcome="rejected",type="{ADD}"}}'] == 1
    assert found['foldline_tenant_commands_total{outcome="completed",tenant="acme"}'] == 3
    assert found['foldline_tenant_commands_total{outcome="rejected",tenant="acme"}'] == 1
    assert not [name for name in found if "umbrella" in name]
    assert found['foldline_tenant_commands_waiting{tenant="acme"}'] == 0
    assert found["foldline_commit_batch_size_count"] == found["foldline_commit_duration_seconds_count"] == 2
    assert found["foldline_commit_batch_size_sum"] == 5
    assert found['foldline_commit_batch_size_bucket{le="1"}'] == 1
    assert found['foldline_command_queue_wait_seconds_bucket{le="2.5"}'] == 1
    assert 3 <= found["foldline_command_queue_wait_seconds_sum"] < 60
    # Three aggregates were loaded; the one of the refusal was there by then.
    assert found['foldline_cache_lookups_total{result="miss"}'] == 3
    assert found['foldline_cache_lookups_total{result="hit"}'] == 1
    assert found["foldline_events_appended_total"] == 4


async def test_the_head_is_the_lines_and_not_only_of_ones_own_commits(
    write_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a start, and when another appends: what lags is measured against it. Until it is known there is none."""
    monkeypatch.setattr(module, "WATCH_S", 0.3)
    idle = Committer(write_db.app, BUS, shard=1, clock=lambda: datetime.now(UTC))
    async with replica(write_db, BUS) as other:
        await other.ask(*[adding(1) for _ in range(3)])
        async with told(idle, write_db) as metrics:
            [head] = [it for it in metrics.every() if isinstance(it, Number) and it.name == "foldline.head"]
            assert not head.read()  # nothing has been waited for, so nothing has been asked

            async def is_at(position: int) -> bool:
                return (await page(metrics)).get("foldline_head") == position

            await eventually(lambda: is_at(3), 20)
            await other.ask(adding(1))
            await eventually(lambda: is_at(4), 20)
            idle.observer.head = 9  # of a line that a restore has taken back
            await eventually(lambda: is_at(4), 20)


async def test_each_command_of_a_batch_is_a_line_at_debug(write_db: Database) -> None:
    """With its outcome and its place in the trace, and without its content."""
    traceparent = f"00-{'a' * 32}-{'b' * 16}-00"
    commands = [make_command(BUS, Add(counter_id="a", amount=amount), traceparent=traceparent) for amount in (3, -9)]
    with capture_logs() as lines:
        async with replica(write_db, BUS) as one:
            await one.ask(*commands)
    told = [{key: value for key, value in line.items() if key != "module"} for line in lines if line["event"] == "command"]
    common = {
        "event": "command",
        "log_level": "debug",
        "tenant": "acme",
        "type": ADD,
        "trace_id": "a" * 32,
        "span_id": "b" * 16,
        "version": 1,
    }
    accepted, refused = (command.key[1] for command in commands)
    assert told == [
        {**common, "command_id": accepted, "outcome": "completed", "reason": "", "events": 1},
        {**common, "command_id": refused, "outcome": "rejected", "reason": "BELOW_ZERO", "events": 0},
    ]
