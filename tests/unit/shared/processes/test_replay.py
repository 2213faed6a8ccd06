"""Replays of histories: a release without changes finds no difference in any life of a process; each change is named."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from bank.v1 import account_pb2, transfer_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from saga_service.transfer import TRANSFER
from shared.folds.errors import Rejected
from shared.folds.process import Answer, ProcessDefinition, Send, Step
from shared.line.event_store import PURGED
from shared.processes import replay as replaying
from shared.processes.compatibility import Case, Mismatch, PastEntry, WaitingCommand
from shared.processes.history import PARKED, RESTARTED
from shared.processes.process_type import process_types
from shared.processes.records import CommandResult, PendingCommand, Process
from shared.processes.round import Round
from shared.rpc.status import to_status
from tests.support.domains.gifts import GIFT, Gift, deposit, on_answer, react
from tests.support.fakes.line import Store, uid

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
OPENED = account_pb2.AccountOpened(account_id=uid(1), owner_id=uid(9), currency="USD", name="blue")
FROZEN = account_pb2.AccountFrozen(account_id=uid(1), owner_id=uid(9))
STARTED = transfer_pb2.TransferStarted(
    transfer_id=uid(1), from_account_id=uid(2), to_account_id=uid(3), amount_minor=69, currency="USD", suspense_id=uid(4)
)


@dataclass(slots=True)
class Life:
    """A process of a release, as the runner and operators bring it on: a round for each input."""

    manager: ProcessDefinition[Any]
    process: Process | None = None
    commands: dict[str, PendingCommand] = field(default_factory=dict)
    timers: dict[str, datetime] = field(default_factory=dict)
    history: list[PastEntry] = field(default_factory=list)
    store: Store = field(default_factory=Store)

    def round(self) -> Round:
        """The next round."""
        processes = {} if self.process is None else {self.process.key: self.process}
        return Round(process_types([self.manager]), NOW, processes)

    def save(self, done: Round) -> None:
        """What the store does with its result."""
        [self.process] = done.processes.values()
        for (_, name), due_at in done.timers.items():
            self.timers.pop(name, None)
            if due_at is not None:
                self.timers[name] = due_at
        for (_, step), command in done.commands.items():
            self.commands.setdefault(step, command)
        for it in done.history:
            self.history.append(PastEntry(it.kind, it.name, it.step, it.id, it.position, it.error, it.note))

    def event(self, event: Message, aggregate_id: str = uid(1)) -> None:
        """An event came."""
        done = self.round()
        done.event(done.kinds[self.manager.type], uid(1), event, self.store.append("acme", aggregate_id, event))
        self.save(done)

    def answer(self, step: str, reason: str = "") -> None:
        """An answer came: accepted, or refused for a reason."""
        done = self.round()
        error = to_status(Rejected(reason, "no")) if reason else None
        done.answer(CommandResult(self.commands.pop(step), error, reason))
        self.save(done)

    def fire(self, name: str) -> None:
        """A timer was due."""
        del self.timers[name]
        done = self.round()
        done.timer(self.key, name)
        self.save(done)

    def taken(self, step: str) -> None:
        """A command's id was taken, so it is sent again under another."""
        done = self.round()
        done.taken(self.commands.pop(step))
        self.save(done)

    def retry(self, step: str) -> None:
        """An operator has a command sent again under another id."""
        done = self.round()
        assert self.process is not None
        done.operator(self.process, "retry", "olga")
        self.commands[step] = done.again(self.process, self.commands[step])
        self.save(done)

    def restart(self, outcome: str) -> None:
        """The line was restored, and its history accepted."""
        done = self.round()
        assert self.process is not None
        done.operator(self.process, "accept-history", "olga", note=outcome)
        self.save(done)

    def begin_anew(self) -> None:
        """The line was restored to what came behind the first event: the process runs again."""
        self.restart(RESTARTED)
        assert self.process is not None
        self.process.state = self.process.phase = ""
        self.commands.clear()
        self.timers.clear()
        done = self.round()
        envelope = self.store.events[0]
        done.event(done.kinds["gift"], uid(1), account_pb2.AccountOpened.FromString(envelope.payload), envelope)
        self.save(done)

    @property
    def key(self) -> tuple[str, str, str]:
        """Its name."""
        return "acme", self.manager.type, uid(1)

    def case(self) -> Case:
        """The copy that is checked."""
        assert self.process is not None
        commands = [WaitingCommand(it.step, it.command_type, it.payload) for it in self.commands.values()]
        return Case(self.process, NOW, commands, dict(self.timers), [], list(self.history))


def replay(life: Life, manager: ProcessDefinition[Any] | None = None) -> Mismatch | None:
    """What a release makes of a life."""
    case = life.case()
    found = {at: life.store.events[at - 1] for at in replaying.positions(case)}
    return replaying.replay(process_types([manager or life.manager]), case, found)


def given_twice() -> Life:
    """A gift was accepted, the bonus waits."""
    life = Life(GIFT)
    life.event(OPENED)
    life.answer("gift")
    return life


@pytest.mark.parametrize(("manager", "begin"), [(GIFT, OPENED), (TRANSFER, STARTED)], ids=["gift", "transfer"])
@given(choices=st.lists(st.tuples(st.sampled_from(["accept", "refuse", "fire", "taken", "retry", "freeze"]), st.integers(0, 3))))
def test_no_life_differs_for_the_release_that_it_was_lived_in(
    manager: ProcessDefinition[Any], begin: Message, choices: list[tuple[str, int]]
) -> None:
    """Whatever came, and however often commands were sent again."""
    life = Life(manager)
    life.event(begin)
    for choice, place in choices:
        steps, timers = sorted(life.commands), sorted(life.timers)
        if choice == "freeze" and manager is GIFT:
            life.event(FROZEN)
        elif choice == "fire" and timers:
            life.fire(timers[place % len(timers)])
        elif steps:
            step = steps[place % len(steps)]
            match choice:
                case "accept":
                    life.answer(step)
                case "refuse":
                    life.answer(step, "CANCELLED_BY_OPERATOR")
                case "taken":
                    life.taken(step)
                case "retry":
                    life.retry(step)
        assert life.process is not None
        if life.process.status == "ended":
            return
        assert replay(life) is None


def test_a_process_that_began_anew_is_replayed_from_there() -> None:
    """After a restore of the line; one that was parked then is replayed from its first event."""
    life = given_twice()
    life.begin_anew()
    assert list(life.commands) == ["gift"]
    assert replay(life) is None
    life = given_twice()
    life.restart(PARKED)
    life.event(FROZEN)
    assert replay(life) is None


def test_the_attempt_of_an_answer_is_that_of_its_command() -> None:
    """A fold may look at it."""
    seen: list[int] = []

    def looking(state: Gift, answer: Answer) -> Step[Gift]:
        seen.append(answer.attempt)
        return on_answer(state, answer)

    life = Life(GIFT)
    life.event(OPENED)
    life.taken("gift")
    life.retry("gift")
    life.answer("gift")
    assert replay(life, replace(GIFT, on_answer=looking)) is None
    assert seen == [3]


DEPOSIT = "bank.v1.DepositMoneyRequest"


def reacts(**changes: Any) -> ProcessDefinition[Any]:
    """A release whose reaction to an opened account has something else."""

    def changed(state: Gift, event: Message, envelope: EventEnvelope) -> Step[Gift] | None:
        step = react(state, event, envelope)
        if isinstance(event, account_pb2.AccountFrozen):
            return changes.get("frozen", step)
        return None if step is None else replace(step, **{name: changes[name] for name in changes if name != "frozen"})

    return replace(GIFT, react=changed)


def answers(step: Step[Gift]) -> ProcessDefinition[Any]:
    """A release whose step behind an accepted gift is another."""
    return replace(GIFT, on_answer=lambda state, answer: step)


def sends(step: str, amount: int) -> tuple[Send, ...]:
    """What a step sends."""
    return (Send(step=step, command=deposit(uid(1), amount)),)


def raises(state: Gift, answer: Answer) -> Step[Gift]:
    """A fold with a defect."""
    raise ZeroDivisionError


TOPPING_UP = Gift(phase="topping up", account_id=uid(1))


@pytest.mark.parametrize(
    ("release", "mismatch"),
    [
        (
            answers(Step(state=TOPPING_UP, send=sends("card", 100))),
            ("COMMANDS_DIFFER", f"answer gift: sent bonus ({DEPOSIT}), now card ({DEPOSIT})"),
        ),
        (answers(Step(state=TOPPING_UP, send=sends("bonus", 101))), ("COMMANDS_DIFFER", "bonus: amount_minor")),
        (
            answers(Step(state=replace(TOPPING_UP, phase="adding"), send=sends("bonus", 100))),
            ("STATE_DIFFERS", "phase"),
        ),
        (answers(Step(state=TOPPING_UP, ended=True)), ("ENDS_EARLIER", "answer gift: the process ends now")),
        (
            answers(Step(state=TOPPING_UP, send=sends("bonus", 100), cancel_timers=("late",))),
            ("TIMERS_DIFFER", "late is due at another time, or not set"),
        ),
        (replace(GIFT, on_answer=raises), ("FOLD_FAILED", "replayed answer gift: ZeroDivisionError")),
        (
            replace(GIFT, on_answer=lambda state, answer: Step(state=Gift(phase=3))),  # type: ignore[arg-type]
            ("FOLD_FAILED", "replayed answer gift: PydanticSerializationError"),
        ),
        (reacts(timers=()), ("TIMERS_DIFFER", "event bank.v1.AccountOpened: set late, now none")),
        (replace(GIFT, react=lambda *it: None), ("INPUT_IGNORED", "event bank.v1.AccountOpened: it changes nothing now")),
        (replace(GIFT, key={account_pb2.AccountFrozen: str}), ("HISTORY_UNREADABLE", "event bank.v1.AccountOpened: ")),
    ],
)
def test_what_a_release_would_have_done_otherwise_is_named(release: ProcessDefinition[Any], mismatch: tuple[str, str]) -> None:
    """By input, command and field; no values, which may be personal."""
    found = replay(given_twice(), release)
    assert found is not None
    assert (found.what, found.where[: len(mismatch[1])]) == mismatch


def test_a_renamed_step_is_the_same_step() -> None:
    """The commands that an old release sent are those that the new one sends by another name."""

    def renamed(state: Gift, answer: Answer) -> Step[Gift]:
        return on_answer(state, replace(answer, step="gift" if answer.step == "present" else answer.step))

    present = reacts(send=sends("present", 500))
    release = replace(GIFT, react=present.react, on_answer=renamed)
    life = Life(GIFT)
    life.event(OPENED)
    for _ in range(2):
        found = replay(life, release)
        assert found is not None
        assert found.what == "COMMANDS_DIFFER"
        assert replay(life, replace(release, renamed={"gift": "present"})) is None
        if "gift" in life.commands:
            life.answer("gift")


def test_migrated_states_are_compared_as_the_new_release_has_them() -> None:
    """A migration that does not give what the folds give is found."""
    right = replace(GIFT, schema=2, migrations={1: lambda fields: fields})
    wrong = replace(GIFT, schema=2, migrations={1: lambda fields: {**fields, "account_id": uid(8)}})
    assert replay(given_twice(), right) is None
    assert replay(given_twice(), wrong) == Mismatch("STATE_DIFFERS", "account_id")


def test_a_step_that_is_sent_while_it_waits_is_the_same_command() -> None:
    """Under the id that it has by then, with the content that it was first sent with."""
    release = reacts(frozen=Step(state=Gift(phase="giving", account_id=uid(1)), send=sends("gift", 501)))
    life = Life(release)
    life.event(OPENED)
    life.taken("gift")
    life.event(FROZEN)
    assert replay(life) is None


def test_a_timer_that_was_cancelled_is_missed_unless_it_may_have_fired() -> None:
    """A timer that was due may have fired without a trace, if the fold had nothing to do."""
    life = given_twice()
    due_at = life.timers.pop("late")
    assert replay(life) == Mismatch("TIMERS_DIFFER", "late was not set, or cancelled")
    case = life.case()
    case.now = due_at
    events = {1: life.store.events[0]}
    assert replaying.replay(process_types([GIFT]), case, events) is None


def test_a_command_that_does_not_wait_as_it_should_is_named() -> None:
    """Such a process would wait for ever, or get an answer that it does not wait for."""
    life = given_twice()
    life.commands.clear()
    assert replay(life) == Mismatch("COMMANDS_DIFFER", "waits for nothing, now bonus")


def test_a_history_that_the_line_does_not_bear_out_is_named() -> None:
    """Another event stands there, or none, or the history is gone. A purged event is no mismatch: its process goes too."""
    life = given_twice()
    event = life.store.events[0]
    life.store.events[0] = EventEnvelope(position=1, event_id=uid(77), type=event.type)
    what = "event bank.v1.AccountOpened: the line has another event at position 1, or none"
    assert replay(life) == Mismatch("HISTORY_UNREADABLE", what)
    case = life.case()
    assert replaying.replay(process_types([GIFT]), case, {}) == Mismatch("HISTORY_UNREADABLE", what)
    life.store.events[0] = EventEnvelope(position=1, event_id=event.event_id, type=PURGED)
    assert replay(life) is None
    life.history.clear()
    assert replay(life) == Mismatch("HISTORY_UNREADABLE", "it does not say what began the process")
