"""Ids of a process's commands."""

from __future__ import annotations

import pytest

from shared.folds.ids import step_id

PROCESS = "0f1c2d3e-4a5b-4c6d-8e7f-001122334455"


def test_the_id_of_a_step_never_changes() -> None:
    """A stored literal: another id would carry out every step under way a second time after an upgrade."""
    assert str(step_id("transfer", PROCESS, "debit")) == "53d645cb-d513-5da2-a2fb-88ebf0ab39e1"
    assert step_id("transfer", PROCESS.upper(), "debit", 1) == step_id("transfer", PROCESS, "debit")


def test_types_processes_steps_and_attempts_have_ids_of_their_own() -> None:
    """Nothing shares an id with anything else."""
    other = "0f1c2d3e-4a5b-4c6d-8e7f-001122334456"
    ids = {
        step_id(type_, process, step, attempt)
        for type_ in ("transfer", "registration")
        for process in (PROCESS, other)
        for step in ("debit", "credit")
        for attempt in (1, 2)
    }
    assert len(ids) == 16


def test_what_is_no_uuid_or_no_attempt_is_refused() -> None:
    """A mistake that would otherwise be seen only after a crash."""
    with pytest.raises(ValueError, match="badly formed"):
        step_id("transfer", "transfer-1", "debit")
    with pytest.raises(ValueError, match="from 1"):
        step_id("transfer", PROCESS, "debit", 0)
