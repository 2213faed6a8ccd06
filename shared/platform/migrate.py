"""Runs a service's alembic history. A service's migrations/env.py is one call: `run_in_env()`.

A migration finds the names of the roles it grants to in `context.config.attributes["roles"]`, for example
`{"app": "foldline_write_app"}`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from alembic import command, context
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, make_url
from sqlalchemy.pool import NullPool


class SchemaTooNew(ValueError):
    """A newer release has migrated the database. The text is one sentence that begins with SCHEMA_TOO_NEW."""


def migrate(script_location: Path, owner_url: str, roles: Mapping[str, str], *, shard: int = 1) -> None:
    """Brings the database at `owner_url` to the newest revision below `script_location`, in one transaction.

    Two at once do no harm: the second waits at a lock and finds nothing left to do. Raises SchemaTooNew, and changes nothing, if
    the database has a revision that this release does not know.
    """
    config = Config()
    config.set_main_option("script_location", str(script_location).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes.update(owner_url=owner_url, roles=dict(roles), shard=shard)
    command.upgrade(config, "head")


def refuse_newer(script_location: Path, revisions: Iterable[str]) -> None:
    """Raises SchemaTooNew if one of these revisions of a database is not below `script_location`."""
    _refuse_unknown(ScriptDirectory(str(script_location)), revisions)


def run_in_env() -> None:
    """What migrations/env.py does: connects as the owner and runs the revisions that are missing."""
    url = make_url(context.config.attributes["owner_url"]).set(drivername="postgresql+psycopg")
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        context.configure(connection=connection, transactional_ddl=True)
        with context.begin_transaction():
            # Held to the end of the transaction. Alembic reads the current revision after this.
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(hashtextextended('foldline.migrate', 0))")
            _refuse_unknown(ScriptDirectory.from_config(context.config), context.get_context().get_current_heads())
            context.run_migrations()
    engine.dispose()


def _refuse_unknown(scripts: ScriptDirectory, revisions: Iterable[str]) -> None:
    if unknown := sorted(set(revisions) - {script.revision for script in scripts.walk_revisions()}):
        raise SchemaTooNew(
            f"SCHEMA_TOO_NEW: the database is at revision {', '.join(unknown)}, which this release does not know: "
            "run the bootstrap of the newest release that was ever here"
        )
