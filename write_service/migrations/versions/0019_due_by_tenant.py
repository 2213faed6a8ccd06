"""What is due of each tenant, in order: the scheduler takes tenants in turns where much is due.

Revision ID: 0019
Revises: 0018
"""

from __future__ import annotations

from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

INDEXES = """
CREATE INDEX schedules_due_by_tenant ON schedules (tenant, due_at, schedule_id) WHERE status = 'active';
CREATE INDEX commands_due_by_tenant ON commands (tenant, due_at, received_at) WHERE status = 'scheduled';
"""


def upgrade() -> None:
    """Adds the indexes; they hold what waits alone, so commands that are sent at once cost no more."""
    op.execute(INDEXES)


def downgrade() -> None:
    """Removes the indexes."""
    op.execute("DROP INDEX schedules_due_by_tenant; DROP INDEX commands_due_by_tenant")
