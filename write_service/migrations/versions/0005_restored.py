"""A restored copy of the line has another epoch: by itself where it can be told from the original, else at an operator's word.

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

from alembic import context, op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# Where the line is: the cluster's identifier, which initdb makes, and the database's number, which a database that was dropped
# and made again does not get back. A dump that is restored elsewhere carries the old home along, and so is found out.
HOME = """
CREATE FUNCTION line_home() RETURNS text
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
  SELECT s.system_identifier || '.' || d.oid FROM pg_control_system() s, pg_database d WHERE d.datname = current_database()
$$;
ALTER TABLE line ADD COLUMN home text COLLATE "C";
UPDATE line SET home = line_home();
ALTER TABLE line ALTER COLUMN home SET NOT NULL;
"""

# A copy's epoch follows from that of the original and from where the copy is, so it stays the same without being written.
EPOCH = """
CREATE OR REPLACE FUNCTION line_epoch() RETURNS text
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
  SELECT CASE WHEN l.home = line_home() THEN l.epoch
         ELSE substr(encode(sha256(convert_to(l.epoch || ' ' || line_home(), 'UTF8')), 'hex'), 1, 32)::uuid END
         || '/' || ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int
  FROM line l
$$;
"""

# For what cannot be found out: files copied back, or a dump restored into the database that it was made of. Two at once: the
# second waits for the row and finds another epoch. Repeated: refused, for the same reason.
RESTORED = """
CREATE FUNCTION line_restored(p_epoch text) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
  PERFORM FROM line FOR UPDATE;
  UPDATE line SET epoch = gen_random_uuid(), home = line_home() WHERE line_epoch() = p_epoch;
  RETURN FOUND;
END $$;
"""


def upgrade() -> None:
    """The line stays where it is, and its epoch as it was."""
    app = context.config.attributes["roles"]["app"]
    for statements in (HOME, EPOCH, RESTORED):
        op.execute(statements)
    op.execute("REVOKE ALL ON FUNCTION line_home, line_restored FROM PUBLIC")
    op.execute(f'GRANT EXECUTE ON FUNCTION line_restored TO "{app}"')


def downgrade() -> None:
    """What was restored would seem to be what it was before; there is no way back but a new migration."""
    raise NotImplementedError("write a new migration instead")
