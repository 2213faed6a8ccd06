"""The reference scenarios without faults, with fixed values."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from typing import Any

import grpc.aio

from bank.v1 import account_query_pb2, person_query_pb2, transfer_query_pb2, user_query_pb2
from deploy.bank import Bank
from deploy.bank_requests import new_id, options, register
from deploy.engines.mail import MailSink
from deploy.mailbox import messages
from foldline.v1 import archive_pb2, command_pb2, event_store_pb2, history_pb2
from shared.rpc.status import from_rpc_error

MAIL_MAX_S = 10.0
"""How long an e-mail may take from the end of its transfer."""

_TO_TEN = ("I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X")
NUMERALS = [*_TO_TEN, *(f"X{one}" for one in _TO_TEN), "XXI"]


class Wrong(Exception):
    """A scenario found another value than expected."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Prints what happens in a scenario, and compares values with the expected ones."""

    say: Callable[[str], None]

    def see(self, what: str, found: object, expected: object) -> None:
        """Prints a value if it is the expected one. Raises Wrong otherwise."""
        if found != expected:
            raise Wrong(f"{what}: {found!r}, expected {expected!r}")
        self.say(f"  ✓ {what}: {found}")


class Scenarios:
    """What the bank does when nothing goes wrong with the machines."""

    def __init__(self, stage: Stage, bank: Bank, neighbour: Bank, mail: MailSink) -> None:
        """`neighbour` is a caller of another tenant, Umbrella. `mail` takes the e-mails of all tenants."""
        self._say = stage.say
        self._see = stage.see
        self._bank = bank
        self._neighbour = neighbour
        self._mail = mail

    async def rename(self) -> None:
        """A person is registered and takes another name."""
        self._say("register Alice O'Wonderland, rename her to Alice Cooper")
        alice, _ = await self._bank.register("Alice O'Wonderland")
        receipt = await self._bank.rename(alice, "Alice Cooper")
        summary = await self._bank.person(alice, receipt.consistency_token)
        self._see("the person summary reads", summary.name, "Alice Cooper")
        names = _names(await self._bank.stream("person", alice))
        self._see("the stream of events is", names, ["PersonRegistered", "PersonRenamed"])

    async def snapshots(self) -> None:
        """A person with many names: loading reads a snapshot, and any state of the past can be seen."""
        self._say("register King Henry I, rename him 20 times to Henry II … Henry XXI")
        henry, _ = await self._bank.register("Henry I")
        for numeral in NUMERALS[1:]:
            await self._bank.rename(henry, f"Henry {numeral}")
        who: dict[str, Any] = {"aggregate_type": "person", "aggregate_id": henry}
        described = await self._bank.call(self._bank.history.DescribeAggregate, history_pb2.DescribeAggregateRequest(**who))
        self._see("his events", described.version, 21)
        self._see("snapshots at versions", list(described.snapshot_versions), [20])
        for version, name in ((21, "Henry XXI"), (20, "Henry XX"), (1, "Henry I")):
            request = history_pb2.GetAggregateRequest(**who, version=version)
            state = json.loads((await self._bank.call(self._bank.history.GetAggregate, request)).state_json)
            self._see(f"the state at version {version}", state["name"], name)

    async def boxes(self) -> None:
        """A person goes to the archive and comes back."""
        self._say("register Mad Hatter One, rename him 7 times, box him")
        hatter, _ = await self._bank.register("Mad Hatter One")
        for number in ("Two", "Three", "Four", "Five", "Six", "Seven", "Eight"):
            await self._bank.rename(hatter, f"Mad Hatter {number}")
        before = await self._bank.stream("person", hatter)
        who: dict[str, Any] = {"aggregate_type": "person", "aggregate_id": hatter}
        await self._bank.call(self._bank.archive.BoxAggregate, archive_pb2.BoxAggregateRequest(options=options(), **who))
        verified = (await self._bank.call(self._bank.archive.VerifyBox, archive_pb2.VerifyBoxRequest(**who))).box
        self._see("events in the archive, verified", verified.events, 8)
        self._see("what is left online", _names(await self._bank.stream("person", hatter)), ["AggregateBoxed"])
        refusal = await self._refusal(self._bank.rename(hatter, "Mad Hatter Nine"))
        self._see("another name is refused", refusal, "AGGREGATE_BOXED")
        self._say("unbox him")
        await self._bank.call(self._bank.archive.UnboxAggregate, archive_pb2.UnboxAggregateRequest(options=options(), **who))
        after = await self._bank.stream("person", hatter)
        self._see("his 8 events are as they were", after[:8] == before, True)
        receipt = await self._bank.rename(hatter, "Mad Hatter Nine")
        summary = await self._bank.person(hatter, receipt.consistency_token)
        self._see("the person summary reads", summary.name, "Mad Hatter Nine")

    async def money(self) -> None:
        """Two people, two accounts, deposits and withdrawals, one of them refused."""
        blue, red = await self._two_accounts()
        self._say("withdraw 69.00 from blue, deposit 69.00 on red, withdraw 1000.00 from blue")
        await self._bank.withdraw(blue, 69_00)
        receipt = await self._bank.deposit(red, 69_00)
        self._see("the last one is refused", await self._refusal(self._bank.withdraw(blue, 1000_00)), "INSUFFICIENT_FUNDS")
        token = receipt.consistency_token
        self._see("blue holds, in cents", (await self._bank.account(blue, token)).balance_minor, 31_00)
        self._see("red holds, in cents", (await self._bank.account(red, token)).balance_minor, 169_00)
        owner = (await self._bank.account(blue, token)).owner_id
        person = await self._bank.person(owner, token)
        totals = [(total.currency, total.total_minor) for total in person.total_balances]
        self._see("Bill owns, in all", (person.open_account_count, totals), (1, [("USD", "3100")]))
        request = account_query_pb2.ListMovementsRequest(account_id=blue, consistency_token=token)
        listed = await self._bank.call(self._bank.account_queries.ListMovements, request)
        self._see("blue's statement, the newest first", [m.amount_minor for m in listed.movements], [-69_00, 100_00])

    async def logins(self) -> None:
        """Many users want one login: exactly one gets it."""
        self._say("register two users with the login Tweedle, one after the other, and one in another tenant")
        first = await _registered(self._bank, "Tweedle", "dum and dee")
        self._see("the first registration", _status(first), "SUCCEEDED")
        second = await _registered(self._bank, "TWEEDLE", "dee and dum")
        self._see("the second", (_status(second), second.reason), ("FAILED", "LOGIN_TAKEN"))
        neighbour = await _registered(self._neighbour, "Tweedle", "another house")
        self._see("the one in another tenant", _status(neighbour), "SUCCEEDED")
        await self._bank.deactivate(first.user_id)
        third = await _registered(self._bank, "Tweedle", "dee again")
        self._see("another one, when the first is deactivated", _status(third), "SUCCEEDED")
        self._say("register a hundred users with the login Humpty, at once")
        crowd = await asyncio.gather(*(_registered(self._bank, "Humpty", f"wall number {n}") for n in range(100)))
        self._see("of a hundred", dict(Counter(_status(user) for user in crowd)), {"SUCCEEDED": 1, "FAILED": 99})

    async def later(self) -> None:
        """Commands for later: one is cancelled, one runs by itself."""
        self._say("schedule the registration of Tweedledum for tomorrow")
        tweedledum, command_id = new_id(), new_id()
        command = register(tweedledum, "Tweedledum", command_id=command_id)
        receipt = await self._bank.schedule(command, _in(days=1))
        self._see("the command is", _outcome(receipt), "SCHEDULED")
        self._see(
            "reading the person's events is refused",
            await self._refusal(self._bank.stream("person", tweedledum)),
            "STREAM_NOT_FOUND",
        )
        listed = await self._bank.list_commands(status=command_pb2.COMMAND_STATUS_SCHEDULED)
        self._see("it is among the commands that wait", command_id in [each.receipt.command_id for each in listed.commands], True)
        self._see("it is cancelled", _outcome(await self._bank.cancel(command_id)), "CANCELLED")
        self._say("schedule the registration of Tweedledee for a second from now")
        tweedledee, command_id = new_id(), new_id()
        await self._bank.schedule(register(tweedledee, "Tweedledee", command_id=command_id), _in(seconds=1))
        receipt = await self._bank.ended_command(command_id)
        self._see("it ran by itself", _outcome(receipt), "COMPLETED")
        self._see("the person summary reads", (await self._bank.person(tweedledee, receipt.consistency_token)).name, "Tweedledee")

    async def mail(self) -> None:
        """Umbrella's owner is told by e-mail of a transfer over 10,000; nobody else is, and of no smaller one."""
        self._say("in both tenants Ada has 50,000.00 USD, Albert 100.00")
        ours, theirs = await self._ada_and_albert(self._bank), await self._ada_and_albert(self._neighbour)
        self._say("transfer 18,000.00 in another tenant; in Umbrella 10,000.00 exactly, then 18,000.00")
        foreign = await self._completed(self._bank, ours, 18_000_00)
        exactly = await self._completed(self._neighbour, theirs, 10_000_00)
        large = await self._completed(self._neighbour, theirs, 18_000_00)
        message = await self._mail_about(large)
        self._see("the e-mail is for", str(message["To"]), "ada@umbrella.example")
        self._see("its subject is", str(message["Subject"]), "Large transfer: 18,000.00 USD")
        found = [len(_about(messages(self._mail.folder), transfer)) for transfer in (foreign, exactly, large)]
        self._see("e-mails about the three transfers", found, [0, 0, 1])

    async def _ada_and_albert(self, bank: Bank) -> tuple[str, str]:
        (ada, _), (albert, _) = await bank.register("Ada"), await bank.register("Albert")
        (hers, _), (his, _) = await bank.open(ada, name="Ada's"), await bank.open(albert, name="Albert's")
        await bank.deposit(hers, 50_000_00)
        await bank.deposit(his, 100_00)
        return hers, his

    async def _completed(self, bank: Bank, accounts: tuple[str, str], amount_minor: int) -> str:
        """Transfers from the first account to the second; returns the transfer's id when it is completed."""
        transfer = await bank.ended_transfer(await bank.transfer(*accounts, amount_minor))
        if _ended(transfer) != "COMPLETED":
            raise Wrong(f"the transfer is {_ended(transfer)}: {transfer.reason}")
        return transfer.transfer_id

    async def _mail_about(self, transfer_id: str) -> EmailMessage:
        """The e-mail that names a transfer, as soon as it has arrived."""
        give_up_at = time.monotonic() + MAIL_MAX_S
        while time.monotonic() < give_up_at:
            if found := _about(messages(self._mail.folder), transfer_id):
                return found[0]
            await asyncio.sleep(0.02)
        raise Wrong(f"no e-mail about transfer {transfer_id} arrived within {MAIL_MAX_S:.0f} s")

    async def overrides(self) -> None:
        """In tenant Umbrella nobody takes another name, until that is switched off."""
        self._say("Umbrella registers Alice Abernathy and renames her to Alice Parks")
        alice, registered = await self._neighbour.register("Alice Abernathy")
        self._see("it is refused", await self._refusal(self._neighbour.rename(alice, "Alice Parks")), "RENAMING_DISABLED")
        self._see("the stream of events is", _names(await self._neighbour.stream("person", alice)), ["PersonRegistered"])
        summary = await self._neighbour.person(alice, registered.consistency_token)
        self._see("the name is", summary.name, "Alice Abernathy")
        overrides = [(override.name, override.on) for override in await self._neighbour.list_overrides()]
        self._see("what runs otherwise for Umbrella", overrides, [("large-transfer-notice", True), ("renaming-disabled", True)])

    async def refusals(self) -> None:
        """An account for nobody, the closing of somebody who holds money: nothing is saved."""
        self._say("open an account for a person who does not exist")
        nobody = new_id()
        self._see("it is refused", await self._refusal(self._bank.open(nobody)), "PERSON_NOT_FOUND")
        self._see(
            "reading the person's events is refused", await self._refusal(self._bank.stream("person", nobody)), "STREAM_NOT_FOUND"
        )
        self._say("register Bill, open blue and red, deposit 100.00 on blue, close Bill")
        bill, _ = await self._bank.register("Bill")
        blue, red = [(await self._bank.open(bill, name=name))[0] for name in ("blue", "red")]
        await self._bank.deposit(blue, 100_00)
        self._see("it is refused", await self._refusal(self._bank.close_person(bill)), "PERSON_HOLDS_MONEY")
        streams = [await self._bank.stream(*key) for key in (("person", bill), ("account", blue), ("account", red))]
        self._see("events of Bill, blue and red", [len(events) for events in streams], [3, 2, 1])
        self._say("withdraw 100.00 from blue, close Bill")
        await self._bank.withdraw(blue, 100_00)
        receipt = await self._bank.close_person(bill)
        self._see("in one transaction, events of Bill, blue and red", receipt.events_appended, 3)
        summary = await self._bank.person(bill, receipt.consistency_token)
        status = person_query_pb2.PersonStatus.Name(summary.status).removeprefix("PERSON_STATUS_")
        self._see("Bill is, with open accounts", (status, summary.open_account_count), ("CLOSED", 0))
        self._see("an account for Bill is refused", await self._refusal(self._bank.open(bill)), "PERSON_CLOSED")

    async def transfer(self) -> None:
        """A transfer from blue to red."""
        blue, red = await self._two_accounts()
        self._say("transfer 69.00 from blue to red")
        transfer = await self._bank.ended_transfer(await self._bank.transfer(blue, red, 69_00))
        self._see("the transfer is", _ended(transfer), "COMPLETED")
        steps = [step.name for step in transfer.steps]
        self._see("its steps were", steps, ["started", "debited", "credited", "completed"])
        await self._balances(blue, 31_00, red, 169_00)

    async def refund(self) -> None:
        """Transfers to an account that takes no money: it comes back."""
        blue, red = await self._two_accounts()
        self._say("freeze red, transfer 69.00 from blue to red")
        await self._bank.freeze(red)
        transfer = await self._bank.ended_transfer(await self._bank.transfer(blue, red, 69_00))
        self._see("the transfer is", (_ended(transfer), transfer.reason), ("FAILED", "ACCOUNT_FROZEN"))
        steps = [step.name for step in transfer.steps]
        self._see("its steps were", steps, ["started", "debited", "refunded", "failed"])
        await self._balances(blue, 100_00, red, 100_00)
        self._say("close green, transfer 69.00 from blue to green")
        owner, _ = await self._bank.register("Rufus")
        green, _ = await self._bank.open(owner, name="green")
        await self._bank.close(green)
        transfer = await self._bank.ended_transfer(await self._bank.transfer(blue, green, 69_00))
        self._see("the transfer is", (_ended(transfer), transfer.reason), ("FAILED", "ACCOUNT_CLOSED"))
        await self._balances(blue, 100_00, red, 100_00)

    async def _refusal(self, call: Awaitable[object]) -> str:
        """The reason of a call that must be refused."""
        try:
            await call
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error).reason
        raise Wrong("it was accepted")

    async def _two_accounts(self) -> tuple[str, str]:
        self._say("register Bill and Ted, open blue and red, deposit 100.00 USD on each")
        (bill, _), (ted, _) = await self._bank.register("Bill"), await self._bank.register("Ted")
        (blue, _), (red, _) = await self._bank.open(bill, name="blue"), await self._bank.open(ted, name="red")
        await self._bank.deposit(blue, 100_00)
        await self._bank.deposit(red, 100_00)
        return blue, red

    async def _balances(self, blue: str, blue_minor: int, red: str, red_minor: int) -> None:
        self._see("blue holds, in cents", (await self._bank.account_now(blue)).balance_minor, blue_minor)
        self._see("red holds, in cents", (await self._bank.account_now(red)).balance_minor, red_minor)


def _in(**more: float) -> datetime:
    """A moment that far from now."""
    return datetime.now(UTC) + timedelta(**more)


def _names(events: Iterable[event_store_pb2.EventEnvelope]) -> list[str]:
    return [event.type.rpartition(".")[2] for event in events]


def _about(found: Iterable[EmailMessage], transfer_id: str) -> list[EmailMessage]:
    """The e-mails whose text names a transfer."""
    return [message for message in found if transfer_id in str(message.get_body(("plain",)))]


async def _registered(bank: Bank, login: str, password: str) -> user_query_pb2.UserSummary:
    return await bank.ended_registration(await bank.register_user(login, password))


def _status(user: user_query_pb2.UserSummary) -> str:
    return user_query_pb2.RegistrationStatus.Name(user.status).removeprefix("REGISTRATION_STATUS_")


def _outcome(receipt: command_pb2.CommandReceipt) -> str:
    return command_pb2.CommandStatus.Name(receipt.status).removeprefix("COMMAND_STATUS_")


def _ended(transfer: transfer_query_pb2.TransferSummary) -> str:
    return transfer_query_pb2.TransferStatus.Name(transfer.status).removeprefix("TRANSFER_STATUS_")
