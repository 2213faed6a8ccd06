"""What may be done with a transfer, and by whom it is ended."""

from __future__ import annotations

from typing import Any

import pytest

from bank.v1 import transfer_pb2
from shared.folds.ids import step_id
from tests.support.checks.scenario import META, given
from write_service.domain.transfer import TRANSFER, Transfer, complete, fail, start, suspense_id
from write_service.domain.transfer_types import (
    Compensation,
    CompleteTransfer,
    FailTransfer,
    StartTransfer,
    TransferCompleted,
    TransferFailed,
    TransferStarted,
)

T1 = "7d1c0a5e-0000-4000-8000-000000000001"

# META's moment, 2026-01-02 03:04:05 UTC, in milliseconds, and one and two minutes later.
NOW_MS = 1_767_323_045_000

start_it = StartTransfer(transfer_id=T1, from_account_id="a1", to_account_id="a2", amount_minor=69, currency="USD")
to_itself = StartTransfer(transfer_id=T1, from_account_id="a1", to_account_id="a1", amount_minor=69, currency="USD")
complete_it = CompleteTransfer(transfer_id=T1)
fail_it = FailTransfer(transfer_id=T1, reason="ACCOUNT_FROZEN", compensation=2)
completed = TransferCompleted(transfer_id=T1)
failed = TransferFailed(transfer_id=T1, reason="ACCOUNT_FROZEN", compensation=2)
started = TransferStarted(
    transfer_id=T1,
    from_account_id="a1",
    to_account_id="a2",
    amount_minor=69,
    currency="USD",
    debit_command_id="63ec8a31-0000-0000-0000-000000000000",
    credit_command_id="63ec8a31-0000-0000-0000-000000000001",
    refund_command_id="63ec8a31-0000-0000-0000-000000000002",
    suspend_command_id="63ec8a31-0000-0000-0000-000000000003",
    complete_command_id="63ec8a31-0000-0000-0000-000000000004",
    fail_command_id="63ec8a31-0000-0000-0000-000000000005",
    suspense_id="63ec8a31-0000-0000-0000-000000000006",
    debit_not_after_ms=NOW_MS + 60_000,
    credit_not_after_ms=NOW_MS + 120_000,
)


def test_starting_fixes_the_ids_and_limits_of_all_later_steps() -> None:
    """Ids follow from the transfer and the step; the debit has a minute, and the credit another."""
    [event] = start(Transfer(), start_it, META)
    assert event == TransferStarted(
        transfer_id=T1,
        from_account_id="a1",
        to_account_id="a2",
        amount_minor=69,
        currency="USD",
        debit_command_id=str(step_id("transfer", T1, "debit")),
        credit_command_id=str(step_id("transfer", T1, "credit")),
        refund_command_id=str(step_id("transfer", T1, "refund")),
        suspend_command_id=str(step_id("transfer", T1, "suspend")),
        complete_command_id=str(step_id("transfer", T1, "complete")),
        fail_command_id=str(step_id("transfer", T1, "fail")),
        suspense_id=suspense_id("acme", "USD"),
        debit_not_after_ms=1_767_323_105_000,
        credit_not_after_ms=1_767_323_165_000,
    )


# (what happened, decision, command, the events it gives)
ACCEPTED: dict[str, tuple[list[Any], Any, Any, list[Any]]] = {
    "complete": ([started], complete, complete_it, [completed]),
    "complete the completed: nothing": ([started, completed], complete, complete_it, []),
    "complete the failed: nothing": ([started, failed], complete, complete_it, []),
    "fail": ([started], fail, fail_it, [failed]),
    "fail the failed: nothing": ([started, failed], fail, fail_it, []),
    "fail the completed: nothing": ([started, completed], fail, fail_it, []),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    """A transfer ends once; to end it again changes nothing."""
    history, decide, command, events = ACCEPTED[name]
    given(TRANSFER, *history).when(decide, command).then(*events)


# (what happened, decision, command, reason). Each row breaks the rule it names and all rules after it.
REFUSED: dict[str, tuple[list[Any], Any, Any, str]] = {
    "start: 1. started already": ([started], start, to_itself, "TRANSFER_ALREADY_STARTED"),
    "start: 1. ended already": ([started, completed], start, to_itself, "TRANSFER_ALREADY_STARTED"),
    "start: 2. to the same account": ([], start, to_itself, "SAME_ACCOUNT"),
    "complete: no such transfer": ([], complete, complete_it, "TRANSFER_NOT_FOUND"),
    "fail: no such transfer": ([], fail, fail_it, "TRANSFER_NOT_FOUND"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """These commands are refused for these reasons, in the documented order of precedence."""
    history, decide, command, reason = REFUSED[name]
    given(TRANSFER, *history).when(decide, command).then_refused(reason)


def test_an_unknown_compensation_is_a_defect() -> None:
    """The request's rules let no other number through; were one to come, it would not get into an event."""
    unspecified = FailTransfer(transfer_id=T1, reason="ACCOUNT_FROZEN", compensation=0)
    with pytest.raises(ValueError, match="0 is not a valid Compensation"):
        fail(Transfer(started=True), unspecified, META)


def test_compensations_are_numbered_as_in_the_contract() -> None:
    """The domain knows no protobuf, so its numbers are held to it here."""
    named = {f"COMPENSATION_{one.name}": one.value for one in Compensation}
    assert {"COMPENSATION_UNSPECIFIED": 0, **named} == dict(transfer_pb2.Compensation.items())


def test_a_tenant_has_one_suspense_account_of_a_currency() -> None:
    """Another tenant or currency has another."""
    ids = {suspense_id(tenant, currency) for tenant in ("acme", "umbrella") for currency in ("USD", "EUR")}
    assert len(ids) == 4
    assert suspense_id("acme", "USD") in ids


def test_the_state_is_the_fold_of_the_events() -> None:
    """Every event of the kind leaves its trace."""
    assert given(TRANSFER, started).state == Transfer(started=True)
    assert given(TRANSFER, started, completed).state == Transfer(started=True, ended=True)
    assert given(TRANSFER, started, failed).state == Transfer(started=True, ended=True)
