"""Each query of the dashboard and of the alert rules, evaluated over what the processes of a system really say."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from deploy.local.system import PROJECTOR, RELAY
from shared.commands.observer import CommitObserver
from shared.platform.certificate_ends import watch_certificates
from shared.platform.metrics import Metrics
from shared.platform.probe import DatabaseProbe
from shared.platform.settings import ProcessSettings
from tests.containers.alert_cases import PANELS, ROOT, RULES
from tests.support.clients.bank import Bank, channels, tried
from tests.support.system.authority import Authority
from tests.support.system.scrapes import Scrapes
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

SHOWN = {target["expr"] for panel in PANELS for target in panel["targets"]}
ALERTS: dict[str, str] = {rule["alert"]: rule["expr"] for rule in RULES}
# Not asked of a healthy system, which may give something: the machine of a test is busy.
MAY_FIRE = {"FoldlineLoopBlocked"}
# Not made to fire here: each takes a fault of a minute or more, or a defect of ours. `tests/unit/test_observe.py` does it with
# made-up numbers.
TAKES_LONG = {"FoldlineProcessesStuck", "FoldlineSchedulesLate", "FoldlineCommitsFail", "FoldlineLoopBlocked", "FoldlineDefects"}
BROKEN = {
    "saga": """
        UPDATE processes SET status = 'parked', attention = 'MONEY_IN_SUSPENSE';
        INSERT INTO deliveries (delivery_id, tenant, name, channel, recipient, order_key, content, source, correlation_id,
                                traceparent, status, last_error, created_at, due_at)
        SELECT gen_random_uuid(), 'acme', 'x', 'email', 'x', status, '{}', '', '', '', status, '',
               now() - interval '1 hour', now() + interval '1 hour'
        FROM unnest(ARRAY['pending', 'dead']) AS status""",
    "read": """
        INSERT INTO parked_keys (parked_id, consumer, shard, serves, tenant, table_name, key, row_id, error)
        VALUES (gen_random_uuid(), 'accounts', 1, true, 'acme', 'accounts', 'x', 'x', 'ValueError')""",
}


async def of_certificates(folder: Path) -> str:
    """The page of a process with a certificate that ends in half a day; those of the stack have none."""
    files = Authority(folder).issue(begins_in=timedelta(days=-1.5))
    metrics = Metrics("test")
    watch_certificates(metrics, ProcessSettings(tls_cert_file=files.cert, tls_key_file=files.key))
    return (await metrics.render())[1].decode()


async def of_tenants() -> str:
    """The page of a write service that is told which tenants metrics tell apart, which that of the stack is not."""
    metrics = Metrics("test")
    CommitObserver().register(metrics, ["acme"], DatabaseProbe("", application_name="test"), lambda _: 0)
    return (await metrics.render())[1].decode()


@pytest.fixture
async def bank(stack: Stack) -> AsyncIterator[Bank]:
    """A caller of the system."""
    async with channels(stack) as (write, read):
        yield Bank(write, read, stack.token())


async def used(bank: Bank) -> str:
    """A transfer from end to end, a command that is refused, and a hit of the cache; returns an account."""
    person_id, _ = await bank.register("Ada")
    source, _ = await bank.open(person_id)
    target, _ = await bank.open(person_id)
    await bank.deposit(source, 10)
    assert await tried(bank.withdraw(source, 1000)) == "INSUFFICIENT_FUNDS"
    await bank.ended_transfer(await bank.transfer(source, target, 4))
    return source


def told(scrapes: Scrapes, query: str) -> list[float]:
    """What a query gives by the last scrape, but for what is not a number."""
    return [value for value in scrapes.store.vector(query, scrapes.at_s).values() if not math.isnan(value)]


async def test_each_query_is_answered_by_what_is_really_there(stack: Stack, bank: Bank, tmp_path: Path) -> None:
    """Each panel shows something of a healthy system, on which no alert would fire; then each fires that is broken on purpose."""
    scrapes = Scrapes(stack)

    async def all_shown() -> bool:
        await used(bank)
        await scrapes.take({"tenants": await of_tenants(), "certificates": await of_certificates(tmp_path / str(scrapes.at_s))})
        assert [query for query in SHOWN if not told(scrapes, query)] == []
        return True

    await eventually(all_shown, 60, every_s=0.5)

    async def healthy() -> bool:
        await scrapes.take({"certificates": ""})
        assert {name for name, query in ALERTS.items() if told(scrapes, query)} - MAY_FIRE == set()
        return True

    await eventually(healthy, 60, every_s=0.5)

    account_id = await used(bank)
    await stack.stop(PROJECTOR)
    await stack.stop(RELAY)
    await bank.deposit(account_id, 1)
    for database, statements in BROKEN.items():
        with psycopg.connect(getattr(stack.databases, database).owner) as connection:
            connection.execute(statements)

    async def all_fire() -> bool:
        refused = [bank.account("x" * 2**21) for _ in range(20)]
        assert {*await asyncio.gather(*map(tried, refused))} == {"MESSAGE_TOO_LARGE"}
        # Prometheus sees the consumers stand where they are for a while.
        await scrapes.take({"certificates": await of_certificates(tmp_path / str(scrapes.at_s))}, later_s=400)
        assert {name for name, query in ALERTS.items() if not told(scrapes, query)} - TAKES_LONG == set()
        return True

    await eventually(all_fire, 60, every_s=0.5)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_says_what_to_do(rule: dict[str, Any]) -> None:
    """A severity, one sentence, and a part of the runbook that is its own."""
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"]["summary"]
    file, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert anchor == rule["alert"].lower()
    assert rule["alert"] in re.findall(r"^## (.+)$", (ROOT / file).read_text(), re.MULTILINE)


def test_the_runbook_has_no_alert_that_is_not_there() -> None:
    """Nobody looks for one that was renamed."""
    headings = re.findall(r"^## (Foldline.+)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE)
    assert headings == [rule["alert"] for rule in RULES]
