"""The tables of transfers and users, and the transfer behind a movement.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

from alembic import context, op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TABLES = """
CREATE TABLE transfers (
  tenant text COLLATE "C" NOT NULL,
  transfer_id text COLLATE "C" NOT NULL,
  from_account_id text COLLATE "C" NOT NULL,
  to_account_id text COLLATE "C" NOT NULL,
  amount_minor bigint NOT NULL,
  currency text COLLATE "C" NOT NULL,
  status text COLLATE "C" NOT NULL,
  reason text NOT NULL,
  compensation integer NOT NULL,
  started_at timestamptz NOT NULL,
  debited_at timestamptz,
  credited_at timestamptz,
  refunded_at timestamptz,
  suspended_at timestamptz,
  ended_at timestamptz,
  PRIMARY KEY (tenant, transfer_id)
) WITH (fillfactor = 60);
CREATE INDEX transfers_by_start ON transfers (tenant, started_at, transfer_id);
CREATE INDEX transfers_by_source ON transfers (tenant, from_account_id, started_at, transfer_id);
CREATE INDEX transfers_by_target ON transfers (tenant, to_account_id, started_at, transfer_id);

CREATE TABLE users (
  tenant text COLLATE "C" NOT NULL,
  user_id text COLLATE "C" NOT NULL,
  login text NOT NULL,
  email text NOT NULL,
  status text COLLATE "C" NOT NULL,
  reason text NOT NULL,
  started_at timestamptz NOT NULL,
  ended_at timestamptz,
  PRIMARY KEY (tenant, user_id)
) WITH (fillfactor = 80);
CREATE INDEX users_by_start ON users (tenant, started_at, user_id);

ALTER TABLE movements ADD COLUMN transfer_id text COLLATE "C" NOT NULL DEFAULT '';
ALTER TABLE movements ADD COLUMN counterparty_account_id text COLLATE "C" NOT NULL DEFAULT '';
"""


def upgrade() -> None:
    """Makes the tables and gives each its policies and grants."""
    roles = context.config.attributes["roles"]
    app, query = roles["app"], roles["query"]
    op.execute(TABLES)
    for table in ("transfers", "users"):
        op.execute(f"SELECT secure_query_table('{table}', '{app}', '{query}')")


def downgrade() -> None:
    """Drops what upgrade made; the projector would fill it again from the line only with a new checkpoint."""
    op.execute("ALTER TABLE movements DROP COLUMN counterparty_account_id")
    op.execute("ALTER TABLE movements DROP COLUMN transfer_id")
    op.execute("DROP TABLE users")
    op.execute("DROP TABLE transfers")
