"""docs/observability.md has each metric that a process emits, as it is, and none that no process emits."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from deploy.local.system import PROJECTOR, READ, RELAY, SAGA, WRITE
from tests.e2e.test_dashboards import of_certificates, of_tenants
from tests.support.system.scrapes import PROCESSES, page_of
from tests.support.system.stack import Stack

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "observability.md").read_text()
ROW = re.compile(r"^\| `(\w+)` \| (gauge|counter|histogram) \| (.*?)\|(.+?)\|.+\|$", re.MULTILINE)
BY = {
    "every process": set(PROCESSES),
    "write, read and saga service": {WRITE, READ, SAGA},
    "write service": {WRITE},
    "the relay that leads": {RELAY},
    "the projector and the saga service that lead": {PROJECTOR, SAGA},
    "read and saga service": {READ, SAGA},
    "read service": {READ},
    "saga service": {SAGA},
}
DATABASES = {"foldline_write", "foldline_read", "foldline_saga"}


@dataclass
class Described:
    """A metric: its kind, who has it, and the labels of its series, if there are any."""

    kind: str
    by: set[str] = field(default_factory=set)
    labels: set[str] = field(default_factory=set)


def documented() -> dict[str, Described]:
    """By name, what the page says."""
    return {
        name: Described(kind, BY[by.strip()], set(re.findall(r"`([a-z_]+)`", labels)))
        for name, kind, labels, by in ROW.findall(PAGE)
    }


async def emitted(stack: Stack, folder: Path) -> dict[str, Described]:
    """By name, what the processes say: of a metric without series, too.

    Those of the stack have no certificates, and are not told which tenants to tell apart: what one says of that is added.
    """
    found: dict[str, Described] = {}
    pages = {name: await page_of(stack.programs[name].admin_port, "/metrics") for name in PROCESSES}
    for by, page in [*pages.items(), ("", await of_certificates(folder)), ("", await of_tenants())]:
        for family in text_string_to_metric_families(page):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            metric = found.setdefault(name, Described(family.type))
            metric.by |= {by} - {""}
            metric.labels |= {label for sample in family.samples for label in sample.labels} - {"le"}
    return found


async def test_each_metric_is_described_and_each_described_one_is_there(shared_stack: Stack, tmp_path: Path) -> None:
    """With its kind, its labels, and the processes that have it."""
    described, there = documented(), await emitted(shared_stack, tmp_path)
    assert set(described) == set(there)
    differ = defaultdict[str, list[object]](list)
    for name, metric in there.items():
        told = described[name]
        if (told.kind, told.by) != (metric.kind, metric.by) or (metric.labels and told.labels != metric.labels):
            differ[name] += [told, metric]
    assert differ == {}


def test_no_page_names_a_metric_that_is_not_described() -> None:
    """Nor a label: the runbook and the other pages as well."""
    described = documented()
    known = {*described, *DATABASES}.union(*(metric.labels for metric in described.values()))
    for file in sorted(DOCS.glob("*.md")):
        named = set(re.findall(r"\bfoldline_[a-z_]*[a-z]", file.read_text()))
        assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in named} <= known, file.name
