"""Migrations expand: what a release before relies on stays."""

from __future__ import annotations

import pytest

from tests.support.checks.migrations import ALLOWED, NOT_OURS, findings, main, statements


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
