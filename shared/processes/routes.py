"""Which processes an event belongs to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from google.protobuf.message import Message

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.process import ProcessKeys
from shared.folds.upcasting import NONE
from shared.processes.parked import EVENT_UNKNOWN, EVENT_UNREADABLE, NO_PROCESS_NAMED, Unroutable
from shared.processes.process_type import ProcessType

PROCESS_ID_CHARS_MAX = 128


class RoutedEvent(NamedTuple):
    """An event with the process that it belongs to."""

    kind: ProcessType
    process_id: str
    event: Message
    envelope: EventEnvelope


class Routes:
    """The events that types of processes react to."""

    def __init__(self, kinds: Iterable[ProcessType]) -> None:
        self._kinds = tuple(kinds)
        self._routes: dict[str, list[tuple[ProcessType, type[Message], Any]]] = {}
        for kind in self._kinds:
            keys: ProcessKeys = kind.manager.key
            for event, key in keys.items():
                self._routes.setdefault(event.DESCRIPTOR.full_name, []).append((kind, event, key))

        self._upcasters = next((kind.upcasters for kind in self._kinds), NONE)

    def concern(self, envelope: EventEnvelope) -> bool:
        """Whether any type of process reacts to events of this type, or to what they have become, or may in a newer release."""
        return (
            envelope.type in self._routes
            or (envelope.type in self._upcasters and self._upcasters.newest(envelope.type) in self._routes)
            or not self._upcasters.knows(envelope.type)
        )

    def route(self, envelope: EventEnvelope) -> list[RoutedEvent]:
        """The event, once for each type of process that reacts to it. Raises Unroutable."""
        try:
            envelope = self._upcasters.today(envelope)  # the follower could not upcast it, or it was parked under an old type
        except Exception as error:
            raise Unroutable(EVENT_UNREADABLE, type(error).__name__) from error
        if not self._upcasters.knows(envelope.type):
            raise Unroutable(EVENT_UNKNOWN, "")
        routed = []
        for kind, message, key in self._routes.get(envelope.type, ()):
            try:
                event = message.FromString(envelope.payload)
            except Exception as error:
                raise Unroutable(EVENT_UNREADABLE, type(error).__name__) from error
            try:
                process_id = key(event)
            except Exception as error:
                raise Unroutable(NO_PROCESS_NAMED, type(error).__name__) from error
            # What no row of a process can have. Bytes that mean nothing are often decoded as an event without fields.
            if not isinstance(process_id, str) or not 0 < len(process_id) <= PROCESS_ID_CHARS_MAX or "\0" in process_id:
                raise Unroutable(NO_PROCESS_NAMED, "")
            routed.append(RoutedEvent(kind, process_id, event, envelope))
        return routed
