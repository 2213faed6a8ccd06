"""Messages to the outside: e-mails and webhooks that wait, were sent, or were given up.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

from alembic import context, op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# Of the pending ones of a tenant, recipient and key, the one with the lowest number is sent first. `sending` is set before
# a message leaves: while it is, nobody knows whether the message has arrived. No address of a recipient is in here.
DELIVERIES = """
CREATE TABLE deliveries (
  number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  delivery_id uuid NOT NULL UNIQUE,
  tenant text COLLATE "C" NOT NULL,
  name text COLLATE "C" NOT NULL,
  channel text COLLATE "C" NOT NULL CHECK (channel IN ('email', 'webhook', 'fold')),
  recipient text COLLATE "C" NOT NULL,
  order_key text COLLATE "C" NOT NULL,
  content text NOT NULL,
  source text COLLATE "C" NOT NULL,
  correlation_id text COLLATE "C" NOT NULL,
  traceparent text COLLATE "C" NOT NULL,
  status text COLLATE "C" NOT NULL CHECK (status IN ('pending', 'sent', 'dead', 'discarded')),
  last_error text NOT NULL,
  created_at timestamptz NOT NULL,
  due_at timestamptz NOT NULL,
  ended_at timestamptz,
  tries integer NOT NULL DEFAULT 0,
  sending boolean NOT NULL DEFAULT false
) WITH (fillfactor = 80);
CREATE INDEX deliveries_due ON deliveries (due_at, number) WHERE status = 'pending' AND NOT sending;
CREATE INDEX deliveries_line ON deliveries (tenant, recipient, order_key, number) WHERE status = 'pending';
CREATE INDEX deliveries_sending ON deliveries (number) WHERE sending;
CREATE INDEX deliveries_by_status ON deliveries (status, number);
CREATE INDEX deliveries_ended ON deliveries (ended_at) WHERE ended_at IS NOT NULL;
"""


def upgrade() -> None:
    """Makes the table, for the application's role to read and write."""
    app = context.config.attributes["roles"]["app"]
    op.execute(DELIVERIES)
    op.execute(f'GRANT SELECT, INSERT, UPDATE, DELETE ON deliveries TO "{app}"')


def downgrade() -> None:
    """What waits would be lost; there is no way back but a new migration."""
    raise NotImplementedError("write a new migration instead")
