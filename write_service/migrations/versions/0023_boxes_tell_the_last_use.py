"""A box has the time of the last event that changed what is in it, so that boxing does not begin the time to a purge anew.

Revision ID: 0023
Revises: 0022
"""

from __future__ import annotations

from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None

# Boxes of earlier releases have none: their aggregates are kept from the boxing on. The events are still in their table when
# `box_aggregate` (0009) inserts the box. The newest comes first; only the few marks of former boxes are passed over.
COLUMN = """
ALTER TABLE boxes ADD COLUMN changed_at timestamptz;
CREATE FUNCTION box_changed_at() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
  SELECT e.recorded_at INTO NEW.changed_at FROM events e
  WHERE e.tenant = NEW.tenant AND e.category = NEW.category AND e.aggregate_id = NEW.aggregate_id AND e.version <= NEW.version
    AND e.type NOT IN ('foldline.v1.AggregateBoxed', 'foldline.v1.AggregateUnboxed')
  ORDER BY e.version DESC LIMIT 1;
  RETURN NEW;
END $$;
CREATE TRIGGER box_changed_at BEFORE INSERT ON boxes
FOR EACH ROW WHEN (NEW.location <> '') EXECUTE FUNCTION box_changed_at();
"""


def upgrade() -> None:
    """Adds a column, which a trigger sets."""
    op.execute(COLUMN)
    op.execute("REVOKE ALL ON FUNCTION box_changed_at FROM PUBLIC")


def downgrade() -> None:
    """The time to a purge begins anew with boxing."""
    op.execute("DROP TRIGGER box_changed_at ON boxes")
    op.execute("DROP FUNCTION box_changed_at")
    op.execute("ALTER TABLE boxes DROP COLUMN changed_at")
