"""Deliveries on a real database, over a real SMTP server: in order, once, tried again, given up, and steered."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from deploy.bootstrap import Database
from shared.folds.delivery import Notice, Outgoing
from shared.folds.errors import NotFound, Rejected
from shared.processes import announce, deliveries, delivery_store
from shared.processes.channels import Contact, NotDelivered
from shared.processes.deliveries import DeliveryPolicy
from shared.processes.delivery_store import Delivery
from shared.processes.smtp import Smtp
from tests.support.system.mail import Mailbox, serving
from tests.support.system.post import QUICK, Post, Scripted, all_are, mail, true
from tests.support.system.waiting import eventually


@pytest.fixture
def contacts(tmp_path: Path) -> Path:
    """Ada and Bob of Umbrella."""
    file = tmp_path / "contacts.json"
    umbrella = {"owner": {"email": "ada@umbrella.example"}, "bob": {"email": "bob@umbrella.example"}}
    file.write_text(json.dumps({"umbrella": umbrella}))
    return file


@pytest.fixture
def post(saga_db: Database, contacts: Path) -> Post:
    """Deliveries."""
    return Post(saga_db, contacts)


async def test_an_email_arrives_once_with_text_and_html(post: Post, mailbox: Mailbox) -> None:
    """Its Message-ID is the delivery's id; plain text and HTML; nothing in the table names the address."""
    [delivery_id] = await post.put(mail("hello", html="<p>about hello</p>"))
    async with post.sending(Smtp(mailbox.url, "bank@foldline.example")):
        await all_are(post, "sent")
    [message] = mailbox.messages
    assert message["Message-ID"] == f"<{delivery_id}@foldline.example>"
    assert (message["From"], message["To"], message["Subject"]) == ("bank@foldline.example", "ada@umbrella.example", "hello")
    text, html = message.get_body(("plain",)), message.get_body(("html",))
    assert text is not None
    assert html is not None
    assert (text.get_content().strip(), html.get_content().strip()) == ("about hello", "<p>about hello</p>")
    async with await post.connect() as connection:
        cursor = await connection.execute("SELECT count(*) FROM deliveries AS d WHERE d::text LIKE '%ada@%'")
        assert await cursor.fetchone() == (0,)


async def test_messages_of_a_key_arrive_in_order_and_wait_for_no_other_key(post: Post) -> None:
    """The second of a line waits while the first fails; another line does not."""
    channel = Scripted()
    channel.fails["a1"] = [NotDelivered("AWAY"), NotDelivered("AWAY")]
    await post.put(mail("a1", key="a"), mail("a2", key="a"), mail("b1", key="b"), mail("a3", key="a"))
    async with post.sending(channel):
        await eventually(lambda: channel.sent == ["b1"])
        await post.put(mail("a4", key="a"))
        await all_are(post, "sent", "sent", "sent", "sent", "sent")
    assert channel.sent == ["b1", "a1", "a2", "a3", "a4"]
    assert [row[1] for row in await post.rows()] == [3, 1, 1, 1, 1]


async def test_a_sender_that_ends_sends_nothing_more_though_a_cancellation_was_swallowed(
    post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a library in the moment in which the server answers: the next sender would send the rest of the line again."""
    monkeypatch.setattr(deliveries, "DRAIN_S", 0.1)
    sent: list[str] = []

    class Swallows:
        async def send(self, delivery: Delivery, contact: Contact) -> None:
            sent.append(str(delivery.delivery_id))
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    ids = await post.put(mail("first", key="a"), mail("second", key="a"))
    async with post.sending(Swallows()):
        await eventually(lambda: sent)
    assert sent == [str(ids[0])]


async def test_a_contact_that_hangs_holds_up_nobody_else(post: Post, mailbox: Mailbox) -> None:
    """While one contact's server is silent, another's messages arrive."""
    channel = Scripted()
    channel.hold = asyncio.Event()
    smtp = Smtp(mailbox.url, "bank@foldline.example")

    class Split:
        async def send(self, delivery: Delivery, contact: Contact) -> None:
            await (channel if delivery.recipient == "owner" else smtp).send(delivery, contact)

    for half in ("first", "second"):
        await post.put(*(mail(f"{half} {number}", key=f"{half} {number}") for number in range(16)))
    await post.put(mail("quick", to="bob"))
    async with post.sending(Split()):
        await eventually(lambda: mailbox.subjects() == ["quick"])
        channel.hold.set()
        await eventually(lambda: len(channel.sent) == 32)


async def test_what_never_arrives_is_given_up_and_lets_the_next_go(post: Post) -> None:
    """After tries_max tries it is dead; at once if the receiver refuses it for good. Later ones of the line go on."""
    channel = Scripted()
    channel.fails["a1"] = [NotDelivered("AWAY", str(number)) for number in range(9)]
    channel.fails["b1"] = [NotDelivered("REFUSED", "550", final=True)]
    await post.put(mail("a1", key="a"), mail("a2", key="a"), mail("b1", key="b"))
    async with post.sending(channel):
        await all_are(post, "dead", "sent", "dead")
    rows = await post.rows()
    assert [(row[1], row[2]) for row in rows] == [(4, "AWAY: 3"), (1, ""), (1, "REFUSED: 550")]


async def test_the_pause_is_the_longer_one_of_ours_and_the_receivers(post: Post) -> None:
    """Its line waits with it; a receiver that asks for less than our own pause is not tried earlier."""
    channel = Scripted()
    channel.fails["a1"] = [NotDelivered("BUSY", retry_after_s=100)]
    channel.fails["b1"] = [NotDelivered("BUSY", retry_after_s=1)]
    await post.put(mail("a1", key="a"), mail("a2", key="a"), mail("b1", key="b"))
    began = datetime.now(UTC)
    async with post.sending(channel, DeliveryPolicy(first_s=60)):

        async def failed() -> bool:
            return [row[2] for row in await post.rows()] == ["BUSY", "", "BUSY"]

        await eventually(failed, 15)
    async with await post.connect() as connection:
        rows = await (await connection.execute("SELECT due_at, tries FROM deliveries ORDER BY number")).fetchall()
    [(a1, _), (a2, untried), (b1, _)] = [((due_at - began).total_seconds(), tries) for due_at, tries in rows]
    assert 100 <= a1 < 115
    assert (a2, untried) == (a1, 0)
    assert 30 <= b1 < 75


async def test_an_operator_retries_and_discards(post: Post) -> None:
    """A dead one is sent again under its id; a discarded one stays; a sent one is refused by name."""
    channel = Scripted()
    channel.fails["a"] = [NotDelivered("REFUSED", final=True)]
    channel.fails["b"] = [NotDelivered("REFUSED", final=True)]
    a, b = await post.put(mail("a", key="a"), mail("b", key="b"))
    async with post.operator() as operator, post.sending(channel):
        await all_are(post, "dead", "dead")
        [again] = await operator.retry(a)
        assert (again.delivery_id, again.status, again.tries) == (a, "pending", 0)
        gone = await operator.discard(b, "wrong address", "olga")
        assert gone == await operator.discard(b, "another reason", "otto")
        assert (gone.status, gone.last_error) == ("discarded", "discarded by olga: wrong address")
        await all_are(post, "sent", "discarded")
        for action in (operator.retry(a), operator.discard(a, "late", "olga")):
            with pytest.raises(Rejected) as refused:
                await action
            assert refused.value.reason == "DELIVERY_SENT"
        with pytest.raises(NotFound, match="there is no delivery"):
            await operator.retry(uuid4())
        assert [it.delivery_id for it in await operator.find(1, None)] == [b]
        assert [it.delivery_id for it in await operator.find(9, None, status="sent")] == [a]
    assert channel.sent == ["a"]


async def test_what_is_under_way_is_not_taken_back(post: Post) -> None:
    """While it is being sent an operator is told so, since it may arrive."""
    channel = Scripted()
    channel.hold = asyncio.Event()
    [a] = await post.put(mail("a"))
    async with post.operator() as operator, post.sending(channel):
        await channel.entered.wait()
        with pytest.raises(Rejected) as refused:
            await operator.discard(a, "no", "olga")
        assert refused.value.reason == "BEING_SENT"
        channel.hold.set()
        await all_are(post, "sent")


async def test_a_fold_that_raises_waits_for_an_operator(post: Post) -> None:
    """Its input is kept as a dead delivery; when the fold is mended, a retry gives the message, once."""
    broken = [True]

    def fold(notice: Notice) -> Sequence[Outgoing]:
        if broken:
            raise KeyError("secret")
        return [mail(str(notice.data["what"]))]

    post.announcements.notice("umbrella", "hook", "test", "told", fold)
    cause = announce.Cause(("test", "1"), "umbrella", "source", "correlation", "")
    made = announce.of_notice(post.announcements, cause, "test", Notice(name="told", data={"what": "mended"}))
    async with await post.connect() as connection:
        for _ in range(2):  # folded again after a roll-back, it is the same row
            await delivery_store.insert(connection, made, datetime.now(UTC))
    channel = Scripted()
    async with post.operator() as operator, post.sending(channel):
        [dead] = await operator.find(9, None)
        assert (dead.channel, dead.status, dead.last_error) == ("fold", "dead", "FOLD_FAILED: KeyError")
        with pytest.raises(Rejected) as refused:
            await operator.retry(dead.delivery_id)
        assert refused.value.reason == "FOLD_FAILED"
        broken.clear()
        [fresh] = await operator.retry(dead.delivery_id)
        assert fresh.channel == "email"
        await all_are(post, "sent")
        with pytest.raises(NotFound):
            await operator.retry(dead.delivery_id)
    assert channel.sent == ["mended"]


async def test_a_contact_that_is_missing_is_waited_for(post: Post) -> None:
    """The file is read again when it changes; until then the message is tried, and the reason names no address."""
    post.contacts.write_text("{}")
    await post.put(mail("a"))
    channel = Scripted()
    async with post.sending(channel, DeliveryPolicy(first_s=0.05, longest_s=0.1, tries_max=1000)):

        async def failed() -> None:
            [(status, tries, error, _)] = await post.rows()
            assert (status, error) == ("pending", "CONTACT_UNKNOWN: tenant umbrella has no contact owner")
            assert tries > 0

        await eventually(lambda: true(failed))
        post.contacts.write_text(json.dumps({"umbrella": {"owner": {"email": "ada@umbrella.example"}}}))
        await all_are(post, "sent")


async def test_a_lost_database_doubles_nothing(post: Post) -> None:
    """The connection is lost while a message is under way: it is noted as sent when the database is back."""
    channel = Scripted()
    channel.hold = asyncio.Event()
    await post.put(mail("a"))
    async with post.sending(channel):
        await channel.entered.wait()
        with psycopg.connect(post.database.admin, autocommit=True) as admin:
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
                "AND pid <> pg_backend_pid()"
            )
        channel.hold.set()
        await all_are(post, "sent")
        await post.put(mail("b"))
        await all_are(post, "sent", "sent")
    assert channel.sent == ["a", "b"]


async def test_a_sender_that_stops_lets_a_message_under_way_end(post: Post) -> None:
    """It is noted as sent, so the next sender does not send it again."""
    channel = Scripted()
    channel.hold = asyncio.Event()
    await post.put(mail("a"))
    task = asyncio.create_task(post.sender(channel).run())
    await channel.entered.wait()
    task.cancel()
    asyncio.get_running_loop().call_later(0.2, channel.hold.set)
    await asyncio.gather(task, return_exceptions=True)
    assert await post.statuses() == ["sent"]


async def test_a_sender_that_was_replaced_writes_nothing(post: Post) -> None:
    """The old one's result comes after the new one has claimed the message: the new one's counts."""
    old, new = Scripted(), Scripted()
    old.hold, new.hold = asyncio.Event(), asyncio.Event()
    await post.put(mail("a"))
    async with post.sending(old):
        await old.entered.wait()
        async with post.sending(new):
            await new.entered.wait()  # under the same id: the old one may have died in the middle
            old.fails["a"] = [NotDelivered("REFUSED", final=True)]
            old.hold.set()
            await eventually(lambda: not old.fails["a"])
            assert [row[:2] for row in await post.rows()] == [("pending", 2)]
            new.hold.set()
            await all_are(post, "sent")
    assert (old.sent, new.sent) == ([], ["a"])


async def test_sent_ones_leave_after_the_retention(post: Post) -> None:
    """Sent and discarded deliveries are deleted when they are old; dead ones stay for an operator."""
    channel = Scripted()
    channel.fails["dead"] = [NotDelivered("REFUSED", final=True)]
    await post.put(mail("sent", key="1"), mail("dead", key="2"))
    async with post.sending(channel, QUICK):
        await all_are(post, "sent", "dead")
    async with post.sending(channel, DeliveryPolicy(retention=timedelta(0))):
        await all_are(post, "dead")


# Over SMTP


async def test_a_server_that_refuses_one_recipient_serves_the_others(post: Post, mailbox: Mailbox) -> None:
    """550 is for good, 450 for a while; the text of the answer, which may name the address, is not kept."""
    answers = iter(["450 4.2.1 ada@umbrella.example is busy", "550 5.1.1 ada@umbrella.example is nobody"])
    mailbox.on_recipient = lambda address: next(answers) if address.startswith("ada") else "250 OK"
    await post.put(mail("a"), mail("b", to="bob"))
    async with post.sending(Smtp(mailbox.url, "bank@foldline.example")):
        await all_are(post, "dead", "sent")
    assert [(row[1], row[2]) for row in await post.rows()] == [(2, "SMTP_REFUSED: 550 5.1.1"), (1, "")]


async def test_a_server_that_is_away_is_waited_for(post: Post) -> None:
    """Nothing listens: the message waits, and arrives when the server does."""
    mailbox = Mailbox()
    await post.put(mail("a"))
    async with post.sending(Smtp(mailbox.url, "bank@foldline.example"), DeliveryPolicy(first_s=0.05, longest_s=0.1)):

        async def failed() -> None:
            assert (await post.rows())[0][2].startswith("SMTP_AWAY")

        await eventually(lambda: true(failed))
        with serving(mailbox):
            await all_are(post, "sent")
    assert mailbox.subjects() == ["a"]


async def test_a_slow_server_is_given_up_and_tried_again_under_the_same_id(post: Post, mailbox: Mailbox) -> None:
    """It took the message and its answer came too late: the second copy has the same Message-ID."""
    slow = [True]

    def late(message: EmailMessage) -> str:
        if slow:
            slow.clear()
            time.sleep(1.0)
        return "250 OK"

    mailbox.on_message = late
    [delivery_id] = await post.put(mail("a"))
    async with post.sending(Smtp(mailbox.url, "bank@foldline.example", timeout_s=0.4)):
        await all_are(post, "sent")
        await eventually(lambda: len(mailbox.messages) == 2)
    assert mailbox.ids() == [f"<{delivery_id}@foldline.example>"] * 2
    assert bytes(mailbox.messages[0]) == bytes(mailbox.messages[1])
