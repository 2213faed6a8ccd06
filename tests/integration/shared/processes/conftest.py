"""Gifts over a saga database of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.bootstrap import Database
from tests.support.domains import gifts
from tests.support.domains.gifts import World


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """A file with a token that nobody checks."""
    file = tmp_path / "saga.token"
    file.write_text("t0ken\n")
    return file


@pytest.fixture
def world(saga_db: Database, token_file: Path) -> World:
    """A line, a write service, a saga database."""
    return World(saga_db, token_file)


@pytest.fixture(autouse=True)
def no_defects() -> Iterator[None]:
    """Folds are right unless a test breaks them."""
    yield
    gifts.DEFECTS.accounts.clear()
