"""`append_one` in fewer statements, and with full names instead of a search path of its own.

Together these took a fifth of a lone caller's commit.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# It runs with its owner's rights, so nothing in it may be looked for along the caller's search path: every table, function
# and operator has its schema before it. (COALESCE and GREATEST are no functions, and compare by the type's own order.)
# The lock comes in a statement of its own, before the one that finds the head: on a fresh snapshot, that is. The aggregates
# make a row of an empty line as well.
APPEND_ONE = """
CREATE OR REPLACE FUNCTION append_one(
  p_shard integer, p_tenant text, p_category text, p_aggregate_id text, p_version bigint,
  c_command_id uuid, c_type text, c_fingerprint bytea, c_payload bytea, c_user_id text, c_on_behalf_of text,
  c_correlation_id uuid, c_causation_id uuid, c_traceparent text, c_received_at timestamptz,
  e_event_id uuid, e_type text, e_payload bytea, e_metadata bytea,
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
    causation_id, traceparent, received_at, finished_at, version, events_appended, position, head)
  VALUES (
    p_tenant, c_command_id, c_type, p_category, p_aggregate_id, c_fingerprint, c_payload, 'completed', c_user_id,
    c_on_behalf_of, c_correlation_id, c_causation_id, c_traceparent, c_received_at, o_recorded_at, p_version, 1, o_head,
    o_head);
END $$;
"""


def upgrade() -> None:
    """Replaces the function; who may call it stays."""
    op.execute(APPEND_ONE)


def downgrade() -> None:
    """The names stay in full, which a search path does not change."""
    op.execute("ALTER FUNCTION append_one SET search_path = pg_catalog, public, pg_temp")
