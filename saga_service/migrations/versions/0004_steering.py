"""Paused types, parked events, acknowledgements, and notes of operators.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

from alembic import context, op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# The runner reads both with its fence, in the same statement. `paused` has a field for each paused type; `parked` counts how
# often an operator has changed parked_events.
CHECKPOINTS = """
ALTER TABLE checkpoints ADD COLUMN paused jsonb NOT NULL DEFAULT '{}';
ALTER TABLE checkpoints ADD COLUMN parked bigint NOT NULL DEFAULT 0;
ALTER TABLE process_history ADD COLUMN note text NOT NULL DEFAULT '';
"""

# The first event of a stream that no process could be found for, with a reason; and all later ones of the stream, without.
PARKED = """
CREATE TABLE parked_events (
  shard smallint NOT NULL,
  tenant text COLLATE "C" NOT NULL,
  aggregate_type text COLLATE "C" NOT NULL,
  aggregate_id text COLLATE "C" NOT NULL,
  position bigint NOT NULL,
  event_id text COLLATE "C" NOT NULL,
  type text COLLATE "C" NOT NULL,
  envelope bytea NOT NULL,
  reason text NOT NULL,
  parked_at timestamptz NOT NULL,
  PRIMARY KEY (shard, tenant, aggregate_type, aggregate_id, position)
);
"""

# One person asks for the acknowledgement of what a process says, another confirms it.
ACKNOWLEDGEMENTS = """
CREATE TABLE process_acknowledgements (
  tenant text COLLATE "C" NOT NULL,
  type text COLLATE "C" NOT NULL,
  process_id text COLLATE "C" NOT NULL,
  attention text COLLATE "C" NOT NULL,
  resolution text NOT NULL,
  asked_by text COLLATE "C" NOT NULL,
  asked_at timestamptz NOT NULL,
  PRIMARY KEY (tenant, type, process_id)
);
"""


def upgrade() -> None:
    """Makes the columns and tables, for the application's role to read and write."""
    app = context.config.attributes["roles"]["app"]
    for statements in (CHECKPOINTS, PARKED, ACKNOWLEDGEMENTS):
        op.execute(statements)
    op.execute(f'GRANT SELECT, INSERT, UPDATE, DELETE ON parked_events TO "{app}"')
    op.execute(f'GRANT SELECT, INSERT, UPDATE, DELETE ON process_acknowledgements TO "{app}"')


def downgrade() -> None:
    """What is parked would be lost; there is no way back but a new migration."""
    raise NotImplementedError("write a new migration instead")
