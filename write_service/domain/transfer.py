"""A transfer of money between two accounts: started by a caller, ended by its process."""

from __future__ import annotations

from typing import assert_never

from msgspec import Struct
from msgspec.structs import replace

from shared.folds.aggregate import Aggregate, Meta
from shared.folds.errors import AlreadyExists, NotFound, Rejected
from shared.folds.ids import derived_id, step_id
from write_service.domain.transfer_types import (
    Compensation,
    CompleteTransfer,
    FailTransfer,
    StartTransfer,
    TransferCompleted,
    TransferEvent,
    TransferFailed,
    TransferStarted,
)

PROCESS = "transfer"
"""The type of the process that takes it on: the ids of the later steps are made of it."""

STEP_LIMIT_MS = 60_000
"""How long the debit, and after it the credit, may take; a later one is refused and the transfer fails."""


# State


class Transfer(Struct, frozen=True, kw_only=True):
    started: bool = False
    ended: bool = False


# Decisions


def start(transfer: Transfer, command: StartTransfer, meta: Meta) -> list[TransferEvent]:
    """Fixes the ids and time limits of all later steps.

    Refusals, in order of precedence: TRANSFER_ALREADY_STARTED, SAME_ACCOUNT; then those of its two ends.
    """
    if transfer.started:
        raise AlreadyExists("TRANSFER_ALREADY_STARTED", "a transfer with this id has been started")
    if command.from_account_id == command.to_account_id:
        raise Rejected("SAME_ACCOUNT", "a transfer needs two accounts")
    now_ms = int(meta.now.timestamp() * 1000)
    return [
        TransferStarted(
            transfer_id=command.transfer_id,
            from_account_id=command.from_account_id,
            to_account_id=command.to_account_id,
            amount_minor=command.amount_minor,
            currency=command.currency,
            debit_command_id=str(step_id(PROCESS, command.transfer_id, "debit")),
            credit_command_id=str(step_id(PROCESS, command.transfer_id, "credit")),
            refund_command_id=str(step_id(PROCESS, command.transfer_id, "refund")),
            suspend_command_id=str(step_id(PROCESS, command.transfer_id, "suspend")),
            complete_command_id=str(step_id(PROCESS, command.transfer_id, "complete")),
            fail_command_id=str(step_id(PROCESS, command.transfer_id, "fail")),
            suspense_id=suspense_id(meta.tenant, command.currency),
            debit_not_after_ms=now_ms + STEP_LIMIT_MS,
            credit_not_after_ms=now_ms + 2 * STEP_LIMIT_MS,
        )
    ]


def complete(transfer: Transfer, command: CompleteTransfer, meta: Meta) -> list[TransferEvent]:
    """Refusals: TRANSFER_NOT_FOUND."""
    _refuse_unless_started(transfer)
    return [] if transfer.ended else [TransferCompleted(transfer_id=command.transfer_id)]


def fail(transfer: Transfer, command: FailTransfer, meta: Meta) -> list[TransferEvent]:
    """Refusals: TRANSFER_NOT_FOUND."""
    _refuse_unless_started(transfer)
    if transfer.ended:
        return []
    return [
        TransferFailed(transfer_id=command.transfer_id, reason=command.reason, compensation=Compensation(command.compensation))
    ]


def suspense_id(tenant: str, currency: str) -> str:
    """The one suspense account of a tenant and currency."""
    return derived_id("suspense", tenant, currency)


def _refuse_unless_started(transfer: Transfer) -> None:
    if not transfer.started:
        raise NotFound("TRANSFER_NOT_FOUND", "there is no transfer with this id")


# Evolve


def evolve(transfer: Transfer, event: TransferEvent) -> Transfer:
    """The transfer after the event."""
    match event:
        case TransferStarted():
            return replace(transfer, started=True)
        case TransferCompleted() | TransferFailed():
            return replace(transfer, ended=True)
        case _:
            assert_never(event)


TRANSFER = Aggregate(category="transfer", initial=Transfer(), evolve=evolve)
