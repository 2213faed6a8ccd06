"""Lists of parked keys, and of deactivated users by status, that cost as much as they show.

Revision ID: 0020
Revises: 0019
"""

from __future__ import annotations

from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

INDEXES = """
CREATE INDEX parked_keys_by_shard ON parked_keys (shard, parked_at, parked_id);
CREATE INDEX parked_keys_by_group ON parked_keys (shard, group_name, parked_at, parked_id);
CREATE INDEX parked_keys_by_tenant ON parked_keys (shard, tenant, parked_at, parked_id);
CREATE INDEX parked_keys_by_tenant_and_group ON parked_keys (shard, tenant, group_name, parked_at, parked_id);
CREATE INDEX users_deactivated_by_status ON users (tenant, status, started_at, user_id) WHERE deactivated_at IS NOT NULL;
"""

# Only the conditions that are asked for are in the query, because a plan for "this value, or any" uses no index of it. Of the
# events that wait for a key 10,000 are counted.
LIST = """
CREATE OR REPLACE FUNCTION list_parked(
  p_shard integer, p_consumer text, p_tenant text, p_at timestamptz, p_at_id uuid, p_limit integer
) RETURNS TABLE (
  parked_id uuid, consumer text, shard integer, tenant text, table_name text, key text, error text, behind uuid,
  parked_at timestamptz, events bigint
)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
  RETURN QUERY EXECUTE
    'SELECT k.parked_id, k.consumer, k.shard, k.tenant, k.table_name, k.key, k.error, k.behind, k.parked_at,
       (SELECT count(*) FROM (SELECT FROM parked_events e WHERE e.parked_id = k.parked_id LIMIT 10000) e)
     FROM parked_keys k WHERE k.shard = $1 AND (k.parked_at, k.parked_id) > ($4, $5)'
    || CASE WHEN p_consumer = '' THEN '' ELSE ' AND k.group_name = $2' END
    || CASE WHEN p_tenant = '' THEN '' ELSE ' AND k.tenant = $3' END
    || ' ORDER BY k.parked_at, k.parked_id LIMIT $6'
  USING p_shard, p_consumer, p_tenant, p_at, p_at_id, p_limit;
END $$;
"""

LIST_BEFORE = """
CREATE OR REPLACE FUNCTION list_parked(
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
"""


def upgrade() -> None:
    """Indexes of tables that have few entries as a rule, and a function that uses them."""
    op.execute(INDEXES)
    op.execute(LIST)


def downgrade() -> None:
    """Such lists read all parked keys, and all users of a status, again."""
    op.execute(LIST_BEFORE)
    op.execute(
        "DROP INDEX parked_keys_by_shard, parked_keys_by_group, parked_keys_by_tenant, parked_keys_by_tenant_and_group,"
        " users_deactivated_by_status"
    )
