"""Operators may ask for the tables of a lost history to be emptied and filled again.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

from alembic import context, op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# The query role reads alone: what it asks for is done by the projector, which finds it in the checkpoint's row.
REFILL = """
ALTER TABLE checkpoints ADD COLUMN refill_asked boolean NOT NULL DEFAULT false;
CREATE FUNCTION ask_refill(p_name text, p_shard integer) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
  UPDATE checkpoints SET refill_asked = true
  WHERE name = p_name AND shard = p_shard AND state = 'stopped' AND starts_with(reason, 'HISTORY_DIVERGED');
  RETURN FOUND;
END $$;
"""


def upgrade() -> None:
    """A column and a function."""
    query = context.config.attributes["roles"]["query"]
    op.execute(REFILL)
    op.execute("REVOKE ALL ON FUNCTION ask_refill FROM PUBLIC")
    op.execute(f'GRANT EXECUTE ON FUNCTION ask_refill TO "{query}"')


def downgrade() -> None:
    """Nobody asks any more."""
    op.execute("DROP FUNCTION ask_refill")
    op.execute("ALTER TABLE checkpoints DROP COLUMN refill_asked")
