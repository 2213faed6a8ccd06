"""Since when people and accounts are in the archive.

Revision ID: 0015
Revises: 0014
"""

from __future__ import annotations

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

COLUMNS = """
ALTER TABLE people ADD COLUMN boxed_at timestamptz;
ALTER TABLE accounts ADD COLUMN boxed_at timestamptz;
"""


def upgrade() -> None:
    """Two columns, which the groups' new versions fill."""
    op.execute(COLUMNS)


def downgrade() -> None:
    """Nobody is shown as boxed."""
    op.execute("ALTER TABLE accounts DROP COLUMN boxed_at")
    op.execute("ALTER TABLE people DROP COLUMN boxed_at")
