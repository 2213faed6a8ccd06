"""When a scheduler was last at work: what was due while none was is missed, what is merely late is not.

Revision ID: 0022
Revises: 0021
"""

from __future__ import annotations

from alembic import context, op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None

TABLE = """
CREATE TABLE scheduler_lives (
  shard smallint PRIMARY KEY,
  seen_at timestamptz NOT NULL
);
"""

# Returns the last time before, and the present one. Two at once: the second waits for the row, and sees the first.
SEEN = """
CREATE FUNCTION scheduler_seen(p_shard integer, OUT o_before timestamptz, OUT o_now timestamptz)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
  SELECT l.seen_at INTO o_before FROM scheduler_lives l WHERE l.shard = p_shard FOR UPDATE;
  o_now := greatest(clock_timestamp(), o_before);
  INSERT INTO scheduler_lives (shard, seen_at) VALUES (p_shard, o_now)
  ON CONFLICT (shard) DO UPDATE SET seen_at = greatest(scheduler_lives.seen_at, excluded.seen_at);
END $$;
"""


def upgrade() -> None:
    """A table of one row, and the function that keeps it."""
    app = context.config.attributes["roles"]["app"]
    op.execute(TABLE)
    op.execute(SEEN)
    op.execute("REVOKE ALL ON FUNCTION scheduler_seen FROM PUBLIC")
    op.execute(f'GRANT EXECUTE ON FUNCTION scheduler_seen TO "{app}"')


def downgrade() -> None:
    """Removes both; the release before goes by lateness alone."""
    op.execute("DROP FUNCTION scheduler_seen; DROP TABLE scheduler_lives")
