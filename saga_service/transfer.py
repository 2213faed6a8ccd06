"""A transfer: debit, credit, complete; or give the money back, and fail.

    started ──▶ debiting ──▶ crediting ──▶ completing ──▶ completed
                   │             │ refused
                   │             ▼
                   │         refunding ──refused──▶ suspending
                   │ refused     │                      │
                   └──────────▶ failing ◀───────────────┘ ──▶ failed

Every arrow is the answer to a command. Time limits are fields of the commands: the account itself refuses a debit or credit
that comes too late, so the process knows that it was not carried out. An operator may cancel debit, credit and refund, which
then count as refused. The other steps are mandatory, because a transfer cannot end without them: they are sent again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from operator import attrgetter

from bank.v1 import account_pb2, transfer_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.delivery import Notice
from shared.folds.process import Answer, ProcessDefinition, Send, Step, Timer

# Phases, and the steps of the same process that they wait for.
DEBITING, CREDITING, REFUNDING, SUSPENDING, COMPLETING, FAILING = (
    "debiting",
    "crediting",
    "refunding",
    "suspending",
    "completing",
    "failing",
)
COMPLETED, FAILED = "completed", "failed"

OVERDUE = "overdue"
OVERDUE_AFTER = timedelta(minutes=3)
"""Longer than debit and credit may take together. A transfer that takes longer is shown to operators."""

MONEY_IN_SUSPENSE = "MONEY_IN_SUSPENSE"
STEP_OVERDUE = "STEP_OVERDUE"

TRANSFER_COMPLETED = "transfer_completed"
"""The notice of a completed transfer: transfer_id, amount_minor, currency."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """The state of the process: the request, the phase, and the reason if it is going to fail."""

    phase: str = ""
    transfer_id: str = ""
    from_account_id: str = ""
    to_account_id: str = ""
    amount_minor: int = 0
    currency: str = ""
    suspense_id: str = ""
    credit_not_after_ms: int = 0
    reason: str = ""
    compensation: transfer_pb2.Compensation.ValueType = transfer_pb2.COMPENSATION_UNSPECIFIED


def react(transfer: Transfer, event: transfer_pb2.TransferStarted, envelope: EventEnvelope) -> Step[Transfer] | None:
    """A transfer was started: debit."""
    if transfer.phase:
        return None
    started = Transfer(
        phase=DEBITING,
        transfer_id=event.transfer_id,
        from_account_id=event.from_account_id,
        to_account_id=event.to_account_id,
        amount_minor=event.amount_minor,
        currency=event.currency,
        suspense_id=event.suspense_id,
        credit_not_after_ms=event.credit_not_after_ms,
    )
    debit = account_pb2.WithdrawMoneyRequest(
        account_id=event.from_account_id,
        amount_minor=event.amount_minor,
        currency=event.currency,
        transfer_id=event.transfer_id,
        counterparty_account_id=event.to_account_id,
        not_after_ms=event.debit_not_after_ms,
    )
    begun_at = datetime.fromtimestamp(envelope.recorded_at.seconds, UTC)
    return Step(
        state=started,
        send=(Send(step="debit", command=debit),),
        timers=(Timer(name=OVERDUE, due_at=begun_at + OVERDUE_AFTER),),
    )


def on_answer(transfer: Transfer, answer: Answer) -> Step[Transfer]:  # noqa: PLR0911 (each arrow of the picture is one)
    """The next step, by phase and answer. An answer that the phase does not wait for changes nothing."""
    match (transfer.phase, answer.step, answer.accepted):
        case ("debiting", "debit", True):
            return _credit(transfer)
        case ("debiting", "debit", False):
            return _fail(replace(transfer, reason=answer.reason, compensation=transfer_pb2.COMPENSATION_NOT_NEEDED))
        case ("crediting", "credit", True):
            return _complete(transfer)
        case ("crediting", "credit", False):
            return _refund(replace(transfer, reason=answer.reason))
        case ("refunding", "refund", True):
            return _fail(replace(transfer, compensation=transfer_pb2.COMPENSATION_REFUNDED))
        case ("refunding", "refund", False):
            return _suspend(transfer)
        case ("suspending", "suspend", True):
            return _fail(replace(transfer, compensation=transfer_pb2.COMPENSATION_SUSPENDED))
        case ("completing", "complete", True):
            return Step(state=replace(transfer, phase=COMPLETED), notify=(_completed(transfer),), ended=True)
        case ("failing", "fail", True):
            return Step(state=replace(transfer, phase=FAILED), attention=_attention(transfer), ended=True)
        case ("suspending", "suspend", False) | ("completing", "complete", False) | ("failing", "fail", False):
            return _insist(transfer, answer)
        case _:
            return Step(state=transfer, attention=_attention(transfer))


def on_timer(transfer: Transfer, name: str) -> Step[Transfer] | None:
    """Marks a transfer that takes too long, for operators. The transfer itself goes on."""
    return Step(state=transfer, attention=STEP_OVERDUE)


def _credit(transfer: Transfer) -> Step[Transfer]:
    credit = account_pb2.DepositMoneyRequest(
        account_id=transfer.to_account_id,
        amount_minor=transfer.amount_minor,
        currency=transfer.currency,
        transfer_id=transfer.transfer_id,
        counterparty_account_id=transfer.from_account_id,
        not_after_ms=transfer.credit_not_after_ms,
    )
    return _go(transfer, CREDITING, Send(step="credit", command=credit))


def _refund(transfer: Transfer) -> Step[Transfer]:
    refund = account_pb2.DepositMoneyRequest(
        account_id=transfer.from_account_id,
        amount_minor=transfer.amount_minor,
        currency=transfer.currency,
        transfer_id=transfer.transfer_id,
        counterparty_account_id=transfer.to_account_id,
    )
    return _go(transfer, REFUNDING, Send(step="refund", command=refund))


def _suspend(transfer: Transfer) -> Step[Transfer]:
    suspend = account_pb2.SuspendMoneyRequest(
        suspense_id=transfer.suspense_id,
        transfer_id=transfer.transfer_id,
        amount_minor=transfer.amount_minor,
        currency=transfer.currency,
    )
    return _go(transfer, SUSPENDING, Send(step="suspend", command=suspend))


def _complete(transfer: Transfer) -> Step[Transfer]:
    complete = transfer_pb2.CompleteTransferRequest(transfer_id=transfer.transfer_id)
    return _go(transfer, COMPLETING, Send(step="complete", command=complete))


def _fail(transfer: Transfer) -> Step[Transfer]:
    fail = transfer_pb2.FailTransferRequest(
        transfer_id=transfer.transfer_id, reason=transfer.reason, compensation=transfer.compensation
    )
    return _go(transfer, FAILING, Send(step="fail", command=fail))


def _insist(transfer: Transfer, answer: Answer) -> Step[Transfer]:
    """Sends the same step again, because an operator cancelled it. No other refusal arrives here: the step is mandatory.

    So the process always knows where the money is.
    """
    return {"suspend": _suspend, "complete": _complete, "fail": _fail}[answer.step](transfer)


def _completed(transfer: Transfer) -> Notice:
    facts: dict[str, str | int | bool] = {
        "transfer_id": transfer.transfer_id,
        "amount_minor": transfer.amount_minor,
        "currency": transfer.currency,
    }
    return Notice(name=TRANSFER_COMPLETED, data=facts)


def _go(transfer: Transfer, phase: str, send: Send) -> Step[Transfer]:
    return Step(state=replace(transfer, phase=phase), send=(send,), attention=_attention(transfer))


def _attention(transfer: Transfer) -> str:
    return MONEY_IN_SUSPENSE if transfer.compensation == transfer_pb2.COMPENSATION_SUSPENDED else ""


TRANSFER = ProcessDefinition(
    type="transfer",
    aggregate="transfer",
    initial=Transfer(),
    key={transfer_pb2.TransferStarted: attrgetter("transfer_id")},
    react=react,
    on_answer=on_answer,
    on_timer=on_timer,
    phase=attrgetter("phase"),
    mandatory=frozenset({"suspend", "complete", "fail"}),
    skippable=frozenset({"complete", "fail"}),
)
