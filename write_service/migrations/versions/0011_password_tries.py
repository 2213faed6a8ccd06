"""Wrong passwords are counted where all replicas see them.

Revision ID: 0011
Revises: 0010
"""

from __future__ import annotations

from alembic import context, op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

# Not in the write-ahead log: after a crash of the server the count begins anew, which costs a guesser's victim nothing.
TRIES = """
CREATE UNLOGGED TABLE password_tries (
  tenant text COLLATE "C" NOT NULL,
  login_id text COLLATE "C" NOT NULL,
  minute bigint NOT NULL,
  tries integer NOT NULL,
  PRIMARY KEY (tenant, login_id, minute)
) WITH (fillfactor = 60);
CREATE INDEX password_tries_by_minute ON password_tries (minute);
"""

# The sliding window counter: the tries of this minute, and of the minute before as much as still lies within sixty seconds.
# The tenant's count is the row with an empty login. Two at once: the second waits for the row and counts on.
COUNT = """
CREATE FUNCTION count_password_try(p_tenant text, p_login_id text, p_per_login integer, p_per_tenant integer) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  now_s double precision := extract(epoch FROM clock_timestamp());
  this bigint := floor(now_s / 60);
  before double precision := 1 - (now_s / 60 - this);
  subject text;
  allowed integer;
BEGIN
  DELETE FROM password_tries t WHERE t.minute < this - 1;
  FOR subject, allowed IN VALUES (p_login_id, p_per_login), ('', p_per_tenant) LOOP
    INSERT INTO password_tries AS t (tenant, login_id, minute, tries) VALUES (p_tenant, subject, this, 1)
    ON CONFLICT (tenant, login_id, minute) DO UPDATE SET tries = t.tries + 1;
    IF (SELECT sum(CASE WHEN t.minute = this THEN t.tries ELSE t.tries * before END) FROM password_tries t
        WHERE t.tenant = p_tenant AND t.login_id = subject AND t.minute >= this - 1) > allowed THEN
      -- What is refused is not counted, so a guesser who goes on does not keep others out for longer.
      UPDATE password_tries t SET tries = t.tries - 1
      WHERE t.tenant = p_tenant AND t.login_id IN (p_login_id, subject) AND t.minute = this;
      RETURN false;
    END IF;
  END LOOP;
  RETURN true;
END $$;
"""

FORGET = """
CREATE FUNCTION forget_password_tries(p_tenant text, p_login_id text) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
  DELETE FROM password_tries t WHERE t.tenant = p_tenant AND t.login_id = p_login_id;
  UPDATE password_tries t SET tries = greatest(t.tries - 1, 0)
  WHERE t.tenant = p_tenant AND t.login_id = '' AND t.minute = floor(extract(epoch FROM clock_timestamp()) / 60);
END $$;
"""


def upgrade() -> None:
    """Additions alone: an older release counts within each process, as before."""
    app = context.config.attributes["roles"]["app"]
    for statements in (TRIES, COUNT, FORGET):
        op.execute(statements)
    for function in ("count_password_try", "forget_password_tries"):
        op.execute(f"REVOKE ALL ON FUNCTION {function} FROM PUBLIC")
        op.execute(f'GRANT EXECUTE ON FUNCTION {function} TO "{app}"')


def downgrade() -> None:
    """There is no way back but a new migration."""
    raise NotImplementedError("write a new migration instead")
