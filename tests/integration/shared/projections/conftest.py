"""Nothing of what tests break outlives them."""

from __future__ import annotations

import pytest

from shared.projections import rebuild
from tests.integration.shared.projections.parked_keys import broken, slow, unreadable


@pytest.fixture(autouse=True)
def whole() -> None:
    """Nothing is broken when a test begins."""
    broken.clear()
    slow.clear()
    unreadable.clear()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of rebuilds follow each other without long pauses."""
    monkeypatch.setattr(rebuild, "LOOK_S", 0.01)
    monkeypatch.setattr(rebuild, "STEP_S", 0.005)
