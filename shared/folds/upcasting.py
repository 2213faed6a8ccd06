"""Upcasting: events of contracts that are not written any more become events of today when they are read.

What is stored never changes, and the broker and the archive carry it as it was stored. A step is a pure function from an old
message to the one that followed it; steps are chained until the message is of today.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, Generic, NamedTuple, TypeVar

from google.protobuf.message import Message

from foldline.v1.event_store_pb2 import EventEnvelope
from foldline.v1.tenant_pb2 import EventPurged

Old = TypeVar("Old", bound=Message)
New = TypeVar("New", bound=Message)


class Step(NamedTuple, Generic[Old, New]):
    """From an old message to the next one. `up` neither changes what it is given, nor adds what depends on anything else."""

    old: type[Old]
    new: type[New]
    up: Callable[[Old], New]


class UnknownEvent(Exception):
    """A release that is newer than this one wrote the event: what it means here is not known."""


class Upcasters:
    """The steps of all events, in any order. Raises TypeError for two steps from one message, and for a circle.

    `known` has the types of all events that this release knows, also of those that a reader has no use for: one that passed
    over an event of a newer release, as if it had no use for it, would lack it for good. None: all are known. What stands in
    place of purged events is always known, and never stored.
    """

    def __init__(self, *steps: Step[Any, Any], known: Collection[str] | None = None) -> None:
        self.known = None if known is None else frozenset({*known, EventPurged.DESCRIPTOR.full_name})
        self._steps = {step.old.DESCRIPTOR.full_name: step for step in steps}
        if len(self._steps) < len(steps):
            raise TypeError("two steps begin with the same message")
        for name in self._steps:
            seen = {name}
            while (step := self._steps.get(name)) is not None:
                name = step.new.DESCRIPTOR.full_name  # noqa: PLW2901 - along the chain
                if name in seen:
                    raise TypeError(f"the steps from {name} lead back to it")
                seen.add(name)

    def __contains__(self, type_name: str) -> bool:
        """Whether a message's full name is that of an old one."""
        return type_name in self._steps

    def knows(self, type_name: str) -> bool:
        """Whether this release knows events of that type."""
        return self.known is None or type_name in self.known

    def newest(self, type_name: str) -> str:
        """The full name of the message that a stored one becomes; its own if it is of today."""
        while (step := self._steps.get(type_name)) is not None:
            type_name = step.new.DESCRIPTOR.full_name
        return type_name

    def stored_as(self, type_names: Iterable[str]) -> list[str]:
        """The full names under which messages of today may be stored: their own, and those of the old ones they were."""
        today = set(type_names)
        return sorted(today | {old for old in self._steps if self.newest(old) in today})

    def upcast(self, type_name: str, payload: bytes) -> tuple[str, bytes]:
        """The type and bytes of today of a stored event. Raises google.protobuf.message.DecodeError."""
        first = self._steps.get(type_name)
        if first is None:
            return type_name, payload
        message, step = first.old.FromString(payload), first
        while True:
            message = step.up(message)
            type_name = message.DESCRIPTOR.full_name
            following = self._steps.get(type_name)
            if following is None:
                return type_name, message.SerializeToString(deterministic=True)
            step = following

    def today(self, envelope: EventEnvelope) -> EventEnvelope:
        """The envelope, or, if its event is an old one, a copy with that of today. Raises what `upcast` and a step raise."""
        if envelope.type not in self._steps:
            return envelope
        fresh = EventEnvelope()
        fresh.CopyFrom(envelope)
        fresh.type, fresh.payload = self.upcast(envelope.type, envelope.payload)
        return fresh

    def update(self, envelopes: Iterable[EventEnvelope]) -> None:
        """Replaces type and payload in envelopes with old events. One that cannot be decoded stays as it is."""
        steps = self._steps
        if not steps:
            return
        for envelope in envelopes:
            if envelope.type in steps:
                try:
                    envelope.type, envelope.payload = self.upcast(envelope.type, envelope.payload)
                except Exception:  # noqa: BLE001, S112 - whoever decodes it meets the same, where one key is parked for it
                    continue


NONE = Upcasters()
"""For a line without old events."""
