"""Whoever rewrites rows without moving their checkpoint raises a number in it: a replay, the end of a tenant or of an aggregate.

Revision ID: 0022
Revises: 0021
"""

from __future__ import annotations

from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """A projector of the release before neither raises nor looks at it, and goes on as it did."""
    op.execute("ALTER TABLE checkpoints ADD COLUMN generation bigint NOT NULL DEFAULT 0")


def downgrade() -> None:
    """Only this release's projectors use it."""
    op.execute("ALTER TABLE checkpoints DROP COLUMN generation")
