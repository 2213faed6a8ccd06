"""What is kept of a tenant that is gone is deleted.

Revision ID: 0007
Revises: 0006
"""

from __future__ import annotations

from alembic import context, op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

# No other statement finds deliveries by tenant alone, nor histories but by their process.
INDEX = "CREATE INDEX deliveries_by_tenant ON deliveries (tenant)"


def upgrade() -> None:
    """The right to delete, and an index."""
    app = context.config.attributes["roles"]["app"]
    op.execute(INDEX)
    op.execute(f'GRANT DELETE ON notices TO "{app}"')


def downgrade() -> None:
    """Write a new migration instead."""
    raise NotImplementedError("write a new migration instead")
