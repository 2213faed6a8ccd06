"""Of an aggregate's snapshots only the newest of each state schema is kept.

Revision ID: 0008
Revises: 0007
"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

# In the statement that adds a snapshot, so within the append and under the shard's lock. Those of another schema stay: while
# services are being replaced, both releases load from their own. They are never more than there were schemas.
TRIGGER = """
CREATE FUNCTION snapshots_keep_newest() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
  DELETE FROM snapshots s USING added a
  WHERE s.tenant = a.tenant AND s.category = a.category AND s.aggregate_id = a.aggregate_id AND s.schema = a.schema
    AND s.version < a.version;
  RETURN NULL;
END $$;
REVOKE ALL ON FUNCTION snapshots_keep_newest FROM PUBLIC;
CREATE TRIGGER snapshots_keep_newest AFTER INSERT ON snapshots REFERENCING NEW TABLE AS added
  FOR EACH STATEMENT EXECUTE FUNCTION snapshots_keep_newest();
"""

OLDER = """
DELETE FROM snapshots s WHERE EXISTS (
  SELECT FROM snapshots n
  WHERE n.tenant = s.tenant AND n.category = s.category AND n.aggregate_id = s.aggregate_id AND n.schema = s.schema
    AND n.version > s.version)
"""


def upgrade() -> None:
    """Adds the trigger, and deletes what it would have deleted."""
    op.execute(TRIGGER)
    op.execute(OLDER)


def downgrade() -> None:
    """Older snapshots are missed by nobody: a state is loaded from the newest."""
    op.execute("DROP TRIGGER snapshots_keep_newest ON snapshots")
    op.execute("DROP FUNCTION snapshots_keep_newest")
