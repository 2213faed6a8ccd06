"""A tenant is closed behind all who have looked whether it is, and write a row of it.

Revision ID: 0021
Revises: 0020
"""

from __future__ import annotations

from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

# Who writes a row of a tenant without the shard's lock takes the tenant's lock first, shared, and then looks whether the tenant
# is closed; who closes it takes the lock alone. So a row is written before the tenant is closed, and the purge finds it, or it is
# refused. The purge waits for transactions with an older number than the closing one; without the lock, one that had looked and
# had no number yet got a later one. No deadlock: who closes takes this lock before the shard's, and no append takes it.
KEEP = """
CREATE FUNCTION keep_tenant_open(p_tenant text) RETURNS void
LANGUAGE sql VOLATILE SET search_path = pg_catalog, public, pg_temp AS $$
  SELECT pg_advisory_xact_lock_shared(hashtextextended('tenant ' || p_tenant, 0))
$$;
"""

# As in 0017; new is the lock.
REFUSE = """
CREATE OR REPLACE FUNCTION refuse_closed_tenant() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
  PERFORM keep_tenant_open(NEW.tenant);
  IF EXISTS (SELECT FROM tenant_purges t WHERE t.tenant = NEW.tenant) THEN
    RAISE EXCEPTION 'the tenant is closed' USING ERRCODE = 'serialization_failure';
  END IF;
  RETURN NEW;
END $$;
"""

# As in 0017; new is the lock.
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
  PERFORM keep_tenant_open(p_tenant);
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

# As in 0018; new is the lock.
CLOSE = """
CREATE OR REPLACE FUNCTION close_tenant(
  p_shard integer, p_tenant text, p_asked_by text, p_type text, p_payload bytea, p_metadata bytea, p_event_id uuid
) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  v_position bigint;
  v_recorded_at timestamptz;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended('tenant ' || p_tenant, 0));
  PERFORM pg_advisory_xact_lock(1, p_shard);
  IF EXISTS (SELECT FROM tenant_purges t WHERE t.tenant = p_tenant) THEN
    RETURN true;
  END IF;
  IF NOT (
    EXISTS (SELECT FROM events e WHERE e.tenant = p_tenant) OR EXISTS (SELECT FROM commands k WHERE k.tenant = p_tenant)
    OR EXISTS (SELECT FROM schedules s WHERE s.tenant = p_tenant) OR EXISTS (SELECT FROM snapshots s WHERE s.tenant = p_tenant)
    OR EXISTS (SELECT FROM credentials c WHERE c.tenant = p_tenant) OR EXISTS (SELECT FROM boxes b WHERE b.tenant = p_tenant))
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

# As in 0018; new is the lock.
RELEASE = """
CREATE OR REPLACE FUNCTION release_firings(
  s_tenant text[], s_schedule_id uuid[], s_due_at timestamptz[], s_next_at timestamptz[], s_fired_at timestamptz[],
  f_tenant text[], f_schedule_id uuid[], f_command_id uuid[], f_due_at timestamptz[]
) RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp
AS $$
DECLARE
  released bigint;
BEGIN
  PERFORM keep_tenant_open(f.tenant) FROM (SELECT DISTINCT unnest(s_tenant) AS tenant) AS f;
  WITH mine AS (
    SELECT s.tenant, s.schedule_id, g.next_at, g.fired_at
    FROM unnest(s_tenant, s_schedule_id, s_due_at, s_next_at, s_fired_at) AS g(tenant, schedule_id, due_at, next_at, fired_at)
    JOIN schedules s USING (tenant, schedule_id)
    WHERE s.status = 'active' AND s.due_at = g.due_at
      AND NOT EXISTS (SELECT FROM tenant_purges t WHERE t.tenant = s.tenant)
    FOR UPDATE OF s SKIP LOCKED),
  moved AS (
    UPDATE schedules s SET
      due_at = m.next_at, fired_at = coalesce(m.fired_at, s.fired_at),
      status = CASE WHEN m.next_at IS NULL THEN 'ended' ELSE s.status END,
      changed_at = CASE WHEN m.next_at IS NULL THEN clock_timestamp() ELSE s.changed_at END,
      changed_by = CASE WHEN m.next_at IS NULL THEN '' ELSE s.changed_by END
    FROM mine m WHERE s.tenant = m.tenant AND s.schedule_id = m.schedule_id
    RETURNING s.*)
  INSERT INTO commands (
    tenant, command_id, type, category, aggregate_id, fingerprint, payload, status, user_id, on_behalf_of, correlation_id,
    causation_id, traceparent, received_at, version, events_appended, position, head, due_at, roles)
  SELECT s.tenant, f.command_id, s.type, s.category, s.aggregate_id, s.fingerprint, s.payload, 'scheduled', s.user_id, '',
    s.correlation_id, s.schedule_id, s.traceparent, clock_timestamp(), 0, 0, 0,
    coalesce((SELECT e.position FROM events e ORDER BY e.position DESC LIMIT 1), 0), f.due_at, s.roles
  FROM moved s
  JOIN unnest(f_tenant, f_schedule_id, f_command_id, f_due_at) AS f(tenant, schedule_id, command_id, due_at)
    USING (tenant, schedule_id)
  ON CONFLICT DO NOTHING;
  GET DIAGNOSTICS released = ROW_COUNT;
  RETURN released;
END $$;
"""


def upgrade() -> None:
    """Adds a function, which the others call, and replaces those; who may call them stays."""
    for statements in (KEEP, REFUSE, SCHEDULE, CLOSE, RELEASE):
        op.execute(statements)
    op.execute("REVOKE ALL ON FUNCTION keep_tenant_open FROM PUBLIC")


def downgrade() -> None:
    """The functions of before leave rows behind; there is no way back but a new migration."""
    raise NotImplementedError("write a new migration instead")
