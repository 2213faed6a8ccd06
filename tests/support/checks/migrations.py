"""`make lint` holds the migrations to squawk: a release before must go on while and after one runs (expand, then contract).

`python -m tests.support.checks.migrations` prints what is found, and fails if there is anything.
"""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory

from shared.platform.versions import POSTGRES_MIN

ROOT = Path(__file__).parents[3]
ROLES = {role: f"foldline_{role}" for role in ("owner", "app", "query")}
NOT_OURS = (
    # All migrations that are missing run in one transaction, so that a failure leaves nothing; the bootstrap limits no time.
    "require-concurrent-index-creation",
    "require-lock-timeout",
    "require-statement-timeout",
    "prefer-robust-stmts",
    # How many values a column can have is decided per column.
    "prefer-bigint-over-int",
    "prefer-bigint-over-smallint",
    "prefer-text-field",
)
ALLOWED = {
    # (service and revision, rule): why it does no harm.
    (
        "read_0004",
        "ban-drop-default",
    ): "older than this check: a projector of the release before adds no rows",
    ("read_0005", "ban-drop-default"): "as 0004",
    ("read_0007", "adding-field-with-default"): "a generated column of a table that holds a row for each consumer",
    ("read_0012", "adding-field-with-default"): "a ring of 512 rows for each group",
    ("saga_0003", "ban-drop-constraint"): "the constraint is made anew at once, with one more value",
    ("write_0005", "adding-not-nullable-field"): "a table of one row",
    ("write_0006", "constraint-missing-not-valid"): "no row can break it, for the status is new",
    ("write_0020", "ban-drop-constraint"): "the table takes rows of tenants that are not closed, which nobody writes before",
    ("write_0020", "require-concurrent-index-deletion"): "another index serves the same reads, and to drop one takes no time",
    ("write_0006", "ban-drop-function"): "the changelog says that this release's processes replace all others at once",
}


class Finding(NamedTuple):
    """What squawk says of a migration."""

    migration: str
    rule: str
    text: str


def migrations_of(service: str) -> Path:
    """The folder of a service's migrations."""
    return ROOT / f"{service}_service/migrations"


def chain_broken(folder: Path) -> str:
    """What keeps the revisions in a folder from being one chain, each behind the one of the next lower number; empty if nothing.

    Alembic upgrades to one head, and passes over a file that no head leads to.
    """
    last: str | None = None
    for file in sorted((folder / "versions").glob("*.py")):
        number, names = file.name.split("_")[0], dict[str, object]()
        for statement in ast.parse(file.read_text()).body:
            match statement:
                case ast.Assign(targets=[ast.Name(id="revision" | "down_revision" as name)], value=ast.Constant(value=value)):
                    names[name] = value
        if names != {"revision": number, "down_revision": last}:
            return f"{file.name} must be {number} behind {last}"
        last = number
    script = ScriptDirectory.from_config(_config(folder))
    return "" if last is not None and script.get_heads() == [last] else f"the heads are {script.get_heads()}, not {last}"


def _config(folder: Path) -> Config:
    config = Config()
    config.set_main_option("script_location", str(folder))
    config.set_main_option("path_separator", "os")
    config.attributes.update(roles=ROLES, shard=1)
    return config


def statements(service: str) -> Iterator[tuple[str, str]]:
    """The SQL of each revision of a service, by its name, the oldest first."""
    config = _config(migrations_of(service))
    script = ScriptDirectory.from_config(config)
    for revision in reversed(list(script.walk_revisions())):
        written = io.StringIO()
        with EnvironmentContext(
            config,
            script,
            fn=lambda *_, to=revision: script._upgrade_revs(to.revision, to.down_revision),
            as_sql=True,
            starting_rev=revision.down_revision,
            destination_rev=revision.revision,
        ) as environment:
            environment.configure(dialect_name="postgresql", output_buffer=written)
            environment.run_migrations()
        yield f"{service}_{revision.revision}", written.getvalue()


def findings(migrations: dict[str, str]) -> list[Finding]:
    """What squawk finds in statements, but for what is allowed."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in migrations.items():
            (Path(folder) / f"{name}.sql").write_text(text)
        squawk = str(Path(sys.executable).with_name("squawk"))
        options = ["--reporter=json", "--assume-in-transaction", f"--pg-version={POSTGRES_MIN}"]
        files = sorted(map(str, Path(folder).glob("*.sql")))
        line = [squawk, *options, f"--exclude={','.join(NOT_OURS)}", *files]
        done = subprocess.run(line, capture_output=True, check=False, text=True)  # noqa: S603 (of ours)
    found = [Finding(Path(row["file"]).stem, row["rule_name"], row["message"]) for row in json.loads(done.stdout)]
    return [finding for finding in found if (finding.migration, finding.rule) not in ALLOWED]


def main() -> int:
    """Prints what is found."""
    found = findings({name: text for service in ("write", "read", "saga") for name, text in statements(service)})
    for finding in found:
        print(f"{finding.migration}: {finding.rule}: {finding.text}")  # noqa: T201
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
