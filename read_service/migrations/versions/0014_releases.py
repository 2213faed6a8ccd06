"""Which version of a group's folds made its tables, and the function by which a newer release asks for a rebuild.

Revision ID: 0014
Revises: 0013
"""

from __future__ import annotations

from alembic import context, op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

FOLDS = "ALTER TABLE checkpoints ADD COLUMN folds integer NOT NULL DEFAULT 1"
# One step at a time: what stands in the way is ended first, and the caller asks again. Former tables that are kept are those of a
# release before the last; a rebuild that was begun with older folds would be of no use.
FUNCTION = """
CREATE FUNCTION ask_release_rebuild(p_group text, p_shard integer, p_folds integer) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
  v_serving checkpoints;
  v_rebuild projection_rebuilds;
BEGIN
  SELECT * INTO v_serving FROM checkpoints WHERE group_name = p_group AND shard = p_shard AND serves;
  IF v_serving.name IS NULL OR v_serving.position = 0 OR v_serving.folds >= p_folds
    OR (v_serving.state = 'stopped' AND starts_with(v_serving.reason, 'HISTORY_DIVERGED')) THEN
    RETURN 'NOT_NEEDED';
  END IF;
  SELECT * INTO v_rebuild FROM projection_rebuilds WHERE group_name = p_group AND shard = p_shard FOR UPDATE;
  IF v_rebuild.group_name IS NULL THEN
    INSERT INTO projection_rebuilds (group_name, shard, version, only_if_same, asked_by)
    VALUES (p_group, p_shard, nextval('projection_versions'), false, 'release ' || p_folds) ON CONFLICT DO NOTHING;
    RETURN 'ASKED';
  END IF;
  IF v_rebuild.state = 'switched' THEN
    UPDATE projection_rebuilds SET state = 'dropping' WHERE group_name = p_group AND shard = p_shard;
    RETURN 'DROPPING';
  END IF;
  IF v_rebuild.state IN ('filling', 'waiting', 'switching') AND EXISTS (
    SELECT FROM checkpoints c WHERE c.name = p_group || '@' || v_rebuild.version AND c.shard = p_shard AND c.position > 0
      AND c.folds < p_folds) THEN
    UPDATE projection_rebuilds SET state = 'cancelling' WHERE group_name = p_group AND shard = p_shard;
    RETURN 'CANCELLING';
  END IF;
  RETURN 'UNDER_WAY';
END $$;
"""


def upgrade() -> None:
    """A column and a function for the projector."""
    app = context.config.attributes["roles"]["app"]
    op.execute(FOLDS)
    op.execute(FUNCTION)
    op.execute("REVOKE ALL ON FUNCTION ask_release_rebuild FROM PUBLIC")
    op.execute(f'GRANT EXECUTE ON FUNCTION ask_release_rebuild TO "{app}"')


def downgrade() -> None:
    """A release with other folds is rebuilt by hand again."""
    op.execute("DROP FUNCTION ask_release_rebuild")
    op.execute("ALTER TABLE checkpoints DROP COLUMN folds")
