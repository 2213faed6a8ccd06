"""An aggregate that has ended is purged: its events leave holes, and its other rows go.

Revision ID: 0020
Revises: 0019
"""

from __future__ import annotations

from alembic import context, op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

# A row of `aggregate_purges` is for one aggregate and what goes with it: the arrays name all of them, that one last, with the
# version of the last event that goes. Its mark, AggregatePurged, is the next version, and stays. A box without a location stands
# for the events that are gone, so that no append takes one of their versions (0010). While commands go, those of aggregates
# before `part`, and of that one those received up to `after`, are through.
TABLES = """
CREATE TABLE aggregate_purges (
  purge_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  tenant text COLLATE "C" NOT NULL,
  command_id uuid NOT NULL,
  categories text[] COLLATE "C" NOT NULL,
  aggregate_ids text[] COLLATE "C" NOT NULL,
  versions bigint[] NOT NULL,
  purged_at timestamptz NOT NULL,
  stage text COLLATE "C" NOT NULL DEFAULT 'events' CHECK (stage IN ('events', 'rows', 'archive', 'done')),
  events bigint NOT NULL DEFAULT 0,
  boxed_events bigint NOT NULL DEFAULT 0,
  commands bigint NOT NULL DEFAULT 0,
  schedules bigint NOT NULL DEFAULT 0,
  snapshots bigint NOT NULL DEFAULT 0,
  credentials bigint NOT NULL DEFAULT 0,
  boxes bigint NOT NULL DEFAULT 0,
  files bigint NOT NULL DEFAULT 0,
  part integer NOT NULL DEFAULT 1,
  after timestamptz NOT NULL DEFAULT '-infinity',
  done_at timestamptz
);
CREATE INDEX aggregate_purges_open ON aggregate_purges (purge_id) WHERE stage <> 'done';
CREATE INDEX aggregate_purges_by_tenant ON aggregate_purges (tenant, purge_id);
CREATE INDEX boxed_events_by_box_and_position ON boxed_events (box_id, position);
CREATE INDEX schedules_by_aggregate ON schedules (tenant, category, aggregate_id);
ALTER TABLE purged_events DROP CONSTRAINT purged_events_tenant_fkey;
ALTER TABLE purged_events ADD COLUMN purged_at timestamptz;
COMMENT ON COLUMN purged_events.purged_at IS 'Of an event that went with its aggregate; of others the tenant''s end says when.';
DROP INDEX boxed_events_by_box;
"""

# The marks, and the row of the command that asked, in one transaction: from then on nobody decides on the aggregates. A command
# on one of them at the same time: whoever takes the shard's lock first wins; the other finds the version taken or the aggregate
# moved. Whoever had the state in memory finds the mark's version taken, or the box in its way. A command for later that is
# written behind the check is refused when it is due.
PURGE = """
CREATE FUNCTION purge_aggregates(
  p_shard integer, p_tenant text, a_category text[], a_aggregate_id text[], a_version bigint[], k_subject_id text[],
  e_event_id uuid[], e_type text, e_payload bytea, e_metadata bytea,
  c_command_id uuid, c_type text, c_fingerprint bytea, c_payload bytea, c_user_id text, c_correlation_id uuid,
  c_traceparent text, c_received_at timestamptz,
  OUT o_head bigint, OUT o_purge_id bigint
)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp
AS $$
DECLARE
  v_count integer := cardinality(a_category);
  v_before bigint;
  v_recorded_at timestamptz;
  v_snapshots bigint;
  v_credentials bigint;
BEGIN
  PERFORM pg_advisory_xact_lock(1, p_shard);
  IF EXISTS (SELECT FROM tenant_purges t WHERE t.tenant = p_tenant) OR EXISTS (
    SELECT FROM unnest(a_category, a_aggregate_id, a_version) AS a(category, aggregate_id, version)
    WHERE a.version <> coalesce((
      SELECT e.version FROM events e
      WHERE e.tenant = p_tenant AND e.category = a.category AND e.aggregate_id = a.aggregate_id
      ORDER BY e.version DESC LIMIT 1), 0))
  THEN
    RAISE EXCEPTION 'an aggregate has moved, or the tenant is closed' USING ERRCODE = 'serialization_failure';
  END IF;
  IF EXISTS (
    SELECT FROM unnest(a_category, a_aggregate_id) AS a(category, aggregate_id)
    WHERE aggregate_awaits(p_tenant, a.category, a.aggregate_id))
  THEN
    RAISE EXCEPTION 'a command for one of them waits for its time' USING ERRCODE = 'object_in_use';
  END IF;
  SELECT e.position, e.recorded_at INTO v_before, v_recorded_at FROM events e ORDER BY e.position DESC LIMIT 1;
  o_head := v_before + v_count;
  v_recorded_at := greatest(clock_timestamp(), v_recorded_at);
  INSERT INTO commands (
    tenant, command_id, type, category, aggregate_id, fingerprint, payload, status, user_id, on_behalf_of, correlation_id,
    traceparent, received_at, finished_at, version, events_appended, position, head)
  VALUES (
    p_tenant, c_command_id, c_type, a_category[v_count], a_aggregate_id[v_count], c_fingerprint, c_payload, 'completed',
    c_user_id, '', c_correlation_id, c_traceparent, c_received_at, v_recorded_at, a_version[v_count] + 1, v_count,
    o_head, o_head);
  INSERT INTO events (position, event_id, tenant, category, aggregate_id, version, type, payload, recorded_at, metadata)
  SELECT v_before + a.nth, a.event_id, p_tenant, a.category, a.aggregate_id, a.version + 1, e_type, e_payload, v_recorded_at,
    e_metadata
  FROM unnest(a_category, a_aggregate_id, a_version, e_event_id) WITH ORDINALITY
    AS a(category, aggregate_id, version, event_id, nth);
  UPDATE boxes b SET unboxed_at = v_recorded_at
  FROM unnest(a_category, a_aggregate_id) AS a(category, aggregate_id)
  WHERE b.tenant = p_tenant AND b.category = a.category AND b.aggregate_id = a.aggregate_id AND b.unboxed_at IS NULL;
  INSERT INTO boxes (tenant, category, aggregate_id, version, location, chain, boxed_at)
  SELECT p_tenant, a.category, a.aggregate_id, a.version, '', '', v_recorded_at
  FROM unnest(a_category, a_aggregate_id, a_version) AS a(category, aggregate_id, version);
  DELETE FROM snapshots s USING unnest(a_category, a_aggregate_id) AS a(category, aggregate_id)
  WHERE s.tenant = p_tenant AND s.category = a.category AND s.aggregate_id = a.aggregate_id;
  GET DIAGNOSTICS v_snapshots = ROW_COUNT;
  DELETE FROM credentials c WHERE c.tenant = p_tenant AND c.subject_id = ANY (k_subject_id);
  GET DIAGNOSTICS v_credentials = ROW_COUNT;
  INSERT INTO aggregate_purges (tenant, command_id, categories, aggregate_ids, versions, purged_at, snapshots, credentials)
  VALUES (p_tenant, c_command_id, a_category, a_aggregate_id, a_version, v_recorded_at, v_snapshots, v_credentials)
  RETURNING purge_id INTO o_purge_id;
END $$;
"""

AWAITS = """
CREATE FUNCTION aggregate_awaits(p_tenant text, p_category text, p_aggregate_id text) RETURNS boolean
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
  SELECT EXISTS (
      SELECT FROM commands k
      WHERE k.tenant = p_tenant AND k.category = p_category AND k.aggregate_id = p_aggregate_id AND k.status = 'scheduled')
    OR EXISTS (
      SELECT FROM schedules s
      WHERE s.tenant = p_tenant AND s.category = p_category AND s.aggregate_id = p_aggregate_id AND s.status <> 'ended')
$$;
"""

# One step, one transaction, of up to `p_limit` rows. Returns the stage that it leaves behind. Two at once: the second waits for
# the row. The newest events go first, of all aggregates of the purge, so that what is left at any time can be folded (0017):
# some of the newest are read of each aggregate and of each box, and of these go the ones behind which nothing can be missing.
# Of commands that processes sent (ids of version 8) the outcome stays, without the payload: a process that was away sends them
# again, and must get the first answer, or it would take what was done for refused.
# Nothing is done for a tenant that is closed: the tenant's own purge deletes all of it, and counts what it deletes.
STEP = """
CREATE FUNCTION purge_aggregates_step(p_purge_id bigint, p_limit integer) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
SET plan_cache_mode = force_custom_plan AS $$
DECLARE
  p aggregate_purges;
  at bigint[];
  each integer;
  online bigint;
  boxed bigint;
  gone bigint;
  ended bigint;
  until timestamptz;
  is_last boolean;
BEGIN
  SELECT * INTO p FROM aggregate_purges a WHERE a.purge_id = p_purge_id FOR UPDATE;
  IF NOT FOUND OR EXISTS (SELECT FROM tenant_purges t WHERE t.tenant = p.tenant) THEN
    RETURN 'done';
  END IF;
  IF p.stage = 'events' THEN
    each := greatest(p_limit / cardinality(p.versions), 20);
    WITH found AS MATERIALIZED (
      SELECT a.nth AS source, e.position
      FROM unnest(p.categories, p.aggregate_ids, p.versions) WITH ORDINALITY AS a(category, aggregate_id, version, nth)
      CROSS JOIN LATERAL (
        SELECT e.position FROM events e
        WHERE e.tenant = p.tenant AND e.category = a.category AND e.aggregate_id = a.aggregate_id AND e.version <= a.version
        ORDER BY e.version DESC LIMIT each) e
      UNION ALL
      SELECT -x.box_id, b.position FROM unnest(p.categories, p.aggregate_ids) AS a(category, aggregate_id)
      JOIN boxes x ON x.tenant = p.tenant AND x.category = a.category AND x.aggregate_id = a.aggregate_id
      CROSS JOIN LATERAL (
        SELECT b.position FROM boxed_events b WHERE b.box_id = x.box_id ORDER BY b.position DESC LIMIT each) b
    ), behind AS (
      SELECT max(s.oldest) AS oldest
      FROM (SELECT min(f.position) AS oldest FROM found f GROUP BY f.source HAVING count(*) = each) s
    )
    SELECT array_agg(n.position) INTO at FROM (
      SELECT f.position FROM found f CROSS JOIN behind b WHERE f.position >= coalesce(b.oldest, 0)
      ORDER BY f.position DESC LIMIT p_limit) n;
    PERFORM set_config('foldline.boxing', 'on', true);
    WITH gone AS (DELETE FROM events e WHERE e.position = ANY (at) RETURNING e.position, e.event_id)
    INSERT INTO purged_events (position, event_id, tenant, purged_at)
    SELECT g.position, g.event_id, p.tenant, p.purged_at FROM gone g;
    GET DIAGNOSTICS online = ROW_COUNT;
    PERFORM set_config('foldline.boxing', '', true);
    WITH gone AS (DELETE FROM boxed_events b WHERE b.position = ANY (at) RETURNING b.position, b.event_id)
    INSERT INTO purged_events (position, event_id, tenant, purged_at)
    SELECT g.position, g.event_id, p.tenant, p.purged_at FROM gone g;
    GET DIAGNOSTICS boxed = ROW_COUNT;
    UPDATE aggregate_purges SET events = p.events + online, boxed_events = p.boxed_events + boxed,
      stage = CASE WHEN online + boxed = 0 THEN 'rows' ELSE 'events' END
    WHERE purge_id = p_purge_id RETURNING stage INTO p.stage;
  ELSIF p.stage = 'rows' THEN
    SELECT k.received_at INTO until FROM commands k
    WHERE k.tenant = p.tenant AND k.category = p.categories[p.part] AND k.aggregate_id = p.aggregate_ids[p.part]
      AND k.received_at > p.after
    ORDER BY k.received_at OFFSET p_limit - 1 LIMIT 1;
    is_last := until IS NULL;
    until := coalesce(until, 'infinity');
    DELETE FROM commands k
    WHERE k.tenant = p.tenant AND k.category = p.categories[p.part] AND k.aggregate_id = p.aggregate_ids[p.part]
      AND k.received_at > p.after AND k.received_at <= until
      AND k.finished_at <= p.purged_at AND k.command_id <> p.command_id AND substr(k.command_id::text, 15, 1) <> '8';
    GET DIAGNOSTICS gone = ROW_COUNT;
    UPDATE commands k SET payload = ''
    WHERE k.tenant = p.tenant AND k.category = p.categories[p.part] AND k.aggregate_id = p.aggregate_ids[p.part]
      AND k.received_at > p.after AND k.received_at <= until
      AND k.finished_at <= p.purged_at AND k.payload <> '' AND k.command_id <> p.command_id;
    DELETE FROM schedules WHERE is_last AND ctid = ANY (ARRAY(
      SELECT s.ctid FROM schedules s
      WHERE s.tenant = p.tenant AND s.category = p.categories[p.part] AND s.aggregate_id = p.aggregate_ids[p.part]
        AND s.status = 'ended' AND s.created_at <= p.purged_at LIMIT p_limit));
    GET DIAGNOSTICS ended = ROW_COUNT;
    is_last := is_last AND ended < p_limit;
    UPDATE aggregate_purges SET commands = p.commands + gone, schedules = p.schedules + ended,
      after = CASE WHEN is_last THEN '-infinity' WHEN until = 'infinity' THEN p.after ELSE until END,
      part = p.part + is_last::integer,
      stage = CASE WHEN is_last AND p.part = cardinality(p.aggregate_ids) THEN 'archive' ELSE 'rows' END
    WHERE purge_id = p_purge_id RETURNING stage INTO p.stage;
  END IF;
  RETURN p.stage;
END $$;
"""

# The last step, when the archive's folders are gone. `p_files` is how many files went.
FINISH_AGGREGATES = """
CREATE FUNCTION finish_purge_of_aggregates(p_purge_id bigint, p_files bigint) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  p aggregate_purges;
  gone bigint;
BEGIN
  SELECT * INTO p FROM aggregate_purges a WHERE a.purge_id = p_purge_id FOR UPDATE;
  IF p.stage IS DISTINCT FROM 'archive' OR EXISTS (SELECT FROM tenant_purges t WHERE t.tenant = p.tenant) THEN
    RETURN 'done';
  END IF;
  DELETE FROM boxes b USING unnest(p.categories, p.aggregate_ids) AS a(category, aggregate_id)
  WHERE b.tenant = p.tenant AND b.category = a.category AND b.aggregate_id = a.aggregate_id AND b.location <> '';
  GET DIAGNOSTICS gone = ROW_COUNT;
  UPDATE aggregate_purges SET boxes = gone, files = p.files + p_files, stage = 'done', done_at = clock_timestamp()
  WHERE purge_id = p_purge_id;
  RETURN 'done';
END $$;
"""

# As in 0018; new is that the purges of the tenant's aggregates go.
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
  DELETE FROM aggregate_purges
  WHERE ctid = ANY (ARRAY(SELECT a.ctid FROM aggregate_purges a WHERE a.tenant = p_tenant LIMIT p_limit));
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
    WHEN EXISTS (SELECT FROM boxes b WHERE b.tenant = p_tenant)
      OR EXISTS (SELECT FROM aggregate_purges a WHERE a.tenant = p_tenant) THEN 'archive'
    WHEN again THEN 'closed' ELSE 'done' END;
  UPDATE tenant_purges SET boxes = p.boxes + gone, files = p.files + p_files, stage = p.stage,
    below = CASE WHEN p.stage = 'closed' THEN p.position - 1 ELSE p.below END,
    chain = CASE WHEN p.stage = 'closed' THEN sha256('') ELSE p.chain END,
    done_at = CASE WHEN p.stage = 'done' THEN clock_timestamp() END
  WHERE tenant = p_tenant;
  RETURN p.stage;
END $$;
"""


def upgrade() -> None:
    """Adds a table and functions; the application reads the table and calls the functions."""
    app = context.config.attributes["roles"]["app"]
    for statements in (TABLES, AWAITS, PURGE, STEP, FINISH_AGGREGATES, FINISH):
        op.execute(statements)
    op.execute(f'GRANT SELECT ON aggregate_purges TO "{app}"')
    for function in ("aggregate_awaits", "purge_aggregates", "purge_aggregates_step", "finish_purge_of_aggregates"):
        op.execute(f"REVOKE ALL ON FUNCTION {function} FROM PUBLIC")
        op.execute(f'GRANT EXECUTE ON FUNCTION {function} TO "{app}"')


def downgrade() -> None:
    """What was purged is gone, and nobody may use its aggregate again; there is no way back but a new migration."""
    raise NotImplementedError("write a new migration instead")
