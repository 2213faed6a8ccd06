"""Every process of the bank, explored: each answer in each phase leads on, and every way ends."""

from __future__ import annotations

from typing import Any

import pytest

from docs.process_diagrams import arrows
from saga_service.registry import PROCESSES
from shared.folds.process import ProcessDefinition


@pytest.mark.parametrize("definition", PROCESSES, ids=lambda it: it.type)
def test_from_every_phase_there_is_a_way_to_an_end(definition: ProcessDefinition[Any]) -> None:
    """A phase that no answer leads out of would strand its processes: a definition that misses a state is found here."""
    first, found = arrows(definition)
    ends = {arrow.target for arrow in found if arrow.ends}
    leads_on = set(ends)
    for _ in found:
        leads_on |= {arrow.source for arrow in found if arrow.target in leads_on}
    phases = {first} | {arrow.target for arrow in found}
    assert phases == leads_on
    assert not any(arrow.source in ends for arrow in found)


def test_the_diagram_of_a_transfer() -> None:
    """What its module's docstring draws, in words."""
    [transfer] = [it for it in PROCESSES if it.type == "transfer"]
    first, found = arrows(transfer)
    assert first == "debiting"
    assert [(arrow.source, arrow.label, arrow.target) for arrow in found] == [
        ("debiting", "debit accepted", "crediting"),
        ("debiting", "debit refused", "failing"),
        ("crediting", "credit accepted", "completing"),
        ("crediting", "credit refused", "refunding"),
        ("failing", "fail accepted", "failed"),
        ("completing", "complete accepted", "completed"),
        ("refunding", "refund accepted", "failing"),
        ("refunding", "refund refused", "suspending"),
        ("suspending", "suspend accepted", "failing"),
    ]
