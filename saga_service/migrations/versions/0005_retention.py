"""Ended processes leave after a retention.

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

from alembic import context, op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# Only processes that nobody need look at any more leave.
ENDED = """
CREATE INDEX processes_ended ON processes (moved_at) WHERE status = 'ended' AND trouble = '' AND attention = '';
"""


def upgrade() -> None:
    """An index of what may leave, and the right to delete it."""
    app = context.config.attributes["roles"]["app"]
    op.execute(ENDED)
    op.execute(f'GRANT DELETE ON processes, process_history TO "{app}"')


def downgrade() -> None:
    """Write a new migration instead."""
    raise NotImplementedError("write a new migration instead")
