"""Parked keys are counted up to a number for each version of a group: with tens of thousands of keys, operators wait no longer.

Revision ID: 0023
Revises: 0022
"""

from __future__ import annotations

from alembic import context, op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None

# Each count reads a part of the index that begins with consumer and shard.
COUNT = """
CREATE FUNCTION count_parked_each(p_shard integer, p_max integer) RETURNS TABLE (consumer text, parked bigint)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
  SELECT c.name, n.parked FROM checkpoints c CROSS JOIN LATERAL (
    SELECT count(*) AS parked FROM (
      SELECT FROM parked_keys k WHERE k.consumer = c.name AND k.shard = p_shard LIMIT p_max) k) n
  WHERE c.shard = p_shard AND n.parked > 0
$$;
"""
REBUILD = """
CREATE OR REPLACE FUNCTION get_rebuild(p_group text, p_shard integer) RETURNS TABLE (
  version integer, state text, only_if_same boolean, asked_by text, started_at timestamptz, ended_at timestamptz,
  at_position bigint, target_position bigint, reason text, parked bigint,
  compared_at bigint, rows_before bigint, rows_after bigint, rows_differing bigint, differences text
)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
  SELECT r.version, r.state, r.only_if_same, r.asked_by, r.started_at, r.ended_at, coalesce(n.position, 0),
    coalesce((SELECT max(c.position) FROM checkpoints c WHERE c.shard = p_shard AND c.serves), 0), coalesce(n.reason, ''),
    (SELECT count(*) FROM (
      SELECT FROM parked_keys k WHERE k.consumer = p_group || '@' || r.version AND k.shard = p_shard LIMIT 10000) k),
    r.compared_at, r.rows_before, r.rows_after, r.rows_differing, r.differences
  FROM projection_rebuilds r LEFT JOIN checkpoints n ON n.name = p_group || '@' || r.version AND n.shard = r.shard
  WHERE r.group_name = p_group AND r.shard = p_shard
$$;
"""


def upgrade() -> None:
    """A function for the query role beside those of the release before, and one that counts no further than that."""
    query = context.config.attributes["roles"]["query"]
    op.execute(COUNT)
    op.execute("REVOKE ALL ON FUNCTION count_parked_each FROM PUBLIC")
    op.execute(f'GRANT EXECUTE ON FUNCTION count_parked_each TO "{query}"')
    op.execute(REBUILD)


def downgrade() -> None:
    """The changed function is right for the release before, too."""
    op.execute("DROP FUNCTION count_parked_each")
