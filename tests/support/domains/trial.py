"""A domain for tests of the kernel: its decisions refuse, change nothing, read other aggregates, grow, fail or never end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

from msgspec import Struct
from msgspec.structs import replace

from shared.commands.append import Batch, NewCommand, NewEvent
from shared.commands.codec import EventCodecs
from shared.commands.registry import CommandRegistry
from shared.folds.aggregate import Aggregate, Credential, Decided, Meta
from shared.folds.errors import Rejected
from shared.line.event_store import AggregateKey
from shared.platform.identity import Role
from tests.support.domains.messages import command_codec, event_codec

ALL_BYTES = bytes(range(256))
RECEIVED_AT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


# Commands


class Add(Struct, frozen=True, kw_only=True):
    """Refused as BELOW_ZERO if the total would be; adding nothing changes nothing."""

    counter_id: str
    amount: int


class Blurt(Struct, frozen=True, kw_only=True):
    """Raises an exception whose text no caller may see."""

    counter_id: str
    text: str


class Swell(Struct, frozen=True, kw_only=True):
    """Makes an event of about as many bytes as the amount, plus the total."""

    counter_id: str
    amount: int


class SetPassword(Struct, frozen=True, kw_only=True):
    """Saves a hash of the password; refused as WEAK if that is empty."""

    counter_id: str
    subject_id: str
    word: str


class Chain(Struct, frozen=True, kw_only=True):
    """Causes events in as many rounds of reactions as `links`; without end if that is negative."""

    counter_id: str
    links: int


class GoOffDuty(Struct, frozen=True, kw_only=True):
    """Refused as NOBODY_ON_DUTY if the colleague is off already: it reads an aggregate that it does not change."""

    counter_id: str
    colleague_id: str


class Move(Struct, frozen=True, kw_only=True):
    """Takes from one counter and adds to another, in one transaction."""

    counter_id: str
    to_id: str
    amount: int


class Share(Struct, frozen=True, kw_only=True):
    """Adds the amount to many counters, in one transaction; refused as FULL if one of them would be beyond a thousand."""

    counter_id: str
    to_ids: tuple[str, ...]
    amount: int


# Events


class Added(Struct, frozen=True, kw_only=True):
    counter_id: str
    amount: int


class Swollen(Struct, frozen=True, kw_only=True):
    counter_id: str
    text: str


class PasswordSet(Struct, frozen=True, kw_only=True):
    counter_id: str


class Linked(Struct, frozen=True, kw_only=True):
    counter_id: str
    links: int


class WentOffDuty(Struct, frozen=True, kw_only=True):
    counter_id: str
    colleague_id: str


class Moved(Struct, frozen=True, kw_only=True):
    counter_id: str
    to_id: str
    amount: int


class Shared(Struct, frozen=True, kw_only=True):
    counter_id: str
    to_ids: tuple[str, ...]
    amount: int


CounterEvent = Added | Swollen | PasswordSet | Linked | WentOffDuty | Moved | Shared


# State


class Counter(Struct, frozen=True, kw_only=True):
    total: int = 0
    off_duty: bool = False


# Decisions


def add(counter: Counter, command: Add, meta: Meta) -> list[CounterEvent]:
    """Refusals: BELOW_ZERO."""
    if counter.total + command.amount < 0:
        raise Rejected("BELOW_ZERO", "the total would be below zero", total=counter.total)
    return [Added(counter_id=command.counter_id, amount=command.amount)] if command.amount else []


def blurt(counter: Counter, command: Blurt, meta: Meta) -> list[CounterEvent]:
    """Raises what no handler should."""
    raise ValueError(command.text)


def swell(counter: Counter, command: Swell, meta: Meta) -> list[CounterEvent]:
    """An event whose size depends on the state."""
    return [Swollen(counter_id=command.counter_id, text="x" * (counter.total + command.amount))]


def set_password(counter: Counter, command: SetPassword, meta: Meta) -> Decided[CounterEvent]:
    """Refusals: WEAK. Any other function of the password would do for a hash."""
    if not command.word:
        raise Rejected("WEAK", "an empty password")
    credential = Credential(subject_id=command.subject_id, password_hash=f"hash({command.word})")
    return Decided(events=[PasswordSet(counter_id=command.counter_id)], credentials=[credential])


def chain(counter: Counter, command: Chain, meta: Meta) -> list[CounterEvent]:
    """The first link."""
    return [Linked(counter_id=command.counter_id, links=command.links)]


def link(counter: Counter, event: Linked, meta: Meta) -> list[CounterEvent]:
    """The next link, unless it was the last."""
    return [Linked(counter_id=event.counter_id, links=event.links - 1)] if event.links else []


def go_off_duty(counter: Counter, command: GoOffDuty, meta: Meta) -> list[CounterEvent]:
    """Always; the colleague has the last word."""
    return [WentOffDuty(counter_id=command.counter_id, colleague_id=command.colleague_id)]


def stay_on_duty(counter: Counter, event: WentOffDuty, meta: Meta) -> list[CounterEvent]:
    """Refusals: NOBODY_ON_DUTY. Changes nothing."""
    if counter.off_duty:
        raise Rejected("NOBODY_ON_DUTY", "the colleague is off duty")
    return []


def move(counter: Counter, command: Move, meta: Meta) -> list[CounterEvent]:
    """Refusals: BELOW_ZERO."""
    if counter.total < command.amount:
        raise Rejected("BELOW_ZERO", "the total would be below zero", total=counter.total)
    return [Moved(counter_id=command.counter_id, to_id=command.to_id, amount=command.amount)]


def receive(counter: Counter, event: Moved, meta: Meta) -> list[CounterEvent]:
    """Refusals: FULL, above a thousand."""
    if counter.total + event.amount > 1000:
        raise Rejected("FULL", "a counter counts to a thousand")
    return [Added(counter_id=event.to_id, amount=event.amount)]


def share(counter: Counter, command: Share, meta: Meta) -> list[CounterEvent]:
    """Always; each of the others has a say."""
    return [Shared(counter_id=command.counter_id, to_ids=command.to_ids, amount=command.amount)]


def receive_share(counter: Counter, event: Shared, meta: Meta) -> list[CounterEvent]:
    """Refusals: FULL, above a thousand."""
    if counter.total + event.amount > 1000:
        raise Rejected("FULL", "a counter counts to a thousand")
    return [Added(counter_id=meta.aggregate_id, amount=event.amount)]


# Evolve


def evolve(counter: Counter, event: CounterEvent) -> Counter:
    """The counter after the event."""
    match event:
        case Added():
            return replace(counter, total=counter.total + event.amount)
        case Moved():
            return replace(counter, total=counter.total - event.amount)
        case WentOffDuty():
            return replace(counter, off_duty=True)
        case _:
            return counter


COUNTER = Aggregate(category="counter", initial=Counter(), evolve=evolve)

ADD = command_codec(Add)
BLURT = command_codec(Blurt)
SWELL = command_codec(Swell)
SET_PASSWORD = command_codec(SetPassword, redacted=("word",))
CHAIN = command_codec(Chain)
GO_OFF_DUTY = command_codec(GoOffDuty)
MOVE = command_codec(Move)
SHARE = command_codec(Share)
EVENTS: EventCodecs[CounterEvent] = EventCodecs(
    event_codec(Added),
    event_codec(Swollen),
    event_codec(PasswordSet),
    event_codec(Linked),
    event_codec(WentOffDuty),
    event_codec(Moved),
    event_codec(Shared),
)
USERS = frozenset({Role.USER})


def build_registry(
    counter: Aggregate[Counter, CounterEvent] = COUNTER,
    *,
    snapshot_every: int = 10,
    ended: Callable[[Counter], bool] | None = None,
) -> CommandRegistry:
    """The table of this domain, for counters as given: with another fold or interval of snapshots, or an end, for one."""
    registry = CommandRegistry()
    on = registry.aggregate(counter, EVENTS, snapshot_every=snapshot_every, ended=ended, credentials=True)
    on.command(ADD, add, id=lambda c: c.counter_id, roles=USERS)
    on.command(BLURT, blurt, id=lambda c: c.counter_id, roles=USERS)
    on.command(SWELL, swell, id=lambda c: c.counter_id, roles=USERS)
    on.command(SET_PASSWORD, set_password, id=lambda c: c.counter_id, roles=USERS)
    on.command(CHAIN, chain, id=lambda c: c.counter_id, roles=USERS)
    on.command(GO_OFF_DUTY, go_off_duty, id=lambda c: c.counter_id, roles=USERS)
    on.command(MOVE, move, id=lambda c: c.counter_id, roles=USERS)
    on.command(SHARE, share, id=lambda c: c.counter_id, roles=USERS)
    on.react(Linked, link, id=lambda e: e.counter_id)
    on.react(WentOffDuty, stay_on_duty, id=lambda e: e.colleague_id)
    on.react(Moved, receive, id=lambda e: e.to_id)
    on.react_each(Shared, receive_share, ids=lambda e: e.to_ids)
    return registry


def twice_as_much(counter: Counter, command: Add, meta: Meta) -> Sequence[CounterEvent]:
    """What a tenant may have instead of `add`."""
    return [Added(counter_id=command.counter_id, amount=2 * command.amount)]


def lone(
    key: AggregateKey, version: int = 1, *, command: dict[str, Any] | None = None, event: dict[str, Any] | None = None
) -> Batch:
    """A command that was accepted and the event that it led to."""
    row = NewCommand(
        tenant=key[0],
        command_id=str(uuid4()),
        type="trial.Add",
        category=key[1],
        aggregate_id=key[2],
        fingerprint=b"\x00\xff",
        payload=ALL_BYTES,
        status="completed",
        user_id="alice",
        on_behalf_of="bob",
        correlation_id=str(UUID(int=7)),
        causation_id=str(UUID(int=8)),
        traceparent="00-1-2-01",
        received_at=RECEIVED_AT,
        version=version,
        events_appended=1,
        last_event=1,
        error=None,
    )
    added = NewEvent(uuid4(), key, version, "trial.Added", ALL_BYTES, b"metadata")
    return Batch(reads={key: version - 1}, commands=[replace(row, **command or {})], events=[replace(added, **event or {})])
