"""Migrations are one chain, and expand: what a release before relies on stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.checks.migrations import ALLOWED, NOT_OURS, chain_broken, findings, main, migrations_of, statements


def test_no_migration_takes_anything_from_the_release_before(capsys: pytest.CaptureFixture[str]) -> None:
    """As squawk sees it, of all services; an exception that nothing needs any more is none."""
    assert main() == 0, capsys.readouterr().out
    named = {name for service in ("write", "read", "saga") for name, _ in statements(service)}
    assert {name for name, _ in ALLOWED} <= named
    assert not {rule for _, rule in ALLOWED} & set(NOT_OURS)


@pytest.mark.parametrize(
    ("statement", "rule"),
    [
        ("ALTER TABLE accounts DROP COLUMN name;", "ban-drop-column"),
        ("ALTER TABLE accounts RENAME COLUMN name TO title;", "renaming-column"),
        ("ALTER TABLE accounts ADD COLUMN title text NOT NULL;", "adding-required-field"),
        ("ALTER TABLE accounts ALTER COLUMN name TYPE varchar(9);", "changing-column-type"),
        ("DROP TABLE accounts;", "ban-drop-table"),
    ],
)
def test_a_migration_that_contracts_is_seen(statement: str, rule: str) -> None:
    """The release before would fail on it."""
    assert rule in {finding.rule for finding in findings({"read_9999": statement})}


@pytest.mark.parametrize("service", ["write", "read", "saga"])
def test_the_migrations_of_a_service_are_one_chain(service: str) -> None:
    """One head, which every file leads to."""
    assert chain_broken(migrations_of(service)) == ""


@pytest.mark.parametrize(
    ("revisions", "broken"),
    [
        ({"0001": None, "0002": "0001", "0005": "0002"}, ""),
        ({"0001": None, "0002": "0001", "0003": "0001"}, "0003_a.py must be 0003 behind 0002"),
        ({"0001": None, "0002": None}, "0002_a.py must be 0002 behind 0001"),
        ({"0001": None, "0003": "0002"}, "0003_a.py must be 0003 behind 0001"),
        ({}, "the heads are [], not None"),
    ],
)
def test_a_chain_that_is_broken_is_seen(tmp_path: Path, revisions: dict[str, str | None], broken: str) -> None:
    """Two heads, two first ones, a link that leads nowhere, or no revision at all; numbers may be left out."""
    (tmp_path / "versions").mkdir()
    for revision, before in revisions.items():
        (tmp_path / "versions" / f"{revision}_a.py").write_text(f"revision = {revision!r}\ndown_revision = {before!r}\n")
    assert chain_broken(tmp_path) == broken
