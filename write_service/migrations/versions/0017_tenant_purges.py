"""A tenant is closed and purged: its events leave holes, and the rows of its other tables go.

Revision ID: 0017
Revises: 0015
"""

from __future__ import annotations

from alembic import context, op

revision = "0017"
down_revision = "0015"
branch_labels = None
depends_on = None

# A row of `tenant_purges` closes its tenant for ever. `below` is how far down the line its events are gone, and `chain` a hash
# over the position and id of each, in that order. `closed_by` is the transaction that closed it.
TABLES = """
CREATE TABLE tenant_purges (
  tenant text COLLATE "C" PRIMARY KEY,
  asked_by text COLLATE "C" NOT NULL,
  closed_at timestamptz NOT NULL,
  closed_by xid8 NOT NULL,
  position bigint NOT NULL,
  event_id uuid NOT NULL,
  stage text COLLATE "C" NOT NULL DEFAULT 'closed' CHECK (stage IN ('closed', 'events', 'rows', 'archive', 'done')),
  below bigint NOT NULL,
  chain bytea NOT NULL DEFAULT sha256(''),
  events bigint NOT NULL DEFAULT 0,
  boxed_events bigint NOT NULL DEFAULT 0,
  commands bigint NOT NULL DEFAULT 0,
  schedules bigint NOT NULL DEFAULT 0,
  snapshots bigint NOT NULL DEFAULT 0,
  credentials bigint NOT NULL DEFAULT 0,
  boxes bigint NOT NULL DEFAULT 0,
  files bigint NOT NULL DEFAULT 0,
  done_at timestamptz
);
CREATE INDEX tenant_purges_open ON tenant_purges (closed_at) WHERE stage <> 'done';
CREATE TABLE purged_events (
  position bigint PRIMARY KEY,
  event_id uuid NOT NULL,
  tenant text COLLATE "C" NOT NULL REFERENCES tenant_purges
);
"""

CLOSED = """
CREATE FUNCTION refuse_closed_tenant() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
  IF EXISTS (SELECT FROM tenant_purges t WHERE t.tenant = NEW.tenant) THEN
    RAISE EXCEPTION 'the tenant is closed' USING ERRCODE = 'serialization_failure';
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER refuse_closed_tenant BEFORE INSERT ON schedules FOR EACH ROW EXECUTE FUNCTION refuse_closed_tenant();
"""

# As in 0010; new is that nothing is appended for a tenant that is closed.
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
  IF EXISTS (SELECT FROM tenant_purges t WHERE t.tenant = ANY (c_tenant) OR t.tenant = ANY (e_tenant)) THEN
    RAISE EXCEPTION 'a tenant is closed' USING ERRCODE = 'serialization_failure';
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

# As in 0010; new is the second NOT EXISTS.
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
    AND NOT EXISTS (SELECT FROM public.tenant_purges t WHERE t.tenant OPERATOR(pg_catalog.=) p_tenant)
  RETURNING position, recorded_at INTO o_head, o_recorded_at;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'the aggregate was boxed, or the tenant closed' USING ERRCODE = 'serialization_failure';
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

# As in 0006; new is that nothing is scheduled for a tenant that is closed.
SCHEDULE = """
CREATE OR REPLACE FUNCTION schedule_command(
  p_tenant text, p_command_id uuid, p_type text, p_category text, p_aggregate_id text, p_fingerprint bytea,
  p_payload bytea, p_user_id text, p_on_behalf_of text, p_correlation_id uuid, p_causation_id uuid, p_traceparent text,
  p_received_at timestamptz, p_due_at timestamptz, p_roles text[], p_expected_version bigint
) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp
AS $$
BEGIN
  IF EXISTS (SELECT FROM tenant_purges t WHERE t.tenant = p_tenant) THEN
    RAISE EXCEPTION 'the tenant is closed' USING ERRCODE = 'serialization_failure';
  END IF;
  INSERT INTO commands AS k (
    tenant, command_id, type, category, aggregate_id, fingerprint, payload, status, user_id, on_behalf_of, correlation_id,
    causation_id, traceparent, received_at, version, events_appended, position, head, due_at, roles, expected_version)
  VALUES (
    p_tenant, p_command_id, p_type, p_category, p_aggregate_id, p_fingerprint, p_payload, 'scheduled', p_user_id,
    p_on_behalf_of, p_correlation_id, p_causation_id, p_traceparent, p_received_at, 0, 0, 0,
    coalesce((SELECT e.position FROM events e ORDER BY e.position DESC LIMIT 1), 0),
    greatest(p_due_at, clock_timestamp()), p_roles, p_expected_version)
  ON CONFLICT (tenant, command_id) DO UPDATE SET
    status = 'scheduled', received_at = excluded.received_at, finished_at = NULL, error = NULL, due_at = excluded.due_at,
    roles = excluded.roles, expected_version = excluded.expected_version, traceparent = excluded.traceparent
  WHERE k.status = 'failed' AND k.fingerprint = excluded.fingerprint;
  RETURN FOUND;
END $$;
"""

# The mark is the last event of the tenant, and the only one that stays: whoever follows the line deletes the tenant's rows at it.
# A repeat returns what the first call did.
CLOSE = """
CREATE FUNCTION close_tenant(
  p_shard integer, p_tenant text, p_asked_by text, p_type text, p_payload bytea, p_metadata bytea, p_event_id uuid
) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  v_position bigint;
  v_recorded_at timestamptz;
BEGIN
  PERFORM pg_advisory_xact_lock(1, p_shard);
  IF EXISTS (SELECT FROM tenant_purges t WHERE t.tenant = p_tenant) THEN
    RETURN true;
  END IF;
  IF NOT EXISTS (SELECT FROM events e WHERE e.tenant = p_tenant) AND NOT EXISTS (SELECT FROM commands k WHERE k.tenant = p_tenant)
  THEN
    RETURN false;
  END IF;
  SELECT e.position, e.recorded_at INTO v_position, v_recorded_at FROM events e ORDER BY e.position DESC LIMIT 1;
  v_position := coalesce(v_position, 0) + 1;
  v_recorded_at := greatest(clock_timestamp(), v_recorded_at);
  INSERT INTO events (position, event_id, tenant, category, aggregate_id, version, type, payload, recorded_at, metadata)
  VALUES (v_position, p_event_id, p_tenant, 'tenant', 'tenant', 1, p_type, p_payload, v_recorded_at, p_metadata);
  INSERT INTO tenant_purges (tenant, asked_by, closed_at, closed_by, position, event_id, below)
  VALUES (p_tenant, p_asked_by, v_recorded_at, pg_current_xact_id(), v_position, p_event_id, v_position - 1);
  RETURN true;
END $$;
"""

# One step, one transaction: up to `p_window` positions of the line, or up to `p_limit` rows of each table. Returns the stage that
# it leaves behind. Two at once: the second waits for the row, and goes on where the first has come to.
#
# The newest events go first, so that what is left at any time is a beginning of each stream, which can be folded: a consumer that
# is behind, or begins anew, meets no event whose predecessors are gone.
#
# 'closed' waits for transactions that began before the tenant was closed, and may still write a row of it. Then the recurring
# schedules go, which would go on making commands.
PURGE = """
CREATE FUNCTION purge_tenant(p_tenant text, p_window bigint, p_limit integer) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  p tenant_purges;
  above bigint;
  online bigint := 0;
  boxed bigint := 0;
  gone bigint;
  gone_commands bigint;
  gone_snapshots bigint;
  gone_credentials bigint;
  link text;
BEGIN
  SELECT * INTO p FROM tenant_purges t WHERE t.tenant = p_tenant FOR UPDATE;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'the tenant is not closed' USING ERRCODE = 'invalid_parameter_value';
  END IF;
  IF p.stage = 'closed' THEN
    IF pg_snapshot_xmin(pg_current_snapshot()) > p.closed_by THEN
      DELETE FROM schedules WHERE ctid = ANY (ARRAY(SELECT s.ctid FROM schedules s WHERE s.tenant = p_tenant LIMIT p_limit));
      GET DIAGNOSTICS gone = ROW_COUNT;
      UPDATE tenant_purges SET schedules = p.schedules + gone, stage = CASE WHEN gone < p_limit THEN 'events' ELSE 'closed' END
      WHERE tenant = p_tenant RETURNING stage INTO p.stage;
    END IF;
  ELSIF p.stage = 'events' THEN
    above := greatest(p.below - p_window, 0);
    PERFORM set_config('foldline.boxing', 'on', true);
    WITH gone AS (
      DELETE FROM events e WHERE e.position > above AND e.position <= p.below AND e.tenant = p_tenant
      RETURNING e.position, e.event_id)
    INSERT INTO purged_events (position, event_id, tenant) SELECT g.position, g.event_id, p_tenant FROM gone g;
    GET DIAGNOSTICS online = ROW_COUNT;
    PERFORM set_config('foldline.boxing', '', true);
    WITH gone AS (
      DELETE FROM boxed_events b USING boxes x
      WHERE b.position > above AND b.position <= p.below AND x.box_id = b.box_id AND x.tenant = p_tenant
      RETURNING b.position, b.event_id)
    INSERT INTO purged_events (position, event_id, tenant) SELECT g.position, g.event_id, p_tenant FROM gone g;
    GET DIAGNOSTICS boxed = ROW_COUNT;
    SELECT string_agg(h.position || ' ' || h.event_id, E'\\n' ORDER BY h.position DESC) INTO link
    FROM purged_events h WHERE h.position > above AND h.position <= p.below AND h.tenant = p_tenant;
    UPDATE tenant_purges SET events = p.events + online, boxed_events = p.boxed_events + boxed, below = above,
      chain = CASE WHEN link IS NULL THEN p.chain ELSE sha256(p.chain || convert_to(link, 'UTF8')) END,
      stage = CASE WHEN above = 0 THEN 'rows' ELSE 'events' END
    WHERE tenant = p_tenant RETURNING stage INTO p.stage;
  ELSIF p.stage = 'rows' THEN
    DELETE FROM commands WHERE ctid = ANY (ARRAY(SELECT k.ctid FROM commands k WHERE k.tenant = p_tenant LIMIT p_limit));
    GET DIAGNOSTICS gone_commands = ROW_COUNT;
    DELETE FROM snapshots WHERE ctid = ANY (ARRAY(SELECT s.ctid FROM snapshots s WHERE s.tenant = p_tenant LIMIT p_limit));
    GET DIAGNOSTICS gone_snapshots = ROW_COUNT;
    DELETE FROM credentials WHERE ctid = ANY (ARRAY(SELECT c.ctid FROM credentials c WHERE c.tenant = p_tenant LIMIT p_limit));
    GET DIAGNOSTICS gone_credentials = ROW_COUNT;
    DELETE FROM password_tries WHERE tenant = p_tenant;
    UPDATE tenant_purges SET commands = p.commands + gone_commands, snapshots = p.snapshots + gone_snapshots,
      credentials = p.credentials + gone_credentials,
      stage = CASE WHEN greatest(gone_commands, gone_snapshots, gone_credentials) < p_limit THEN 'archive' ELSE 'rows' END
    WHERE tenant = p_tenant RETURNING stage INTO p.stage;
  END IF;
  RETURN p.stage;
END $$;
"""

# The last steps, when the archive's folders are gone: up to `p_limit` rows of `boxes` each. `p_files` is how many files went.
FINISH = """
CREATE FUNCTION finish_purge(p_tenant text, p_files bigint, p_limit integer) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  p tenant_purges;
  gone bigint;
BEGIN
  SELECT * INTO p FROM tenant_purges t WHERE t.tenant = p_tenant FOR UPDATE;
  IF p.stage IS DISTINCT FROM 'archive' THEN
    RETURN p.stage;
  END IF;
  DELETE FROM boxes WHERE box_id = ANY (ARRAY(SELECT b.box_id FROM boxes b WHERE b.tenant = p_tenant LIMIT p_limit));
  GET DIAGNOSTICS gone = ROW_COUNT;
  UPDATE tenant_purges SET boxes = p.boxes + gone, files = p.files + p_files,
    stage = CASE WHEN gone < p_limit THEN 'done' ELSE 'archive' END,
    done_at = CASE WHEN gone < p_limit THEN clock_timestamp() END
  WHERE tenant = p_tenant RETURNING stage INTO p.stage;
  RETURN p.stage;
END $$;
"""


def upgrade() -> None:
    """Adds tables and functions, and replaces those that append and schedule; who may call these stays."""
    app = context.config.attributes["roles"]["app"]
    for statements in (TABLES, CLOSED, APPEND_BATCH, APPEND_ONE, SCHEDULE, CLOSE, PURGE, FINISH):
        op.execute(statements)
    op.execute(f'GRANT SELECT ON tenant_purges, purged_events TO "{app}"')
    op.execute("REVOKE ALL ON FUNCTION refuse_closed_tenant FROM PUBLIC")
    for function in ("close_tenant", "purge_tenant", "finish_purge"):
        op.execute(f"REVOKE ALL ON FUNCTION {function} FROM PUBLIC")
        op.execute(f'GRANT EXECUTE ON FUNCTION {function} TO "{app}"')


def downgrade() -> None:
    """What was purged is gone, and nobody may use its tenant again; there is no way back but a new migration."""
    raise NotImplementedError("write a new migration instead")
