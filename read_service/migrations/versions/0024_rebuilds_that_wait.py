"""When a rebuild does not switch by itself, and what it locks first.

It waits for an operator if a key is parked in its tables alone: their rows lack events of those that serve. It begins anew
if a migration has changed the tables since, which its own do not have. Its end locks the tables before the checkpoint, as its
switch and a projector's batch do; the other way around, it and a batch of a paused leader waited for each other.

Revision ID: 0024
Revises: 0023
"""

from __future__ import annotations

from alembic import context, op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None

# `switch_rebuild` is that of migration 0021, with what it looks at behind the locks: a migration that changes the tables, and a
# batch that parks a key, have ended by then.
#
# Indexes of both versions are paired by their definitions, and those with the same definition by their order: two of one table
# let no rebuild switch.
FUNCTIONS = """
CREATE FUNCTION indexes_of_table(p_table text) RETURNS TABLE (name name, definition text, number bigint)
LANGUAGE sql STABLE SET search_path = pg_catalog, public, pg_temp AS $$
  SELECT relname, definition, row_number() OVER (PARTITION BY definition ORDER BY relname) FROM (
    SELECT c.relname, format('index %s %s %s', i.indisunique, i.indisprimary, split_part(pg_get_indexdef(c.oid), ' USING ', 2))
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indrelid = p_table::regclass) AS it (relname, definition)
$$;

CREATE FUNCTION shape_of_table(p_table text) RETURNS text[]
LANGUAGE sql STABLE SET search_path = pg_catalog, public, pg_temp AS $$
  SELECT array_agg(part ORDER BY part) FROM (
    SELECT format('column %s %s %s %s %s', a.attname, format_type(a.atttypid, a.atttypmod), a.attcollation, a.attnotnull,
      pg_get_expr(d.adbin, d.adrelid))
    FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE a.attrelid = p_table::regclass AND a.attnum > 0 AND NOT a.attisdropped
    UNION ALL
    SELECT definition FROM indexes_of_table(p_table)
    UNION ALL
    SELECT pg_get_constraintdef(c.oid) FROM pg_constraint c WHERE c.conrelid = p_table::regclass AND c.contype = 'c') AS s (part)
$$;

CREATE FUNCTION drop_rebuilt(p_rebuild projection_rebuilds) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  v_name text := p_rebuild.group_name || '@' || p_rebuild.version;
  v_table text;
BEGIN
  FOREACH v_table IN ARRAY p_rebuild.tables LOOP
    EXECUTE format('LOCK TABLE %I IN ACCESS EXCLUSIVE MODE', v_table || '__v' || p_rebuild.version);
  END LOOP;
  DELETE FROM parked_keys WHERE consumer = v_name AND shard = p_rebuild.shard;
  DELETE FROM checkpoints WHERE name = v_name AND shard = p_rebuild.shard AND NOT serves;
  FOREACH v_table IN ARRAY p_rebuild.tables LOOP
    EXECUTE format('DROP TABLE %I', v_table || '__v' || p_rebuild.version);
  END LOOP;
END $$;

CREATE OR REPLACE FUNCTION end_rebuild(p_group text, p_shard integer, p_version integer) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '2s' AS $$
DECLARE
  v_rebuild projection_rebuilds;
  v_table text;
BEGIN
  DELETE FROM projection_rebuilds WHERE group_name = p_group AND shard = p_shard AND version = p_version
    AND state IN ('cancelling', 'dropping') RETURNING * INTO v_rebuild;
  IF v_rebuild.group_name IS NULL THEN
    RETURN false;
  END IF;
  IF v_rebuild.state = 'cancelling' THEN
    PERFORM drop_rebuilt(v_rebuild);
    RETURN true;
  END IF;
  FOREACH v_table IN ARRAY v_rebuild.tables LOOP
    EXECUTE format('DROP TABLE %I', v_table || '__old');
  END LOOP;
  RETURN true;
END $$;

CREATE FUNCTION renew_rebuild(p_group text, p_shard integer, p_version integer) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '200ms' AS $$
DECLARE
  v_rebuild projection_rebuilds;
BEGIN
  SELECT * INTO v_rebuild FROM projection_rebuilds
  WHERE group_name = p_group AND shard = p_shard AND version = p_version AND state IN ('filling', 'waiting', 'switching')
  FOR UPDATE;
  IF v_rebuild.group_name IS NULL OR NOT EXISTS (
    SELECT FROM unnest(v_rebuild.tables) AS t (name)
    WHERE shape_of_table(t.name) IS DISTINCT FROM shape_of_table(t.name || '__v' || p_version)) THEN
    RETURN false;
  END IF;
  PERFORM drop_rebuilt(v_rebuild);
  UPDATE projection_rebuilds
  SET version = nextval('projection_versions'), state = 'asked', tables = '{}', started_at = NULL, compared_at = NULL,
    rows_before = NULL, rows_after = NULL, rows_differing = NULL, differences = '[]',
    only_if_same = only_if_same AND state <> 'switching'
  WHERE group_name = p_group AND shard = p_shard;
  RETURN true;
END $$;

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
  IF renew_rebuild(p_group, p_shard, p_version) THEN
    RETURN false;
  END IF;
  SELECT * INTO v_old FROM checkpoints WHERE group_name = p_group AND shard = p_shard AND serves FOR UPDATE;
  SELECT * INTO v_new FROM checkpoints WHERE name = v_name AND shard = p_shard FOR UPDATE;
  IF v_old.name IS NULL OR v_new.name IS NULL OR v_old.name = v_new.name
    OR v_new.position < v_old.position OR v_new.epoch <> v_old.epoch THEN
    RETURN false;
  END IF;
  IF v_rebuild.state = 'filling' AND EXISTS (
    SELECT FROM parked_keys n WHERE n.consumer = v_name AND n.shard = p_shard AND NOT EXISTS (
      SELECT FROM parked_keys o WHERE o.consumer = v_old.name AND o.shard = p_shard
        AND (o.tenant, o.table_name, o.key) = (n.tenant, n.table_name, n.key))) THEN
    UPDATE projection_rebuilds SET state = 'waiting' WHERE group_name = p_group AND shard = p_shard;
    RETURN false;
  END IF;
  FOREACH v_table IN ARRAY v_rebuild.tables LOOP
    EXECUTE format('ALTER TABLE %I RENAME TO %I', v_table, v_table || '__old');
    EXECUTE format('ALTER TABLE %I RENAME TO %I', v_table || '__v' || p_version, v_table);
    FOR v_index IN
      SELECT o.name AS former, n.name AS latter
      FROM indexes_of_table(v_table || '__old') o JOIN indexes_of_table(v_table) n USING (definition, number)
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
OF_THE_OWNER = ("indexes_of_table", "shape_of_table", "drop_rebuilt")


def upgrade() -> None:
    """A projector of the release before calls `switch_rebuild` and `end_rebuild` as ever, and follows the states."""
    app = context.config.attributes["roles"]["app"]
    op.execute(FUNCTIONS)
    for name in (*OF_THE_OWNER, "renew_rebuild"):
        op.execute(f"REVOKE ALL ON FUNCTION {name} FROM PUBLIC")
    op.execute(f'GRANT EXECUTE ON FUNCTION renew_rebuild TO "{app}"')


def downgrade() -> None:
    """The functions are right for the release before, too."""
