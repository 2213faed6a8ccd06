"""Dashboards and alert rules ask for what the processes really emit: every metric, and every label."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import psycopg
import pytest
import yaml

from deploy.local.system import PROJECTOR, READ, RELAY, SAGA, WRITE
from shared.commands.observer import CommitObserver
from shared.platform.certificate_ends import watch_certificates
from shared.platform.metrics import Metrics
from shared.platform.probe import DatabaseProbe
from shared.platform.settings import ProcessSettings
from tests.e2e.test_probes import page
from tests.support.clients.bank import Bank, channels
from tests.support.system.authority import Authority
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

ROOT = Path(__file__).parents[2]
OBSERVE = ROOT / "deploy/observe"
RULES = [rule for group in yaml.safe_load((OBSERVE / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
PANELS = json.loads((OBSERVE / "dashboard.json").read_text())["panels"]
QUERIES = [rule["expr"] for rule in RULES] + [target["expr"] for panel in PANELS for target in panel["targets"]]
# What Prometheus adds itself.
ADDED = {"job", "instance"}
PARKED_KEY = """
INSERT INTO parked_keys (parked_id, consumer, shard, serves, tenant, table_name, key, row_id, error)
VALUES (gen_random_uuid(), 'accounts', 1, true, 'acme', 'accounts', 'x', 'x', 'ValueError')
"""
SERIES = re.compile(r"^(\w+)(?:\{(.*)\})? ")


def emitted(text: str) -> Iterator[tuple[str, set[str]]]:
    """The metrics of a page, each series with its labels."""
    for line in text.splitlines():
        if found := SERIES.match(line):
            yield found[1], set(re.findall(r'(\w+)="', found[2] or ""))


def asked(expression: Any) -> Iterator[tuple[str, set[str]]]:
    """The metrics that a query asks for, each with the labels that it matches or groups by."""
    match expression:
        case promql.VectorSelector():
            yield expression.name or "", {matcher.name for matcher in expression.matchers.matchers}
        case promql.MatrixSelector():
            yield from asked(expression.vector_selector)
        case promql.Call():
            for argument in expression.args:
                yield from asked(argument)
        case promql.BinaryExpr():
            yield from asked(expression.lhs)
            yield from asked(expression.rhs)
        case promql.AggregateExpr():
            grouped = set(expression.modifier.labels) if expression.modifier else set()
            for name, labels in asked(expression.expr):
                yield name, labels | grouped
        case promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            yield from asked(expression.expr)
        case promql.NumberLiteral() | promql.StringLiteral():
            return
        case _:
            raise AssertionError(f"this kind of expression is not looked into: {type(expression).__name__}")


async def of_certificates(folder: Path) -> str:
    """The page of a process with a certificate, which those of the stack do not have."""
    files = Authority(folder).issue()
    metrics = Metrics("test")
    watch_certificates(metrics, ProcessSettings(tls_cert_file=files.cert, tls_key_file=files.key))
    return (await metrics.render())[1].decode()


async def of_tenants() -> str:
    """The page of a write service that is told which tenants metrics tell apart, which that of the stack is not."""
    metrics = Metrics("test")
    CommitObserver().register(metrics, ["acme"], DatabaseProbe("", application_name="test"), lambda _: 0)
    return (await metrics.render())[1].decode()


async def test_every_query_asks_for_what_is_there(stack: Stack, tmp_path: Path) -> None:
    """After a command that is refused, an ended and a parked process, metrics of all processes have all that is asked for."""
    elsewhere = await of_certificates(tmp_path) + await of_tenants()
    async with channels(stack) as (write, read):
        bank = Bank(write, read, stack.token())
        person_id, _ = await bank.register("Ada")
        source, _ = await bank.open(person_id)
        target, _ = await bank.open(person_id)
        await bank.deposit(source, 10)
        await bank.ended_transfer(await bank.transfer(source, target, 4))
    with psycopg.connect(stack.databases.saga.owner) as saga:
        saga.execute("UPDATE processes SET status = 'parked', attention = 'MONEY_IN_SUSPENSE'")
    with psycopg.connect(stack.databases.read.owner) as tables:
        tables.execute(PARKED_KEY)

    async def all_there() -> bool:
        found = defaultdict[str, set[str]](set)
        for metric, labels in emitted(elsewhere):
            found[metric] |= labels
        for name in (WRITE, RELAY, READ, PROJECTOR, SAGA):
            _, body = await page(stack.programs[name].admin_port, "/metrics")
            for metric, labels in emitted(body.decode()):
                found[metric] |= labels
        wanted = [one for query in QUERIES for one in asked(promql.parse(query)) if one[0] != "up"]
        missing = {f"{name} {sorted(labels)}" for name, labels in wanted if name not in found or labels - found[name] - ADDED}
        assert not missing, sorted(missing)
        return len(wanted) > 30

    await eventually(all_there, 40, every_s=0.5)


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


def test_a_query_for_what_is_not_there_is_seen() -> None:
    """The metric's name and its labels are found wherever they stand in a query."""
    query = 'sum by (a) (rate(x_total{b="1"}[1m])) / scalar(max(y)) or absent(z)'
    assert sorted(asked(promql.parse(query))) == [("x_total", {"a", "b"}), ("y", set()), ("z", set())]
    assert dict(emitted('# TYPE x counter\nx{a="1",b="2"} 3\ny 4\n')) == {"x": {"a", "b"}, "y": set()}
