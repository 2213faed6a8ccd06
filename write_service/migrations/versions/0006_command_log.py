"""The command log as a product: scheduled commands, how long each was decided, indexes to search by, a sweeper.

Both append functions are replaced, since they write one more column: services of before this migration are refused until
they are replaced too.

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

from alembic import context, op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

# `due_at` stays in the row of the outcome. Roles and the expected version are kept only until then.
COLUMNS = """
ALTER TABLE commands
  ADD COLUMN decided_us integer NOT NULL DEFAULT 0,
  ADD COLUMN due_at timestamptz,
  ADD COLUMN roles text[] COLLATE "C",
  ADD COLUMN expected_version bigint,
  ADD CONSTRAINT commands_scheduled CHECK (status <> 'scheduled' OR (due_at IS NOT NULL AND roles IS NOT NULL));
"""

INDEXES = """
CREATE INDEX commands_due ON commands (due_at, received_at) WHERE status = 'scheduled';
CREATE INDEX commands_by_time ON commands (tenant, received_at);
CREATE INDEX commands_by_status ON commands (tenant, status, received_at) WHERE status <> 'completed';
CREATE INDEX commands_by_type ON commands (tenant, type, received_at);
CREATE INDEX commands_by_user ON commands (tenant, user_id, received_at);
CREATE INDEX commands_by_aggregate ON commands (tenant, category, aggregate_id, received_at);
CREATE INDEX commands_by_behalf ON commands (tenant, on_behalf_of, received_at) WHERE on_behalf_of <> '';
CREATE INDEX commands_by_correlation ON commands (tenant, correlation_id, received_at) WHERE correlation_id <> command_id;
CREATE INDEX commands_by_cause ON commands (tenant, causation_id, received_at) WHERE causation_id IS NOT NULL;
CREATE INDEX commands_by_age ON commands USING brin (received_at) WITH (autosummarize = on);
"""

# As in 0001, where the rules are explained; new are the scheduled commands and credentials that go (their hash is NULL).
APPEND_BATCH = """
CREATE FUNCTION append_batch(
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

# As in 0004, where the rules are explained.
APPEND_ONE = """
CREATE FUNCTION append_one(
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
  RETURNING position, recorded_at INTO o_head, o_recorded_at;
  INSERT INTO public.commands (
    tenant, command_id, type, category, aggregate_id, fingerprint, payload, status, user_id, on_behalf_of, correlation_id,
    causation_id, traceparent, received_at, finished_at, version, events_appended, position, head, decided_us)
  VALUES (
    p_tenant, c_command_id, c_type, p_category, p_aggregate_id, c_fingerprint, c_payload, 'completed', c_user_id,
    c_on_behalf_of, c_correlation_id, c_causation_id, c_traceparent, c_received_at, o_recorded_at, p_version, 1, o_head,
    o_head, c_decided_us);
END $$;
"""

# A row waits under the command's own id until the row of its outcome takes its place, in the append of its events: that
# row is the claim, so whoever fires it a second time collides. Cancelling and putting off change the waiting row. Each of
# these functions changes one row and then ends, without the shard's lock: it holds nothing that an append could wait for
# while it waits itself. An append that finds the row changed under it keeps its hands off (see append_batch), and one of
# these that finds it gone changes nothing and says so. Killed anywhere: the one row is changed, or it is not.
SCHEDULE = """
CREATE FUNCTION schedule_command(
  p_tenant text, p_command_id uuid, p_type text, p_category text, p_aggregate_id text, p_fingerprint bytea,
  p_payload bytea, p_user_id text, p_on_behalf_of text, p_correlation_id uuid, p_causation_id uuid, p_traceparent text,
  p_received_at timestamptz, p_due_at timestamptz, p_roles text[], p_expected_version bigint
) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp
AS $$
BEGIN
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

CREATE FUNCTION reschedule_command(p_tenant text, p_command_id uuid, p_due_at timestamptz) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp
AS $$
BEGIN
  UPDATE commands SET due_at = greatest(p_due_at, clock_timestamp())
  WHERE tenant = p_tenant AND command_id = p_command_id AND status = 'scheduled';
  RETURN FOUND;
END $$;

CREATE FUNCTION end_scheduled_command(p_tenant text, p_command_id uuid, p_status text, p_error bytea) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp
AS $$
BEGIN
  IF p_status NOT IN ('cancelled', 'rejected', 'failed') THEN
    RAISE EXCEPTION 'a scheduled command does not end as %', p_status USING ERRCODE = 'invalid_parameter_value';
  END IF;
  UPDATE commands SET status = p_status, error = p_error, finished_at = clock_timestamp()
  WHERE tenant = p_tenant AND command_id = p_command_id AND status = 'scheduled';
  RETURN FOUND;
END $$;
"""

# Rows that somebody works on are left for the next time, so a sweep waits for nobody; an append may wait for its end.
SWEEP = """
CREATE FUNCTION sweep_commands(p_before timestamptz, p_limit integer) RETURNS integer
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp
AS $$
DECLARE
  swept integer;
BEGIN
  DELETE FROM commands WHERE ctid = ANY (ARRAY(
    SELECT k.ctid FROM commands k
    WHERE k.received_at < p_before AND k.finished_at < p_before AND k.status <> 'scheduled'
    LIMIT p_limit FOR UPDATE SKIP LOCKED));
  GET DIAGNOSTICS swept = ROW_COUNT;
  RETURN swept;
END $$;
"""


def upgrade() -> None:
    """Adds columns, indexes and functions, and lets the application call the functions and nobody else."""
    app = context.config.attributes["roles"]["app"]
    op.execute(COLUMNS)
    op.execute(INDEXES)
    op.execute("DROP FUNCTION append_batch")
    op.execute("DROP FUNCTION append_one")
    op.execute(APPEND_BATCH)
    op.execute(APPEND_ONE)
    op.execute(SCHEDULE)
    op.execute(SWEEP)
    functions = (
        "append_batch",
        "append_one",
        "schedule_command",
        "reschedule_command",
        "end_scheduled_command",
        "sweep_commands",
    )
    for function in functions:
        op.execute(f"REVOKE ALL ON FUNCTION {function} FROM PUBLIC")
        op.execute(f'GRANT EXECUTE ON FUNCTION {function} TO "{app}"')


def downgrade() -> None:
    """What was scheduled would be lost; restore a backup instead."""
    raise NotImplementedError("restore a backup instead")
