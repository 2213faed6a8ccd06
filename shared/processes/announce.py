"""Calls the registered announcement folds on events and notices; the messages that they return become rows of `deliveries`.

The rows are saved in the transaction that takes the event or the step, so a message exists if and only if its cause does.
A delivery's id follows from its cause: if the same cause is folded again, the ids are the same and no second row is made.
A fold that raises stops nothing: its input is kept as a dead delivery, and an operator's retry calls the fold again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID

import orjson

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.delivery import MESSAGES_MAX, Announcements, Email, Notice, Outgoing, Webhook
from shared.folds.ids import derived_id
from shared.platform.telemetry import logger

log = logger(__name__)

EMAIL, WEBHOOK = "email", "webhook"
FOLD = "fold"
"""The channel of a delivery whose fold raised. Its content is the fold's input, and it waits for an operator."""
FOLD_FAILED = "FOLD_FAILED"


class NewDelivery(NamedTuple):
    """A delivery to save; the fields are the row's columns, in their order."""

    delivery_id: UUID
    tenant: str
    # Of the announcement.
    name: str
    channel: str
    recipient: str
    order_key: str
    content: str
    # Id of the event or the process that it comes from.
    source: str
    correlation_id: str
    traceparent: str
    status: str
    last_error: str


class Cause(NamedTuple):
    """The event or notice that a message comes from. The delivery's id is derived from `parts`."""

    parts: tuple[str, ...]
    tenant: str
    source: str
    correlation_id: str
    traceparent: str


def of_event(announcements: Announcements, envelope: EventEnvelope) -> list[NewDelivery]:
    """The deliveries that an event causes."""
    found: list[NewDelivery] = []
    for name, message, fold in announcements.on_event(envelope.tenant, envelope.type):

        def ask(message: Any = message, fold: Any = fold) -> Sequence[Outgoing]:
            told: Sequence[Outgoing] = fold(message.FromString(envelope.payload), envelope)
            return told

        found += _asked(name, ask, _of_envelope(envelope), lambda: {"event": envelope.SerializeToString().hex()})
    return found


def of_notice(announcements: Announcements, cause: Cause, process_type: str, notice: Notice) -> list[NewDelivery]:
    """The deliveries that a notice of a process causes."""
    found: list[NewDelivery] = []
    for name, fold in announcements.on_notice(cause.tenant, process_type, notice.name):
        found += _asked(name, lambda fold=fold: fold(notice), cause, lambda: _kept(cause, process_type, notice))  # type: ignore[misc]
    return found


def asked_again(announcements: Announcements, tenant: str, name: str, content: str) -> list[NewDelivery]:
    """The messages that the fold of a failed delivery returns now; again a delivery of channel FOLD if that fails."""
    kept = orjson.loads(content)
    if "event" in kept:
        envelope = EventEnvelope.FromString(bytes.fromhex(kept["event"]))
        found = of_event(announcements, envelope)
    else:
        cause = Cause(tuple(kept["parts"]), tenant, kept["source"], kept["correlation_id"], kept["traceparent"])
        found = of_notice(announcements, cause, kept["process_type"], Notice(name=kept["notice"], data=kept["data"]))
    return [delivery for delivery in found if delivery.name == name]


def load(channel: str, content: str) -> Outgoing:
    """The message of a delivery."""
    fields = orjson.loads(content)
    return Email(**fields) if channel == EMAIL else Webhook(**fields)


def _of_envelope(envelope: EventEnvelope) -> Cause:
    metadata = envelope.metadata
    parts = ("event", envelope.tenant, envelope.event_id)
    return Cause(parts, envelope.tenant, envelope.event_id, metadata.correlation_id, metadata.traceparent)


def _asked(
    name: str, ask: Callable[[], Sequence[Outgoing]], cause: Cause, keep: Callable[[], Mapping[str, object]]
) -> list[NewDelivery]:
    try:
        messages = list(ask())
        if len(messages) > MESSAGES_MAX:
            raise ValueError(f"more than {MESSAGES_MAX} messages for one input")
        return [_delivery(name, cause, number, message) for number, message in enumerate(messages)]
    except Exception as defect:  # noqa: BLE001 (a fold's defect is that of its own delivery alone)
        # The exception's text may hold anything: its kind is told.
        what = type(defect).__name__
        log.error("announcement_failed", announcement=name, tenant=cause.tenant, source=cause.source, error=what)  # noqa: TRY400
        failed = UUID(derived_id(*cause.parts, name, FOLD))
        content = orjson.dumps(keep()).decode()
        facts = (cause.source, cause.correlation_id, cause.traceparent, "dead", f"{FOLD_FAILED}: {what}")
        return [NewDelivery(failed, cause.tenant, name, FOLD, "", "", content, *facts)]


def _delivery(name: str, cause: Cause, number: int, message: Outgoing) -> NewDelivery:
    channel = EMAIL if isinstance(message, Email) else WEBHOOK
    content = orjson.dumps(message).decode()
    delivery_id = UUID(derived_id(*cause.parts, name, str(number)))
    facts = (cause.source, cause.correlation_id, cause.traceparent, "pending", "")
    return NewDelivery(delivery_id, cause.tenant, name, channel, message.to, message.key, content, *facts)


def _kept(cause: Cause, process_type: str, notice: Notice) -> dict[str, object]:
    return {
        "parts": cause.parts,
        "source": cause.source,
        "correlation_id": cause.correlation_id,
        "traceparent": cause.traceparent,
        "process_type": process_type,
        "notice": notice.name,
        "data": dict(notice.data),
    }
