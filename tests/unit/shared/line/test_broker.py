"""What an event looks like on the broker."""

from __future__ import annotations

from urllib.parse import unquote

from hypothesis import given
from hypothesis import strategies as st

from foldline.v1.event_store_pb2 import EventEnvelope, EventMetadata, ReadAllResponse
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

    message = broker.to_message(1, event)

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
        "Foldline-Version": "1",
    }


@given(tenant=texts, category=texts, aggregate_id=texts, user_id=texts, payload=st.binary(max_size=30))
def test_an_event_can_be_read_whatever_is_in_its_ids(
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

    message = broker.to_message(2, event)

    headers = {name: unquote(value) for name, value in message.headers.items()}
    assert [unquote(part) for part in message.headers["ce-source"].split("/")] == ["", "foldline", "2", tenant, category]
    assert (headers["ce-id"], headers["ce-subject"], headers["ce-type"]) == (uid(1), aggregate_id, "bank.v1.MoneyDeposited")
    assert (headers["Foldline-Version"], message.payload) == ("3", payload)
    assert message.subject.isascii()
    assert len(message.subject.split(".")) == 6
    assert not set(message.subject) & set(" *>\r\n\t")
    assert not any(set(value) & set("\r\n") for value in message.headers.values())


@given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=30), bytes_max=st.integers(1, 2000))
def test_pages_hold_all_events_in_order_and_are_not_too_large(sizes: list[int], bytes_max: int) -> None:
    """Whatever the broker's limit for a message is. An event that is larger by itself has a page of its own."""
    events = [EventEnvelope(position=number, payload=b"x" * size) for number, size in enumerate(sizes, 1)]

    pages = broker.to_pages(1, "e/1", events, bytes_max)

    read = [ReadAllResponse.FromString(page) for page in pages]
    assert [event for page in read for event in page.events] == events
    assert {(page.shard, page.epoch) for page in read} == {(1, "e/1")}
    assert [page.head_position for page in read] == [page.events[-1].position for page in read]
    for raw, page in zip(pages, read, strict=True):
        assert len(raw) <= bytes_max or len(page.events) == 1


def test_headers_are_sent_as_they_are_told() -> None:
    """nats-py takes them as one header whose value it leaves alone; on the wire they are those of the message."""
    event = Store().deposit("acme", uid(1), uid(2), 100, 100)
    message = broker.to_message(1, event)

    ((name, value),) = message.encoded_headers().items()

    assert f"{name}: {value.strip().translate({10: ' ', 13: ' '})}".split("\r\n") == [
        f"{name}: {text}" for name, text in message.headers.items()
    ]
