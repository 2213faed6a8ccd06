"""An index for transfers in the order of their amounts.

Revision ID: 0013
Revises: 0012
"""

from __future__ import annotations

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """One index. An amount never changes, so a transfer writes its entry when it starts and when its status changes."""
    op.execute("CREATE INDEX transfers_by_amount ON transfers (tenant, amount_minor, transfer_id)")


def downgrade() -> None:
    """Lists in this order sort again."""
    op.execute("DROP INDEX transfers_by_amount")
