"""Every process of the bank, explored: each answer in each phase leads on, and every way ends; and what is found if not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from bank.v1.account_pb2 import WithdrawMoneyRequest
from saga_service.app import build
from saga_service.registration import REGISTRATION, Registration
from saga_service.registry import PROCESSES
from saga_service.transfer import TRANSFER, Transfer
from shared.folds.process import Answer, ProcessDefinition, Send, Step
from shared.processes.compatibility import Mismatch
from shared.processes.diagram import PLACES_MAX, STATES_MAX, Arrow, explore, refuse_flawed
from shared.processes.process_type import ProcessType


def test_the_definitions_of_the_bank_miss_nothing() -> None:
    """The saga service refuses to start with one that does."""
    refuse_flawed(PROCESSES)


def test_the_diagram_of_a_transfer() -> None:
    """What its module's docstring draws, in words."""
    found = explore(ProcessType(TRANSFER)).arrows
    assert [(arrow.source, arrow.label, arrow.target) for arrow in found] == [
        ("", "TransferStarted", "debiting"),
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
    assert [arrow.target for arrow in found if arrow.ends] == ["failed", "completed"]


def test_the_service_refuses_to_start_with_a_definition_that_misses_a_state() -> None:
    """Before anything else is built."""
    nothing: Any = None
    with pytest.raises(TypeError, match="the process transfer: STRANDED: debiting"):
        build(nothing, nothing, [REGISTRATION, without("debiting", "debit", accepted=True, then=stays)])


def flaws(definition: ProcessDefinition[Any]) -> list[Mismatch]:
    """What is wrong with a definition. That is also what it is refused for at start-up."""
    found = list(explore(ProcessType(definition)).flaws)
    if found:
        with pytest.raises(TypeError, match=f"the process {definition.type}: {found[0].what}: {found[0].where}"):
            refuse_flawed([definition])
    return found


def without(phase: str, step: str, *, accepted: bool, then: Callable[[Transfer], Step[Transfer]]) -> ProcessDefinition[Any]:
    """The transfer, whose folds do something else on one answer in one phase."""

    def on_answer(transfer: Transfer, answer: Answer) -> Step[Transfer]:
        if (transfer.phase, answer.step, answer.accepted) == (phase, step, accepted):
            return then(transfer)
        return TRANSFER.on_answer(transfer, answer)

    return replace(TRANSFER, on_answer=on_answer)


def stays(transfer: Transfer) -> Step[Transfer]:
    """What a fold does with an answer that its phase does not wait for."""
    return Step(state=transfer)


def raises(transfer: Transfer) -> Step[Transfer]:
    """What a fold does that must match."""
    raise LookupError(transfer.phase)


@pytest.mark.parametrize(
    ("phase", "step", "accepted"),
    [
        ("debiting", "debit", False),
        ("crediting", "credit", True),
        ("refunding", "refund", False),
        ("suspending", "suspend", True),
    ],
)
def test_a_state_that_no_fold_handles_is_found(phase: str, step: str, accepted: bool) -> None:
    """Its processes would wait for ever, though the timer is still set; or be parked, if the fold raises."""
    for fold, what in ((raises, "FOLD_FAILED"), (stays, "STRANDED")):
        found = flaws(without(phase, step, accepted=accepted, then=fold))
        assert {(it.what, it.where.partition(",")[0]) for it in found} == {(what, phase)}


def test_a_mandatory_step_that_is_not_sent_again_when_an_operator_cancels_it_is_found() -> None:
    """Only an operator refuses it, so no other test of the folds meets this."""
    assert flaws(without("completing", "complete", accepted=False, then=stays))
    [found, *_] = flaws(without("failing", "fail", accepted=False, then=raises))
    assert found.where == "failing, fail refused: LookupError"


def test_phases_that_lead_in_a_circle_are_found() -> None:
    """Every answer sends a command, and none ends it: a circle has no end."""

    def on_answer(it: Registration, answer: Answer) -> Step[Registration]:
        if (it.phase, answer.step, answer.accepted) == ("confirming", "confirm", True):
            return REGISTRATION.on_answer(replace(it, phase="reserving"), replace(answer, step="reserve"))
        step = REGISTRATION.on_answer(it, answer)
        return REGISTRATION.on_answer(replace(it, phase="reserving"), replace(answer, step="reserve")) if step.ended else step

    found = flaws(replace(REGISTRATION, on_answer=on_answer))
    assert {it.what for it in found} == {"NEVER_ENDS"}
    assert {it.where for it in found} >= {"reserving", "holding", "confirming"}


def test_a_definition_that_no_event_begins_is_found() -> None:
    """Its fold concerns itself with nothing that it names."""
    nothing = replace(TRANSFER, react=lambda state, event, envelope: None)
    assert [it.what for it in flaws(nothing)] == ["NEVER_BEGINS"]


def test_a_counter_in_the_state_does_not_make_the_exploration_endless() -> None:
    """Of states that differ in a number alone only some are tried; those of phases without end, too."""
    debit = Send(step="debit", command=WithdrawMoneyRequest())

    def on_answer(transfer: Transfer, answer: Answer) -> Step[Transfer]:
        if answer.step == "debit" and not answer.accepted:
            return Step(state=replace(transfer, amount_minor=transfer.amount_minor + 1), send=(debit,))
        return TRANSFER.on_answer(transfer, answer)

    found = explore(ProcessType(replace(TRANSFER, on_answer=on_answer)))
    assert Arrow("debiting", "debit refused", "debiting", ends=False) in found.arrows
    assert Arrow("completing", "complete accepted", "completed", ends=True) in found.arrows
    numbered = replace(TRANSFER, on_answer=on_answer, phase=lambda it: f"{it.phase} {it.amount_minor}")
    assert len(explore(ProcessType(numbered)).arrows) > PLACES_MAX / 4


def reminding(times: int, *, circling: bool) -> ProcessDefinition[Any]:
    """The transfer, which debits again so many times, whatever the answer, and then fails.

    `circling`: only after a refusal; after an acceptance it credits for ever.
    """
    debit, credit = (Send(step=step, command=WithdrawMoneyRequest()) for step in ("debit", "credit"))

    def on_answer(it: Transfer, answer: Answer) -> Step[Transfer]:
        if circling and answer.step == "credit":
            return Step(state=it, send=(credit,))
        if answer.step != "debit" or (circling and answer.accepted):
            return TRANSFER.on_answer(it, answer)
        if it.amount_minor < times:
            return Step(state=replace(it, amount_minor=it.amount_minor + 1), send=(debit,))
        return TRANSFER.on_answer(it, replace(answer, accepted=False))

    return replace(TRANSFER, on_answer=on_answer)


def test_an_end_behind_more_states_than_are_tried_is_no_flaw() -> None:
    """A process that reminds 20 times and then ends is not refused because the search stops before; nor is one of more phases."""
    assert STATES_MAX < 20
    assert flaws(reminding(20, circling=False)) == []
    numbered = replace(reminding(PLACES_MAX, circling=False), phase=lambda it: f"{it.phase} {it.amount_minor}")
    assert flaws(numbered) == []


def test_a_circle_beside_a_counter_is_found() -> None:
    """The bound excuses the phases from which the search came to it, and no others."""
    assert flaws(reminding(20, circling=True)) == [Mismatch("NEVER_ENDS", "crediting")]
