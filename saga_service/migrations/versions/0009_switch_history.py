"""The switches of announcements, each with its place on the line.

Revision ID: 0009
Revises: 0008
"""

from __future__ import annotations

from alembic import context, op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

# What `switched_off` holds is the sum of these. They say what was off at an earlier place, when the line is restored to it.
SWITCHES = """
CREATE TABLE announcement_switches (
  shard smallint NOT NULL,
  tenant text COLLATE "C" NOT NULL,
  name text COLLATE "C" NOT NULL,
  position bigint NOT NULL,
  is_on boolean NOT NULL,
  PRIMARY KEY (shard, tenant, name, position)
);
INSERT INTO announcement_switches (shard, tenant, name, position, is_on)
SELECT shard, tenant, name, position, false FROM switched_off;
"""


def upgrade() -> None:
    """The table, with the last switch of each announcement that is off, and the right to keep it."""
    app = context.config.attributes["roles"]["app"]
    op.execute(SWITCHES)
    op.execute(f'GRANT SELECT, INSERT, UPDATE, DELETE ON announcement_switches TO "{app}"')


def downgrade() -> None:
    """After a restore of the line, announcements that were off would be on; write a new migration instead."""
    raise NotImplementedError("write a new migration instead")
