"""The application checks passwords: it may read the hashes that the append function saved.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

from alembic import context, op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Grants reading; writing stays with the append function alone."""
    app = context.config.attributes["roles"]["app"]
    op.execute(f'GRANT SELECT ON credentials TO "{app}"')


def downgrade() -> None:
    """Takes the grant back."""
    app = context.config.attributes["roles"]["app"]
    op.execute(f'REVOKE SELECT ON credentials FROM "{app}"')
