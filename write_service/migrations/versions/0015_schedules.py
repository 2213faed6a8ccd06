"""Recurring schedules: a row for each, the function that releases their firings, and those that steer them.

Revision ID: 0015
Revises: 0011
"""

from __future__ import annotations

from alembic import context, op

revision = "0015"
down_revision = "0011"
branch_labels = None
depends_on = None

# `due_at` is the time of the next firing, `fired_at` that of the last.
TABLE = """
CREATE TABLE schedules (
  tenant text COLLATE "C" NOT NULL,
  schedule_id uuid NOT NULL,
  cron text COLLATE "C" NOT NULL,
  time_zone text COLLATE "C" NOT NULL,
  catch_up text COLLATE "C" NOT NULL CHECK (catch_up IN ('none', 'one', 'all')),
  status text COLLATE "C" NOT NULL CHECK (status IN ('active', 'paused', 'ended')),
  due_at timestamptz,
  fired_at timestamptz,
  type text COLLATE "C" NOT NULL,
  category text COLLATE "C" NOT NULL,
  aggregate_id text COLLATE "C" NOT NULL,
  fingerprint bytea NOT NULL,
  payload bytea NOT NULL,
  user_id text COLLATE "C" NOT NULL,
  roles text[] COLLATE "C" NOT NULL,
  correlation_id uuid NOT NULL,
  traceparent text COLLATE "C" NOT NULL,
  created_at timestamptz NOT NULL,
  changed_at timestamptz NOT NULL,
  changed_by text COLLATE "C" NOT NULL,
  problem text COLLATE "C" NOT NULL DEFAULT '',
  PRIMARY KEY (tenant, schedule_id),
  CHECK ((status = 'active') = (due_at IS NOT NULL))
);
CREATE INDEX schedules_due ON schedules (due_at, tenant, schedule_id) WHERE status = 'active';
CREATE INDEX schedules_live ON schedules (tenant, created_at, schedule_id) WHERE status <> 'ended';
CREATE INDEX schedules_ended ON schedules (tenant, created_at, schedule_id) WHERE status = 'ended';
CREATE INDEX schedules_ended_by_user ON schedules (tenant, user_id, created_at, schedule_id) WHERE status = 'ended';
CREATE INDEX schedules_by_age ON schedules (changed_at) WHERE status = 'ended';
"""

# The lock makes the limit of a tenant exact: who comes second counts what the first has made. It is of the tenant alone, and
# no append takes it.
CREATE = """
CREATE FUNCTION create_schedule(
  p_tenant text, p_schedule_id uuid, p_cron text, p_time_zone text, p_catch_up text, p_due_at timestamptz, p_type text,
  p_category text, p_aggregate_id text, p_fingerprint bytea, p_payload bytea, p_user_id text, p_roles text[],
  p_correlation_id uuid, p_traceparent text, p_live_max integer
) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp
AS $$
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended('schedules of ' || p_tenant, 0));
  IF EXISTS (SELECT FROM schedules s WHERE s.tenant = p_tenant AND s.schedule_id = p_schedule_id) THEN
    RETURN true;
  END IF;
  IF p_live_max <= (
    SELECT count(*) FROM (
      SELECT FROM schedules s WHERE s.tenant = p_tenant AND s.status <> 'ended' LIMIT p_live_max) AS live)
  THEN
    RETURN false;
  END IF;
  INSERT INTO schedules (
    tenant, schedule_id, cron, time_zone, catch_up, status, due_at, type, category, aggregate_id, fingerprint, payload, user_id,
    roles, correlation_id, traceparent, created_at, changed_at, changed_by)
  VALUES (
    p_tenant, p_schedule_id, p_cron, p_time_zone, p_catch_up, 'active', p_due_at, p_type, p_category, p_aggregate_id,
    p_fingerprint, p_payload, p_user_id, p_roles, p_correlation_id, p_traceparent, clock_timestamp(), clock_timestamp(),
    p_user_id);
  RETURN true;
END $$;

CREATE FUNCTION change_schedule(
  p_tenant text, p_schedule_id uuid, p_status text, p_due_at timestamptz, p_changed_by text, p_problem text
) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp
AS $$
BEGIN
  UPDATE schedules SET
    status = p_status, due_at = p_due_at, changed_at = clock_timestamp(), changed_by = p_changed_by, problem = p_problem
  WHERE tenant = p_tenant AND schedule_id = p_schedule_id AND status <> p_status AND status <> 'ended';
  RETURN FOUND;
END $$;
"""

# Firings become rows of the command log that wait, in the transaction that moves their schedule to its next time. Killed
# anywhere: both are there or neither. Two replicas at once: one has the schedule's row, the other passes it over, or finds
# it at another time. A schedule that is paused or ended meanwhile is passed over as well, or its pausing waits and then sees the
# firings. This function holds rows of schedules alone when it writes its firings, which nobody else can have written, so no
# append waits for it while it waits for an append.
RELEASE = """
CREATE FUNCTION release_firings(
  s_tenant text[], s_schedule_id uuid[], s_due_at timestamptz[], s_next_at timestamptz[], s_fired_at timestamptz[],
  f_tenant text[], f_schedule_id uuid[], f_command_id uuid[], f_due_at timestamptz[]
) RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp
AS $$
DECLARE
  released bigint;
BEGIN
  WITH mine AS (
    SELECT s.tenant, s.schedule_id, g.next_at, g.fired_at
    FROM unnest(s_tenant, s_schedule_id, s_due_at, s_next_at, s_fired_at) AS g(tenant, schedule_id, due_at, next_at, fired_at)
    JOIN schedules s USING (tenant, schedule_id)
    WHERE s.status = 'active' AND s.due_at = g.due_at
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

SWEEP = """
CREATE FUNCTION sweep_schedules(p_before timestamptz, p_limit integer) RETURNS integer
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp
AS $$
DECLARE
  swept integer;
BEGIN
  DELETE FROM schedules WHERE ctid = ANY (ARRAY(
    SELECT s.ctid FROM schedules s WHERE s.status = 'ended' AND s.changed_at < p_before LIMIT p_limit FOR UPDATE SKIP LOCKED));
  GET DIAGNOSTICS swept = ROW_COUNT;
  RETURN swept;
END $$;
"""


def upgrade() -> None:
    """Adds the table and the functions: the application reads the one, and calls the others."""
    app = context.config.attributes["roles"]["app"]
    for statements in (TABLE, CREATE, RELEASE, SWEEP):
        op.execute(statements)
    op.execute(f'GRANT SELECT ON schedules TO "{app}"')
    for function in ("create_schedule", "change_schedule", "release_firings", "sweep_schedules"):
        op.execute(f"REVOKE ALL ON FUNCTION {function} FROM PUBLIC")
        op.execute(f'GRANT EXECUTE ON FUNCTION {function} TO "{app}"')


def downgrade() -> None:
    """Schedules would be lost; restore a backup instead."""
    raise NotImplementedError("restore a backup instead")
