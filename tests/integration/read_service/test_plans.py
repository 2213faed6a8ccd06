"""Every list, in every order and with every filter that it offers, reads an index in order: a page costs the same at any size."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from deploy.bootstrap import Database
from foldline.v1.range_pb2 import TimeRange, WholeRange
from read_service.registry import RPCS
from shared.folds.moments import timestamp
from shared.platform.postgres import SETTINGS
from shared.projections.summary import SummaryServicer
from shared.projections.summary_rpcs import SummaryRpcs
from tests.support.system.engines import Engines

ROWS = int(os.environ.get("FOLDLINE_TEST_ROWS", "60000"))
PAGE = 51
BLOCKS_MAX = 600
"""Of 8 KiB, for a page of 50: each row of a page may be on a block of its own, and an index has a few levels."""

FILL = """
INSERT INTO people SELECT 'acme', gen_random_uuid(), 'n' || n, 'n' || n, {now} - n * interval '1 s', 1, 1,
  CASE WHEN n % 1000 = 7 THEN 'closed' ELSE 'active' END, NULL FROM generate_series(1, {rows}) n;
INSERT INTO accounts SELECT 'acme', gen_random_uuid(), 'owner-' || n % ({rows} / 20), 'a',
  CASE WHEN n % 1000 = 8 THEN 'EUR' ELSE 'USD' END,
  (n * 7919) % 100003, CASE n % 1000 WHEN 7 THEN 'frozen' WHEN 9 THEN 'closed' ELSE 'active' END, {now} - n * interval '1 s', 1
  FROM generate_series(1, {rows}) n;
INSERT INTO transfers SELECT 'acme', gen_random_uuid(), CASE WHEN n % 2 = 0 THEN 'busy' ELSE 'a' || n % 1000 END,
  'b' || n % 1000, n, 'USD',
  CASE n % 1000 WHEN 7 THEN 'failed' WHEN 8 THEN 'started' ELSE 'completed' END, '', 0, {now} - n * interval '1 s'
  FROM generate_series(1, {rows}) n;
INSERT INTO users SELECT 'acme', gen_random_uuid(), 'l' || n, 'e', CASE WHEN n % 1000 = 7 THEN 'failed' ELSE 'succeeded' END, '',
  {now} - n * interval '1 s', NULL, 'user', CASE WHEN n % 1000 = 8 THEN {now} END FROM generate_series(1, {rows}) n;
ANALYZE people, accounts, transfers, users;
"""
NOW = datetime(2026, 1, 2, tzinfo=UTC)
LONG = TimeRange(before=timestamp(NOW - timedelta(seconds=60)))
SHORT = TimeRange(since=timestamp(NOW - timedelta(seconds=9000)), before=timestamp(NOW - timedelta(seconds=8990)))
# Values of the filters: one that most rows have, and one that few have.
VALUES: dict[tuple[str, str], list[Any]] = {
    ("account", "owner_id"): ["owner-5"],
    ("account", "status"): [1, 2],
    ("account", "currency"): ["USD", "EUR"],
    ("person", "name_prefix"): ["n", "n77"],
    ("person", "status"): [1, 2],
    ("transfer", "account_id"): ["busy", "a1"],
    ("transfer", "status"): [1, 2, 3],
    ("user", "status"): [2, 3],
    ("user", "deactivated"): [True],
    ("account", "balance_minor"): [WholeRange(min=100), WholeRange(min=77, max=78)],
    ("account", "opened_at"): [LONG, SHORT],
    ("person", "registered_at"): [LONG, SHORT],
    ("transfer", "amount_minor"): [WholeRange(max=10**9), WholeRange(min=77, max=78)],
    ("transfer", "started_at"): [LONG, SHORT],
    ("user", "started_at"): [LONG, SHORT],
}


@pytest.fixture(scope="module")
def filled(engines: Engines) -> Iterator[Database]:
    """A tenant with many rows in each table."""
    database = engines.clone("read")
    with psycopg.connect(database.app, autocommit=True) as app:
        app.execute("SET transaction_timeout = 0")
        app.execute(FILL.format(rows=ROWS, now=f"timestamptz '{NOW}'"))
    with psycopg.connect(database.owner, autocommit=True) as owner:
        owner.execute("ANALYZE")
    yield database
    engines.drop(database)


def cases() -> Iterator[Any]:
    """Each summary, order and filter value, alone."""
    for rpcs in RPCS:
        summary = rpcs.summary
        asked = [(), *(((name, value),) for name in summary.filters for value in VALUES[summary.name, name])]
        for order, direction, filters in itertools.product(summary.orders, ("", " desc"), asked):
            if any(order not in summary.only_in.get(name, [order]) for name, _ in filters):
                continue
            told = " ".join(f"{name}={value}".replace("\n", " ") for name, value in filters)
            yield pytest.param(rpcs, order + direction, dict(filters), id=f"{summary.name} by {order}{direction} {told}")


@pytest.mark.parametrize(("rpcs", "order", "filters"), list(cases()))
def test_a_page_is_read_from_an_index_in_order(
    filled: Database, rpcs: SummaryRpcs[Any], order: str, filters: dict[str, Any]
) -> None:
    """No sort of more than a page, and few blocks, under the query role's policies and with the plan of any value."""
    servicer: SummaryServicer[Any] = SummaryServicer(rpcs, None, None)  # type: ignore[arg-type]
    found = {name: rpcs.summary.filters[name](value) for name, value in filters.items()}
    sql, values = servicer.page_query(order, found, None, PAGE)
    assert filled.query
    with psycopg.connect(filled.query) as connection:
        for name, value in SETTINGS.items():
            connection.execute("SELECT set_config(%s, %s, true)", (name, value))
        connection.execute("SELECT set_config('app.tenant', 'acme', true)")
        values = {"tenant": "acme", **values}
        names = {name: f"${nth}" for nth, name in enumerate(values, 1)}
        connection.execute(f"PREPARE page AS {sql % names}")
        literals = psycopg.sql.SQL(", ").join(map(psycopg.sql.Literal, values.values()))
        query = psycopg.sql.SQL("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE page ({})").format(literals)
        [(found,)] = connection.execute(query).fetchall()
    plan = (json.loads(found) if isinstance(found, str) else found)[0]["Plan"]
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < BLOCKS_MAX, json.dumps(plan, indent=1)
    assert all(node["Actual Rows"] <= 2 * PAGE for node in nodes(plan) if "Sort" in node["Node Type"])


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A plan's nodes."""
    yield plan
    for part in plan.get("Plans", ()):
        yield from nodes(part)
