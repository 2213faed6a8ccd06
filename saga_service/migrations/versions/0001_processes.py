"""The checkpoint, and what processes are made of: states, outgoing commands, timers, histories, notices.

Revision ID: 0001
Revises:
"""

from __future__ import annotations

from alembic import context, op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# The checkpoint is written by every transaction: room for new versions of the row on its page keeps them off the index.
CHECKPOINTS = """
CREATE TABLE checkpoints (
  name text COLLATE "C" NOT NULL,
  shard smallint NOT NULL,
  epoch text COLLATE "C" NOT NULL DEFAULT '',
  position bigint NOT NULL DEFAULT 0 CHECK (position >= 0),
  event_id text COLLATE "C" NOT NULL DEFAULT '',
  state text COLLATE "C" NOT NULL DEFAULT 'running' CHECK (state IN ('running', 'stopped')),
  reason text NOT NULL DEFAULT '',
  moved_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (name, shard)
) WITH (fillfactor = 10);
"""

# `trouble` is the runner's word for why a process is parked, `attention` the process's own. A process whose trouble is
# FOLD_FAILED is asked nothing: its inputs wait in process_inputs, in their order.
PROCESSES = """
CREATE TABLE processes (
  tenant text COLLATE "C" NOT NULL,
  type text COLLATE "C" NOT NULL,
  process_id text COLLATE "C" NOT NULL,
  state text NOT NULL,
  schema integer NOT NULL,
  status text COLLATE "C" NOT NULL CHECK (status IN ('running', 'ended', 'parked')),
  trouble text COLLATE "C" NOT NULL,
  attention text COLLATE "C" NOT NULL,
  phase text COLLATE "C" NOT NULL,
  correlation_id text COLLATE "C" NOT NULL,
  causation_id text COLLATE "C" NOT NULL,
  on_behalf_of text COLLATE "C" NOT NULL,
  traceparent text COLLATE "C" NOT NULL,
  attempts text NOT NULL,
  entries integer NOT NULL,
  started_at timestamptz NOT NULL,
  moved_at timestamptz NOT NULL,
  PRIMARY KEY (tenant, type, process_id)
) WITH (fillfactor = 60);
CREATE INDEX processes_by_start ON processes (started_at, tenant, type, process_id);
CREATE INDEX processes_open ON processes (started_at, tenant, type, process_id)
  WHERE status <> 'ended' OR trouble <> '' OR attention <> '';

CREATE TABLE process_inputs (
  tenant text COLLATE "C" NOT NULL,
  type text COLLATE "C" NOT NULL,
  process_id text COLLATE "C" NOT NULL,
  number bigint GENERATED ALWAYS AS IDENTITY,
  kind text COLLATE "C" NOT NULL CHECK (kind IN ('event', 'answer', 'timer')),
  name text COLLATE "C" NOT NULL,
  content bytea NOT NULL,
  PRIMARY KEY (tenant, type, process_id, number)
);
"""

# A command was handed out `tries` times, `answered` of which came back with the word that it was not carried out. As
# long as the two differ it may have been, and no operator can take it back.
COMMANDS = """
CREATE TABLE process_commands (
  tenant text COLLATE "C" NOT NULL,
  type text COLLATE "C" NOT NULL,
  process_id text COLLATE "C" NOT NULL,
  step text COLLATE "C" NOT NULL,
  attempt integer NOT NULL,
  command_id uuid NOT NULL,
  command_type text COLLATE "C" NOT NULL,
  payload bytea NOT NULL,
  causation_id text COLLATE "C" NOT NULL,
  on_behalf_of text COLLATE "C" NOT NULL,
  traceparent text COLLATE "C" NOT NULL,
  due_at timestamptz NOT NULL,
  tries integer NOT NULL,
  answered integer NOT NULL DEFAULT 0,
  failures integer NOT NULL DEFAULT 0,
  given_up boolean NOT NULL DEFAULT false,
  last_error text NOT NULL DEFAULT '',
  PRIMARY KEY (tenant, type, process_id, step)
) WITH (autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 5000);
CREATE INDEX process_commands_due ON process_commands (due_at) WHERE NOT given_up;

CREATE TABLE process_timers (
  tenant text COLLATE "C" NOT NULL,
  type text COLLATE "C" NOT NULL,
  process_id text COLLATE "C" NOT NULL,
  name text COLLATE "C" NOT NULL,
  due_at timestamptz NOT NULL,
  PRIMARY KEY (tenant, type, process_id, name)
) WITH (autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 5000);
CREATE INDEX process_timers_due ON process_timers (due_at);
"""

HISTORY = """
CREATE TABLE process_history (
  tenant text COLLATE "C" NOT NULL,
  type text COLLATE "C" NOT NULL,
  process_id text COLLATE "C" NOT NULL,
  number integer NOT NULL,
  happened_at timestamptz NOT NULL,
  kind text COLLATE "C" NOT NULL,
  name text COLLATE "C" NOT NULL,
  step text COLLATE "C" NOT NULL,
  id text COLLATE "C" NOT NULL,
  position bigint NOT NULL,
  attempts integer NOT NULL,
  error bytea,
  phase text COLLATE "C" NOT NULL,
  PRIMARY KEY (tenant, type, process_id, number)
);

CREATE TABLE notices (
  number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  tenant text COLLATE "C" NOT NULL,
  type text COLLATE "C" NOT NULL,
  process_id text COLLATE "C" NOT NULL,
  name text COLLATE "C" NOT NULL,
  data text NOT NULL,
  created_at timestamptz NOT NULL
);
"""


def upgrade() -> None:
    """Makes the tables, for the application's role to read and write."""
    app = context.config.attributes["roles"]["app"]
    for statements in (CHECKPOINTS, PROCESSES, COMMANDS, HISTORY):
        op.execute(statements)
    op.execute(f'GRANT SELECT, INSERT, UPDATE ON checkpoints, processes TO "{app}"')
    op.execute(f'GRANT SELECT, INSERT, UPDATE, DELETE ON process_commands, process_timers TO "{app}"')
    op.execute(f'GRANT SELECT, INSERT, DELETE ON process_inputs TO "{app}"')
    op.execute(f'GRANT SELECT, INSERT ON process_history, notices TO "{app}"')


def downgrade() -> None:
    """Histories are nowhere else; there is no way back but a new migration."""
    raise NotImplementedError("write a new migration instead")
