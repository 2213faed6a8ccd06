"""No append takes a version that is in the archive.

A replica may have a state in memory that is older than the box: the version that it would append is not in the tables any more,
so no index refuses it.

Revision ID: 0010
Revises: 0009
"""

from __future__ import annotations

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

INDEX = "CREATE INDEX boxes_in_force ON boxes (box_id) WHERE unboxed_at IS NULL"

# As in 0006; new is that boxes are looked at. A shard without any is asked for one row.
APPEND_BATCH = """
CREATE OR REPLACE FUNCTION append_batch(
  p_shard integer, p_again boolean,
  r_tenant text[], r_category text[], r_aggregate_id text[], r_version bigint[],
  c_tenant text[], c_command_id uuid[], c_type text[], c_category text[], c_aggregate_id text[],
  c_fingerprint bytea[], c_payload bytea[], c_status text[], c_user_id text[], c_on_behalf_of text[],
  c_correlation_id uuid[], c_causation_id uuid[], c_traceparent text[], c_received_at timestamptz[],
  c_version bigint[], c_events_appended integer[], c_last_event integer[], c_error bytea[], c_decided_us integer[],
  e_event_id uuid[], e_tenant text[], e_category text[], e_aggregate_id text[], e_version bigint[],
  e_type text[], e_payload bytea[], e_metadata bytea[],
  s_tenant text[], s_category text[], s_aggregate_id text[], s_version bigint[], s_schema integer[], s_state bytea[],
  k_tenant text[], k_subject_id text[], k_password_hash text[],
  OUT o_head bigint, OUT o_recorded_at timestamptz
)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp
AS $$
DECLARE
  before bigint;
  replaced text[];
  replaced_id uuid[];
  replaced_due_at timestamptz[];
BEGIN
  -- 1. The shard's lock, held through the commit.
  PERFORM pg_advisory_xact_lock(1, p_shard);

  -- 2. Is the world still as it was when the decisions were made? As far as no row below would collide.
  IF cardinality(r_version) > 0 AND EXISTS (
    SELECT FROM unnest(r_tenant, r_category, r_aggregate_id, r_version) AS r(tenant, category, aggregate_id, version)
    WHERE r.version <> coalesce((
      SELECT e.version FROM events e
      WHERE e.tenant = r.tenant AND e.category = r.category AND e.aggregate_id = r.aggregate_id
      ORDER BY e.version DESC LIMIT 1), 0))
  THEN
    RAISE EXCEPTION 'an aggregate that was read has moved' USING ERRCODE = 'serialization_failure';
  END IF;
  IF EXISTS (SELECT FROM boxes b WHERE b.unboxed_at IS NULL) AND EXISTS (
    SELECT FROM unnest(e_tenant, e_category, e_aggregate_id, e_version) AS e(tenant, category, aggregate_id, version)
    JOIN boxes b ON b.tenant = e.tenant AND b.category = e.category AND b.aggregate_id = e.aggregate_id
      AND b.version >= e.version AND b.unboxed_at IS NULL)
  THEN
    RAISE EXCEPTION 'an aggregate was boxed' USING ERRCODE = 'serialization_failure';
  END IF;
  SELECT e.position, e.recorded_at INTO before, o_recorded_at FROM events e ORDER BY e.position DESC LIMIT 1;
  before := coalesce(before, 0);
  o_head := before + cardinality(e_event_id);
  o_recorded_at := greatest(clock_timestamp(), o_recorded_at);

  -- 3. Everything, at once. A command that met a defect may come again, but not as another; and a scheduled one comes
  -- when it is due. If it was cancelled or put off meanwhile, its row stays, and the row of its outcome collides with it.
  IF p_again THEN
    WITH gone AS (
      DELETE FROM commands k USING unnest(c_tenant, c_command_id, c_fingerprint) AS c(tenant, command_id, fingerprint)
      WHERE k.tenant = c.tenant AND k.command_id = c.command_id AND k.fingerprint = c.fingerprint
        AND (k.status = 'failed' OR k.status = 'scheduled' AND k.due_at <= clock_timestamp())
      RETURNING k.tenant, k.command_id, k.due_at)
    SELECT array_agg(g.tenant), array_agg(g.command_id), array_agg(g.due_at) INTO replaced, replaced_id, replaced_due_at
    FROM gone g WHERE g.due_at IS NOT NULL;
  END IF;
  IF cardinality(c_command_id) = 1 THEN
    INSERT INTO commands (
      tenant, command_id, type, category, aggregate_id, fingerprint, payload, status, user_id, on_behalf_of,
      correlation_id, causation_id, traceparent, received_at, finished_at, version, events_appended, position, head,
      error, decided_us)
    VALUES (
      c_tenant[1], c_command_id[1], c_type[1], c_category[1], c_aggregate_id[1], c_fingerprint[1], c_payload[1],
      c_status[1], c_user_id[1], c_on_behalf_of[1], c_correlation_id[1], c_causation_id[1], c_traceparent[1],
      c_received_at[1], o_recorded_at, c_version[1], c_events_appended[1],
      CASE WHEN c_last_event[1] > 0 THEN before + c_last_event[1] ELSE 0 END, o_head, c_error[1],
      c_decided_us[1]);
  ELSE
    INSERT INTO commands (
      tenant, command_id, type, category, aggregate_id, fingerprint, payload, status, user_id, on_behalf_of,
      correlation_id, causation_id, traceparent, received_at, finished_at, version, events_appended, position, head,
      error, decided_us)
    SELECT c.tenant, c.command_id, c.type, c.category, c.aggregate_id, c.fingerprint, c.payload, c.status, c.user_id,
      c.on_behalf_of, c.correlation_id, c.causation_id, c.traceparent, c.received_at, o_recorded_at, c.version,
      c.events_appended, CASE WHEN c.last_event > 0 THEN before + c.last_event ELSE 0 END, o_head, c.error,
      c.decided_us
    FROM (
      SELECT unnest(c_tenant) AS tenant, unnest(c_command_id) AS command_id, unnest(c_type) AS type,
        unnest(c_category) AS category, unnest(c_aggregate_id) AS aggregate_id, unnest(c_fingerprint) AS fingerprint,
        unnest(c_payload) AS payload, unnest(c_status) AS status, unnest(c_user_id) AS user_id,
        unnest(c_on_behalf_of) AS on_behalf_of, unnest(c_correlation_id) AS correlation_id,
        unnest(c_causation_id) AS causation_id, unnest(c_traceparent) AS traceparent,
        unnest(c_received_at) AS received_at, unnest(c_version) AS version,
        unnest(c_events_appended) AS events_appended, unnest(c_last_event) AS last_event, unnest(c_error) AS error,
        unnest(c_decided_us) AS decided_us) AS c;
  END IF;
  IF replaced_id IS NOT NULL THEN
    UPDATE commands k SET due_at = r.due_at
    FROM unnest(replaced, replaced_id, replaced_due_at) AS r(tenant, command_id, due_at)
    WHERE k.tenant = r.tenant AND k.command_id = r.command_id;
  END IF;
  IF cardinality(e_event_id) = 1 THEN
    INSERT INTO events (position, event_id, tenant, category, aggregate_id, version, type, payload, recorded_at, metadata)
    VALUES (o_head, e_event_id[1], e_tenant[1], e_category[1], e_aggregate_id[1], e_version[1], e_type[1], e_payload[1],
      o_recorded_at, e_metadata[1]);
  ELSIF o_head > before THEN
    INSERT INTO events (position, event_id, tenant, category, aggregate_id, version, type, payload, recorded_at, metadata)
    SELECT e.position, e.event_id, e.tenant, e.category, e.aggregate_id, e.version, e.type, e.payload, o_recorded_at,
      e.metadata
    FROM (
      SELECT generate_series(before + 1, o_head) AS position, unnest(e_event_id) AS event_id,
        unnest(e_tenant) AS tenant, unnest(e_category) AS category, unnest(e_aggregate_id) AS aggregate_id,
        unnest(e_version) AS version, unnest(e_type) AS type, unnest(e_payload) AS payload,
        unnest(e_metadata) AS metadata) AS e;
  END IF;
  IF cardinality(s_version) > 0 THEN
    INSERT INTO snapshots (tenant, category, aggregate_id, version, schema, state)
    SELECT * FROM unnest(s_tenant, s_category, s_aggregate_id, s_version, s_schema, s_state)
    ON CONFLICT DO NOTHING;
  END IF;
  IF cardinality(k_subject_id) > 0 THEN
    DELETE FROM credentials d USING unnest(k_tenant, k_subject_id, k_password_hash) AS k(tenant, subject_id, password_hash)
    WHERE d.tenant = k.tenant AND d.subject_id = k.subject_id AND k.password_hash IS NULL;
    INSERT INTO credentials (tenant, subject_id, password_hash)
    SELECT k.tenant, k.subject_id, k.password_hash
    FROM unnest(k_tenant, k_subject_id, k_password_hash) AS k(tenant, subject_id, password_hash)
    WHERE k.password_hash IS NOT NULL
    ON CONFLICT (tenant, subject_id) DO UPDATE SET password_hash = excluded.password_hash;
  END IF;
END $$;
"""

# As in 0006 and 0004; new is the HAVING.
APPEND_ONE = """
CREATE OR REPLACE FUNCTION append_one(
  p_shard integer, p_tenant text, p_category text, p_aggregate_id text, p_version bigint,
  c_command_id uuid, c_type text, c_fingerprint bytea, c_payload bytea, c_user_id text, c_on_behalf_of text,
  c_correlation_id uuid, c_causation_id uuid, c_traceparent text, c_received_at timestamptz,
  e_event_id uuid, e_type text, e_payload bytea, e_metadata bytea, c_decided_us integer,
  OUT o_head bigint, OUT o_recorded_at timestamptz
)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
AS $$
BEGIN
  PERFORM pg_catalog.pg_advisory_xact_lock(1, p_shard);
  INSERT INTO public.events (
    position, event_id, tenant, category, aggregate_id, version, type, payload, recorded_at, metadata)
  SELECT
    coalesce(pg_catalog.max(l.position), 0) OPERATOR(pg_catalog.+) 1, e_event_id, p_tenant, p_category, p_aggregate_id,
    p_version, e_type, e_payload, greatest(pg_catalog.clock_timestamp(), pg_catalog.max(l.recorded_at)), e_metadata
  FROM (SELECT e.position, e.recorded_at FROM public.events e ORDER BY e.position DESC LIMIT 1) l
  HAVING NOT EXISTS (
    SELECT FROM public.boxes b
    WHERE b.tenant OPERATOR(pg_catalog.=) p_tenant AND b.category OPERATOR(pg_catalog.=) p_category
      AND b.aggregate_id OPERATOR(pg_catalog.=) p_aggregate_id AND b.version OPERATOR(pg_catalog.>=) p_version
      AND b.unboxed_at IS NULL)
  RETURNING position, recorded_at INTO o_head, o_recorded_at;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'the aggregate was boxed' USING ERRCODE = 'serialization_failure';
  END IF;
  INSERT INTO public.commands (
    tenant, command_id, type, category, aggregate_id, fingerprint, payload, status, user_id, on_behalf_of, correlation_id,
    causation_id, traceparent, received_at, finished_at, version, events_appended, position, head, decided_us)
  VALUES (
    p_tenant, c_command_id, c_type, p_category, p_aggregate_id, c_fingerprint, c_payload, 'completed', c_user_id,
    c_on_behalf_of, c_correlation_id, c_causation_id, c_traceparent, c_received_at, o_recorded_at, p_version, 1, o_head,
    o_head, c_decided_us);
END $$;
"""

# As in 0009; new is that chains that differ because somebody else boxed the aggregate meanwhile are no damage.
BOX = """
CREATE OR REPLACE FUNCTION box_aggregate(
  p_shard integer, p_tenant text, p_category text, p_aggregate_id text, p_version bigint, p_location text, p_chain bytea,
  c_command_id uuid, c_type text, c_fingerprint bytea, c_payload bytea, c_user_id text, c_correlation_id uuid,
  c_traceparent text, c_received_at timestamptz, e_event_id uuid, e_type text, e_payload bytea, e_metadata bytea,
  OUT o_head bigint
)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp
AS $$
DECLARE
  same boolean;
  boxed_as bigint;
  moved bigint;
BEGIN
  same := box_chain(p_tenant, p_category, p_aggregate_id, p_version) = p_chain;
  PERFORM pg_advisory_xact_lock(1, p_shard);
  IF p_version <> (
    SELECT e.version FROM events e
    WHERE e.tenant = p_tenant AND e.category = p_category AND e.aggregate_id = p_aggregate_id
    ORDER BY e.version DESC LIMIT 1)
  THEN
    RAISE EXCEPTION 'the aggregate has moved' USING ERRCODE = 'serialization_failure';
  END IF;
  IF NOT same THEN
    RAISE EXCEPTION 'the archive has other events than the line' USING ERRCODE = 'data_exception';
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


def upgrade() -> None:
    """Replaces the functions; who may call them stays."""
    op.execute(INDEX)
    op.execute(APPEND_BATCH)
    op.execute(APPEND_ONE)
    op.execute(BOX)


def downgrade() -> None:
    """Boxes and the functions of before do not go together; restore a backup instead."""
    raise NotImplementedError("restore a backup instead")
