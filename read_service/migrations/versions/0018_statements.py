"""Statements by ranges of moments: the version of an account's first movement from a moment on.

Revision ID: 0018
Revises: 0017
"""

from __future__ import annotations

from alembic import context, op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

# With the caller's rights, so that its policies hold. Each step of the loop reads one row by the primary key and halves the
# versions that are left: twenty steps for a million. No movement moved before one of a lower version.
FUNCTION = """
CREATE FUNCTION first_movement_since(p_tenant text, p_account_id text, p_moment timestamptz) RETURNS bigint
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  v_low bigint := 0;
  v_high bigint;
  v_middle bigint;
  v_version bigint;
  v_moved_at timestamptz;
BEGIN
  SELECT coalesce(max(m.version) + 1, 0) INTO v_high FROM movements m WHERE m.tenant = p_tenant AND m.account_id = p_account_id;
  WHILE v_low < v_high LOOP
    v_middle := (v_low + v_high) / 2;
    SELECT m.version, m.moved_at INTO v_version, v_moved_at FROM movements m
    WHERE m.tenant = p_tenant AND m.account_id = p_account_id AND m.version >= v_middle AND m.version < v_high
    ORDER BY m.version LIMIT 1;
    IF v_version IS NULL OR v_moved_at >= p_moment THEN
      v_high := v_middle;
    ELSE
      v_low := v_version + 1;
    END IF;
  END LOOP;
  RETURN v_high;
END $$;
"""


def upgrade() -> None:
    """A function for the query role."""
    query = context.config.attributes["roles"]["query"]
    op.execute(FUNCTION)
    op.execute("REVOKE ALL ON FUNCTION first_movement_since FROM PUBLIC")
    op.execute(f'GRANT EXECUTE ON FUNCTION first_movement_since TO "{query}"')


def downgrade() -> None:
    """Statements are listed as a whole."""
    op.execute("DROP FUNCTION first_movement_since")
