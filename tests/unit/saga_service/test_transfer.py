"""Every path of a transfer's process, as a table of answers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from google.protobuf.message import Message

from bank.v1 import account_pb2, transfer_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from saga_service.transfer import TRANSFER, Transfer
from shared.folds.delivery import Notice
from shared.folds.ids import step_id
from shared.folds.process import Answer, Send, Step
from tests.support.checks.scenario import META
from tests.support.fakes.interleaving import BEGIN
from tests.support.fakes.line import uid
from write_service.domain import transfer as domain
from write_service.domain import transfer_types

ID, BLUE, RED, SUSPENSE = uid(1), uid(2), uid(3), uid(4)
STARTED = transfer_pb2.TransferStarted(
    transfer_id=ID,
    from_account_id=BLUE,
    to_account_id=RED,
    amount_minor=6900,
    currency="USD",
    suspense_id=SUSPENSE,
    debit_not_after_ms=1000,
    credit_not_after_ms=2000,
)
ENVELOPE = EventEnvelope(tenant="acme")
ENVELOPE.recorded_at.FromDatetime(BEGIN)

DEBIT = account_pb2.WithdrawMoneyRequest(
    account_id=BLUE, amount_minor=6900, currency="USD", transfer_id=ID, counterparty_account_id=RED, not_after_ms=1000
)
CREDIT = account_pb2.DepositMoneyRequest(
    account_id=RED, amount_minor=6900, currency="USD", transfer_id=ID, counterparty_account_id=BLUE, not_after_ms=2000
)
# Never too late.
REFUND = account_pb2.DepositMoneyRequest(
    account_id=BLUE, amount_minor=6900, currency="USD", transfer_id=ID, counterparty_account_id=RED
)
SUSPEND = account_pb2.SuspendMoneyRequest(suspense_id=SUSPENSE, transfer_id=ID, amount_minor=6900, currency="USD")
COMPLETE = transfer_pb2.CompleteTransferRequest(transfer_id=ID)


def failing(reason: str, compensation: transfer_pb2.Compensation.ValueType) -> transfer_pb2.FailTransferRequest:
    """The command that ends a transfer that failed."""
    return transfer_pb2.FailTransferRequest(transfer_id=ID, reason=reason, compensation=compensation)


NOT_NEEDED = failing("COMMAND_EXPIRED", transfer_pb2.COMPENSATION_NOT_NEEDED)
REFUNDED = failing("ACCOUNT_FROZEN", transfer_pb2.COMPENSATION_REFUNDED)
SUSPENDED = failing("ACCOUNT_FROZEN", transfer_pb2.COMPENSATION_SUSPENDED)
CANCELLED = "CANCELLED_BY_OPERATOR"

# The answers in their order, each with what is sent next and the phase it is in then; a reason is a refusal.
Road = list[tuple[str, str, Message | None, str, str]]
ROADS: dict[str, Road] = {
    "all goes well": [
        ("debit", "", CREDIT, "crediting", ""),
        ("credit", "", COMPLETE, "completing", ""),
        ("complete", "", None, "completed", ""),
    ],
    "the debit is refused": [
        ("debit", "COMMAND_EXPIRED", NOT_NEEDED, "failing", ""),
        ("fail", "", None, "failed", ""),
    ],
    "the credit is refused": [
        ("debit", "", CREDIT, "crediting", ""),
        ("credit", "ACCOUNT_FROZEN", REFUND, "refunding", ""),
        ("refund", "", REFUNDED, "failing", ""),
        ("fail", "", None, "failed", ""),
    ],
    "the refund is refused as well": [
        ("debit", "", CREDIT, "crediting", ""),
        ("credit", "ACCOUNT_FROZEN", REFUND, "refunding", ""),
        ("refund", "ACCOUNT_CLOSED", SUSPEND, "suspending", ""),
        ("suspend", "", SUSPENDED, "failing", "MONEY_IN_SUSPENSE"),
        ("fail", "", None, "failed", "MONEY_IN_SUSPENSE"),
    ],
    "an operator takes the debit back": [
        ("debit", CANCELLED, failing(CANCELLED, transfer_pb2.COMPENSATION_NOT_NEEDED), "failing", ""),
        ("fail", "", None, "failed", ""),
    ],
    "an operator takes the credit back": [
        ("debit", "", CREDIT, "crediting", ""),
        ("credit", CANCELLED, REFUND, "refunding", ""),
        ("refund", "", failing(CANCELLED, transfer_pb2.COMPENSATION_REFUNDED), "failing", ""),
    ],
    "an operator takes back what must happen: it is sent again": [
        ("debit", "", CREDIT, "crediting", ""),
        ("credit", "", COMPLETE, "completing", ""),
        ("complete", CANCELLED, COMPLETE, "completing", ""),
        ("complete", "", None, "completed", ""),
    ],
    "an operator takes back the suspense and the failure: they are sent again": [
        ("debit", "", CREDIT, "crediting", ""),
        ("credit", "ACCOUNT_FROZEN", REFUND, "refunding", ""),
        ("refund", CANCELLED, SUSPEND, "suspending", ""),
        ("suspend", CANCELLED, SUSPEND, "suspending", ""),
        ("suspend", "", SUSPENDED, "failing", "MONEY_IN_SUSPENSE"),
        ("fail", CANCELLED, SUSPENDED, "failing", "MONEY_IN_SUSPENSE"),
        ("fail", "", None, "failed", "MONEY_IN_SUSPENSE"),
    ],
}
ALL_STEPS = ("debit", "credit", "refund", "suspend", "complete", "fail")


def begun() -> Step[Transfer]:
    """The first step."""
    step = TRANSFER.react(TRANSFER.initial, STARTED, ENVELOPE)
    assert step is not None
    return step


def answer(step: str, reason: str = "") -> Answer:
    """Of the first attempt."""
    return Answer(step=step, attempt=1, accepted=not reason, reason=reason)


def step_of(command: Message) -> str:
    """The name of the step that sends a command."""
    steps = [(DEBIT, "debit"), (CREDIT, "credit"), (REFUND, "refund"), (SUSPEND, "suspend"), (COMPLETE, "complete")]
    return next((step for like, step in steps if like == command), "fail")


def test_it_begins_with_the_debit_and_a_timer() -> None:
    """The debit within its time; an operator is told after three minutes."""
    step = begun()
    assert step.send == (Send(step="debit", command=DEBIT),)
    assert [(timer.name, timer.due_at) for timer in step.timers] == [("overdue", BEGIN + timedelta(minutes=3))]
    assert (TRANSFER.phase(step.state), step.ended, step.attention) == ("debiting", False, "")


COMPLETED_FACTS: dict[str, str | int | bool] = {
    "transfer_id": "00000000-0000-4000-8000-000000000001",
    "amount_minor": 6900,
    "currency": "USD",
}


@pytest.mark.parametrize("road", ROADS)
def test_roads(road: str) -> None:
    """After each answer exactly the next command, the phase, what an operator should see, and the end at the end alone."""
    state = begun().state
    for name, reason, command, phase, attention in ROADS[road]:
        step = TRANSFER.on_answer(state, answer(name, reason))
        expected = () if command is None else (Send(step=step_of(command), command=command),)
        assert (step.send, TRANSFER.phase(step.state), step.attention) == (expected, phase, attention)
        assert step.ended == (command is None)
        assert (step.timers, step.cancel_timers) == ((), ())
        told = (Notice(name="transfer_completed", data=COMPLETED_FACTS),) if phase == "completed" else ()
        assert step.notify == told
        state = step.state


@pytest.mark.parametrize("road", ROADS)
def test_what_is_not_waited_for_changes_nothing(road: str) -> None:
    """Wherever it is: the event again, and answers to every other step, accepted or refused."""
    state, waits_for = begun().state, "debit"
    for name, reason, command, _, _ in [*ROADS[road], ("", "", None, "", "")]:
        assert TRANSFER.react(state, STARTED, ENVELOPE) is None
        for other in {*ALL_STEPS} - {waits_for}:
            for why in ("", "ACCOUNT_FROZEN", CANCELLED):
                step = TRANSFER.on_answer(state, answer(other, why))
                assert (step.state, step.send, step.ended) == (state, (), False)
        if name:
            state = TRANSFER.on_answer(state, answer(name, reason)).state
            waits_for = step_of(command) if command is not None else ""


@pytest.mark.parametrize(
    ("before", "step"),
    [
        ([("debit", ""), ("credit", "")], "complete"),
        ([("debit", "X")], "fail"),
        ([("debit", ""), ("credit", "X"), ("refund", "X")], "suspend"),
    ],
)
def test_what_must_not_be_refused_is_asked_for_again(before: list[tuple[str, str]], step: str) -> None:
    """It is mandatory, so that the runner parks the process before this would go round and round."""
    state = begun().state
    for name, reason in before:
        state = TRANSFER.on_answer(state, answer(name, reason)).state
    again = TRANSFER.on_answer(state, answer(step, "TRANSFER_NOT_FOUND"))
    assert [sent.step for sent in again.send] == [step]
    assert (again.state, again.ended) == (state, False)
    assert step in TRANSFER.mandatory


def test_being_overdue_is_shown_and_changes_nothing() -> None:
    """Until its next step."""
    state = begun().state
    step = TRANSFER.on_timer(state, "overdue")
    assert step is not None
    assert (step.state, step.send, step.attention, step.ended) == (state, (), "STEP_OVERDUE", False)
    assert TRANSFER.on_answer(step.state, answer("debit")).attention == ""


def test_the_first_event_fixes_the_ids_of_all_steps_that_are_sent() -> None:
    """What the domain wrote down is what the runner makes of process, step and first attempt; no step is missing."""
    start = transfer_types.StartTransfer(transfer_id=ID, from_account_id=BLUE, to_account_id=RED, amount_minor=1, currency="USD")
    [started] = domain.start(domain.Transfer(), start, META)
    assert isinstance(started, transfer_types.TransferStarted)
    fixed = {name: getattr(started, f"{name}_command_id") for name in ALL_STEPS}
    assert fixed == {name: str(step_id("transfer", ID, name)) for name in ALL_STEPS}
    sent = {begun().send[0].step} | {step_of(command) for road in ROADS.values() for *_, command, _, _ in road if command}
    ids = {name.removesuffix("_command_id") for name in started.__struct_fields__ if name.endswith("_command_id")}
    assert ids == sent == set(ALL_STEPS)


def test_the_time_limits_are_within_what_makes_it_overdue() -> None:
    """A credit may come after the debit's limit; an operator is called when both are past."""
    start = transfer_types.StartTransfer(transfer_id=ID, from_account_id=BLUE, to_account_id=RED, amount_minor=1, currency="USD")
    [started] = domain.start(domain.Transfer(), start, META)
    assert isinstance(started, transfer_types.TransferStarted)
    begun_ms = int(META.now.timestamp() * 1000)
    assert begun_ms < started.debit_not_after_ms < started.credit_not_after_ms
    limit = datetime.fromtimestamp(started.credit_not_after_ms / 1000, UTC)
    assert limit < META.now + timedelta(minutes=3)
