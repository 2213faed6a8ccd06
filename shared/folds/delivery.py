"""Messages to receivers outside: each is for a named contact of a tenant, and a fold makes it from an event or a notice.

    ANNOUNCEMENTS.notice(UMBRELLA, "large-transfer-notice", "transfer", "transfer_completed", large_transfer)
    ANNOUNCEMENTS.event("*", "account-frozen-hook", account_pb2.AccountFrozen, frozen)

A fold names a contact ("owner"), never an address. Addresses and signing secrets are settings of the deployment, and are
looked up when a message is sent. So no table holds them, and a new address also applies to messages that wait.
Folds are pure; the kernel saves their messages in the transaction of the event or step that caused them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from google.protobuf.message import Message

from foldline.v1.event_store_pb2 import EventEnvelope

EVERY_TENANT = "*"

SUBJECT_CHARS_MAX = 200
CONTENT_CHARS_MAX = 100_000
NAME_CHARS_MAX = 63
MESSAGES_MAX = 16
"""The most messages that one fold may return for one input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Email:
    """An e-mail to a contact. Raises ValueError for a subject that is no single line, or for content that is too long."""

    to: str
    subject: str
    text: str
    # The same as HTML. The fold makes it and escapes values that it inserts. Empty: plain text only.
    html: str = ""
    # Messages of a tenant to a contact with the same key arrive in order; messages with other keys do not wait for them.
    key: str = ""

    def __post_init__(self) -> None:
        _check_name("to", self.to)
        _check_length("subject", self.subject, SUBJECT_CHARS_MAX)
        # A line break would end the header, and the rest of the text would become further headers.
        if not self.subject.isprintable():
            raise ValueError("the subject of an e-mail is one line of printable characters")
        _check_length("text", self.text, CONTENT_CHARS_MAX)
        _check_length("html", self.html, CONTENT_CHARS_MAX)
        _check_length("key", self.key, SUBJECT_CHARS_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """A CloudEvent for a contact's endpoint. `type` is the event's, as in `com.example.transfer.completed`."""

    to: str
    type: str
    data: Mapping[str, str | int | bool]
    # The id of the thing that the event is about, for example a transfer's.
    subject: str = ""
    key: str = ""

    def __post_init__(self) -> None:
        _check_name("to", self.to)
        for name, value in (("type", self.type), ("subject", self.subject)):
            _check_length(name, value, SUBJECT_CHARS_MAX)
            if not value.isprintable():
                raise ValueError(f"the {name} of a webhook is one line of printable characters")
        if not self.type:
            raise ValueError("a webhook has a type")
        _check_length("data", "".join(f"{name}{value}" for name, value in self.data.items()), CONTENT_CHARS_MAX)
        _check_length("key", self.key, SUBJECT_CHARS_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """A notice that a process gives (`Step.notify`). The folds that are registered for it get it, if there are any.

    It holds no personal data.
    """

    name: str
    data: Mapping[str, str | int | bool]


Outgoing = Email | Webhook
EventFold = Callable[[Any, EventEnvelope], Sequence[Outgoing]]
NoticeFold = Callable[[Notice], Sequence[Outgoing]]


class OnEvent(NamedTuple):
    """A fold from events to messages; `name` is its name in the registration, unique for a tenant."""

    name: str
    message: type[Message]
    fold: EventFold


class OnNotice(NamedTuple):
    """A fold from notices to messages."""

    name: str
    fold: NoticeFold


SwitchedOff = tuple[str, str]
"""A tenant and the name of an announcement that is switched off for it."""


class Announcements:
    """Which messages each tenant wants sent: one table of folds, filled in one place."""

    def __init__(self) -> None:
        self._names: set[tuple[str, str]] = set()
        self._events: dict[tuple[str, str], list[OnEvent]] = {}
        self._notices: dict[tuple[str, str, str], list[OnNotice]] = {}
        self._off: frozenset[SwitchedOff] = frozenset()

    def event(self, tenant: str, name: str, message: type[Message], fold: EventFold) -> None:
        """Calls `fold` for each event of this type of the tenant; EVERY_TENANT for all tenants. Raises TypeError."""
        self._register(tenant, name)
        self._events.setdefault((tenant, message.DESCRIPTOR.full_name), []).append(OnEvent(name, message, fold))

    def notice(self, tenant: str, name: str, process_type: str, notice: str, fold: NoticeFold) -> None:
        """Calls `fold` for each notice of this name from the tenant's processes of a type. Raises TypeError."""
        self._register(tenant, name)
        self._notices.setdefault((tenant, process_type, notice), []).append(OnNotice(name, fold))

    def on_event(self, tenant: str, event_type: str) -> Sequence[OnEvent]:
        """The folds for an event: two look-ups, because most events have none."""
        every, own = self._events.get((EVERY_TENANT, event_type), ()), self._events.get((tenant, event_type), ())
        return [it for it in (*every, *own) if (tenant, it.name) not in self._off] if every or own else ()

    def on_notice(self, tenant: str, process_type: str, notice: str) -> Sequence[OnNotice]:
        """The folds for a notice."""
        every = self._notices.get((EVERY_TENANT, process_type, notice), ())
        own = self._notices.get((tenant, process_type, notice), ())
        return [it for it in (*every, *own) if (tenant, it.name) not in self._off]

    def __bool__(self) -> bool:
        return bool(self._names)

    @property
    def names(self) -> frozenset[tuple[str, str]]:
        """The tenant, or EVERY_TENANT, and the name of each."""
        return frozenset(self._names)

    def without(self, off: frozenset[SwitchedOff]) -> Announcements:
        """The same table, in which these are switched off."""
        view = Announcements()
        view._names, view._events, view._notices, view._off = self._names, self._events, self._notices, off
        return view

    def _register(self, tenant: str, name: str) -> None:
        _check_name("name", name)
        if (tenant, name) in self._names or (EVERY_TENANT, name) in self._names:
            raise TypeError(f"the announcement {name} is registered twice for {tenant}")
        self._names.add((tenant, name))


def _check_name(what: str, value: str) -> None:
    if not value or len(value) > NAME_CHARS_MAX or not value.isprintable():
        raise ValueError(f"{what} is a name of 1 to {NAME_CHARS_MAX} printable characters")


def _check_length(what: str, value: str, chars_max: int) -> None:
    if len(value) > chars_max:
        raise ValueError(f"{what} has more than {chars_max} characters")
