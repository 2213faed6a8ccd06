"""Undone processes leave after the retention, and those that were acknowledged are found.

Revision ID: 0011
Revises: 0010
"""

from __future__ import annotations

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

# Both are small: a process is undone by a restore alone, and few are acknowledged.
UNDONE = "CREATE INDEX processes_undone ON processes (moved_at) WHERE status = 'undone'"
CONFIRMED = """
CREATE INDEX process_history_confirmed ON process_history (tenant, type, process_id)
WHERE kind = 'operator' AND name = 'confirm'
"""


def upgrade() -> None:
    """Two indexes."""
    op.execute(UNDONE)
    op.execute(CONFIRMED)


def downgrade() -> None:
    """Write a new migration instead."""
    raise NotImplementedError("write a new migration instead")
