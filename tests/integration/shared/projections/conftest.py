"""Nothing of what tests break outlives them."""

from __future__ import annotations

import pytest

from tests.integration.shared.projections.parked_keys import broken, slow, unreadable


@pytest.fixture(autouse=True)
def whole() -> None:
    """Nothing is broken when a test begins."""
    broken.clear()
    slow.clear()
    unreadable.clear()
