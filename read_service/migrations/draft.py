"""`python -m read_service.migrations.draft` writes the migration of the query tables which no migration makes yet.

A table that is there already is changed by a migration that is written by hand; a test compares both with their descriptions.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from read_service.registry import GROUPS
from shared.folds.table import Table

VERSIONS = Path(__file__).parent / "versions"
_TEXT = '''"""The tables of {names}.

Revision ID: {revision}
Revises: {before}
"""

from __future__ import annotations

from alembic import context, op

revision = "{revision}"
down_revision = "{before}"
branch_labels = None
depends_on = None

TABLES = """
{definitions}
"""


def upgrade() -> None:
    """Makes the tables and gives each its policies and grants."""
    roles = context.config.attributes["roles"]
    op.execute(TABLES)
    for table in {tables}:
        op.execute(f"SELECT secure_query_table('{{table}}', '{{roles['app']}}', '{{roles['query']}}')")


def downgrade() -> None:
    """Query tables are filled from the line; there is no way back but a new migration."""
    raise NotImplementedError("write a new migration instead")
'''


def missing(tables: Iterable[Table[Any]], versions: Path) -> list[Table[Any]]:
    """Those of the tables that no migration makes."""
    texts = "".join(path.read_text() for path in versions.glob("[0-9]*.py"))
    made = set(re.findall(r"CREATE TABLE (\w+) ", texts))
    return [table for table in tables if table.name not in made]


def draft(tables: Sequence[Table[Any]], versions: Path) -> Path:
    """Writes the next migration, which makes the tables."""
    names, before = [table.name for table in tables], max(path.name for path in versions.glob("[0-9]*.py"))[:4]
    revision = f"{int(before) + 1:04}"
    path = versions / f"{revision}_{'_'.join(names)}.py"
    definitions = "\n\n".join(table.definition() for table in tables)
    tables_text = "(" + ", ".join(f'"{name}"' for name in names) + ",)"
    path.write_text(
        _TEXT.format(names=" and ".join(names), revision=revision, before=before, definitions=definitions, tables=tables_text)
    )
    return path


def main() -> int:
    """Writes it and says where."""
    tables = missing((projection.table for group in GROUPS for projection in group.projections), VERSIONS)
    sys.stdout.write(f"{draft(tables, VERSIONS) if tables else 'a migration makes each table'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
