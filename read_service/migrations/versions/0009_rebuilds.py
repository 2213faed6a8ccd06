"""Rebuilds: the tables of a group are filled anew beside those that serve, compared, and put in their place.

Revision ID: 0009
Revises: 0008
"""

from __future__ import annotations

from alembic import context, op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

# A row lasts from the request until the former tables are dropped, or until it is cancelled.
TABLE = """
CREATE TABLE projection_rebuilds (
  group_name text COLLATE "C" NOT NULL,
  shard integer NOT NULL,
  version integer NOT NULL,
  tables text[] NOT NULL DEFAULT '{}',
  state text COLLATE "C" NOT NULL DEFAULT 'asked'
    CHECK (state IN ('asked', 'filling', 'waiting', 'switching', 'switched', 'cancelling', 'dropping')),
  only_if_same boolean NOT NULL,
  asked_by text NOT NULL,
  asked_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  started_at timestamptz,
  ended_at timestamptz,
  compared_at bigint,
  rows_before bigint,
  rows_after bigint,
  rows_differing bigint,
  differences text NOT NULL DEFAULT '[]',
  PRIMARY KEY (group_name, shard)
);
CREATE SEQUENCE projection_versions AS integer START 2;
"""

# A version's number is never used again, so nothing that still runs of a cancelled one can touch the tables of another.
#
# Tables are made, renamed and dropped by their owner alone, in these functions. Of the names that they are given, each must be
# that of a query table, and the rest of a name is theirs.
#
# `switch_rebuild` locks the checkpoints before the tables, as each batch of a projector does. A projector that is in the middle
# of a batch is waited for; one that comes later finds its checkpoint gone. A query holds a table for milliseconds; the switch
# waits for it, and later queries for the switch, but not for long: then it gives up and is tried again. The former version's
# checkpoint goes, so whatever still runs of it is fenced.
FUNCTIONS = """
CREATE FUNCTION check_query_tables(p_tables text[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
  IF EXISTS (SELECT FROM unnest(p_tables) AS t (name) WHERE NOT EXISTS (
    SELECT FROM pg_policies p WHERE p.schemaname = 'public' AND p.tablename = t.name AND p.policyname = 'tenant'
      AND t.name <> 'parked_keys')) THEN
    RAISE EXCEPTION 'not a query table';
  END IF;
END $$;

CREATE FUNCTION prepare_rebuild(p_group text, p_shard integer, p_version integer, p_tables text[]) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  v_table text;
  v_options text;
BEGIN
  UPDATE projection_rebuilds SET state = 'filling', started_at = clock_timestamp(), tables = p_tables
  WHERE group_name = p_group AND shard = p_shard AND version = p_version AND state = 'asked';
  IF NOT FOUND THEN
    RETURN false;
  END IF;
  PERFORM check_query_tables(p_tables);
  INSERT INTO checkpoints (name, shard, serves) VALUES (p_group || '@' || p_version, p_shard, false);
  FOREACH v_table IN ARRAY p_tables LOOP
    EXECUTE format('CREATE TABLE public.%I (LIKE %I INCLUDING ALL)', v_table || '__v' || p_version, v_table);
    SELECT array_to_string(c.reloptions, ', ') INTO v_options FROM pg_class c WHERE c.oid = v_table::regclass;
    IF v_options IS NOT NULL THEN
      EXECUTE format('ALTER TABLE %I SET (%s)', v_table || '__v' || p_version, v_options);
    END IF;
    PERFORM secure_query_table((v_table || '__v' || p_version)::regclass, {app}, {query});
  END LOOP;
  RETURN true;
END $$;

CREATE FUNCTION switch_rebuild(p_group text, p_shard integer, p_version integer) RETURNS boolean
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
  SELECT * INTO v_old FROM checkpoints WHERE group_name = p_group AND shard = p_shard AND serves FOR UPDATE;
  SELECT * INTO v_new FROM checkpoints WHERE name = v_name AND shard = p_shard FOR UPDATE;
  IF v_rebuild.group_name IS NULL OR v_old.name IS NULL OR v_new.name IS NULL OR v_old.name = v_new.name
    OR v_new.position < v_old.position OR v_new.epoch <> v_old.epoch THEN
    RETURN false;
  END IF;
  FOREACH v_table IN ARRAY v_rebuild.tables LOOP
    EXECUTE format('LOCK TABLE %I, %I IN ACCESS EXCLUSIVE MODE', v_table, v_table || '__v' || p_version);
  END LOOP;
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
  ON CONFLICT (group_name, shard, slot) DO UPDATE SET seq = excluded.seq, changed = excluded.changed;
  UPDATE projection_rebuilds SET state = 'switched', ended_at = clock_timestamp()
  WHERE group_name = p_group AND shard = p_shard;
  RETURN true;
END $$;

CREATE FUNCTION end_rebuild(p_group text, p_shard integer, p_version integer) RETURNS boolean
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
    DELETE FROM parked_keys WHERE consumer = p_group || '@' || p_version AND shard = p_shard;
    DELETE FROM checkpoints WHERE name = p_group || '@' || p_version AND shard = p_shard AND NOT serves;
  END IF;
  FOREACH v_table IN ARRAY v_rebuild.tables LOOP
    EXECUTE format('DROP TABLE %I', v_table || CASE v_rebuild.state WHEN 'dropping' THEN '__old' ELSE '__v' || p_version END);
  END LOOP;
  RETURN true;
END $$;

CREATE FUNCTION ask_rebuild(p_group text, p_shard integer, p_only_if_same boolean, p_asked_by text) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  v_serving checkpoints;
BEGIN
  SELECT * INTO v_serving FROM checkpoints WHERE group_name = p_group AND shard = p_shard AND serves;
  IF v_serving.name IS NULL THEN
    RETURN 'NEVER_FILLED';
  END IF;
  IF v_serving.state = 'stopped' AND starts_with(v_serving.reason, 'HISTORY_DIVERGED') THEN
    RETURN 'DIVERGED';
  END IF;
  INSERT INTO projection_rebuilds (group_name, shard, version, only_if_same, asked_by)
  VALUES (p_group, p_shard, nextval('projection_versions'), p_only_if_same, p_asked_by) ON CONFLICT DO NOTHING;
  RETURN CASE WHEN FOUND THEN 'ASKED' ELSE 'THERE_ALREADY' END;
END $$;

CREATE FUNCTION steer_rebuild(p_group text, p_shard integer, p_from text[], p_to text) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
  IF p_to NOT IN ('switching', 'cancelling', 'dropping') THEN
    RETURN false;
  END IF;
  UPDATE projection_rebuilds SET state = p_to WHERE group_name = p_group AND shard = p_shard AND state = ANY (p_from)
    AND (p_to = 'dropping') = (state = 'switched');
  RETURN FOUND;
END $$;

CREATE FUNCTION get_rebuild(p_group text, p_shard integer) RETURNS TABLE (
  version integer, state text, only_if_same boolean, asked_by text, started_at timestamptz, ended_at timestamptz,
  at_position bigint, target_position bigint, reason text, parked bigint,
  compared_at bigint, rows_before bigint, rows_after bigint, rows_differing bigint, differences text
)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
  SELECT r.version, r.state, r.only_if_same, r.asked_by, r.started_at, r.ended_at, coalesce(n.position, 0),
    coalesce((SELECT max(c.position) FROM checkpoints c WHERE c.shard = p_shard AND c.serves), 0), coalesce(n.reason, ''),
    (SELECT count(*) FROM parked_keys k WHERE k.consumer = p_group || '@' || r.version AND k.shard = p_shard),
    r.compared_at, r.rows_before, r.rows_after, r.rows_differing, r.differences
  FROM projection_rebuilds r LEFT JOIN checkpoints n ON n.name = p_group || '@' || r.version AND n.shard = r.shard
  WHERE r.group_name = p_group AND r.shard = p_shard
$$;
"""
OF_THE_PROJECTOR = ("prepare_rebuild", "switch_rebuild", "end_rebuild")
OF_OPERATORS = ("ask_rebuild", "steer_rebuild", "get_rebuild")


def upgrade() -> None:
    """A table, functions for the projector, and functions for operators."""
    roles = context.config.attributes["roles"]
    app, query = roles["app"], roles["query"]
    op.execute(TABLE)
    op.execute(f'GRANT SELECT ON projection_rebuilds TO "{app}"')
    op.execute(
        "GRANT UPDATE (state, compared_at, rows_before, rows_after, rows_differing, differences)"
        f' ON projection_rebuilds TO "{app}"'
    )
    op.execute(FUNCTIONS.replace("{app}", f"'{app}'").replace("{query}", f"'{query}'"))
    op.execute("REVOKE ALL ON FUNCTION check_query_tables FROM PUBLIC")
    for names, role in ((OF_THE_PROJECTOR, app), (OF_OPERATORS, query)):
        for name in names:
            op.execute(f"REVOKE ALL ON FUNCTION {name} FROM PUBLIC")
            op.execute(f'GRANT EXECUTE ON FUNCTION {name} TO "{role}"')


def downgrade() -> None:
    """There is no way back while the tables of a version other than the first serve."""
    raise NotImplementedError("write a new migration instead")
