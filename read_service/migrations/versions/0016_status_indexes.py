"""Indexes for the transfers of an account that have a status.

Revision ID: 0016
Revises: 0015
"""

from __future__ import annotations

from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

INDEXES = """
CREATE INDEX transfers_by_source_and_status ON transfers (tenant, from_account_id, status, started_at, transfer_id);
CREATE INDEX transfers_by_target_and_status ON transfers (tenant, to_account_id, status, started_at, transfer_id);
"""


def upgrade() -> None:
    """Two indexes. A transfer writes their entries when it starts and when its status changes."""
    op.execute(INDEXES)


def downgrade() -> None:
    """Such a list of a busy account reads all its transfers again."""
    op.execute("DROP INDEX transfers_by_source_and_status, transfers_by_target_and_status")
