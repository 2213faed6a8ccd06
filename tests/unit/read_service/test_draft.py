"""The migration that is drafted from the description of a table."""

from __future__ import annotations

from datetime import datetime
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import NamedTuple

import pytest

from read_service.migrations.draft import VERSIONS, draft, missing
from read_service.registry import GROUPS
from shared.folds.table import BigNumber, Code, Int32, Table, by
from tests.support.checks.migrations import findings


class LoanRow(NamedTuple):
    """A row with each type of column."""

    tenant: Code
    loan_id: Code
    note: str
    rate: Int32
    lent_minor: int
    owed_minor: BigNumber
    lent_at: datetime
    ended_at: datetime | None


loans = Table("loans", LoanRow, keys=2, indexes=[by("lent_at"), by("lent_at", only="ended_at IS NOT NULL")], filled=80)
LOANS = """
CREATE TABLE loans (
  tenant text COLLATE "C" NOT NULL,
  loan_id text COLLATE "C" NOT NULL,
  note text NOT NULL,
  rate integer NOT NULL,
  lent_minor bigint NOT NULL,
  owed_minor numeric NOT NULL,
  lent_at timestamptz NOT NULL,
  ended_at timestamptz,
  PRIMARY KEY (tenant, loan_id)
) WITH (fillfactor = 80);
CREATE INDEX loans_by_lent_at ON loans (tenant, lent_at, loan_id);
CREATE INDEX loans_by_lent_at_only ON loans (tenant, lent_at, loan_id) WHERE (ended_at IS NOT NULL);
"""


def test_a_table_that_no_migration_makes_gets_one(tmp_path: Path) -> None:
    """The next of the chain, which `make lint` lets pass; there is nothing to be drafted then."""
    (tmp_path / "0021_before.py").write_text("CREATE TABLE users (")
    assert missing([loans], tmp_path) == [loans]
    path = draft([loans], tmp_path)
    assert path == tmp_path / "0022_loans.py"
    spec = spec_from_file_location("drafted", path)
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (module.revision, module.down_revision, module.TABLES) == ("0022", "0021", LOANS)
    assert findings({"read_0022": module.TABLES}) == []
    assert missing([loans], tmp_path) == []


def test_the_migrations_make_all_tables_that_are_described() -> None:
    """A row of the registry whose tables nothing makes would be found by a start of the service."""
    described = [projection.table for group in GROUPS for projection in group.projections]
    assert missing(described, VERSIONS) == []


def test_an_index_by_no_column_is_refused() -> None:
    """When the module of the table is imported."""
    with pytest.raises(TypeError, match=r"loans has indexes by \['lent_by'\], which are no columns"):
        Table("loans", LoanRow, keys=2, indexes=[by("lent_by")])
