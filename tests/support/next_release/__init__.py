"""A release after this one, made from the code as it is: a test runs its processes beside those of this release.

What is new in it is in `changes.py`; each change says the text that it takes the place of, and the build fails if that text is
there no longer. Contracts are compiled as `make proto` does it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from alembic.script import ScriptDirectory

from deploy.bootstrap import Databases
from shared.platform.migrate import migrate
from tests.support.next_release.changes import CHANGES, MIGRATIONS

ROOT = Path(__file__).parents[3]
# What differs. The kernel is taken from this release.
PACKAGES = ("protos", "tests/domains", "upcasters", "write_service", "read_service", "saga_service")
REVISION = "next"


@dataclass(frozen=True, slots=True)
class Release:
    """The code of a release, in a folder."""

    folder: Path

    @property
    def settings(self) -> Mapping[str, str]:
        """Settings for a replica (`System.replica`) that make it one of this release."""
        return {"PYTHONPATH": f"{self.folder}:{self.folder / 'protos'}"}

    def migrate(self, databases: Databases) -> None:
        """What its bootstrap does to databases. Raises SchemaTooNew if a newer release has migrated one."""
        for service in MIGRATIONS:
            url = getattr(databases, service).owner
            migrate(self.folder / f"{service}_service" / "migrations", url, {})


@contextmanager
def next_release(folder: Path) -> Iterator[Release]:
    """The release after this one, in an empty folder. What Python compiled of it is deleted with the block."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    changed(folder)
    for service, sql in MIGRATIONS.items():
        _add_migration(folder / f"{service}_service" / "migrations", sql)
    subprocess.run([sys.executable, str(folder / "protos/generate.py")], check=True, cwd=folder)  # noqa: S603 - our own
    shutil.rmtree(folder / "protos/foldline")  # compiled as it was: this release's is taken
    try:
        yield Release(folder)
    finally:
        if sys.pycache_prefix:
            shutil.rmtree(Path(sys.pycache_prefix) / folder.relative_to("/"), ignore_errors=True)


def changed(folder: Path) -> None:
    """Makes the changes in the files below a folder. Raises LookupError for a text that is not there."""
    for change in CHANGES:
        file = folder / change.path
        text = file.read_text()
        if change.old not in text:
            raise LookupError(f"{change.path} has no {change.old!r}, which tests/support/next_release/changes.py would change")
        file.write_text(text.replace(change.old, change.new))


def _add_migration(migrations: Path, sql: str) -> None:
    [head] = ScriptDirectory(str(migrations)).get_heads()
    names = f"revision = {REVISION!r}\ndown_revision = {head!r}\n"
    code = f"from alembic import op\n\n{names}\n\ndef upgrade():\n    op.execute({sql!r})\n"
    (migrations / "versions" / f"{REVISION}.py").write_text(code)
