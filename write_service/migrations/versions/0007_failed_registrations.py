"""The password hashes of registrations that failed go: from now on the failure itself deletes the hash.

Revision ID: 0007
Revises: 0006
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

DELETE = """
DELETE FROM credentials c WHERE EXISTS (
  SELECT FROM events e
  WHERE e.tenant = c.tenant AND e.category = 'user' AND e.aggregate_id = c.subject_id
    AND e.type = 'bank.v1.UserRegistrationFailed')
"""


def upgrade() -> None:
    """Deletes what nobody could log in with anyway."""
    op.execute(DELETE)


def downgrade() -> None:
    """What was deleted was of no use."""
