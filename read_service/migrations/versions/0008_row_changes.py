"""Which rows each transaction of a projection changed, for those who watch them.

Revision ID: 0008
Revises: 0007
"""

from __future__ import annotations

from alembic import context, op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

# The last 512 transactions of each group, in a ring, so the table never grows. `changed` has tenant and id of each row, as JSON;
# null is "perhaps every row", for transactions that changed many. Whoever misses a number reads all that they watch anew.
RING = """
CREATE TABLE row_change_heads (
  group_name text COLLATE "C" NOT NULL,
  shard integer NOT NULL,
  seq bigint NOT NULL,
  PRIMARY KEY (group_name, shard)
) WITH (fillfactor = 10);
CREATE TABLE row_changes (
  group_name text COLLATE "C" NOT NULL,
  shard integer NOT NULL,
  slot integer NOT NULL,
  seq bigint NOT NULL,
  changed text,
  PRIMARY KEY (group_name, shard, slot)
) WITH (fillfactor = 50);
CREATE FUNCTION row_changes_since(p_group text, p_shard integer, p_seq bigint) RETURNS TABLE (seq bigint, changed text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
  SELECT c.seq, c.changed FROM row_change_heads h
  CROSS JOIN LATERAL generate_series(greatest(p_seq + 1, h.seq - 511), h.seq) AS wanted (seq)
  JOIN row_changes c ON c.group_name = h.group_name AND c.shard = h.shard AND c.slot = wanted.seq % 512
  WHERE h.group_name = p_group AND h.shard = p_shard
  ORDER BY c.seq
$$;
"""


def upgrade() -> None:
    """Two tables and a function; the query role sees no ids of other tenants but through the function."""
    roles = context.config.attributes["roles"]
    app, query = roles["app"], roles["query"]
    op.execute(RING)
    op.execute(f'GRANT SELECT, INSERT, UPDATE ON row_change_heads, row_changes TO "{app}"')
    op.execute(f'GRANT SELECT ON row_change_heads TO "{query}"')
    op.execute("REVOKE ALL ON FUNCTION row_changes_since FROM PUBLIC")
    op.execute(f'GRANT EXECUTE ON FUNCTION row_changes_since TO "{query}"')


def downgrade() -> None:
    """Nobody can watch."""
    op.execute("DROP FUNCTION row_changes_since")
    op.execute("DROP TABLE row_changes, row_change_heads")
