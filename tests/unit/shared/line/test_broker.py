"""What an event looks like on the broker."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client
from nats.aio.msg import Msg

from foldline.v1.event_store_pb2 import EventEnvelope, EventMetadata
from shared.line import broker
from tests.support.fakes.line import Store, uid

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

texts = st.text(max_size=30)


def test_an_event_becomes_a_cloud_event_on_a_subject_of_its_tenant() -> None:
    """Names and headers are a contract with whoever else listens."""
    store = Store()
    event = store.deposit("acme", uid(1), uid(2), 100, 100)
    event.event_id = uid(3)
    event.metadata.traceparent = TRACE

    message = broker.to_message(1, "e/1", event)

    assert message.subject == "foldline.events.1.acme.account.MoneyDeposited"
    assert message.payload == event.payload
    assert message.headers == {
        "Nats-Expected-Last-Sequence": "0",
        "ce-specversion": "1.0",
        "ce-id": "00000000-0000-4000-8000-000000000003",
        "ce-source": "/foldline/1/acme/account",
        "ce-subject": "00000000-0000-4000-8000-000000000001",
        "ce-type": "bank.v1.MoneyDeposited",
        "ce-time": "2026-01-02T03:04:06.678901+00:00",
        "content-type": "application/protobuf",
        "traceparent": TRACE,
        "Foldline-Shard": "1",
        "Foldline-Position": "1",
        "Foldline-Version": "1",
        "Foldline-Epoch": "e/1",
        "Foldline-Metadata": "MjcwMC0wYWY3NjUxOTE2Y2Q0M2RkODQ0OGViMjExYzgwMzE5Yy1iN2FkNmI3MTY5MjAzMzMxLTAx",
    }


@given(tenant=texts, category=texts, aggregate_id=texts, user_id=texts, payload=st.binary(max_size=30))
def test_an_event_comes_back_as_it_was_whatever_is_in_its_ids(
    tenant: str, category: str, aggregate_id: str, user_id: str, payload: bytes
) -> None:
    """No dot, blank, line end or wildcard in an id changes a subject's shape or a header's end."""
    event = EventEnvelope(
        position=7,
        event_id=uid(1),
        tenant=tenant,
        aggregate_type=category,
        aggregate_id=aggregate_id,
        version=3,
        type="bank.v1.MoneyDeposited",
        payload=payload,
        metadata=EventMetadata(user_id=user_id, traceparent=TRACE),
    )
    event.recorded_at.FromNanoseconds(1_780_000_000_123_456_000)

    message = broker.to_message(2, "e/1", event)

    assert broker.from_headers(message.headers, message.payload) == broker.Received(2, "e/1", event)
    assert message.subject.isascii()
    assert len(message.subject.split(".")) == 6
    assert not set(message.subject) & set(" *>\r\n\t")
    assert not any(set(value) & set("\r\n") for value in message.headers.values())


@pytest.mark.parametrize(("sequence", "taken"), [(1, True), (9, False)])
def test_a_copy_of_an_event_further_down_the_stream_is_not_an_event(sequence: int, taken: bool) -> None:
    """Its position is the sequence, or it was not put there by a relay."""
    event = Store().deposit("acme", uid(1), uid(2), 100, 100)
    event.metadata.traceparent = TRACE
    message = broker.to_message(1, "e/1", event)
    reply = f"$JS.ACK.FOLDLINE_EVENTS_1.consumer.1.{sequence}.{sequence}.1780000000000000000.0"
    delivered = Msg(Client(), message.subject, reply, message.payload, message.headers)
    if taken:
        assert broker.from_message(delivered).envelope == event
    else:
        with pytest.raises(broker.NotAnEvent):
            broker.from_message(delivered)


def test_a_message_without_our_headers_is_not_an_event() -> None:
    """Anybody may publish on our subjects if the broker lets him."""
    reply = "$JS.ACK.FOLDLINE_EVENTS_1.consumer.1.1.1.1780000000000000000.0"
    with pytest.raises(broker.NotAnEvent):
        broker.from_message(Msg(Client(), "foldline.events.1.acme.account.Forged", reply, b"not an event", None))
