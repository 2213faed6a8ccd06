"""Every path of a registration's process, as a table of answers."""

from __future__ import annotations

import pytest
from google.protobuf.message import Message

from bank.v1 import user_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from saga_service.registration import REGISTRATION, Registration
from shared.folds.ids import step_id
from shared.folds.process import Answer, Send, Step
from tests.support.checks.scenario import META
from tests.support.fakes.line import uid
from write_service.domain import user as domain
from write_service.domain import user_types

ID, LOGIN = uid(1), uid(2)
STARTED = user_pb2.UserRegistrationStarted(
    user_id=ID, login="Alice", email="alice@example.com", login_id=LOGIN, expires_at_ms=1000
)
ENVELOPE = EventEnvelope(tenant="acme")

RESERVE = user_pb2.ReserveLoginRequest(login_id=LOGIN, user_id=ID, expires_at_ms=1000)
HOLD = user_pb2.ConfirmLoginRequest(login_id=LOGIN, user_id=ID)
CONFIRM = user_pb2.ConfirmUserRegistrationRequest(user_id=ID)
RELEASE = user_pb2.ReleaseLoginRequest(login_id=LOGIN, user_id=ID)
STEPS: list[tuple[Message, str]] = [(RESERVE, "reserve"), (HOLD, "hold"), (CONFIRM, "confirm"), (RELEASE, "release")]
ALL_STEPS = ("reserve", "hold", "confirm", "release", "fail")
CANCELLED = "CANCELLED_BY_OPERATOR"


def failing(reason: str) -> user_pb2.FailUserRegistrationRequest:
    """The command that ends a registration that failed."""
    return user_pb2.FailUserRegistrationRequest(user_id=ID, reason=reason)


# The answers in their order, each with what is sent next and the phase it is in then; a reason is a refusal.
Road = list[tuple[str, str, Message | None, str]]
ROADS: dict[str, Road] = {
    "all goes well": [
        ("reserve", "", HOLD, "holding"),
        ("hold", "", CONFIRM, "confirming"),
        ("confirm", "", None, "succeeded"),
    ],
    "the login is taken": [
        ("reserve", "LOGIN_TAKEN", failing("LOGIN_TAKEN"), "failing"),
        ("fail", "", None, "failed"),
    ],
    "the reservation went to somebody else": [
        ("reserve", "", HOLD, "holding"),
        ("hold", "LOGIN_NOT_HELD", RELEASE, "releasing"),
        ("release", "", failing("LOGIN_NOT_HELD"), "failing"),
        ("fail", "", None, "failed"),
    ],
    "the user cannot be confirmed": [
        ("reserve", "", HOLD, "holding"),
        ("hold", "", CONFIRM, "confirming"),
        ("confirm", "REGISTRATION_FAILED", RELEASE, "releasing"),
        ("release", "", failing("REGISTRATION_FAILED"), "failing"),
        ("fail", "", None, "failed"),
    ],
    "an operator takes back the reservation": [
        ("reserve", CANCELLED, failing(CANCELLED), "failing"),
        ("fail", "", None, "failed"),
    ],
    "an operator takes back the confirmation, and then what must happen: that is sent again": [
        ("reserve", "", HOLD, "holding"),
        ("hold", "", CONFIRM, "confirming"),
        ("confirm", CANCELLED, RELEASE, "releasing"),
        ("release", CANCELLED, RELEASE, "releasing"),
        ("release", "", failing(CANCELLED), "failing"),
        ("fail", CANCELLED, failing(CANCELLED), "failing"),
        ("fail", "", None, "failed"),
    ],
}


def begun() -> Step[Registration]:
    """The first step."""
    step = REGISTRATION.react(REGISTRATION.initial, STARTED, ENVELOPE)
    assert step is not None
    return step


def answer(step: str, reason: str = "") -> Answer:
    """Of the first attempt."""
    return Answer(step=step, attempt=1, accepted=not reason, reason=reason)


def step_of(command: Message) -> str:
    """The name of the step that sends a command."""
    return next((step for like, step in STEPS if like == command), "fail")


def test_it_begins_by_reserving_the_login() -> None:
    """Until the moment that the first event fixed."""
    step = begun()
    assert step.send == (Send(step="reserve", command=RESERVE),)
    assert (REGISTRATION.phase(step.state), step.ended, step.timers) == ("reserving", False, ())


@pytest.mark.parametrize("road", ROADS)
def test_roads(road: str) -> None:
    """After each answer exactly the next command and the phase, and the end at the end alone."""
    state = begun().state
    for name, reason, command, phase in ROADS[road]:
        step = REGISTRATION.on_answer(state, answer(name, reason))
        expected = () if command is None else (Send(step=step_of(command), command=command),)
        assert (step.send, REGISTRATION.phase(step.state), step.ended) == (expected, phase, command is None)
        assert (step.attention, step.timers, step.cancel_timers, step.notify) == ("", (), (), ())
        state = step.state


@pytest.mark.parametrize("road", ROADS)
def test_what_is_not_waited_for_changes_nothing(road: str) -> None:
    """Wherever it is: the event again, and answers to every other step, accepted or refused."""
    state, waits_for = begun().state, "reserve"
    for name, reason, command, _ in [*ROADS[road], ("", "", None, "")]:
        assert REGISTRATION.react(state, STARTED, ENVELOPE) is None
        assert REGISTRATION.on_timer(state, "any") is None
        for other in {*ALL_STEPS} - {waits_for}:
            for why in ("", "LOGIN_TAKEN", CANCELLED):
                step = REGISTRATION.on_answer(state, answer(other, why))
                assert (step.state, step.send, step.ended) == (state, (), False)
        if name:
            state = REGISTRATION.on_answer(state, answer(name, reason)).state
            waits_for = step_of(command) if command is not None else ""


@pytest.mark.parametrize(
    ("before", "step"),
    [([("reserve", ""), ("hold", "X")], "release"), ([("reserve", "X")], "fail")],
)
def test_what_must_not_be_refused_is_asked_for_again(before: list[tuple[str, str]], step: str) -> None:
    """It is mandatory, so that the runner parks the process before this would go round and round."""
    state = begun().state
    for name, reason in before:
        state = REGISTRATION.on_answer(state, answer(name, reason)).state
    again = REGISTRATION.on_answer(state, answer(step, "USER_NOT_FOUND"))
    assert [sent.step for sent in again.send] == [step]
    assert (again.state, again.ended) == (state, False)
    assert step in REGISTRATION.mandatory


def test_the_first_event_fixes_the_ids_of_all_steps_that_are_sent() -> None:
    """What the domain wrote down is what the runner makes of process, step and first attempt; no step is missing."""
    start = user_types.StartUserRegistration(user_id=ID, login="Alice", email="alice@example.com", password="$argon2id$x")
    [started] = domain.start_registration(domain.User(), start, META).events
    fixed = {name: getattr(started, f"{name}_command_id") for name in ALL_STEPS}
    assert fixed == {name: str(step_id("registration", ID, name)) for name in ALL_STEPS}
    sent = {begun().send[0].step} | {step_of(command) for road in ROADS.values() for *_, command, _ in road if command}
    ids = {name.removesuffix("_command_id") for name in started.__struct_fields__ if name.endswith("_command_id")}
    assert ids == sent == set(ALL_STEPS)


def test_its_state_knows_nothing_of_the_person() -> None:
    """Ids alone, whatever the event says."""
    assert "alice" not in repr(begun()).casefold()
