"""Processes whose begin was lost with a part of the line.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# The new condition allows all that the old one did, so no row need be looked at.
STATUSES = """
ALTER TABLE processes DROP CONSTRAINT processes_status_check;
ALTER TABLE processes ADD CONSTRAINT processes_status_check
  CHECK (status IN ('running', 'ended', 'parked', 'undone')) NOT VALID;
"""


def upgrade() -> None:
    """One status more."""
    op.execute(STATUSES)


def downgrade() -> None:
    """Processes may be undone by then; there is no way back but a new migration."""
    raise NotImplementedError("write a new migration instead")
