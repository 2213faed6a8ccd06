"""`foldline delivery` and `foldline mail`, as an operator types them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from email.message import EmailMessage
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiosmtplib
import pytest

from deploy.engines.child import free_port
from deploy.engines.mail import MailSink
from tests.e2e.conftest import Foldline
from tests.e2e.test_large_transfers import about, ada_and_albert, completed
from tests.support.clients.bank import Bank, channels
from tests.support.system.mail import ACCEPTED, Mailbox
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

AMOUNT_MINOR, SUBJECT = 12_345_67, "Large transfer: 12,345.67 USD"


@pytest.fixture
async def refused(shared_stack: Stack, shared_mailbox: Mailbox) -> AsyncIterator[list[str]]:
    """Three transfers of Umbrella whose e-mails the mail server refuses for good, until `mended`."""
    before = shared_mailbox.on_message

    def refuse(message: EmailMessage) -> str:
        return "554 5.7.1 no" if message["Subject"] == SUBJECT else ACCEPTED

    shared_mailbox.on_message = refuse
    async with channels(shared_stack) as (write, read):
        umbrella = Bank(write, read, shared_stack.token("umbrella", "ada"))
        accounts = await ada_and_albert(umbrella)
        yield [await completed(umbrella, *accounts, AMOUNT_MINOR) for _ in range(3)]
    shared_mailbox.on_message = before


def of(found: list[dict[str, Any]], transfers: list[str]) -> list[dict[str, Any]]:
    """The deliveries of these transfers, in the order of the transfers."""
    return sorted((it for it in found if it["source"] in transfers), key=lambda it: transfers.index(it["source"]))


def listed(foldline: Foldline, status: str, transfers: list[str]) -> list[dict[str, Any]]:
    """What `foldline delivery list` prints of these transfers with this status."""
    code, found = foldline("delivery", "list", "--tenant", "umbrella", "--status", status)
    assert code == 0
    return of(found, transfers)


@pytest.mark.long
async def test_dead_deliveries_are_listed_shown_discarded_and_retried(
    foldline: Foldline, refused: list[str], shared_mailbox: Mailbox
) -> None:
    """One is discarded with a reason, one is retried by its id, the third with all dead ones; what is over is refused by name."""
    await eventually(lambda: len(listed(foldline, "dead", refused)) == 3, 20, every_s=0.2)
    first, second, third = (it["delivery_id"] for it in listed(foldline, "dead", refused))
    code, shown = foldline("delivery", "show", first)
    one, content = shown["delivery"], shown["content"]
    assert (code, one["tenant"], one["channel"], one["recipient"]) == (0, "umbrella", "email", "owner")
    assert (one["name"], one["tries"], one["last_error"]) == (
        "large-transfer-notice",
        1,
        "SMTP_REFUSED: 554 5.7.1",
    )
    assert (content["subject"], refused[0] in content["text"]) == (SUBJECT, True)
    assert "ada@" not in json.dumps(shown)
    code, text = foldline("delivery", "show", first, output="text")
    assert (code, SUBJECT in text, "DEAD" in text) == (0, True, True)

    code, [gone] = foldline("delivery", "discard", first, "--reason", "told by telephone")
    assert (code, gone["status"]) == (0, "DELIVERY_STATUS_DISCARDED")
    assert gone["last_error"] == "discarded by olga: told by telephone"
    shared_mailbox.on_message = lambda message: ACCEPTED
    code, [again] = foldline("delivery", "retry", second)
    assert (code, again["delivery_id"]) == (0, second)
    await eventually(lambda: [it["delivery_id"] for it in listed(foldline, "sent", refused)] == [second], 20, every_s=0.2)
    code, found = foldline("delivery", "retry", "--dead", "--tenant", "umbrella")
    assert (code, [it["delivery_id"] for it in of(found, refused)]) == (0, [third])
    await eventually(lambda: [it["delivery_id"] for it in listed(foldline, "sent", refused)] == [second, third], 20, every_s=0.2)
    assert [len(about(shared_mailbox, transfer)) for transfer in refused] == [0, 1, 1]

    for words, reason in (
        (("retry", second), "DELIVERY_SENT"),
        (("discard", third, "--reason", "late"), "DELIVERY_SENT"),
        (("show", str(uuid4())), "DELIVERY_NOT_FOUND"),
        (("retry", str(uuid4())), "DELIVERY_NOT_FOUND"),
    ):
        code, answer = foldline("delivery", *words)
        assert (code, answer["error"]["reason"]) == (1, reason)


def test_a_retry_of_nothing_and_of_two_things_is_a_usage_error(foldline: Foldline) -> None:
    """One id, or --dead."""
    for words in (("retry",), ("retry", str(uuid4()), "--dead")):
        code, text = foldline("delivery", *words, output="text")
        assert (code, "name one delivery, or all dead ones with --dead" in text) == (2, True)


async def test_mail_prints_what_the_mail_server_of_dev_has_taken(foldline: Foldline, tmp_path: Path) -> None:
    """The newest last; nothing yet is said in words."""
    sink = MailSink(tmp_path / "mail", port=free_port())
    sink.start()
    try:
        endpoints = tmp_path / "endpoints.json"
        endpoints.write_text(json.dumps({"mail": str(sink.folder)}))
        assert foldline("mail") == (0, [])
        assert foldline("mail", output="text") == (0, "no mail yet\n")
        port = int(sink.url.partition("?")[0].rpartition(":")[2])
        for name in ("first", "second"):
            message = EmailMessage()
            message["From"], message["To"], message["Subject"] = "bank@foldline.example", "ada@umbrella.example", name
            message.set_content(f"about {name}")
            await aiosmtplib.send(message, hostname="127.0.0.1", port=port, start_tls=False)
        code, found = foldline("mail")
        assert (code, [(it["to"], it["subject"], it["text"].strip()) for it in found]) == (
            0,
            [("ada@umbrella.example", "first", "about first"), ("ada@umbrella.example", "second", "about second")],
        )
        code, found = foldline("mail", "--limit", "1")
        assert (code, [it["subject"] for it in found]) == (0, ["second"])
        code, text = foldline("mail", output="text")
        assert (code, "subject     second" in text) == (0, True)
    finally:
        sink.stop()
