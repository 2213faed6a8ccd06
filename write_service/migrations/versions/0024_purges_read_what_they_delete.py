"""A step of a purge reads no more rows than it may delete, whatever PostgreSQL knows of the tables.

Revision ID: 0024
Revises: 0023
"""

from __future__ import annotations

from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None

# As in 0020, but for two plans that PostgreSQL may no longer choose once it has counted the rows: to read all events of an
# aggregate and sort them, and to pass over the events of other boxes on the way to those of one. Only the index by box and
# position has the order that is asked for now: were it `=`, PostgreSQL would take the order by position for the same.
STEP = """
CREATE OR REPLACE FUNCTION purge_aggregates_step(p_purge_id bigint, p_limit integer) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
SET plan_cache_mode = force_custom_plan SET enable_bitmapscan = off AS $$
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
        SELECT b.position FROM boxed_events b WHERE b.box_id BETWEEN x.box_id AND x.box_id
        ORDER BY b.box_id DESC, b.position DESC LIMIT each) b
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


def upgrade() -> None:
    """Replaces the function, which has the same parameters, owner and grants."""
    op.execute(STEP)


def downgrade() -> None:
    """The function is right for the release before, too."""
