"""The next release that `tests/faults/test_rolling.py` runs can be made from the code as it is."""

from __future__ import annotations

from pathlib import Path

from tests.support.next_release import ROOT, changed
from tests.support.next_release.changes import CHANGES


def test_every_change_finds_the_text_that_it_takes_the_place_of(tmp_path: Path) -> None:
    """Whoever changes that text changes the change."""
    paths = {change.path for change in CHANGES}
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text((ROOT / path).read_text())
    changed(tmp_path)
    assert all((tmp_path / path).read_text() != (ROOT / path).read_text() for path in paths)
