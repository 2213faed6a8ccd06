"""G: who is told of large transfers, and how often when the saga service is killed at the worst moment."""

from __future__ import annotations

import signal
from email.message import EmailMessage
from typing import Any

import grpc.aio
import pytest

from deploy.local.system import SAGA
from foldline.v1 import delivery_pb2, delivery_pb2_grpc, override_pb2
from shared.platform.identity import Role
from shared.rpc.client import bearer
from tests.e2e.conftest import Caller
from tests.support.clients.bank import Bank, channels, read_refusal
from tests.support.system.mail import Mailbox
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

OPERATOR = [Role.OPERATOR]


async def ada_and_albert(bank: Bank) -> tuple[str, str]:
    """Ada's account with 50 000, Albert's with 100."""
    ada, _ = await bank.register("Ada")
    albert, _ = await bank.register("Albert")
    hers, _ = await bank.open(ada)
    his, _ = await bank.open(albert)
    await bank.deposit(hers, 50_000_00)
    await bank.deposit(his, 100_00)
    return hers, his


async def completed(bank: Bank, source: str, target: str, amount_minor: int) -> str:
    """A transfer that was completed."""
    started = await bank.transfer(source, target, amount_minor)
    summary = await bank.ended_transfer(started)
    assert summary.reason == ""
    return started[0]


def about(mailbox: Mailbox, transfer_id: str) -> list[EmailMessage]:
    """The messages that name a transfer."""
    return [message for message in mailbox.messages if transfer_id in str(message.get_body(("plain",)))]


class Operator:
    """An operator of deliveries, or somebody else."""

    def __init__(self, stack: Stack, channel: grpc.aio.Channel, roles: list[Role]) -> None:
        self.stub = delivery_pb2_grpc.DeliveryServiceStub(channel)
        self.who = bearer(stack.token("operators", "olga", roles))

    async def find(self, **wanted: Any) -> list[delivery_pb2.DeliverySummary]:
        """Deliveries."""
        request = delivery_pb2.ListDeliveriesRequest(filter=delivery_pb2.DeliveryFilter(**wanted), page_size=500)
        answer: delivery_pb2.ListDeliveriesResponse = await self.stub.ListDeliveries(request, metadata=self.who, timeout=20)
        return list(answer.deliveries)


async def test_only_umbrellas_owner_is_told_and_only_of_more_than_ten_thousand(
    shared_stack: Stack, shared_mailbox: Mailbox, caller: Caller, tenant: str
) -> None:
    """18 000 within Umbrella: one e-mail to its owner. 10 000 exactly, a cent more, and another tenant: none, one, none."""
    umbrella, other = caller(tenant="umbrella", user_id="ada"), caller()
    hers, his = await ada_and_albert(umbrella)
    theirs = await ada_and_albert(other)
    large = await completed(umbrella, hers, his, 18_000_00)
    exactly = await completed(umbrella, hers, his, 10_000_00)
    just = await completed(umbrella, hers, his, 10_000_01)
    foreign = await completed(other, *theirs, 18_000_00)

    async with shared_stack.channel(SAGA) as channel:
        operator = Operator(shared_stack, channel, OPERATOR)

        async def sent() -> list[delivery_pb2.DeliverySummary]:
            found = [it for it in await operator.find(tenant="umbrella") if it.source in (large, exactly, just, foreign)]
            assert [it.source for it in found] == [just, large]
            assert {it.status for it in found} == {delivery_pb2.DELIVERY_STATUS_SENT}
            return found

        found = await eventually(sent)
        assert await operator.find(tenant=tenant) == []
    [message] = about(shared_mailbox, large)
    assert (message["To"], message["Subject"]) == ("ada@umbrella.example", "Large transfer: 18,000.00 USD")
    assert message["Message-ID"] == f"<{found[1].delivery_id}@localhost>"
    assert [str(it["Subject"]) for it in about(shared_mailbox, just)] == ["Large transfer: 10,000.01 USD"]
    assert about(shared_mailbox, exactly) == about(shared_mailbox, foreign) == []


async def test_switched_off_nobody_is_told_until_it_is_switched_on(shared_stack: Stack, caller: Caller) -> None:
    """By a command of the tenant's administrator, beside the overrides of the write service, and without a restart."""
    umbrella = caller(tenant="umbrella", user_id="ada")
    listed = {each.name: each for each in await umbrella.list_overrides()}
    notice = listed["large-transfer-notice"]
    assert (notice.on, notice.kind) == (True, override_pb2.OVERRIDE_KIND_ANNOUNCEMENT)
    hers, his = await ada_and_albert(umbrella)
    assert (await umbrella.switch_override("large-transfer-notice", False)).events_appended == 1
    try:
        unheard = await completed(umbrella, hers, his, 18_000_00)
        assert {each.name: each.on for each in await umbrella.list_overrides()}["large-transfer-notice"] is False
    finally:
        await umbrella.switch_override("large-transfer-notice", True)
    heard = await completed(umbrella, hers, his, 18_000_00)
    async with shared_stack.channel(SAGA) as channel:
        operator = Operator(shared_stack, channel, OPERATOR)

        async def told() -> list[str]:
            return [it.source for it in await operator.find(tenant="umbrella") if it.source in (unheard, heard)]

        assert await eventually(told) == [heard]


async def test_killed_between_acceptance_and_commit_there_is_a_second_copy_of_the_same_id(stack: Stack, mailbox: Mailbox) -> None:
    """The saga service is killed while the server's answer is on its way: the one case of two copies, of one Message-ID."""
    killed: list[str] = []

    def kill(message: EmailMessage) -> str:
        if not killed:
            killed.append(str(message["Message-ID"]))
            stack.send_signal(SAGA, signal.SIGKILL)
        return "250 OK"

    mailbox.on_message = kill
    async with channels(stack) as (write, read):
        umbrella = Bank(write, read, stack.token("umbrella", "ada"))
        hers, his = await ada_and_albert(umbrella)
        transfer_id = await completed(umbrella, hers, his, 18_000_00)
        await eventually(lambda: not stack.alive(SAGA))
        stack.start(SAGA)
        await stack.wait_ready(SAGA)
        await eventually(lambda: len(mailbox.messages) == 2)
    assert mailbox.ids()[:2] == killed * 2
    assert len(about(mailbox, transfer_id)) == 2
    assert bytes(mailbox.messages[0]) == bytes(mailbox.messages[1])


@pytest.mark.parametrize("roles", [[Role.USER], [Role.TENANT_ADMIN], [Role.PROCESS], [Role.READER]])
async def test_deliveries_are_for_operators(shared_stack: Stack, roles: list[Role]) -> None:
    """Nobody else may list them."""
    async with shared_stack.channel(SAGA) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await Operator(shared_stack, channel, roles).find()
        assert read_refusal(error.value).code == "PERMISSION_DENIED"
