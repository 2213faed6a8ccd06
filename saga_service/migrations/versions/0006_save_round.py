"""A round of the runner in one statement.

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

from alembic import context, op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

# Saves a round whose processes the runner had in memory. It raises serialization_failure, and nothing is saved, if the
# checkpoint is not where the runner left it, if operators have paused or parked something since, or if an answered command has
# no row or was given up. A process that somebody else has changed since has more history, so that process_history_pkey is
# violated: every change of a process adds to its history.
#
# Each statement has one plan that is always right, so the plans are kept. An upsert finds its rows by the index it names. A
# delete by the whole key, row by row, has no other index to use; joined to arrays, its plan could come from a time when the
# table was empty.
SAVE_ROUND = """
CREATE FUNCTION save_round(
  i_name text, i_shard integer, i_parked bigint,
  i_old_epoch text, i_old_position bigint, i_old_event_id text, i_epoch text, i_position bigint, i_event_id text,
  a_tenant text[], a_type text[], a_process_id text[], a_step text[], a_command_id uuid[],
  p_tenant text[], p_type text[], p_process_id text[], p_state text[], p_schema integer[], p_status text[], p_trouble text[],
  p_attention text[], p_phase text[], p_correlation_id text[], p_causation_id text[], p_on_behalf_of text[],
  p_traceparent text[], p_attempts text[], p_entries integer[], p_started_at timestamptz[], p_moved_at timestamptz[],
  c_due_at timestamptz, c_tenant text[], c_type text[], c_process_id text[], c_step text[], c_attempt integer[],
  c_command_id uuid[], c_command_type text[], c_payload bytea[], c_causation_id text[], c_on_behalf_of text[],
  c_traceparent text[],
  e_tenant text[], e_type text[], e_process_id text[],
  t_tenant text[], t_type text[], t_process_id text[], t_name text[], t_due_at timestamptz[],
  g_tenant text[], g_type text[], g_process_id text[], g_name text[],
  h_tenant text[], h_type text[], h_process_id text[], h_number integer[], h_happened_at timestamptz[], h_kind text[],
  h_name text[], h_step text[], h_id text[], h_position bigint[], h_attempts integer[], h_error bytea[], h_phase text[],
  h_note text[]
)
RETURNS void LANGUAGE plpgsql VOLATILE SET plan_cache_mode = 'force_generic_plan'
AS $$
DECLARE
  was_given_up boolean;
BEGIN
  UPDATE checkpoints SET epoch = i_epoch, position = i_position, event_id = i_event_id, state = 'running', reason = '',
    moved_at = clock_timestamp()
  WHERE name = i_name AND shard = i_shard AND epoch = i_old_epoch AND position = i_old_position
    AND event_id = i_old_event_id AND parked = i_parked AND paused = '{}';
  IF NOT FOUND THEN
    RAISE serialization_failure;
  END IF;
  FOR i IN 1 .. cardinality(a_tenant) LOOP
    DELETE FROM process_commands WHERE tenant = a_tenant[i] AND type = a_type[i] AND process_id = a_process_id[i]
      AND step = a_step[i] AND command_id = a_command_id[i] RETURNING given_up INTO was_given_up;
    IF was_given_up IS NOT FALSE THEN
      RAISE serialization_failure;
    END IF;
  END LOOP;
  INSERT INTO processes AS p (tenant, type, process_id, state, schema, status, trouble, attention, phase, correlation_id,
    causation_id, on_behalf_of, traceparent, attempts, entries, started_at, moved_at)
  SELECT unnest(p_tenant), unnest(p_type), unnest(p_process_id), unnest(p_state), unnest(p_schema), unnest(p_status),
    unnest(p_trouble), unnest(p_attention), unnest(p_phase), unnest(p_correlation_id), unnest(p_causation_id),
    unnest(p_on_behalf_of), unnest(p_traceparent), unnest(p_attempts), unnest(p_entries), unnest(p_started_at),
    unnest(p_moved_at)
  ON CONFLICT (tenant, type, process_id) DO UPDATE SET state = excluded.state, schema = excluded.schema,
    status = excluded.status, trouble = excluded.trouble, attention = excluded.attention, phase = excluded.phase,
    causation_id = excluded.causation_id, attempts = excluded.attempts, entries = excluded.entries,
    moved_at = excluded.moved_at;
  IF cardinality(c_tenant) > 0 THEN
    INSERT INTO process_commands (tenant, type, process_id, step, attempt, command_id, command_type, payload, causation_id,
      on_behalf_of, traceparent, tries, due_at)
    SELECT unnest(c_tenant), unnest(c_type), unnest(c_process_id), unnest(c_step), unnest(c_attempt), unnest(c_command_id),
      unnest(c_command_type), unnest(c_payload), unnest(c_causation_id), unnest(c_on_behalf_of), unnest(c_traceparent), 1,
      c_due_at
    ON CONFLICT (tenant, type, process_id, step) DO NOTHING;
  END IF;
  FOR i IN 1 .. cardinality(e_tenant) LOOP
    DELETE FROM process_timers WHERE tenant = e_tenant[i] AND type = e_type[i] AND process_id = e_process_id[i];
  END LOOP;
  IF cardinality(t_tenant) > 0 THEN
    INSERT INTO process_timers (tenant, type, process_id, name, due_at)
    SELECT unnest(t_tenant), unnest(t_type), unnest(t_process_id), unnest(t_name), unnest(t_due_at)
    ON CONFLICT (tenant, type, process_id, name) DO UPDATE SET due_at = excluded.due_at;
  END IF;
  FOR i IN 1 .. cardinality(g_tenant) LOOP
    DELETE FROM process_timers WHERE tenant = g_tenant[i] AND type = g_type[i] AND process_id = g_process_id[i]
      AND name = g_name[i];
  END LOOP;
  INSERT INTO process_history (tenant, type, process_id, number, happened_at, kind, name, step, id, position, attempts, error,
    phase, note)
  SELECT unnest(h_tenant), unnest(h_type), unnest(h_process_id), unnest(h_number), unnest(h_happened_at), unnest(h_kind),
    unnest(h_name), unnest(h_step), unnest(h_id), unnest(h_position), unnest(h_attempts), unnest(h_error), unnest(h_phase),
    unnest(h_note);
END $$;
"""


def upgrade() -> None:
    """Makes the function, which has the rights of its caller."""
    app = context.config.attributes["roles"]["app"]
    op.execute(SAVE_ROUND)
    op.execute("REVOKE ALL ON FUNCTION save_round FROM PUBLIC")
    op.execute(f'GRANT EXECUTE ON FUNCTION save_round TO "{app}"')


def downgrade() -> None:
    """Takes the function away; a round in two statements saves all that it did."""
    op.execute("DROP FUNCTION save_round")
