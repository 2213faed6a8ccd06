"""A switch of a rebuild locks the tables before the checkpoints, as the statement of a projector's batch does.

PostgreSQL locks all tables of a statement before it looks for a row. The other way around, a batch that began during the switch
and the switch waited for each other, until the switch gave up after 200 ms.

Revision ID: 0021
Revises: 0020
"""

from __future__ import annotations

from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

FUNCTION = """
CREATE OR REPLACE FUNCTION switch_rebuild(p_group text, p_shard integer, p_version integer) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '200ms' AS $$
DECLARE
  v_name text := p_group || '@' || p_version;
  v_rebuild projection_rebuilds;
  v_old checkpoints;
  v_new checkpoints;
  v_table text;
  v_index record;
BEGIN
  SELECT * INTO v_rebuild FROM projection_rebuilds
  WHERE group_name = p_group AND shard = p_shard AND version = p_version AND state IN ('filling', 'switching') FOR UPDATE;
  IF v_rebuild.group_name IS NULL OR NOT EXISTS (
    SELECT FROM checkpoints o JOIN checkpoints n ON n.name = v_name AND n.shard = p_shard AND n.epoch = o.epoch
    WHERE o.group_name = p_group AND o.shard = p_shard AND o.serves AND o.name <> v_name AND n.position >= o.position) THEN
    RETURN false;
  END IF;
  FOREACH v_table IN ARRAY v_rebuild.tables LOOP
    EXECUTE format('LOCK TABLE %I, %I IN ACCESS EXCLUSIVE MODE', v_table, v_table || '__v' || p_version);
  END LOOP;
  SELECT * INTO v_old FROM checkpoints WHERE group_name = p_group AND shard = p_shard AND serves FOR UPDATE;
  SELECT * INTO v_new FROM checkpoints WHERE name = v_name AND shard = p_shard FOR UPDATE;
  IF v_old.name IS NULL OR v_new.name IS NULL OR v_old.name = v_new.name
    OR v_new.position < v_old.position OR v_new.epoch <> v_old.epoch THEN
    RETURN false;
  END IF;
  FOREACH v_table IN ARRAY v_rebuild.tables LOOP
    EXECUTE format('ALTER TABLE %I RENAME TO %I', v_table, v_table || '__old');
    EXECUTE format('ALTER TABLE %I RENAME TO %I', v_table || '__v' || p_version, v_table);
    FOR v_index IN
      SELECT o.relname AS former, n.relname AS latter
      FROM pg_index oi JOIN pg_class o ON o.oid = oi.indexrelid
      JOIN pg_index ni ON ni.indrelid = v_table::regclass AND ni.indisprimary = oi.indisprimary
        AND split_part(pg_get_indexdef(ni.indexrelid), ' USING ', 2) = split_part(pg_get_indexdef(oi.indexrelid), ' USING ', 2)
      JOIN pg_class n ON n.oid = ni.indexrelid
      WHERE oi.indrelid = (v_table || '__old')::regclass
    LOOP
      EXECUTE format('ALTER INDEX %I RENAME TO %I', v_index.former, left(v_index.former, 58) || '__old');
      EXECUTE format('ALTER INDEX %I RENAME TO %I', v_index.latter, v_index.former);
    END LOOP;
  END LOOP;
  DELETE FROM parked_keys WHERE consumer = v_old.name AND shard = p_shard;
  DELETE FROM checkpoints WHERE name = v_old.name AND shard = p_shard;
  UPDATE checkpoints SET serves = true WHERE name = v_name AND shard = p_shard;
  UPDATE parked_keys SET serves = true WHERE consumer = v_name AND shard = p_shard;
  WITH head AS (
    INSERT INTO row_change_heads AS h (group_name, shard, seq) VALUES (p_group, p_shard, 1)
    ON CONFLICT (group_name, shard) DO UPDATE SET seq = h.seq + 1 RETURNING seq)
  INSERT INTO row_changes AS c (group_name, shard, slot, seq, changed)
  SELECT p_group, p_shard, head.seq % 512, head.seq, NULL FROM head
  ON CONFLICT (group_name, shard, slot) DO UPDATE SET seq = excluded.seq, changed = excluded.changed, mark = excluded.mark;
  UPDATE projection_rebuilds SET state = 'switched', ended_at = clock_timestamp()
  WHERE group_name = p_group AND shard = p_shard;
  RETURN true;
END $$;
"""


def upgrade() -> None:
    """Replaces the function of migration 0017: its checks come before and behind the locks of the tables."""
    op.execute(FUNCTION)


def downgrade() -> None:
    """The function is right for the release before, too."""
