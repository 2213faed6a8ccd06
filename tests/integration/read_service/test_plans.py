"""Every list, in every order and with every filter that it offers, reads an index in order: a page costs the same at any size."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple
from uuid import UUID

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
from shared.projections.summary_rpcs import SummaryRpcs, orders_of
from shared.projections.watched_list import ROWS_MAX
from tests.support.system.engines import Engines

ROWS, MANY_ROWS = 60_000, 1_000_000
PAGE = 51
BLOCKS_MAX = 600
"""Of 8 KiB, for a page of 50: each row of a page may be on a block of its own, and an index has a few levels."""

FILL = """
INSERT INTO people SELECT 'acme', gen_random_uuid(), 'n' || n, 'n' || n, {now} - n * interval '1 s', 1, 1,
  CASE WHEN n % 1000 = 7 THEN 'closed' ELSE 'active' END, NULL FROM generate_series(1, {rows}) n;
INSERT INTO accounts SELECT 'acme', gen_random_uuid(), 'owner-' || n % ({rows} / 20), 'a',
  CASE WHEN n % 1000 = 8 THEN 'EUR' ELSE 'USD' END,
  (n::bigint * 7919) % 100003, CASE n % 1000 WHEN 7 THEN 'frozen' WHEN 9 THEN 'closed' ELSE 'active' END,
  {now} - n * interval '1 s', 1 FROM generate_series(1, {rows}) n;
INSERT INTO transfers SELECT 'acme', gen_random_uuid(),
  CASE WHEN n % 2 = 0 THEN 'busy' WHEN n % 20 = 3 THEN 'large' ELSE 'a' || n % 1000 END,
  CASE WHEN n % 20 = 6 THEN 'large' ELSE 'b' || n % 1000 END, n, 'USD',
  CASE n % 1000 WHEN 7 THEN 'failed' WHEN 8 THEN 'started' ELSE 'completed' END, '', 0, {now} - n * interval '1 s'
  FROM generate_series(1, {rows}) n;
INSERT INTO users SELECT 'acme', gen_random_uuid(), 'l' || n, 'e', CASE WHEN n % 1000 = 7 THEN 'failed' ELSE 'succeeded' END, '',
  {now} - n * interval '1 s', NULL, 'user', CASE WHEN n % 1000 = 8 THEN {now} END FROM generate_series(1, {rows}) n;
INSERT INTO movements SELECT 'acme', 'busy', n * 2, (n::bigint * 7919) % 100003 - 50000, 0, {now} + n * interval '1 s', '', ''
  FROM generate_series(1, {rows}) n;
INSERT INTO parked_keys (parked_id, consumer, shard, serves, tenant, table_name, key, row_id, error, parked_at)
  SELECT gen_random_uuid(), CASE WHEN n % 1000 = 7 THEN 'users' ELSE 'accounts' END, 1, true,
  CASE WHEN n % 1000 = 8 THEN 'umbrella' ELSE 'acme' END, 'accounts', n, 'r-' || n, 'e', {now} + n * interval '1 s'
  FROM generate_series(1, {rows} / 2) n;
INSERT INTO parked_events SELECT parked_id, n, 'e', 't', '' FROM generate_series(1, {rows} / 2) n,
  (SELECT parked_id FROM parked_keys ORDER BY parked_at LIMIT 1) k;
ANALYZE people, accounts, transfers, users, movements, parked_keys, parked_events;
"""
LATER_BLOCKS_MAX = 60
"""More than for the first page."""
WATCHED_BLOCKS_MAX = 7000
"""For the 1001 rows that are read of a watched list: each with its totals and whether it is parked, by two more indexes of a few
levels each."""
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


class Filled(NamedTuple):
    """A tenant with so many rows in each table."""

    database: Database
    rows: int


@contextmanager
def tables_of(engines: Engines, rows: int) -> Iterator[Filled]:
    """A database of its own."""
    database = engines.clone("read")
    with psycopg.connect(database.app, autocommit=True) as app:
        app.execute("SET transaction_timeout = 0")
        app.execute(FILL.format(rows=rows, now=f"timestamptz '{NOW}'"))
    with psycopg.connect(database.owner, autocommit=True) as owner:
        owner.execute("ANALYZE")
    yield Filled(database, rows)
    engines.drop(database)


@pytest.fixture(scope="module")
def filled(engines: Engines) -> Iterator[Filled]:
    """Enough that a plan which reads a whole table shows."""
    with tables_of(engines, ROWS) as made:
        yield made


def asked(rpcs: SummaryRpcs[Any]) -> Iterator[tuple[dict[str, Any], Any, str]]:
    """No filter, and each value of one, of two and of three filters: the filters, their conditions and how it is called."""
    summary = rpcs.summary
    single = [(name, value) for name in summary.filters for value in VALUES[summary.name, name]]
    several = itertools.chain(itertools.combinations(single, 2), itertools.combinations(single, 3))
    of_each = (filters for filters in several if len({name for name, _ in filters}) == len(filters))
    for filters in [(), *((each,) for each in single), *of_each]:
        told = " ".join(f"{name}={value}".replace("\n", " ") for name, value in filters)
        found = {
            name: of.conditions(dict(filters).get(name)) if name in dict(filters) else [] for name, of in summary.filters.items()
        }
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
def test_a_page_is_read_from_an_index_in_order(filled: Filled, rpcs: SummaryRpcs[Any], order: str, found: Any) -> None:
    """No sort of more than a page, and few blocks, under the query role's policies and with the plan of any value.

    A page behind the row in the middle of all, as a page token names it, costs as much as the first.
    """
    first = planned(filled, *servicer(rpcs).page_query(order, found, None, PAGE))
    later = planned(filled, *servicer(rpcs).page_query(order, found, a_key(filled, rpcs, order, found), PAGE))
    assert blocks(first) < BLOCKS_MAX, json.dumps(first, indent=1)
    assert blocks(later) < blocks(first) + LATER_BLOCKS_MAX, json.dumps(later, indent=1)
    assert all(node["Actual Rows"] <= 2 * PAGE for plan in (first, later) for node in nodes(plan) if "Sort" in node["Node Type"])


def a_key(filled: Filled, rpcs: SummaryRpcs[Any], order: str, found: Any) -> tuple[Any, str] | None:
    """The sort keys of the row in the middle of all; if filters exclude it, of the one in the middle of the first page."""
    column, _ = orders_of(rpcs.summary)[order]
    table, id_ = rpcs.summary.source.sql.split()[0], f"{rpcs.summary.name}_id"
    key = middle(filled, table, column, id_)
    bounds = [it for conditions in found.values() for it in conditions if it.bound]
    if all(it.holds(SimpleNamespace(**{column: key[0]})) for it in bounds if it.bound[0] == column):
        return key
    sql, values = servicer(rpcs).page_query(order, found, None, PAGE)
    with psycopg.connect(filled.database.app) as connection:
        rows = connection.execute(sql.encode(), {"tenant": "acme", **values}).fetchall()
    if not rows:
        return None
    row = rpcs.summary.source.row(*rows[len(rows) // 2][:-1])
    return getattr(row, column), getattr(row, id_)


@cache
def middle(filled: Filled, table: str, column: str, id_: str) -> tuple[Any, str]:
    """The sort keys of the row in the middle of a table."""
    query = f"SELECT {column}, {id_} FROM {table} ORDER BY 1, 2 OFFSET {filled.rows // 2} LIMIT 1"
    with psycopg.connect(filled.database.app) as connection:
        [row] = connection.execute(query.encode()).fetchall()
    return row[0], row[1]


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
def test_a_watched_list_is_read_from_an_index(filled: Filled, rpcs: SummaryRpcs[Any], order: str, found: Any) -> None:
    """As a page of as many rows as a watched list may have."""
    plan = planned(filled, *servicer(rpcs).listed_query([it for each in found.values() for it in each], order, ROWS_MAX + 1))
    assert blocks(plan) < WATCHED_BLOCKS_MAX, json.dumps(plan, indent=1)


def test_totals_read_indexes_and_so_many_of_their_entries(filled: Filled) -> None:
    """No table as a whole, and of no index more than are counted."""
    with psycopg.connect(filled.database.owner, autocommit=True) as owner:
        owner.execute("VACUUM people, accounts, transfers")
    plan = planned(filled, TOTALS, {"limit": 2000})
    scans = [node for node in nodes(plan) if node.get("Relation Name") in ("people", "accounts", "transfers")]
    assert {node["Node Type"] for node in scans} == {"Index Only Scan"}
    assert max(node["Actual Rows"] for node in scans) == 2000
    assert blocks(plan) < BLOCKS_MAX, json.dumps(plan, indent=1)


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
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("asked", STATEMENTS, ids=lambda asked: " ".join(f"{asked}".split()))
def test_a_page_of_a_statement_costs_the_same_at_any_size(
    filled: Filled, asked: dict[str, Any], behind: bool, oldest_first: bool
) -> None:
    """It reads rows by version, which a range of moments is turned into; for a range of amounts a thousand at most."""
    found = {name: of.conditions(asked[name]) if asked[name] else [] for name, of in FILTERS.items()}
    plan = planned(
        filled, *statement_query("busy", found, Place(filled.rows if behind else 0, 0), PAGE, oldest_first=oldest_first)
    )
    assert blocks(plan) < BLOCKS_MAX, json.dumps(plan, indent=1)
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
    filled: Filled, projection: Projection[Any], purge: Purge[Any], behind: bool
) -> None:
    """So many of an aggregate's rows as the projector changes in one transaction, however many it has."""
    sql = Rows(projection).page_with(purge.column, purge.order, behind=behind)
    after = (NOW - timedelta(seconds=filled.rows // 2), "") if behind else ()
    with psycopg.connect(filled.database.app) as connection:
        for name, value in SETTINGS.items():
            connection.execute("SELECT set_config(%s, %s, true)", (name, value))
        values = ("acme", "large", *after, PAGE)
        [(found,)] = connection.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}", values).fetchall()
    plan = found[0]["Plan"]
    assert plan["Actual Rows"] == PAGE
    assert blocks(plan) < BLOCKS_MAX, json.dumps(plan, indent=1)
    assert not any("Sort" in node["Node Type"] for node in nodes(plan))


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("tenant", ["", "acme", "umbrella"])
@pytest.mark.parametrize("projection", ["", "accounts", "users"])
def test_a_page_of_parked_keys_is_read_from_an_index_in_order(filled: Filled, projection: str, tenant: str, behind: bool) -> None:
    """Whatever it is filtered by, and however many events wait for a key."""
    moment = NOW + timedelta(seconds=filled.rows // 4 if behind else -1)
    asked = (1, projection, tenant, moment, UUID(int=0), PAGE)
    assert filled.database.query
    with psycopg.connect(filled.database.query) as connection:
        sql = "SELECT * FROM list_parked(%s, %s, %s, %s, %s, %s)"
        keys = connection.execute(sql, asked).fetchall()  # once before, since a connection's first call reads catalogs too
        [(found,)] = connection.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}", asked).fetchall()
    plan = found[0]["Plan"]
    assert blocks(plan) < BLOCKS_MAX, json.dumps(plan, indent=1)
    assert {row[1] for row in keys} <= ({projection} if projection else {"accounts", "users"})
    assert {row[3] for row in keys} <= ({tenant} if tenant else {"acme", "umbrella"})
    assert (len(keys) == 0) == ((projection, tenant) == ("users", "umbrella"))
    assert max([row[-1] for row in keys], default=0) <= 10_000


@pytest.mark.long
@pytest.mark.timeout(900)
def test_with_a_million_rows_all_of_this_costs_the_same(engines: Engines) -> None:
    """As many blocks at the most as with 60,000."""
    flags = (False, True)
    with tables_of(engines, MANY_ROWS) as filled:
        for rpcs, order, found in (case.values for case in cases()):
            test_a_page_is_read_from_an_index_in_order(filled, rpcs, order, found)
        for rpcs, order, found in (case.values for case in watched_cases()):
            test_a_watched_list_is_read_from_an_index(filled, rpcs, order, found)
        test_totals_read_indexes_and_so_many_of_their_entries(filled)
        for statement, behind, oldest_first in itertools.product(STATEMENTS, flags, flags):
            test_a_page_of_a_statement_costs_the_same_at_any_size(filled, statement, behind, oldest_first)
        for (projection, purge), behind in itertools.product((each.values for each in FOLDED), flags):
            test_rows_of_a_purged_aggregate_are_read_from_an_index_in_order(filled, projection, purge, behind)
        for name, tenant, behind in itertools.product(("", "accounts", "users"), ("", "acme", "umbrella"), flags):
            test_a_page_of_parked_keys_is_read_from_an_index_in_order(filled, name, tenant, behind)


def planned(filled: Filled, sql: str, values: dict[str, Any]) -> dict[str, Any]:
    """The plan of a query that has run as the query service runs it."""
    assert filled.database.query
    with psycopg.connect(filled.database.query) as connection:
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


def blocks(plan: dict[str, Any]) -> int:
    """How many blocks a query read, from memory or from disk."""
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A plan's nodes."""
    yield plan
    for part in plan.get("Plans", ()):
        yield from nodes(part)
