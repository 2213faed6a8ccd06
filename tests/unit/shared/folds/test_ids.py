"""Ids of a process's commands."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from uuid import RFC_4122, UUID, uuid1, uuid4

import pytest
from uuid_utils import uuid7

from shared.folds.ids import derived_id, firing_id, is_of_processes, step_id

PROCESS = "0f1c2d3e-4a5b-4c6d-8e7f-001122334455"


def test_the_id_of_a_step_never_changes() -> None:
    """A stored literal: another id would carry out a step that is sent again after an upgrade a second time."""
    assert str(step_id("transfer", PROCESS, "debit")) == "84345d27-f2eb-8b66-b13e-8e19e56d7d27"
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


def test_they_are_in_a_space_of_their_own() -> None:
    """Of version 8, which nobody else makes: neither at random, nor by time, nor from a name."""
    for attempt in range(1, 200):
        made = step_id("transfer", PROCESS, "debit", attempt)
        assert (made.version, made.variant) == (8, RFC_4122)
        assert is_of_processes(str(made))
    for other in (str(uuid4()), str(uuid7()), str(uuid1()), derived_id("login", "acme", "alice"), str(UUID(int=0))):
        assert not is_of_processes(other)


def test_the_id_of_a_firing_is_that_of_its_time() -> None:
    """A stored literal, the same in every zone: another id would let a time fire twice. Nobody but a process may use it."""
    due_at = datetime(2026, 3, 29, 1, 0, tzinfo=UTC)
    assert firing_id(PROCESS, due_at) == "3f9f730a-4c19-80b8-b995-7e33e8d06563"
    assert firing_id(PROCESS.upper(), due_at.astimezone(timezone(timedelta(hours=2)))) == firing_id(PROCESS, due_at)
    assert firing_id(PROCESS, due_at + timedelta(minutes=1)) != firing_id(PROCESS, due_at)
    assert is_of_processes(firing_id(PROCESS, due_at))


def test_what_is_no_uuid_or_no_attempt_is_refused() -> None:
    """A mistake that would otherwise be seen only after a crash."""
    with pytest.raises(ValueError, match="badly formed"):
        step_id("transfer", "transfer-1", "debit")
    with pytest.raises(ValueError, match="from 1"):
        step_id("transfer", PROCESS, "debit", 0)
