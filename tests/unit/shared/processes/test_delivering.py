"""What of deliveries needs no server: the sender's address, headers that are refused, and the pauses between tries."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

import pytest

from shared.folds.delivery import Announcements, Email, Notice
from shared.processes import announce
from shared.processes.channels import NotDelivered
from shared.processes.deliveries import DeliveryPolicy
from shared.processes.delivery_store import Delivery
from shared.processes.smtp import Smtp, sender_of

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ID = "0190e4a0-0000-7000-8000-00000000000a"
URL = "smtp://mail.example"


def hello() -> Delivery:
    """A claimed delivery of an e-mail."""
    told = Announcements()
    told.notice("umbrella", "test", "test", "told", lambda notice: [Email(to="owner", subject="hello", text="hello")])
    [it] = announce.of_notice(told, announce.Cause((), "umbrella", "source", "", ""), "test", Notice(name="told", data={}))
    facts = (it.tenant, it.name, it.channel, it.recipient, it.order_key, it.content, it.source)
    return Delivery(1, UUID(ID), *facts, "", "", "pending", "", AT, AT, None, 1, True)


@pytest.mark.parametrize(
    ("sender", "shown"),
    [
        ("bank@foldline.example", "bank@foldline.example"),
        ("The Bank <bank@foldline.example>", "The Bank <bank@foldline.example>"),
        ('"Bank, Inc." <bank@foldline.example>', '"Bank, Inc." <bank@foldline.example>'),
        ("Grüne Bank <bank@foldline.example>", "Grüne Bank <bank@foldline.example>"),
    ],
)
def test_a_sender_may_have_a_name_and_its_domain_is_that_of_the_message_ids(sender: str, shown: str) -> None:
    """Whatever the name, the Message-ID ends with the domain alone."""
    message = Smtp(URL, sender).compose(hello(), "ada@umbrella.example")
    assert (message["From"], message["Message-ID"]) == (shown, f"<{ID}@foldline.example>")
    assert (sender_of(sender).addr_spec, sender_of(sender).domain) == ("bank@foldline.example", "foldline.example")


@pytest.mark.parametrize(
    "sender",
    [
        *("", "bank", "bank@", "@foldline.example", "a@b.c, d@e.f", "Bank <a@b.c", "Bank, Inc <a@b.c>", "bank: a@b.c;", "a@b.c>"),
        *("a b@c.d", "ä@b.c", "a@bü.c", "a@[1.2.3.4]", "a@b.c\r\nBcc: m@x.example", "a@b.c\x00"),
    ],
)
def test_what_is_no_sender_is_refused_before_anything_is_sent(sender: str) -> None:
    """The setting is checked when the process starts, whether it leads or not."""
    with pytest.raises(ValueError, match="a sender is one e-mail address"):
        Smtp(URL, sender)


def test_an_address_that_would_add_a_header_is_refused_for_good() -> None:
    """The contacts' file does not take such an address; if one came all the same, no try would do any better."""
    with pytest.raises(NotDelivered) as refused:
        Smtp(URL, "bank@foldline.example").compose(hello(), "ada@umbrella.example\r\nBcc: mallory@example.com")
    assert (refused.value.reason, refused.value.final) == ("HEADER_REFUSED", True)


def test_the_pause_doubles_from_a_second_to_an_hour_and_has_a_random_part() -> None:
    """Between a half and the whole of it, so that deliveries that failed together are not tried together."""
    policy = DeliveryPolicy()
    for tries, whole_s in ((1, 1), (2, 2), (5, 16), (12, 2048), (13, 3600), (20, 3600), (10_000, 3600)):
        pauses = [policy.wait_s(tries) for _ in range(200)]
        assert whole_s / 2 <= min(pauses) < 0.6 * whole_s
        assert 0.9 * whole_s < max(pauses) <= whole_s
    assert 4.5 < sum(policy.wait_s(tries) for tries in range(1, 20)) / 3600 < 9.5
