"""How many rows of a tenant that is gone were deleted, by table.

Revision ID: 0010
Revises: 0009
"""

from __future__ import annotations

from alembic import context, op

revision = "0010"
down_revision = "0009"
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


def upgrade() -> None:
    """The table, and the right to keep it."""
    app = context.config.attributes["roles"]["app"]
    op.execute(TABLE)
    op.execute(f'GRANT SELECT, INSERT, UPDATE ON forgotten_tenants TO "{app}"')


def downgrade() -> None:
    """Removes it."""
    op.execute("DROP TABLE forgotten_tenants")
