"""How many rows of a tenant that is gone were deleted, by table.

Revision ID: 0019
Revises: 0018
"""

from __future__ import annotations

from alembic import context, op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

# Counted up in the transactions that delete. It has the tenant's name and nothing else of it.
TABLE = """
CREATE TABLE forgotten_tenants (
  shard smallint NOT NULL,
  tenant text COLLATE "C" NOT NULL,
  table_name text COLLATE "C" NOT NULL,
  rows bigint NOT NULL,
  PRIMARY KEY (shard, tenant, table_name)
);
"""

FUNCTION = """
CREATE FUNCTION forgotten_rows(p_shard integer, p_tenant text) RETURNS TABLE (table_name text, rows bigint)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
  SELECT f.table_name, f.rows FROM forgotten_tenants f WHERE f.shard = p_shard AND f.tenant = p_tenant
$$;
"""


def upgrade() -> None:
    """The table, which the projector writes, and a function for operators."""
    roles = context.config.attributes["roles"]
    op.execute(TABLE)
    op.execute(FUNCTION)
    op.execute(f'GRANT SELECT, INSERT, UPDATE ON forgotten_tenants TO "{roles["app"]}"')
    op.execute("REVOKE ALL ON FUNCTION forgotten_rows FROM PUBLIC")
    op.execute(f'GRANT EXECUTE ON FUNCTION forgotten_rows TO "{roles["query"]}"')


def downgrade() -> None:
    """Removes it."""
    op.execute("DROP FUNCTION forgotten_rows; DROP TABLE forgotten_tenants")
