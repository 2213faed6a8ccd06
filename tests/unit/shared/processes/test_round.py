"""A round in memory: what inputs come to, however they are cut into rounds, and what a defect does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bank.v1 import account_pb2
from foldline.v1 import command_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.errors import Rejected
from shared.folds.ids import step_id
from shared.folds.process import ProcessDefinition, Send, Step, Timer
from shared.processes.process_type import process_types
from shared.processes.records import CommandResult, PendingCommand, Process
from shared.processes.round import Round, with_options
from shared.rpc.status import to_status
from tests.support.domains.gifts import GIFT, Gift, deposit, key
from tests.support.fakes.line import Store, uid

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def opened(number: int = 1) -> EventEnvelope:
    """An account was opened."""
    event = account_pb2.AccountOpened(account_id=uid(number), owner_id=uid(9), currency="USD", name="blue")
    envelope = Store().append("acme", uid(number), event)
    envelope.event_id = uid(100 + number)
    envelope.metadata.correlation_id = uid(200 + number)
    return envelope


def fresh(manager: ProcessDefinition[Any] = GIFT, *processes: Process) -> Round:
    """A round that begins with these processes."""
    return Round(process_types([manager]), NOW, {process.key: process for process in processes})


def tell(done: Round, envelope: EventEnvelope) -> None:
    """Tells it an event."""
    event = account_pb2.AccountOpened.FromString(envelope.payload)
    done.event(done.kinds["gift"], event.account_id, event, envelope)


def begun(manager: ProcessDefinition[Any] = GIFT) -> tuple[Round, Process, PendingCommand]:
    """A round in which a process began, and its first command."""
    done = fresh(manager)
    tell(done, opened())
    [command] = done.commands.values()
    return done, done.processes[key(1)], command


def changed(**fields: Any) -> ProcessDefinition[Any]:
    """The process with other folds."""
    return replace(GIFT, **fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Other:
    """A state of another class."""


Inputs = list[Callable[[Round], None]]


@given(st.lists(st.integers(0, 1), max_size=6), st.sets(st.integers(0, 5)))
def test_however_inputs_are_cut_into_rounds(choices: list[int], cuts: set[int]) -> None:
    """Processes end up the same, with the same commands and the same history, in one round or in many."""

    def inputs() -> Inputs:
        refusal = to_status(Rejected("NO", "no"))

        def answer(step: str, error: Any) -> Callable[[Round], None]:
            id_ = step_id("gift", uid(1), step)
            command = PendingCommand(*key(1), step, 1, id_, "bank.v1.DepositMoneyRequest", b"", "", "", "", 1, 0)
            return lambda done: done.answer(CommandResult(command, error, "NO" if error else ""))

        some: Inputs = [answer("gift", None), answer("gift", refusal)]
        return [lambda done: tell(done, opened()), *(some[choice] for choice in choices)]

    def play(where: set[int]) -> tuple[Any, ...]:
        rounds = [fresh()]
        for number, it in enumerate(inputs()):
            if number in where:
                rounds.append(fresh(GIFT, *rounds[-1].processes.values()))
            it(rounds[-1])
        process = rounds[-1].processes[key(1)]
        history = [entry for done in rounds for entry in done.history]
        return process, history, {command for done in rounds for command in done.commands.values()}

    assert play(set()) == play(cuts)


def test_options_are_merged_into_a_request() -> None:
    """Set once, or set again for another attempt: the last ones count, and the rest is untouched."""
    request = deposit(uid(1), 500)
    once = with_options(request.SerializeToString(), step_id("gift", uid(1), "gift"), uid(5))
    twice = with_options(once, step_id("gift", uid(1), "gift", 2), uid(5))
    request.options.CopyFrom(
        command_pb2.CommandOptions(command_id=str(step_id("gift", uid(1), "gift", 2)), correlation_id=uid(5))
    )
    assert account_pb2.DepositMoneyRequest.FromString(twice) == request


@pytest.mark.parametrize(
    ("manager", "what"),
    [
        (changed(react=lambda state, event, envelope: 1 / 0), "ZeroDivisionError"),
        (changed(react=lambda state, event, envelope: Step(state=Other())), "TypeError"),
        (changed(react=lambda state, event, envelope: Step(state=Gift(phase=3))), "PydanticSerializationError"),  # type: ignore[arg-type]
        (changed(phase=lambda state: state.nothing), "AttributeError"),
        (
            changed(
                react=lambda state, event, envelope: Step(
                    state=state,
                    send=(
                        Send(
                            step="s", command=account_pb2.DepositMoneyRequest(options=command_pb2.CommandOptions(command_id="x"))
                        ),
                    ),
                )
            ),
            "TypeError",
        ),
    ],
)
def test_whatever_is_wrong_with_a_step_parks_its_process(manager: ProcessDefinition[Any], what: str) -> None:
    """Nothing of the step is kept; the input waits; a kind of defect is told, and no text."""
    done = fresh(manager)
    tell(done, opened())
    process = done.processes[key(1)]
    assert (process.status, process.trouble, process.state) == ("parked", "FOLD_FAILED", "")
    assert (done.commands, done.timers, done.deliveries) == ({}, {}, [])
    assert [(waiting.kind, waiting.name) for waiting in done.waiting] == [("event", "bank.v1.AccountOpened")]
    assert done.history[-1].error is not None
    assert what.encode() in done.history[-1].error


def test_a_state_of_a_newer_release_is_left_alone() -> None:
    """Its inputs wait until that release is back."""
    _, process, command = begun()
    process.schema = 2
    done = fresh(GIFT, process)
    done.answer(CommandResult(command, None, ""))
    assert (process.trouble, process.schema) == ("FOLD_FAILED", 2)
    assert len(done.waiting) == 1


def test_a_kind_that_is_gone_loses_nothing() -> None:
    """A release that does not know the process any more parks it with what comes for it."""
    _, process, command = begun()
    done = Round({}, NOW, {process.key: process})
    done.answer(CommandResult(command, None, ""))
    done.timer(key(1), "late")
    assert [waiting.kind for waiting in done.waiting] == ["answer", "timer"]
    again = fresh(GIFT, process)
    again.replay(process, done.waiting)
    assert (process.status, process.trouble, process.attention) == ("running", "", "LATE")
    assert [it.step for it in again.commands.values()] == ["bonus"]


def test_nothing_is_asked_of_a_process_that_ended() -> None:
    """Answers are noted, events and timers are not even that."""
    done, process, command = begun()
    process.status = "ended"
    before = len(done.history)
    done.answer(CommandResult(command, None, ""))
    done.timer(key(1), "late")
    tell(done, opened())
    assert [entry.kind for entry in done.history[before:]] == ["answer"]
    assert len(done.commands) == 1


def test_the_last_word_on_a_timer_counts() -> None:
    """Set, taken back, set again, all in one round; an end takes all of them."""

    def react(state: Gift, event: Any, envelope: EventEnvelope) -> Step[Gift]:
        return Step(
            state=state,
            timers=(Timer(name="a", due_at=NOW), Timer(name="b", due_at=NOW + timedelta(seconds=envelope.position))),
            cancel_timers=("b", "c"),
        )

    done = fresh(changed(react=react))
    tell(done, opened())
    assert done.timers == {(key(1), "a"): NOW, (key(1), "b"): NOW + timedelta(seconds=1), (key(1), "c"): None}
    done.timer(key(1), "c")  # it was due, and taken back in the same round
    assert "timer_fired" not in [entry.kind for entry in done.history]
    ending = fresh(
        changed(react=lambda state, event, envelope: Step(state=state, timers=(Timer(name="a", due_at=NOW),), ended=True))
    )
    tell(ending, opened())
    assert (ending.timers, ending.ended) == ({}, {key(1): None})


def test_a_process_is_registered_once() -> None:
    """A mistake in the registry is told at the start."""
    with pytest.raises(TypeError, match="registered twice"):
        process_types([GIFT, GIFT])
    with pytest.raises(TypeError, match="frozen dataclass"):
        ProcessDefinition(
            type="x",
            initial={},
            key={account_pb2.AccountOpened: str},
            react=lambda state, event, envelope: None,
            on_answer=lambda state, answer: Step(state=state),
            on_timer=lambda state, name: None,
            phase=str,
        )
