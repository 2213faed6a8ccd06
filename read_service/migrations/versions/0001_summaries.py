"""Checkpoints, the function that secures query tables, and the tables of people and accounts.

Revision ID: 0001
Revises:
"""

from __future__ import annotations

from alembic import context, op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# The checkpoint of a projection group is written by every one of its transactions: room for new versions of the row
# on its page keeps them off the index.
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

# Every migration that makes a query table ends with a call of this function, so that no table is without policies:
# `app`, the projector, writes the rows of all tenants; `query` reads those of the tenant that its transaction named,
# and a forgotten WHERE shows nothing of the others. The empty string is no tenant: it is what a setting reads as after
# it was set once in a session. The tables' owner is under the policies too, and has none.
SECURE = """
CREATE FUNCTION secure_query_table(p_table regclass, p_app name, p_query name) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, public AS $$
BEGIN
  EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', p_table);
  EXECUTE format('ALTER TABLE %s FORCE ROW LEVEL SECURITY', p_table);
  EXECUTE format('CREATE POLICY projector ON %s TO %I USING (true) WITH CHECK (true)', p_table, p_app);
  EXECUTE format(
    'CREATE POLICY tenant ON %s FOR SELECT TO %I USING (tenant = nullif(current_setting(''app.tenant'', true), ''''))',
    p_table, p_query);
  EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON %s TO %I', p_table, p_app);
  EXECUTE format('GRANT SELECT ON %s TO %I', p_table, p_query);
END $$;
REVOKE ALL ON FUNCTION secure_query_table FROM PUBLIC;
"""

# Names are searched by prefix with >= and < on the folded form in byte order: LIKE could not use the index under
# row-level security. A balance has no index: every movement would then rewrite all of an account's index entries.
TABLES = """
CREATE TABLE people (
  tenant text COLLATE "C" NOT NULL,
  person_id text COLLATE "C" NOT NULL,
  name text NOT NULL,
  name_folded text COLLATE "C" NOT NULL,
  registered_at timestamptz NOT NULL,
  open_account_count integer NOT NULL,
  version bigint NOT NULL,
  PRIMARY KEY (tenant, person_id)
) WITH (fillfactor = 80);
CREATE INDEX people_by_name ON people (tenant, name_folded, person_id);
CREATE INDEX people_by_registration ON people (tenant, registered_at, person_id);

CREATE TABLE person_totals (
  tenant text COLLATE "C" NOT NULL,
  person_id text COLLATE "C" NOT NULL,
  currency text COLLATE "C" NOT NULL,
  total_minor numeric NOT NULL,
  PRIMARY KEY (tenant, person_id, currency)
) WITH (fillfactor = 60);

CREATE TABLE accounts (
  tenant text COLLATE "C" NOT NULL,
  account_id text COLLATE "C" NOT NULL,
  owner_id text COLLATE "C" NOT NULL,
  name text NOT NULL,
  currency text COLLATE "C" NOT NULL,
  balance_minor bigint NOT NULL,
  status text COLLATE "C" NOT NULL,
  opened_at timestamptz NOT NULL,
  version bigint NOT NULL,
  PRIMARY KEY (tenant, account_id)
) WITH (fillfactor = 60);
CREATE INDEX accounts_by_opening ON accounts (tenant, opened_at, account_id);
CREATE INDEX accounts_by_owner ON accounts (tenant, owner_id, opened_at, account_id);

CREATE TABLE movements (
  tenant text COLLATE "C" NOT NULL,
  account_id text COLLATE "C" NOT NULL,
  version bigint NOT NULL,
  amount_minor bigint NOT NULL,
  balance_after_minor bigint NOT NULL,
  moved_at timestamptz NOT NULL,
  PRIMARY KEY (tenant, account_id, version)
);
"""


def upgrade() -> None:
    """Makes the tables and gives each its policies and grants."""
    roles = context.config.attributes["roles"]
    app, query = roles["app"], roles["query"]
    op.execute(CHECKPOINTS)
    op.execute(f'GRANT SELECT, INSERT, UPDATE ON checkpoints TO "{app}"')
    op.execute(f'GRANT SELECT ON checkpoints TO "{query}"')
    op.execute(SECURE)
    op.execute(TABLES)
    for table in ("people", "person_totals", "accounts", "movements"):
        op.execute(f"SELECT secure_query_table('{table}', '{app}', '{query}')")


def downgrade() -> None:
    """Query tables are rebuilt from the line; there is no way back but a new migration."""
    raise NotImplementedError("write a new migration instead")
