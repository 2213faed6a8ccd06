"""A count of parked keys for the gauge, which costs the same however many events wait.

Revision ID: 0011
Revises: 0010
"""

from __future__ import annotations

from alembic import context, op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

# Of the oldest keys, as many as the caller wants counted at the most. It reads no queue.
FUNCTION = """
CREATE FUNCTION count_parked_capped(p_shard integer, p_max integer) RETURNS TABLE (consumer text, parked bigint)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
  SELECT k.consumer, count(*)
  FROM (SELECT p.consumer FROM parked_keys p WHERE p.shard = p_shard ORDER BY p.parked_at, p.parked_id LIMIT p_max) k
  GROUP BY k.consumer
$$;
"""


def upgrade() -> None:
    """A function for the query role."""
    query = context.config.attributes["roles"]["query"]
    op.execute(FUNCTION)
    op.execute("REVOKE ALL ON FUNCTION count_parked_capped FROM PUBLIC")
    op.execute(f'GRANT EXECUTE ON FUNCTION count_parked_capped TO "{query}"')


def downgrade() -> None:
    """The gauge counts by list_parked again."""
    op.execute("DROP FUNCTION count_parked_capped")
