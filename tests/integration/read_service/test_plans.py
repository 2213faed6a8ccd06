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
from read_service.registry import GROUPS, RPCS
from read_service.statement import FILTERS, READ_MAX, Place, statement_query
from read_service.totals import TOTALS
from shared.folds.errors import Invalid
from shared.folds.moments import timestamp
from shared.folds.projection import Projection, Purge
from shared.platform.postgres import SETTINGS
from shared.projections.rows import Rows
from shared.projections.summary import SummaryServicer
from shared.projections.summary_rpcs import SummaryRpcs
from shared.projections.watched_list import ROWS_MAX
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
INSERT INTO transfers SELECT 'acme', gen_random_uuid(),
  CASE WHEN n % 2 = 0 THEN 'busy' WHEN n % 20 = 3 THEN 'large' ELSE 'a' || n % 1000 END,
  CASE WHEN n % 20 = 6 THEN 'large' ELSE 'b' || n % 1000 END, n, 'USD',
  CASE n % 1000 WHEN 7 THEN 'failed' WHEN 8 THEN 'started' ELSE 'completed' END, '', 0, {now} - n * interval '1 s'
  FROM generate_series(1, {rows}) n;
INSERT INTO users SELECT 'acme', gen_random_uuid(), 'l' || n, 'e', CASE WHEN n % 1000 = 7 THEN 'failed' ELSE 'succeeded' END, '',
  {now} - n * interval '1 s', NULL, 'user', CASE WHEN n % 1000 = 8 THEN {now} END FROM generate_series(1, {rows}) n;
INSERT INTO movements SELECT 'acme', 'busy', n * 2, (n * 7919) % 100003 - 50000, 0, {now} + n * interval '1 s', '', ''
  FROM generate_series(1, {rows}) n;
ANALYZE people, accounts, transfers, users, movements;
"""
WATCHED_BLOCKS_MAX = 6000
"""For the 1001 rows that are read of a watched list."""
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


def asked(rpcs: SummaryRpcs[Any]) -> Iterator[tuple[dict[str, Any], Any, str]]:
    """No filter, each value of a filter, and each two of two filters: the filters, their conditions and how it is called."""
    summary = rpcs.summary
    single = [(name, value) for name in summary.filters for value in VALUES[summary.name, name]]
    pairs = (pair for pair in itertools.combinations(single, 2) if pair[0][0] != pair[1][0])
    for filters in [(), *((each,) for each in single), *pairs]:
        told = " ".join(f"{name}={value}".replace("\n", " ") for name, value in filters)
        found = {name: of(dict(filters).get(name)) if name in dict(filters) else [] for name, of in summary.filters.items()}
        yield dict(filters), found, f"{summary.name} {told}"


def cases() -> Iterator[Any]:
    """Each order of each summary that goes with the filters."""
    for rpcs in RPCS:
        for order, direction, (_, found, told) in itertools.product(rpcs.summary.orders, ("", " desc"), asked(rpcs)):
            try:
                servicer(rpcs)._order(order, found)
            except Invalid:
                continue
            yield pytest.param(rpcs, order + direction, found, id=f"{told} by {order}{direction}")


def servicer(rpcs: SummaryRpcs[Any]) -> SummaryServicer[Any]:
    """One that only makes queries."""
    return SummaryServicer(rpcs, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rpcs", "order", "found"), list(cases()))
def test_a_page_is_read_from_an_index_in_order(filled: Database, rpcs: SummaryRpcs[Any], order: str, found: Any) -> None:
    """No sort of more than a page, and few blocks, under the query role's policies and with the plan of any value."""
    plan = planned(filled, *servicer(rpcs).page_query(order, found, None, PAGE))
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < BLOCKS_MAX, json.dumps(plan, indent=1)
    assert all(node["Actual Rows"] <= 2 * PAGE for node in nodes(plan) if "Sort" in node["Node Type"])


def watched_cases() -> Iterator[Any]:
    """The lists that can be watched."""
    for rpcs in RPCS:
        for _, found, told in asked(rpcs):
            try:
                order = servicer(rpcs)._order("", found)
            except Invalid:
                continue
            yield pytest.param(rpcs, order, found, id=told)


@pytest.mark.parametrize(("rpcs", "order", "found"), list(watched_cases()))
def test_a_watched_list_is_read_from_an_index(filled: Database, rpcs: SummaryRpcs[Any], order: str, found: Any) -> None:
    """As a page of as many rows as a watched list may have."""
    plan = planned(filled, *servicer(rpcs).listed_query([it for each in found.values() for it in each], order, ROWS_MAX + 1))
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < WATCHED_BLOCKS_MAX, json.dumps(plan, indent=1)


def test_totals_read_indexes_and_so_many_of_their_entries(filled: Database) -> None:
    """No table as a whole, and of no index more than are counted."""
    with psycopg.connect(filled.owner, autocommit=True) as owner:
        owner.execute("VACUUM people, accounts, transfers")
    plan = planned(filled, TOTALS, {"limit": 2000})
    scans = [node for node in nodes(plan) if node.get("Relation Name") in ("people", "accounts", "transfers")]
    assert {node["Node Type"] for node in scans} == {"Index Only Scan"}
    assert max(node["Actual Rows"] for node in scans) == 2000
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < BLOCKS_MAX, json.dumps(plan, indent=1)


LATER = TimeRange(since=timestamp(NOW + timedelta(seconds=60)))
BRIEFLY = TimeRange(since=timestamp(NOW + timedelta(seconds=9000)), before=timestamp(NOW + timedelta(seconds=9009)))
STATEMENTS: list[dict[str, Any]] = [
    dict(pair)
    for pair in itertools.product(
        [("moved_at", it) for it in (None, LATER, LONG, BRIEFLY)],
        [("amount_minor", it) for it in (None, WholeRange(max=10**9), WholeRange(min=77, max=79))],
    )
]


@pytest.mark.parametrize("oldest_first", [False, True])
@pytest.mark.parametrize("asked", STATEMENTS, ids=lambda asked: " ".join(f"{asked}".split()))
def test_a_page_of_a_statement_costs_the_same_at_any_size(filled: Database, asked: dict[str, Any], oldest_first: bool) -> None:
    """It reads rows by version, which a range of moments is turned into; for a range of amounts a thousand at most."""
    found = {name: of(asked[name]) if asked[name] else [] for name, of in FILTERS.items()}
    plan = planned(filled, *statement_query("busy", found, Place(0, 0), PAGE, oldest_first=oldest_first))
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < BLOCKS_MAX, json.dumps(plan, indent=1)
    read = [node["Actual Rows"] for node in nodes(plan) if node.get("Relation Name") == "movements"]
    assert read
    assert max(read) <= (READ_MAX if asked["amount_minor"] else PAGE)


FOLDED = [
    pytest.param(projection, purge, id=f"{projection.table.name} by {purge.column}")
    for group in GROUPS
    for projection in group.projections
    for purge in projection.purges
    if purge.fold is not None
]


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(("projection", "purge"), FOLDED)
def test_rows_of_a_purged_aggregate_are_read_from_an_index_in_order(
    filled: Database, projection: Projection[Any], purge: Purge[Any], behind: bool
) -> None:
    """So many of an aggregate's rows as the projector changes in one transaction, however many it has."""
    sql = Rows(projection).page_with(purge.column, purge.order, behind=behind)
    after = (NOW - timedelta(seconds=ROWS // 2), "") if behind else ()
    with psycopg.connect(filled.app) as connection:
        for name, value in SETTINGS.items():
            connection.execute("SELECT set_config(%s, %s, true)", (name, value))
        values = ("acme", "large", *after, PAGE)
        [(found,)] = connection.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}", values).fetchall()
    plan = found[0]["Plan"]
    assert plan["Actual Rows"] == PAGE
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < BLOCKS_MAX, json.dumps(plan, indent=1)
    assert not any("Sort" in node["Node Type"] for node in nodes(plan))


def planned(database: Database, sql: str, values: dict[str, Any]) -> dict[str, Any]:
    """The plan of a query that has run as the query service runs it."""
    assert database.query
    with psycopg.connect(database.query) as connection:
        for name, value in SETTINGS.items():
            connection.execute("SELECT set_config(%s, %s, true)", (name, value))
        connection.execute("SELECT set_config('app.tenant', 'acme', true)")
        values = {"tenant": "acme", **values}
        names = {name: f"${nth}" for nth, name in enumerate(values, 1)}
        connection.execute(f"PREPARE page AS {sql % names}")
        literals = psycopg.sql.SQL(", ").join(map(psycopg.sql.Literal, values.values()))
        query = psycopg.sql.SQL("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE page ({})").format(literals)
        [(found,)] = connection.execute(query).fetchall()
    plan: dict[str, Any] = (json.loads(found) if isinstance(found, str) else found)[0]["Plan"]
    return plan


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A plan's nodes."""
    yield plan
    for part in plan.get("Plans", ()):
        yield from nodes(part)
