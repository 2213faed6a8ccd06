"""A user's registration: reserve the login, hold it, confirm the user; or let the login go, and fail.

    started ──▶ reserving ──▶ holding ──▶ confirming ──▶ succeeded
                    │ refused    │ refused    │ refused
                    │            ▼            │
                    │        releasing ◀──────┘
                    ▼            │
                 failing ◀───────┘ ──▶ failed

The login is its own aggregate, so exactly one of any number of simultaneous registrations reserves it. An operator may cancel
a command that leads to success; it then counts as refused. A mandatory step is sent again when an operator cancels it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter

from bank.v1 import user_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.process import Answer, ProcessDefinition, Send, Step

RESERVING, HOLDING, CONFIRMING, RELEASING, FAILING = "reserving", "holding", "confirming", "releasing", "failing"
SUCCEEDED, FAILED = "succeeded", "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """The state of the process: ids only, nothing about the person."""

    phase: str = ""
    user_id: str = ""
    login_id: str = ""
    # Why it will fail, if it will.
    reason: str = ""


def react(
    registration: Registration, event: user_pb2.UserRegistrationStarted, envelope: EventEnvelope
) -> Step[Registration] | None:
    """A registration was started: reserve the login."""
    if registration.phase:
        return None
    reserve = user_pb2.ReserveLoginRequest(login_id=event.login_id, user_id=event.user_id, expires_at_ms=event.expires_at_ms)
    started = Registration(phase=RESERVING, user_id=event.user_id, login_id=event.login_id)
    return Step(state=started, send=(Send(step="reserve", command=reserve),))


def on_answer(registration: Registration, answer: Answer) -> Step[Registration]:  # noqa: PLR0911 (each arrow is one)
    """The next step, by phase and answer. An answer that the phase does not wait for changes nothing."""
    user_id, login_id = registration.user_id, registration.login_id
    match (registration.phase, answer.step, answer.accepted):
        case ("reserving", "reserve", True):
            hold = user_pb2.ConfirmLoginRequest(login_id=login_id, user_id=user_id)
            return _go(registration, HOLDING, Send(step="hold", command=hold))
        case ("holding", "hold", True):
            confirm = user_pb2.ConfirmUserRegistrationRequest(user_id=user_id)
            return _go(registration, CONFIRMING, Send(step="confirm", command=confirm))
        case ("reserving", "reserve", False):
            return _fail(replace(registration, reason=answer.reason))
        case ("holding", "hold", False) | ("confirming", "confirm", False):
            return _release(replace(registration, reason=answer.reason))
        case ("releasing", "release", True):
            return _fail(registration)
        case ("confirming", "confirm", True):
            return Step(state=replace(registration, phase=SUCCEEDED), ended=True)
        case ("failing", "fail", True):
            return Step(state=replace(registration, phase=FAILED), ended=True)
        case ("releasing", "release", False) | ("failing", "fail", False):
            return _insist(registration, answer)
        case _:
            return Step(state=registration)


def on_timer(registration: Registration, name: str) -> Step[Registration] | None:
    """A registration sets no timers: its reservation expires by itself."""
    return None


def _release(registration: Registration) -> Step[Registration]:
    release = user_pb2.ReleaseLoginRequest(login_id=registration.login_id, user_id=registration.user_id)
    return _go(registration, RELEASING, Send(step="release", command=release))


def _fail(registration: Registration) -> Step[Registration]:
    fail = user_pb2.FailUserRegistrationRequest(user_id=registration.user_id, reason=registration.reason)
    return _go(registration, FAILING, Send(step="fail", command=fail))


def _insist(registration: Registration, answer: Answer) -> Step[Registration]:
    """Sends the same step again, because an operator cancelled it. No other refusal arrives here: the step is mandatory."""
    return {"release": _release, "fail": _fail}[answer.step](registration)


def _go(registration: Registration, phase: str, send: Send) -> Step[Registration]:
    return Step(state=replace(registration, phase=phase), send=(send,))


REGISTRATION = ProcessDefinition(
    type="registration",
    aggregate="user",
    initial=Registration(),
    key={user_pb2.UserRegistrationStarted: attrgetter("user_id")},
    react=react,
    on_answer=on_answer,
    on_timer=on_timer,
    phase=attrgetter("phase"),
    mandatory=frozenset({"release", "fail"}),
    skippable=frozenset({"release", "fail"}),
)
