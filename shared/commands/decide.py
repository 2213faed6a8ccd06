"""Decides a batch of commands in memory: pure except for the ids of new events.

A decision that needs a state that is not loaded stops its group; the caller loads the missing states and decides the
group again, which is safe because decisions have no effects.
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from time import perf_counter_ns
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace
from uuid_utils import uuid7

from foldline.v1 import event_store_pb2
from shared.commands.append import Batch, NewCommand, NewCredential, NewEvent, NewSnapshot
from shared.commands.log import CommandKey
from shared.commands.registry import SWITCHES_ID, CommandRegistry, Route
from shared.commands.states import Boxed, Purged, Unreadable, Versioned
from shared.folds.aggregate import Aggregate, Decided, Meta
from shared.folds.errors import (
    BatchAborted,
    Code,
    InternalError,
    OverLimit,
    Refusal,
    Rejected,
    VersionMismatch,
)
from shared.line.event_store import AggregateKey
from shared.platform.identity import Role
from shared.platform.telemetry import logger
from shared.rpc.status import to_status

REACTIONS_DEPTH_MAX = 16
REACHED_MAX = 1000
"""How many aggregates the reactions to one command, or to an atomic batch, may decide on, beside the commands' own."""
EVENT_BYTES_MAX = 256 * 1024

log = logger(__name__)

Lookup = Callable[[AggregateKey], Versioned | None]
"""The state of an aggregate, or None if it is not loaded."""


class Sender(Struct, frozen=True):
    """The user that sent a command, for whom it was sent, and what caused it."""

    tenant: str
    user_id: str
    on_behalf_of: str
    roles: frozenset[Role]
    causation_id: str | None
    traceparent: str


class Command(Struct, kw_only=True, eq=False):
    """A validated command of an authenticated caller. `content` is the domain's struct; ids are UUIDs as canonical text."""

    key: CommandKey
    route: Route
    aggregate: AggregateKey
    content: Any
    payload: bytes
    expected_version: int | None
    correlation_id: str
    sender: Sender
    received_at: datetime
    # Set if it was scheduled: its outcome replaces its row in the log, which is due at the same time.
    due_at: datetime | None = None

    @property
    def type(self) -> str:
        """The full name of the command's message."""
        return self.route.codec.type_name

    @property
    def fingerprint(self) -> bytes:
        """A hash of type, sender and payload: a repeat has the same one, another command under the same id does not."""
        asked_by = f"{self.type}\n{self.sender.user_id}\n{self.sender.on_behalf_of}\n"
        return hashlib.sha256(asked_by.encode() + self.payload).digest()


class Outcome(Struct):
    """The result of a command: `head` is the last position on the line that it depends on; `refusal` is None if accepted.

    In a plan, `position` counts from 1 within the batch and `head` is 0; the append gives both their final values.
    """

    status: str
    version: int
    events_appended: int
    position: int
    head: int
    refusal: Refusal | None = None


class Plan(Struct):
    """What a batch would write, and the outcomes of its commands; valid if no aggregate that it read has changed."""

    batch: Batch = field(default_factory=Batch)
    states: dict[AggregateKey, Versioned] = {}
    outcomes: dict[CommandKey, Outcome] = {}
    missing: set[AggregateKey] = set()
    # The states that were loaded for it.
    learned: dict[AggregateKey, Versioned] = {}

    def outcomes_at(self, head: int) -> dict[CommandKey, Outcome]:
        """The outcomes when the batch is durable and the line ends at `head`: with positions instead of places in the batch."""
        before = head - len(self.batch.events)
        for outcome in self.outcomes.values():
            outcome.head = head
            if outcome.position:
                outcome.position += before
        return self.outcomes


class _Staged(Struct, eq=False):
    """The changes of one group, kept apart from the plan until all its commands are accepted."""

    states: dict[AggregateKey, Versioned] = {}
    events: list[NewEvent] = []
    snapshots: dict[AggregateKey, NewSnapshot] = {}
    credentials: list[NewCredential] = []
    # The aggregates that reactions decided on, beside the commands' own.
    reached: set[AggregateKey] = set()


class _Missing(Exception):
    """The state of an aggregate is not loaded."""


def decide(registry: CommandRegistry, groups: Iterable[list[Command]], lookup: Lookup, now: datetime) -> Plan:
    """The plan of groups that are decided one after another, each on the states that the groups before it left.

    If the plan's `missing` is not empty, the plan is void: load those states and decide again.
    """
    deciding = BatchDecider(registry, lookup)
    for group in groups:
        deciding.take(group, now)
    return deciding.plan


class BatchDecider:
    """Builds one plan from groups, each decided on the states that the groups before it left."""

    def __init__(self, registry: CommandRegistry, lookup: Lookup) -> None:
        self.registry = registry
        self.plan = Plan()
        self._lookup = lookup

    def at(self, key: AggregateKey) -> Versioned | None:
        """The state that the next group will see; None if it is not loaded."""
        return self.plan.states.get(key) or self.plan.learned.get(key) or self._lookup(key)

    def learn(self, states: Mapping[AggregateKey, Versioned]) -> None:
        """Adds states that were missing."""
        self.plan.learned.update(states)
        self.plan.missing.clear()

    def take(self, group: list[Command], now: datetime) -> bool:
        """Adds a group's changes and outcomes to the plan, or its refusal alone.

        False if a state is not loaded: its key is in the plan's `missing` then, and the group must be given again.
        """
        staged = _Staged()
        accepted: list[tuple[Command, Outcome, int]] = []
        for command in group:
            began_ns = perf_counter_ns()
            try:
                outcome = self._command(command, staged, now)
                accepted.append((command, outcome, _us_since(began_ns)))
            except _Missing:
                return False
            except Refusal as refusal:
                # What the service is to blame for may be sent again under the same id.
                status = "failed" if refusal.code is Code.INTERNAL else "rejected"
                self._refuse(group, command, status, refusal, _us_since(began_ns))
                return True
            except Exception as defect:  # noqa: BLE001 - an error in a decision fails its own group alone
                # The exception's text may hold a secret, so neither the text nor a full traceback is logged.
                log.error(  # noqa: TRY400
                    "command_failed",
                    command_id=command.key[1],
                    tenant=command.key[0],
                    type=command.type,
                    defect=type(defect).__name__,
                    where=traceback.format_tb(defect.__traceback__)[-4:],
                )
                self._refuse(group, command, "failed", InternalError(), _us_since(began_ns))
                return True
        self._accept(staged, accepted)
        return True

    def _command(self, command: Command, staged: _Staged, now: datetime) -> Outcome:
        route, sender = command.route, command.sender
        before = len(staged.events)
        at = self._state(command.aggregate, staged)
        if command.expected_version is not None and command.expected_version != at.version:
            raise VersionMismatch(command.expected_version, at.version)
        meta = Meta(command.key[1], command.aggregate[2], sender.tenant, sender.user_id, sender.on_behalf_of, sender.roles, now)
        metadata = metadata_of(command)
        decision, override = route.decide, route.overrides.get(sender.tenant)
        if override is not None and self._is_on(sender.tenant, override.name, staged):
            decision = override.decide
        wave = self._apply(route.aggregate, command.aggregate, at, decision, command.content, meta, metadata, staged)
        for _ in range(REACTIONS_DEPTH_MAX):
            if not (wave := self._react(wave, command.aggregate, meta, metadata, staged)):
                break
        else:
            raise RecursionError(f"reactions to {command.type} go on beyond {REACTIONS_DEPTH_MAX} rounds")
        last = len(self.plan.batch.events) + len(staged.events) if len(staged.events) > before else 0
        return Outcome("completed", staged.states[command.aggregate].version, len(staged.events) - before, last, 0)

    def _react(self, wave: list[Any], own: AggregateKey, meta: Meta, metadata: bytes, staged: _Staged) -> list[Any]:
        """The events that in-transaction reactions to the last round's events cause.

        Refuses the command if they reach too many aggregates beside its own.
        """
        due = [
            (reaction, event, (meta.tenant, reaction.aggregate.category, id_))
            for event in wave
            for reaction in self.registry.reactions(type(event), meta.tenant)
            if not reaction.name or self._is_on(meta.tenant, reaction.name, staged)
            for id_ in reaction.ids(event)
        ]
        if not due:
            return []
        staged.reached.update([key for _, _, key in due if key != own])
        if len(staged.reached) > REACHED_MAX:
            raise Rejected("TOO_MANY_REACTIONS", f"reactions may reach {REACHED_MAX} other aggregates in one transaction")
        caused: list[Any] = []
        try:
            for reaction, event, key in due:
                at, whose = self._state(key, staged), replace(meta, aggregate_id=key[2])
                caused += self._apply(reaction.aggregate, key, at, reaction.decide, event, whose, metadata, staged)
        except _Missing:
            # All that this round needs is loaded in one query, not one aggregate a query.
            self.plan.missing.update(key for _, _, key in due if key not in staged.states and self.at(key) is None)
            raise
        return caused

    def _apply(
        self,
        aggregate: Aggregate[Any, Any],
        key: AggregateKey,
        at: Versioned,
        decision: Callable[[Any, Any, Meta], Any],
        content: Any,
        meta: Meta,
        metadata: bytes,
        staged: _Staged,
    ) -> list[Any]:
        """The events of one decision, folded into the state and staged."""
        decided = decision(at.state, content, meta)
        if isinstance(decided, Decided):
            staged.credentials += [
                NewCredential(meta.tenant, credential.subject_id, credential.password_hash) for credential in decided.credentials
            ]
            decided = decided.events
        version, state = at.version, at.state
        snapshot_every = self.registry.snapshot_every[key[1]]
        for event in decided:
            codec = self.registry.codecs.of(event)
            payload = codec.encode(event)
            if len(payload) > EVENT_BYTES_MAX:
                raise OverLimit("EVENT_TOO_LARGE", f"an event may have {EVENT_BYTES_MAX} bytes, this has {len(payload)}")
            version, state = version + 1, aggregate.evolve(state, event)
            staged.events.append(NewEvent(uuid7(), key, version, codec.type_name, payload, metadata))
            if version % snapshot_every == 0:
                dump = self.registry.dump_state(state)
                staged.snapshots[key] = NewSnapshot(key, version, aggregate.schema, dump)
        staged.states[key] = Versioned(version, state)
        return list(decided)

    def _is_on(self, tenant: str, name: str, staged: _Staged) -> bool:
        """Whether an override of the tenant is switched on, as of this place of the line."""
        if self.registry.switches is None:
            return True
        aggregate, is_on = self.registry.switches
        return is_on(self._state((tenant, aggregate.category, SWITCHES_ID), staged).state, name)

    def _state(self, key: AggregateKey, staged: _Staged) -> Versioned:
        """The state that this group sees. States from outside the batch are noted in `reads`, for the append to check."""
        at = staged.states.get(key) or self.plan.states.get(key)
        if at is None:
            at = self.plan.learned.get(key) or self._lookup(key)
            if at is None:
                self.plan.missing.add(key)
                raise _Missing
            self.plan.batch.reads.setdefault(key, at.version)
            if isinstance(at.state, Boxed):
                raise aggregate_boxed()
            if isinstance(at.state, Unreadable):
                raise at.state.refusal
            if isinstance(at.state, Purged):
                raise aggregate_purged()
        return at

    def _accept(self, staged: _Staged, accepted: list[tuple[Command, Outcome, int]]) -> None:
        batch = self.plan.batch
        self.plan.states.update(staged.states)
        batch.events += staged.events
        if staged.snapshots or staged.credentials:
            batch.snapshots += staged.snapshots.values()
            batch.credentials += staged.credentials
        for command, outcome, decided_us in accepted:
            self._record(command, outcome, None, decided_us)

    def _refuse(self, group: list[Command], culprit: Command, status: str, refusal: Refusal, decided_us: int) -> None:
        for command in group:
            if command is not culprit:
                self.plan.outcomes[command.key] = Outcome("rejected", 0, 0, 0, 0, BatchAborted())
        at = self.at(culprit.aggregate)
        outcome = Outcome(status, at.version if at else 0, 0, 0, 0, refusal)
        too_large = refusal.code is Code.RESOURCE_EXHAUSTED and culprit.due_at is None
        if too_large or refusal.code is Code.UNAVAILABLE:
            # What is too large for an event is too large for the command log. A scheduled command is there already. What this
            # release cannot decide has no outcome: a replica of a newer one gives it one, also if it waits for its time.
            self.plan.outcomes[culprit.key] = outcome
        else:
            self._record(culprit, outcome, to_status(refusal).SerializeToString(), decided_us)

    def _record(self, command: Command, outcome: Outcome, error: bytes | None, decided_us: int) -> None:
        sender = command.sender
        # Of what is purged, nothing is stored again.
        purged = outcome.refusal is not None and outcome.refusal.reason == "AGGREGATE_PURGED"
        self.plan.outcomes[command.key] = outcome
        if command.due_at is not None:
            self.plan.batch.fires = True
        self.plan.batch.commands.append(
            NewCommand(
                command.key[0],
                command.key[1],
                command.type,
                command.aggregate[1],
                command.aggregate[2],
                command.fingerprint,
                b"" if purged else command.payload,
                outcome.status,
                sender.user_id,
                sender.on_behalf_of,
                command.correlation_id,
                sender.causation_id,
                sender.traceparent,
                command.received_at,
                outcome.version,
                outcome.events_appended,
                outcome.position,
                error,
                decided_us,
            )
        )


def aggregate_boxed() -> Rejected:
    """The refusal of whatever concerns an aggregate that is boxed."""
    return Rejected("AGGREGATE_BOXED", "the aggregate is boxed: its events are in the archive until it is unboxed")


def aggregate_purged() -> Rejected:
    """The refusal of whatever concerns an aggregate that is purged."""
    return Rejected("AGGREGATE_PURGED", "the aggregate is purged: by a rule of its tenant its events are gone for good")


def metadata_of(command: Command) -> bytes:
    """The metadata of the events that a command leads to."""
    sender = command.sender
    return event_store_pb2.EventMetadata(
        command_id=command.key[1],
        correlation_id=command.correlation_id,
        causation_id=sender.causation_id or "",
        user_id=sender.user_id,
        on_behalf_of=sender.on_behalf_of,
        traceparent=sender.traceparent,
    ).SerializeToString()


def _us_since(began_ns: int) -> int:
    return (perf_counter_ns() - began_ns) // 1000
