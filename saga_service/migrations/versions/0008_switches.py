"""Announcements that tenants have switched off.

Revision ID: 0008
Revises: 0007
"""

from __future__ import annotations

from alembic import context, op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

# `position`: where on the line the switch stands.
SWITCHED_OFF = """
CREATE TABLE switched_off (
  shard smallint NOT NULL,
  tenant text COLLATE "C" NOT NULL,
  name text COLLATE "C" NOT NULL,
  position bigint NOT NULL,
  PRIMARY KEY (shard, tenant, name)
);
"""


def upgrade() -> None:
    """The table, and the right to keep it."""
    app = context.config.attributes["roles"]["app"]
    op.execute(SWITCHED_OFF)
    op.execute(f'GRANT SELECT, INSERT, UPDATE, DELETE ON switched_off TO "{app}"')


def downgrade() -> None:
    """What was switched off would be on again; write a new migration instead."""
    raise NotImplementedError("write a new migration instead")
