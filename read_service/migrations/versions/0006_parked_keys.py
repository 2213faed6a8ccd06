"""Keys whose events cannot be folded, the events that wait for them, and what operators ask to be done with them.

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

from alembic import context, op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

# The key of a row has the table's name; that of an aggregate, whose event could not be read, has none. `row_id` is the first
# column behind the tenant, by which queries ask whether a row is held up. The events are copies: the queue of a key grows with
# the line, and is no longer than the key's part of it.
#
# The query role sees the keys of the tenant that its transaction named, as it does in every table, and no events. Operators
# see all tenants through functions of the owner, whom the policies of these tables do not bind.
TABLES = """
CREATE TABLE parked_keys (
  parked_id uuid PRIMARY KEY,
  consumer text COLLATE "C" NOT NULL,
  group_name text COLLATE "C" NOT NULL GENERATED ALWAYS AS (split_part(consumer, '@', 1)) STORED,
  shard integer NOT NULL,
  serves boolean NOT NULL,
  tenant text COLLATE "C" NOT NULL,
  table_name text COLLATE "C" NOT NULL,
  key text COLLATE "C" NOT NULL,
  row_id text COLLATE "C" NOT NULL,
  error text NOT NULL,
  behind uuid REFERENCES parked_keys ON DELETE SET NULL,
  parked_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  UNIQUE (consumer, shard, tenant, table_name, key)
);
CREATE INDEX parked_keys_by_row ON parked_keys (tenant, row_id);
CREATE INDEX parked_keys_by_time ON parked_keys (parked_at, parked_id);
CREATE INDEX parked_keys_behind ON parked_keys (behind) WHERE behind IS NOT NULL;

CREATE TABLE parked_events (
  parked_id uuid NOT NULL REFERENCES parked_keys ON DELETE CASCADE,
  position bigint NOT NULL,
  event_id text COLLATE "C" NOT NULL,
  type text COLLATE "C" NOT NULL,
  envelope bytea NOT NULL,
  PRIMARY KEY (parked_id, position)
);

CREATE TABLE parked_requests (
  request_id uuid PRIMARY KEY,
  parked_id uuid NOT NULL,
  action text COLLATE "C" NOT NULL CHECK (action IN ('retry', 'discard')),
  all_events boolean NOT NULL,
  asked_by text NOT NULL,
  asked_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  done_at timestamptz,
  outcome text COLLATE "C" NOT NULL DEFAULT '',
  applied bigint NOT NULL DEFAULT 0,
  skipped bigint NOT NULL DEFAULT 0,
  skipped_events text NOT NULL DEFAULT '[]'
);
CREATE INDEX parked_requests_open ON parked_requests (parked_id) WHERE done_at IS NULL;
CREATE INDEX parked_requests_done ON parked_requests (done_at) WHERE done_at IS NOT NULL;
ALTER TABLE parked_keys ENABLE ROW LEVEL SECURITY;
"""

FUNCTIONS = """
CREATE FUNCTION list_parked(
  p_shard integer, p_consumer text, p_tenant text, p_at timestamptz, p_at_id uuid, p_limit integer
) RETURNS TABLE (
  parked_id uuid, consumer text, shard integer, tenant text, table_name text, key text, error text, behind uuid,
  parked_at timestamptz, events bigint
)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
  SELECT k.parked_id, k.consumer, k.shard, k.tenant, k.table_name, k.key, k.error, k.behind, k.parked_at,
    (SELECT count(*) FROM parked_events e WHERE e.parked_id = k.parked_id)
  FROM parked_keys k
  WHERE k.shard = p_shard AND (p_consumer = '' OR k.group_name = p_consumer) AND (p_tenant = '' OR k.tenant = p_tenant)
    AND (k.parked_at, k.parked_id) > (p_at, p_at_id)
  ORDER BY k.parked_at, k.parked_id LIMIT p_limit
$$;
CREATE FUNCTION get_parked(p_parked_id uuid) RETURNS TABLE (
  parked_id uuid, consumer text, shard integer, tenant text, table_name text, key text, error text, behind uuid,
  parked_at timestamptz, events bigint
)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
  SELECT k.parked_id, k.consumer, k.shard, k.tenant, k.table_name, k.key, k.error, k.behind, k.parked_at,
    (SELECT count(*) FROM parked_events e WHERE e.parked_id = k.parked_id)
  FROM parked_keys k WHERE k.parked_id = p_parked_id
$$;
CREATE FUNCTION parked_events_of(p_parked_id uuid, p_limit integer) RETURNS TABLE (pos bigint, event_id text, type text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
  SELECT e.position, e.event_id, e.type FROM parked_events e WHERE e.parked_id = p_parked_id ORDER BY e.position LIMIT p_limit
$$;
CREATE FUNCTION ask_parked(p_request_id uuid, p_parked_id uuid, p_action text, p_all boolean, p_asked_by text) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
  INSERT INTO parked_requests (request_id, parked_id, action, all_events, asked_by)
  SELECT p_request_id, k.parked_id, p_action, p_all, p_asked_by FROM parked_keys k WHERE k.parked_id = p_parked_id;
  RETURN FOUND;
END $$;
CREATE FUNCTION parked_answer(p_request_id uuid) RETURNS TABLE (
  done boolean, outcome text, applied bigint, skipped bigint, skipped_events text, still_there boolean
)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
  SELECT r.done_at IS NOT NULL, r.outcome, r.applied, r.skipped, r.skipped_events,
    EXISTS (SELECT FROM parked_keys k WHERE k.parked_id = r.parked_id)
  FROM parked_requests r WHERE r.request_id = p_request_id
$$;
CREATE FUNCTION count_parked(p_shard integer) RETURNS TABLE (consumer text, parked bigint)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
  SELECT k.consumer, count(*) FROM parked_keys k WHERE k.shard = p_shard GROUP BY k.consumer
$$;
"""
NAMES = ("list_parked", "get_parked", "parked_events_of", "ask_parked", "parked_answer", "count_parked")


def upgrade() -> None:
    """Three tables, which the projector writes, and functions for operators."""
    roles = context.config.attributes["roles"]
    app, query = roles["app"], roles["query"]
    op.execute(TABLES)
    op.execute(f'GRANT SELECT, INSERT, UPDATE, DELETE ON parked_keys, parked_events, parked_requests TO "{app}"')
    op.execute(f'CREATE POLICY projector ON parked_keys TO "{app}" USING (true) WITH CHECK (true)')
    op.execute(
        f'CREATE POLICY tenant ON parked_keys FOR SELECT TO "{query}"'
        " USING (tenant = nullif(current_setting('app.tenant', true), ''))"
    )
    op.execute(f'GRANT SELECT ON parked_keys TO "{query}"')
    op.execute(FUNCTIONS)
    for name in NAMES:
        op.execute(f"REVOKE ALL ON FUNCTION {name} FROM PUBLIC")
        op.execute(f'GRANT EXECUTE ON FUNCTION {name} TO "{query}"')


def downgrade() -> None:
    """Nothing is parked any more; a fold that raises stops its group."""
    for name in NAMES:
        op.execute(f"DROP FUNCTION {name}")
    op.execute("DROP TABLE parked_requests, parked_events, parked_keys")
