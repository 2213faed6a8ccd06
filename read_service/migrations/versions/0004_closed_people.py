"""People who were closed, and the lists of one status.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# A list of the few that are closed among the many that are active has an index of its own in each order.
COLUMNS = """
ALTER TABLE people ADD COLUMN status text COLLATE "C" NOT NULL DEFAULT 'active';
ALTER TABLE people ALTER COLUMN status DROP DEFAULT;
ALTER TABLE people ADD COLUMN closed_at timestamptz;
CREATE INDEX people_by_status_and_name ON people (tenant, status, name_folded, person_id);
CREATE INDEX people_by_status_and_registration ON people (tenant, status, registered_at, person_id);
"""


def upgrade() -> None:
    """Two columns and two indexes; everybody who is there is active, for nobody could be closed before."""
    op.execute(COLUMNS)


def downgrade() -> None:
    """Whoever is closed is shown as before, with no account open."""
    op.execute("ALTER TABLE people DROP COLUMN closed_at, DROP COLUMN status")
