"""Nothing of what tests break outlives them."""

from __future__ import annotations

import pytest

from shared.projections import parked, parking, rebuild
from tests.integration.shared.projections.parked_keys import broken, slow, unreadable


@pytest.fixture(autouse=True)
def whole() -> None:
    """Nothing is broken when a test begins."""
    broken.clear()
    slow.clear()
    unreadable.clear()


@pytest.fixture(params=["few", "very many"])
def remembered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A projector remembers what is parked, or it looks up what it needs, as where very many keys are parked; in short pages."""
    if request.param == "very many":
        monkeypatch.setattr(parked, "KNOWN_MAX", 0)
        monkeypatch.setattr(parking, "PAGE", 1)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of rebuilds follow each other without long pauses."""
    monkeypatch.setattr(rebuild, "LOOK_S", 0.01)
    monkeypatch.setattr(rebuild, "STEP_S", 0.005)
