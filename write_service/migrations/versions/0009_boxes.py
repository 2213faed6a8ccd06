"""Boxes: aggregates whose events are in the archive, and the two functions that take events out of the tables and put them back.

Revision ID: 0009
Revises: 0008
"""

from __future__ import annotations

from alembic import context, op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

# `boxed_events` says for each position that is not in `events` which box has it. A box stays when its events are put back.
TABLES = """
CREATE TABLE boxes (
  box_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  tenant text COLLATE "C" NOT NULL,
  category text COLLATE "C" NOT NULL,
  aggregate_id text COLLATE "C" NOT NULL,
  version bigint NOT NULL,
  location text COLLATE "C" NOT NULL,
  chain bytea NOT NULL,
  boxed_at timestamptz NOT NULL,
  unboxed_at timestamptz,
  UNIQUE (tenant, category, aggregate_id, version)
);
CREATE INDEX boxes_by_tenant ON boxes (tenant, box_id);
CREATE TABLE boxed_events (
  position bigint PRIMARY KEY,
  event_id uuid NOT NULL,
  box_id bigint NOT NULL REFERENCES boxes
);
CREATE INDEX boxed_events_by_box ON boxed_events (box_id);
"""

# Events are still never updated, and deleted by `box_aggregate` alone, which has the setting on for one statement.
IMMUTABLE = """
CREATE OR REPLACE FUNCTION events_never_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP = 'DELETE' AND current_setting('foldline.boxing', true) = 'on' THEN
    RETURN NULL;
  END IF;
  RAISE EXCEPTION 'events are never changed' USING ERRCODE = 'integrity_constraint_violation';
END $$;
"""

# The hash chain over the events of an aggregate up to a version. `shared/line/archive.py: chain` computes the same of what it
# reads back from the archive: equal chains mean equal bytes, positions, ids and times.
CHAIN = """
CREATE FUNCTION box_chain(p_tenant text, p_category text, p_aggregate_id text, p_version bigint) RETURNS bytea
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp
AS $$
DECLARE
  chain bytea := sha256(convert_to(concat_ws(E'\\n', p_tenant, p_category, p_aggregate_id), 'UTF8'));
  e events;
BEGIN
  FOR e IN SELECT * FROM events
    WHERE tenant = p_tenant AND category = p_category AND aggregate_id = p_aggregate_id AND version <= p_version
    ORDER BY version
  LOOP
    chain := sha256(chain || convert_to(concat_ws(E'\\n', e.position, e.event_id, e.version, e.type,
      (extract(epoch FROM e.recorded_at) * 1000000)::bigint, encode(e.payload, 'hex'), encode(e.metadata, 'hex')), 'UTF8'));
  END LOOP;
  RETURN chain;
END $$;
"""

# Killed anywhere: all of it is there or nothing. A command on the aggregate at the same time: whoever takes the shard's lock
# first wins; the other finds the version taken, or the aggregate moved. The chain is computed before the lock is taken, since
# events never change: what may have happened until then is that events were added or that somebody else boxed these, and both
# show in the newest version.
BOX = """
CREATE FUNCTION box_aggregate(
  p_shard integer, p_tenant text, p_category text, p_aggregate_id text, p_version bigint, p_location text, p_chain bytea,
  c_command_id uuid, c_type text, c_fingerprint bytea, c_payload bytea, c_user_id text, c_correlation_id uuid,
  c_traceparent text, c_received_at timestamptz, e_event_id uuid, e_type text, e_payload bytea, e_metadata bytea,
  OUT o_head bigint
)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp
AS $$
DECLARE
  boxed_as bigint;
  moved bigint;
BEGIN
  IF box_chain(p_tenant, p_category, p_aggregate_id, p_version) <> p_chain THEN
    RAISE EXCEPTION 'the archive has other events than the line' USING ERRCODE = 'data_exception';
  END IF;
  PERFORM pg_advisory_xact_lock(1, p_shard);
  IF p_version <> (
    SELECT e.version FROM events e
    WHERE e.tenant = p_tenant AND e.category = p_category AND e.aggregate_id = p_aggregate_id
    ORDER BY e.version DESC LIMIT 1)
  THEN
    RAISE EXCEPTION 'the aggregate has moved' USING ERRCODE = 'serialization_failure';
  END IF;
  SELECT a.o_head INTO o_head FROM append_one(
    p_shard, p_tenant, p_category, p_aggregate_id, p_version + 1, c_command_id, c_type, c_fingerprint, c_payload, c_user_id,
    '', c_correlation_id, NULL, c_traceparent, c_received_at, e_event_id, e_type, e_payload, e_metadata, 0) a;
  INSERT INTO boxes (tenant, category, aggregate_id, version, location, chain, boxed_at)
  VALUES (p_tenant, p_category, p_aggregate_id, p_version, p_location, p_chain, clock_timestamp())
  RETURNING box_id INTO boxed_as;
  PERFORM set_config('foldline.boxing', 'on', true);
  WITH gone AS (
    DELETE FROM events e
    WHERE e.tenant = p_tenant AND e.category = p_category AND e.aggregate_id = p_aggregate_id AND e.version <= p_version
    RETURNING e.position, e.event_id)
  INSERT INTO boxed_events (position, event_id, box_id) SELECT g.position, g.event_id, boxed_as FROM gone g;
  GET DIAGNOSTICS moved = ROW_COUNT;
  PERFORM set_config('foldline.boxing', '', true);
  IF moved <> p_version THEN
    RAISE EXCEPTION 'the stream has a gap' USING ERRCODE = 'data_exception';
  END IF;
  DELETE FROM snapshots s WHERE s.tenant = p_tenant AND s.category = p_category AND s.aggregate_id = p_aggregate_id;
END $$;
"""

UNBOX = """
CREATE FUNCTION unbox_aggregate(
  p_shard integer, p_tenant text, p_category text, p_aggregate_id text, p_version bigint,
  x_position bigint[], x_event_id uuid[], x_type text[], x_payload bytea[], x_recorded_at timestamptz[], x_metadata bytea[],
  s_schema integer, s_state bytea,
  c_command_id uuid, c_type text, c_fingerprint bytea, c_payload bytea, c_user_id text, c_correlation_id uuid,
  c_traceparent text, c_received_at timestamptz, e_event_id uuid, e_type text, e_payload bytea, e_metadata bytea,
  OUT o_head bigint
)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp
AS $$
DECLARE
  box boxes;
BEGIN
  PERFORM pg_advisory_xact_lock(1, p_shard);
  SELECT * INTO box FROM boxes b
  WHERE b.tenant = p_tenant AND b.category = p_category AND b.aggregate_id = p_aggregate_id AND b.version = p_version
    AND b.unboxed_at IS NULL;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'the aggregate is not in this box' USING ERRCODE = 'serialization_failure';
  END IF;
  INSERT INTO events (position, event_id, tenant, category, aggregate_id, version, type, payload, recorded_at, metadata)
  SELECT x.position, x.event_id, p_tenant, p_category, p_aggregate_id, x.version, x.type, x.payload, x.recorded_at, x.metadata
  FROM (
    SELECT unnest(x_position) AS position, unnest(x_event_id) AS event_id, generate_series(1, p_version) AS version,
      unnest(x_type) AS type, unnest(x_payload) AS payload, unnest(x_recorded_at) AS recorded_at,
      unnest(x_metadata) AS metadata) AS x;
  IF box_chain(p_tenant, p_category, p_aggregate_id, p_version) <> box.chain THEN
    RAISE EXCEPTION 'these are not the events that were boxed' USING ERRCODE = 'data_exception';
  END IF;
  DELETE FROM boxed_events b WHERE b.box_id = box.box_id;
  IF s_state IS NOT NULL THEN
    INSERT INTO snapshots (tenant, category, aggregate_id, version, schema, state)
    VALUES (p_tenant, p_category, p_aggregate_id, p_version, s_schema, s_state);
  END IF;
  SELECT a.o_head INTO o_head FROM append_one(
    p_shard, p_tenant, p_category, p_aggregate_id, p_version + 2, c_command_id, c_type, c_fingerprint, c_payload, c_user_id,
    '', c_correlation_id, NULL, c_traceparent, c_received_at, e_event_id, e_type, e_payload, e_metadata, 0) a;
  UPDATE boxes SET unboxed_at = clock_timestamp() WHERE box_id = box.box_id;
END $$;
"""


def upgrade() -> None:
    """Adds tables and functions; the application reads the tables and calls the two functions."""
    app = context.config.attributes["roles"]["app"]
    for statements in (TABLES, IMMUTABLE, CHAIN, BOX, UNBOX):
        op.execute(statements)
    op.execute("REVOKE ALL ON FUNCTION box_chain, box_aggregate, unbox_aggregate FROM PUBLIC")
    op.execute(f'GRANT SELECT ON boxes, boxed_events TO "{app}"')
    op.execute(f'GRANT EXECUTE ON FUNCTION box_aggregate, unbox_aggregate TO "{app}"')


def downgrade() -> None:
    """Boxed events would be lost; unbox them and restore a backup instead."""
    raise NotImplementedError("restore a backup instead")
