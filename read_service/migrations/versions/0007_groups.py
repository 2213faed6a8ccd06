"""Each group of tables follows the line on its own; before, all of them shared the checkpoint `summaries`.

Revision ID: 0007
Revises: 0006
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

# The groups go on from where the tables are. The former checkpoint is put beyond every line, so that a projector of the release
# before, which would apply the same events to the same tables a second time, is fenced and then stops as diverged.
SPLIT = """
INSERT INTO checkpoints (name, shard, epoch, position, event_id, state, reason, refill_asked)
SELECT g.name, c.shard, c.epoch, c.position, c.event_id, c.state, c.reason, c.refill_asked
FROM checkpoints c, unnest(ARRAY['people', 'accounts', 'transfers', 'users']) AS g (name) WHERE c.name = 'summaries';
UPDATE checkpoints SET epoch = 'split into groups', position = 9223372036854775806, event_id = '' WHERE name = 'summaries';
"""
# The version of a group that answers queries: another, of the name `accounts@2`, fills tables of its own beside it.
VERSIONS = """
ALTER TABLE checkpoints ADD COLUMN group_name text COLLATE "C" GENERATED ALWAYS AS (split_part(name, '@', 1)) STORED;
ALTER TABLE checkpoints ADD COLUMN serves boolean NOT NULL DEFAULT true;
CREATE UNIQUE INDEX checkpoints_serving ON checkpoints (group_name, shard) WHERE serves;
"""


def upgrade() -> None:
    """Four checkpoints in place of one, and columns that say which version of a group serves."""
    op.execute(SPLIT)
    op.execute(VERSIONS)


def downgrade() -> None:
    """There is no way back: the groups are at different positions."""
    raise NotImplementedError("write a new migration instead")
