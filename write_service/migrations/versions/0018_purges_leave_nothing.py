"""A purge leaves no row behind that somebody else was changing; and a tenant is closed whichever table has rows of it.

Revision ID: 0018
Revises: 0017
"""

from __future__ import annotations

from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

# As in 0017; new is that rows of any table make a tenant.
CLOSE = """
CREATE OR REPLACE FUNCTION close_tenant(
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

# As in 0017; new is when a stage ends. A deletion passes over a row that somebody else changes while it is looked for,
# since the row is at another place then. So a stage ends when none is left, not when few were deleted. New too is that each step
# is planned for the window that it has: a plan for any window reads all of a tenant's index each time.
PURGE = """
CREATE OR REPLACE FUNCTION purge_tenant(p_tenant text, p_window bigint, p_limit integer) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
SET plan_cache_mode = force_custom_plan AS $$
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
      UPDATE tenant_purges SET schedules = p.schedules + gone,
        stage = CASE
          WHEN gone >= p_limit OR EXISTS (SELECT FROM schedules s WHERE s.tenant = p_tenant) THEN 'closed' ELSE 'events' END
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
      stage = CASE
        WHEN greatest(gone_commands, gone_snapshots, gone_credentials) >= p_limit THEN 'rows'
        WHEN EXISTS (SELECT FROM commands k WHERE k.tenant = p_tenant)
          OR EXISTS (SELECT FROM snapshots s WHERE s.tenant = p_tenant)
          OR EXISTS (SELECT FROM credentials c WHERE c.tenant = p_tenant) THEN 'rows'
        ELSE 'archive' END
    WHERE tenant = p_tenant RETURNING stage INTO p.stage;
  END IF;
  RETURN p.stage;
END $$;
"""

# As in 0017; new is that nothing is done while there is a row of the tenant. Who wrote one had looked before the tenant was
# closed, and committed when its table was through: all stages are gone through once more.
FINISH = """
CREATE OR REPLACE FUNCTION finish_purge(p_tenant text, p_files bigint, p_limit integer) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  p tenant_purges;
  gone bigint;
  again boolean;
BEGIN
  SELECT * INTO p FROM tenant_purges t WHERE t.tenant = p_tenant FOR UPDATE;
  IF p.stage IS DISTINCT FROM 'archive' THEN
    RETURN p.stage;
  END IF;
  DELETE FROM boxes WHERE box_id = ANY (ARRAY(SELECT b.box_id FROM boxes b WHERE b.tenant = p_tenant LIMIT p_limit));
  GET DIAGNOSTICS gone = ROW_COUNT;
  again :=
    EXISTS (SELECT FROM schedules s WHERE s.tenant = p_tenant)
    OR EXISTS (SELECT FROM events e WHERE e.tenant = p_tenant AND e.event_id <> p.event_id)
    OR EXISTS (SELECT FROM commands k WHERE k.tenant = p_tenant)
    OR EXISTS (SELECT FROM snapshots s WHERE s.tenant = p_tenant)
    OR EXISTS (SELECT FROM credentials c WHERE c.tenant = p_tenant)
    OR EXISTS (SELECT FROM password_tries t WHERE t.tenant = p_tenant);
  p.stage := CASE
    WHEN EXISTS (SELECT FROM boxes b WHERE b.tenant = p_tenant) THEN 'archive' WHEN again THEN 'closed' ELSE 'done' END;
  UPDATE tenant_purges SET boxes = p.boxes + gone, files = p.files + p_files, stage = p.stage,
    below = CASE WHEN p.stage = 'closed' THEN p.position - 1 ELSE p.below END,
    chain = CASE WHEN p.stage = 'closed' THEN sha256('') ELSE p.chain END,
    done_at = CASE WHEN p.stage = 'done' THEN clock_timestamp() END
  WHERE tenant = p_tenant;
  RETURN p.stage;
END $$;
"""

# As in 0015; new is that nothing fires for a tenant that is closed.
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
    """Replaces functions; who may call them stays."""
    for statements in (CLOSE, PURGE, FINISH, RELEASE):
        op.execute(statements)


def downgrade() -> None:
    """The functions of before leave rows behind; there is no way back but a new migration."""
    raise NotImplementedError("write a new migration instead")
