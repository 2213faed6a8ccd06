"""Users' roles, users who were deactivated, and the lists of one status.

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

COLUMNS = """
ALTER TABLE users ADD COLUMN roles text COLLATE "C" NOT NULL DEFAULT 'user';
ALTER TABLE users ALTER COLUMN roles DROP DEFAULT;
ALTER TABLE users ADD COLUMN deactivated_at timestamptz;
CREATE INDEX users_by_status ON users (tenant, status, started_at, user_id);
CREATE INDEX users_deactivated ON users (tenant, started_at, user_id) WHERE deactivated_at IS NOT NULL;
"""


def upgrade() -> None:
    """Two columns and two indexes; whoever is there has the one role that all had, and nobody could be deactivated."""
    op.execute(COLUMNS)


def downgrade() -> None:
    """Whoever is deactivated is shown as before."""
    op.execute("DROP INDEX users_by_status")
    op.execute("ALTER TABLE users DROP COLUMN deactivated_at, DROP COLUMN roles")
