"""The line of events, the command log, snapshots, credentials, and the one function that writes them.

Revision ID: 0001
Revises:
"""

from __future__ import annotations

from alembic import context, op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = """
CREATE TABLE line (
  shard smallint PRIMARY KEY CHECK (shard > 0),
  epoch uuid NOT NULL DEFAULT gen_random_uuid()
);
COMMENT ON TABLE line IS 'One row: which shard this database is, and a name for its history.';

CREATE TABLE events (
  position bigint PRIMARY KEY CHECK (position > 0),
  event_id uuid NOT NULL,
  tenant text COLLATE "C" NOT NULL,
  category text COLLATE "C" NOT NULL,
  aggregate_id text COLLATE "C" NOT NULL,
  version bigint NOT NULL CHECK (version > 0),
  type text COLLATE "C" NOT NULL,
  payload bytea NOT NULL,
  recorded_at timestamptz NOT NULL,
  metadata bytea NOT NULL,
  UNIQUE (tenant, category, aggregate_id, version)
);

CREATE TABLE commands (
  tenant text COLLATE "C" NOT NULL,
  command_id uuid NOT NULL,
  type text COLLATE "C" NOT NULL,
  category text COLLATE "C" NOT NULL,
  aggregate_id text COLLATE "C" NOT NULL,
  fingerprint bytea NOT NULL,
  payload bytea NOT NULL,
  status text COLLATE "C" NOT NULL
    CHECK (status IN ('scheduled', 'started', 'completed', 'rejected', 'failed', 'cancelled')),
  user_id text COLLATE "C" NOT NULL,
  on_behalf_of text COLLATE "C" NOT NULL,
  correlation_id uuid NOT NULL,
  causation_id uuid,
  traceparent text COLLATE "C" NOT NULL,
  received_at timestamptz NOT NULL,
  finished_at timestamptz,
  version bigint NOT NULL,
  events_appended integer NOT NULL,
  position bigint NOT NULL,
  head bigint NOT NULL,
  error bytea,
  PRIMARY KEY (tenant, command_id)
);

CREATE TABLE snapshots (
  tenant text COLLATE "C" NOT NULL,
  category text COLLATE "C" NOT NULL,
  aggregate_id text COLLATE "C" NOT NULL,
  version bigint NOT NULL,
  schema integer NOT NULL,
  state bytea NOT NULL,
  PRIMARY KEY (tenant, category, aggregate_id, version)
);

CREATE TABLE credentials (
  tenant text COLLATE "C" NOT NULL,
  subject_id text COLLATE "C" NOT NULL,
  password_hash text NOT NULL,
  PRIMARY KEY (tenant, subject_id)
);
"""

IMMUTABLE = """
CREATE FUNCTION events_never_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION 'events are never changed' USING ERRCODE = 'integrity_constraint_violation';
END $$;
CREATE TRIGGER events_never_change BEFORE UPDATE OR DELETE OR TRUNCATE ON events
  FOR EACH STATEMENT EXECUTE FUNCTION events_never_change();
"""

# The timeline grows by one at every failover, so a replica that was promoted without the last commits is told apart
# from the server whose history it continues.
EPOCH = """
CREATE FUNCTION line_epoch() RETURNS text
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
  SELECT epoch || '/' || ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int FROM line
$$;
"""

# Two replicas append at once: the second waits at the lock, and what it reads then is what the first committed,
# because every statement of a VOLATILE function takes a new snapshot. A check in the statement that takes the lock
# would see the past. Nothing is written or locked before the lock is held, else two replicas could wait for each
# other. The lock goes with the transaction, after its rows are visible, so positions are in the order of commits and
# no reader can see a position while an earlier one is still to come. Killed anywhere: the statement is a
# transaction of its own, all of it is there or none.
#
# What was decided on a world that has moved is refused by the indexes that hold the rows anyway: an event whose
# version is taken, a command that has an outcome. Looking for them first cost as much as writing them. An aggregate
# that was read but gets no event has no row that could collide, so its version alone is looked up.
#
# The head is read from the index of positions rather than kept in a row: a row that every commit updates grows a
# chain of dead versions as long as any backup or report holds a snapshot, and every append would walk it.
#
# The arrays are unnested in a list of columns, not in FROM, which would write each array to a store of its own first.
# One command alone, which is what a lone caller waits for, is spared that too: it was an eighth of the statement.
APPEND = """
CREATE FUNCTION append_batch(
  p_shard integer, p_again boolean,
  r_tenant text[], r_category text[], r_aggregate_id text[], r_version bigint[],
  c_tenant text[], c_command_id uuid[], c_type text[], c_category text[], c_aggregate_id text[],
  c_fingerprint bytea[], c_payload bytea[], c_status text[], c_user_id text[], c_on_behalf_of text[],
  c_correlation_id uuid[], c_causation_id uuid[], c_traceparent text[], c_received_at timestamptz[],
  c_version bigint[], c_events_appended integer[], c_last_event integer[], c_error bytea[],
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

  -- 3. Everything, at once. A command that met a defect may come again, but not as another.
  IF p_again THEN
    DELETE FROM commands k USING unnest(c_tenant, c_command_id, c_fingerprint) AS c(tenant, command_id, fingerprint)
    WHERE k.tenant = c.tenant AND k.command_id = c.command_id AND k.fingerprint = c.fingerprint AND k.status = 'failed';
  END IF;
  IF cardinality(c_command_id) = 1 THEN
    INSERT INTO commands (
      tenant, command_id, type, category, aggregate_id, fingerprint, payload, status, user_id, on_behalf_of,
      correlation_id, causation_id, traceparent, received_at, finished_at, version, events_appended, position, head,
      error)
    VALUES (
      c_tenant[1], c_command_id[1], c_type[1], c_category[1], c_aggregate_id[1], c_fingerprint[1], c_payload[1],
      c_status[1], c_user_id[1], c_on_behalf_of[1], c_correlation_id[1], c_causation_id[1], c_traceparent[1],
      c_received_at[1], o_recorded_at, c_version[1], c_events_appended[1],
      CASE WHEN c_last_event[1] > 0 THEN before + c_last_event[1] ELSE 0 END, o_head, c_error[1]);
  ELSE
    INSERT INTO commands (
      tenant, command_id, type, category, aggregate_id, fingerprint, payload, status, user_id, on_behalf_of,
      correlation_id, causation_id, traceparent, received_at, finished_at, version, events_appended, position, head,
      error)
    SELECT c.tenant, c.command_id, c.type, c.category, c.aggregate_id, c.fingerprint, c.payload, c.status, c.user_id,
      c.on_behalf_of, c.correlation_id, c.causation_id, c.traceparent, c.received_at, o_recorded_at, c.version,
      c.events_appended, CASE WHEN c.last_event > 0 THEN before + c.last_event ELSE 0 END, o_head, c.error
    FROM (
      SELECT unnest(c_tenant) AS tenant, unnest(c_command_id) AS command_id, unnest(c_type) AS type,
        unnest(c_category) AS category, unnest(c_aggregate_id) AS aggregate_id, unnest(c_fingerprint) AS fingerprint,
        unnest(c_payload) AS payload, unnest(c_status) AS status, unnest(c_user_id) AS user_id,
        unnest(c_on_behalf_of) AS on_behalf_of, unnest(c_correlation_id) AS correlation_id,
        unnest(c_causation_id) AS causation_id, unnest(c_traceparent) AS traceparent,
        unnest(c_received_at) AS received_at, unnest(c_version) AS version,
        unnest(c_events_appended) AS events_appended, unnest(c_last_event) AS last_event, unnest(c_error) AS error) AS c;
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
    INSERT INTO credentials (tenant, subject_id, password_hash)
    SELECT * FROM unnest(k_tenant, k_subject_id, k_password_hash)
    ON CONFLICT (tenant, subject_id) DO UPDATE SET password_hash = excluded.password_hash;
  END IF;
END $$;
"""


def upgrade() -> None:
    """Makes the tables, and lets the application read them and call the two functions: nothing else."""
    app = context.config.attributes["roles"]["app"]
    op.execute(TABLES)
    op.execute(IMMUTABLE)
    op.execute(EPOCH)
    op.execute(APPEND)
    op.execute(f"INSERT INTO line (shard) VALUES ({int(context.config.attributes.get('shard', 1))})")
    op.execute("REVOKE ALL ON ALL FUNCTIONS IN SCHEMA public FROM PUBLIC")
    op.execute(f'GRANT SELECT ON line, events, commands, snapshots TO "{app}"')
    op.execute(f'GRANT EXECUTE ON FUNCTION append_batch, line_epoch TO "{app}"')


def downgrade() -> None:
    """Events are never dropped by a migration; restore a backup instead."""
    raise NotImplementedError("restore a backup instead")
