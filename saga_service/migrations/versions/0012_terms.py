"""Whoever begins to lead raises a number in the checkpoint: what an earlier leader still writes is refused.

Revision ID: 0012
Revises: 0011
"""

from __future__ import annotations

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """A leader of the release before neither raises nor looks at it, and goes on as it did."""
    op.execute("ALTER TABLE checkpoints ADD COLUMN term bigint NOT NULL DEFAULT 0")


def downgrade() -> None:
    """Only this release's leaders use it."""
    op.execute("ALTER TABLE checkpoints DROP COLUMN term")
