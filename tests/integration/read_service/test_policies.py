"""Row-level security: whatever a query forgets, it sees the rows of its tenant alone, and writes nothing."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from psycopg.pq import TransactionStatus

from bank.v1 import transfer_pb2, user_pb2
from deploy.bootstrap import Database
from read_service.app import TABLES as WATCHED
from shared.folds.errors import Refusal
from shared.platform.postgres import Reads, UnsafeDatabase
from shared.platform.startup import until_safe
from shared.projections.summary import in_tenant
from tests.support.fakes.line import Store, uid
from tests.support.system.query_service import BLUE, RED, Service, bank

# --- tenants ---

TABLES = ("people", "person_totals", "accounts", "movements", "transfers", "users")


def of_two_tenants() -> Store:
    """Rows of both in each table."""
    store, id_ = bank(), uid(500)
    started = transfer_pb2.TransferStarted(
        transfer_id=id_, from_account_id=BLUE, to_account_id=RED, amount_minor=1, currency="USD"
    )
    for tenant in ("acme", "umbrella"):
        store.append(tenant, id_, started, category="transfer")
        store.append(tenant, id_, user_pb2.UserRegistrationStarted(user_id=id_, login="ada"), category="user")
    return store


@pytest.mark.parametrize("table", TABLES)
async def test_a_forgotten_where_shows_nothing_of_another_tenant(service: Service, table: str) -> None:
    """Under the query role a bare SELECT has the rows of the tenant that the transaction named, and no others."""
    await service.holds(of_two_tenants())
    assert service.database.query
    with psycopg.connect(service.database.query, autocommit=True) as connection:

        def seen() -> list[Any]:
            return connection.execute(f"SELECT DISTINCT tenant FROM {table}").fetchall()

        assert seen() == []
        for tenant in ("acme", "umbrella"):
            with connection.transaction():
                connection.execute("SELECT set_config('app.tenant', %s, true)", [tenant])
                assert seen() == [(tenant,)]
        # After the transaction the setting reads as the empty string, which is no tenant.
        assert connection.execute("SELECT current_setting('app.tenant', true)").fetchone() == ("",)
        assert seen() == []
    with psycopg.connect(service.database.admin) as admin:  # the control: the rows are there
        assert len(admin.execute(f"SELECT DISTINCT tenant FROM {table}").fetchall()) == 2


async def test_a_connection_that_goes_back_after_an_error_takes_no_tenant_along(service: Service) -> None:
    """Whatever ended the transaction, the next borrower of the same connection sees nothing until it names a tenant."""
    await service.holds(bank())
    assert service.database.query
    reads = Reads(service.database.query, application_name="test", size_max=1)
    await reads.open()
    cancelled = "SELECT pg_cancel_backend(pg_backend_pid())"
    for bad in ("SELECT 1 / 0", "SELECT nothing FROM accounts", "DELETE FROM accounts", cancelled):
        with pytest.raises((psycopg.Error, Refusal)):
            await in_tenant(reads, "acme", bad, {})
        async with reads.connection() as connection:
            assert await (await connection.execute("SELECT count(*) FROM accounts")).fetchone() == (0,)
            assert connection.info.transaction_status == TransactionStatus.IDLE
        # The control: with a tenant its rows are there, on the same connection, and no other's.
        rows = await in_tenant(reads, "umbrella", "SELECT tenant FROM accounts", {})
        assert set(rows) == {("umbrella",)}
    await reads.close()


@pytest.mark.parametrize("secure", [True, False])
async def test_a_view_shows_the_rows_of_the_tenant_that_the_transaction_named(service: Service, secure: bool) -> None:
    """A view with security_invoker is under the tables' policies as its caller; one without is under its owner's: nothing."""
    await service.holds(bank())
    assert service.database.query
    with psycopg.connect(service.database.owner, autocommit=True) as owner:
        option = "WITH (security_invoker = true)" if secure else ""
        owner.execute(f"CREATE VIEW rich {option} AS SELECT tenant, account_id FROM accounts WHERE balance_minor > 0")
        owner.execute("GRANT SELECT ON rich TO foldline_read_query")
    with psycopg.connect(service.database.query) as connection:
        assert connection.execute("SELECT * FROM rich").fetchall() == []
        connection.execute("SELECT set_config('app.tenant', 'umbrella', true)")
        assert connection.execute("SELECT * FROM rich").fetchall() == ([("umbrella", BLUE)] if secure else [])


@pytest.mark.parametrize("table", [*TABLES, "checkpoints"])
async def test_the_query_role_writes_nothing(service: Service, table: str) -> None:
    """Every way of changing a row is refused by PostgreSQL itself."""
    assert service.database.query
    for statement in (
        f"DELETE FROM {table}",
        f"TRUNCATE {table}",
        f"UPDATE {table} SET {'state' if table == 'checkpoints' else 'tenant'} = 'x'",
        f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY",
    ):
        with psycopg.connect(service.database.query) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(statement)


async def test_every_table_of_rows_is_under_policies(read_db: Database) -> None:
    """No table that queries read is without row-level security, forced on its owner but for what operators see of all."""
    with psycopg.connect(read_db.owner) as owner:
        bare = owner.execute(
            """SELECT relname FROM pg_class WHERE relkind IN ('r', 'p', 'v', 'm') AND relnamespace = 'public'::regnamespace
               AND NOT (relrowsecurity AND relforcerowsecurity) ORDER BY relname"""
        ).fetchall()
        readable = owner.execute(
            """SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace
               AND has_table_privilege('foldline_read_query', oid, 'SELECT') AND NOT relrowsecurity"""
        ).fetchall()
    shared = ("alembic_version", "checkpoints")
    parked = ("parked_events", "parked_keys", "parked_requests")
    of_operators = ("forgotten_tenants", *parked, "projection_rebuilds", "row_change_heads", "row_changes")
    assert [name for (name,) in bare] == sorted((*shared, *of_operators))
    assert sorted(readable) == [("checkpoints",), ("row_change_heads",)]


@pytest.mark.parametrize("role", ["admin", "app", "owner"])
async def test_it_refuses_to_serve_as_anybody_else(read_db: Database, role: str) -> None:
    """As superuser, or as a role that may write the tables, nothing is served."""
    reads = Reads(getattr(read_db, role), application_name="test")
    await reads.open()
    try:
        with pytest.raises(UnsafeDatabase):
            await until_safe(reads, tables=WATCHED)
    finally:
        await reads.close()
