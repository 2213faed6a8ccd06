"""What a watch of a list needs to go on: a mark of each change, and the rows of one tenant that changed behind it.

Revision ID: 0012
Revises: 0011
"""

from __future__ import annotations

from alembic import context, op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

# The mark tells a change from another with the same number, which there is after the read database was restored.
MARK = "ALTER TABLE row_changes ADD COLUMN mark uuid NOT NULL DEFAULT gen_random_uuid()"
FUNCTIONS = """
CREATE FUNCTION row_changes_place(p_group text, p_shard integer)
RETURNS TABLE (seq bigint, mark text, at_position bigint, epoch text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
  SELECT coalesce(h.seq, 0), coalesce(c.mark::text, ''), coalesce(k.position, 0), coalesce(k.epoch, '')
  FROM (VALUES (1)) AS always (row)
  LEFT JOIN row_change_heads h ON h.group_name = p_group AND h.shard = p_shard
  LEFT JOIN row_changes c ON c.group_name = p_group AND c.shard = p_shard AND c.slot = h.seq % 512 AND c.seq = h.seq
  LEFT JOIN checkpoints k ON k.group_name = p_group AND k.shard = p_shard AND k.serves
$$;
CREATE FUNCTION row_changes_of(p_group text, p_shard integer, p_tenant text, p_seq bigint, p_mark text, p_bytes_max integer)
RETURNS text[]
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  v_head bigint;
  v_entries bigint;
  v_named bigint;
  v_bytes bigint;
BEGIN
  SELECT h.seq INTO v_head FROM row_change_heads h WHERE h.group_name = p_group AND h.shard = p_shard;
  IF NOT EXISTS (SELECT FROM row_changes c WHERE c.group_name = p_group AND c.shard = p_shard AND c.slot = p_seq % 512
      AND c.seq = p_seq AND c.mark::text = p_mark) THEN
    RETURN NULL;
  END IF;
  SELECT count(*), count(c.changed), coalesce(sum(length(c.changed)), 0) INTO v_entries, v_named, v_bytes
  FROM row_changes c WHERE c.group_name = p_group AND c.shard = p_shard AND c.seq > p_seq;
  IF v_entries <> v_head - p_seq OR v_named <> v_entries OR v_bytes > p_bytes_max THEN
    RETURN NULL;
  END IF;
  RETURN (
    SELECT coalesce(array_agg(DISTINCT e.id ->> 1), '{}')
    FROM row_changes c CROSS JOIN LATERAL json_array_elements(c.changed::json) AS e (id)
    WHERE c.group_name = p_group AND c.shard = p_shard AND c.seq > p_seq AND e.id ->> 0 = p_tenant);
END $$;
"""
NAMES = ("row_changes_place", "row_changes_of")


def upgrade() -> None:
    """A column and two functions for the query role, which sees of the changes what it asks of one tenant."""
    query = context.config.attributes["roles"]["query"]
    op.execute(MARK)
    op.execute(FUNCTIONS)
    for name in NAMES:
        op.execute(f"REVOKE ALL ON FUNCTION {name} FROM PUBLIC")
        op.execute(f'GRANT EXECUTE ON FUNCTION {name} TO "{query}"')


def downgrade() -> None:
    """Lists cannot be watched."""
    for name in NAMES:
        op.execute(f"DROP FUNCTION {name}")
    op.execute("ALTER TABLE row_changes DROP COLUMN mark")
