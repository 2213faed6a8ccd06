"""Transfers and registrations with the real write domain, through any interleaving of what can happen between them.

Hypothesis plays the network, the clock, the customers and the operators; the checks run after every step of it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bank.v1 import account_pb2, transfer_pb2, user_pb2
from saga_service.registry import PROCESSES
from shared.processes.records import ProcessStatus
from tests.support.fakes.interleaving import Clock, Domain, Saga, later, message_of
from tests.support.fakes.line import uid
from write_service.domain import account_types, person_types, transfer_types, user_types
from write_service.passwords import Passwords
from write_service.registry import build_registry

BUS = build_registry(Passwords())
OWNER = uid(1)
ACCOUNTS = [uid(number) for number in (11, 12, 13)]
EUROS = uid(14)
LOGINS = ("ann", "ANN", "bob")
NEARLY_FULL = 2**63 - 60
NO_TRANSFER: dict[str, Any] = {"transfer_id": None, "counterparty_account_id": None, "not_after_ms": None}

# A failure is told as it was found: to make it small takes minutes, and Phase.shrink here.
EXPLORE = settings(
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    max_examples=80,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


class World(RuleBasedStateMachine):
    """What any processes have to live with."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.domain = Domain(BUS, self.clock)
        self.saga = Saga(PROCESSES, self.domain)
        self.data: Any = None

    # The runner

    @rule(count=st.integers(1, 3), rolled_back=st.booleans())
    def events_come(self, count: int, rolled_back: bool) -> None:
        self.saga.follow(count, rolled_back=rolled_back)

    @precondition(lambda self: self.saga.position)
    @rule(data=st.data())
    def an_event_comes_again(self, data: st.DataObject) -> None:
        before = dict(self.saga.rows)
        self.saga.repeat(data.draw(st.sampled_from(self.domain.line[: self.saga.position])))
        assert self.saga.rows == before

    @precondition(lambda self: self.saga.told)
    @rule(data=st.data(), kept=st.booleans(), rolled_back=st.booleans())
    def answers_come(self, data: st.DataObject, kept: bool, rolled_back: bool) -> None:
        """Some of them, in any order; if they are kept, they will come again."""
        told = data.draw(st.lists(st.sampled_from(self.saga.told), min_size=1, max_size=3))
        self.saga.take(told, rolled_back=rolled_back)
        if not (kept or rolled_back):
            self.saga.told = [it for it in self.saga.told if it not in told]

    @precondition(lambda self: self.saga.answers_given)
    @rule(data=st.data())
    def a_taken_answer_comes_again(self, data: st.DataObject) -> None:
        before = {key: it.state for key, it in self.saga.processes.items()}
        self.saga.take([data.draw(st.sampled_from(self.saga.answers_given))])
        assert {key: it.state for key, it in self.saga.processes.items()} == before

    @rule(rolled_back=st.booleans())
    def timers_fire(self, rolled_back: bool) -> None:
        self.saga.fire(rolled_back=rolled_back)

    # The network

    @precondition(lambda self: self.saga.rows)
    @rule(data=st.data())
    def a_command_is_sent_again(self, data: st.DataObject) -> None:
        self.saga.send_again(data.draw(st.sampled_from(list(self.saga.rows.values()))))

    @precondition(lambda self: self.saga.tries)
    @rule(data=st.data())
    def a_command_arrives(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.saga.tries) - 1))
        self.saga.arrive(self.saga.tries.pop(number))

    @precondition(lambda self: self.saga.tries)
    @rule(data=st.data(), given_up=st.booleans())
    def a_command_meets_a_defect(self, data: st.DataObject, given_up: bool) -> None:
        number = data.draw(st.integers(0, len(self.saga.tries) - 1))
        self.saga.fail(self.saga.tries.pop(number), given_up=given_up)

    @precondition(lambda self: self.saga.tries)
    @rule(data=st.data())
    def a_command_is_lost(self, data: st.DataObject) -> None:
        self.saga.tries.pop(data.draw(st.integers(0, len(self.saga.tries) - 1)))

    @precondition(lambda self: self.saga.told)
    @rule(data=st.data())
    def an_answer_is_lost(self, data: st.DataObject) -> None:
        self.saga.told.pop(data.draw(st.integers(0, len(self.saga.told) - 1)))

    @rule(rounds=st.integers(1, 3))
    def all_goes_well(self, rounds: int) -> None:
        """For a while, so that what is disturbed is not the first step alone."""
        for _ in range(rounds):
            self.saga.follow(10)
            for command in self.saga.tries[:]:
                self.saga.arrive(command)
            self.saga.take(self.saga.told)
            self.saga.tries, self.saga.told = [], []

    # The clock and the operators

    @rule(seconds=st.sampled_from([1, 59, 61, 121, 301]))
    def time_passes(self, seconds: int) -> None:
        self.clock.now += later(seconds)

    @precondition(lambda self: self.saga.unended())
    @rule(data=st.data())
    def an_operator_cancels(self, data: st.DataObject) -> None:
        self.saga.cancel(data.draw(st.sampled_from(self.saga.unended())).key)

    @precondition(lambda self: self.saga.tries)
    @rule(data=st.data())
    def a_command_is_given_up_and_cancelled(self, data: st.DataObject) -> None:
        command = self.saga.tries.pop(data.draw(st.integers(0, len(self.saga.tries) - 1)))
        self.saga.fail(command, given_up=True)
        self.saga.take([self.saga.told.pop()])
        self.saga.cancel(command.key)

    @precondition(lambda self: any(it.status == ProcessStatus.PARKED for it in self.saga.processes.values()))
    @rule(data=st.data())
    def an_operator_retries(self, data: st.DataObject) -> None:
        parked = [it for it in self.saga.processes.values() if it.status == ProcessStatus.PARKED]
        self.saga.retry(data.draw(st.sampled_from(parked)).key)

    # Always

    @invariant()
    def processes_wait_for_what_will_come(self) -> None:
        self.saga.check()

    @invariant()
    def all_is_right(self) -> None:
        """What is always true of the domain."""

    def settled(self) -> None:
        """What is true in the end."""

    def teardown(self) -> None:
        self.saga.settle()
        self.saga.check()
        self.all_is_right()
        self.settled()
        assert not self.saga.unended()


class Books:
    """What the line says about money, event by event; each one is held to what was before it."""

    def __init__(self) -> None:
        self.position = 0
        self.brought: dict[str, int] = defaultdict(int)
        self.balances: dict[tuple[str, str], int] = defaultdict(int)
        self.suspense: dict[str, int] = defaultdict(int)
        self.started: dict[str, transfer_pb2.TransferStarted] = {}
        self.moves: dict[str, list[str]] = defaultdict(list)
        self.ended: dict[str, str] = {}

    def read(self, line: list[Any]) -> None:
        """Goes on to the end of the line; money is right at every position."""
        for envelope in line[self.position :]:
            event = message_of(envelope, *EVENTS)
            if event is not None:
                self.apply(event)
                self.check()
        self.position = len(line)

    def apply(self, event: Any) -> None:
        """One event."""
        match event:
            case account_pb2.MoneyDeposited() | account_pb2.MoneyWithdrawn():
                comes = isinstance(event, account_pb2.MoneyDeposited)
                amount = event.amount_minor if comes else -event.amount_minor
                place = (event.currency, event.account_id)
                self.balances[place] += amount
                assert event.balance_after_minor == self.balances[place] >= 0
                if not event.HasField("transfer_id"):
                    self.brought[event.currency] += amount
                    return
                started = self.started[event.transfer_id]
                ends = (started.from_account_id, started.to_account_id)
                if not comes:
                    assert (event.account_id, event.counterparty_account_id) == ends
                    self.move(event, "debit")
                elif event.account_id == started.to_account_id:
                    assert (event.counterparty_account_id, event.account_id) == ends
                    self.move(event, "credit")
                else:
                    assert (event.account_id, event.counterparty_account_id) == ends
                    self.move(event, "refund")
            case account_pb2.MoneySuspended():
                self.suspense[event.currency] += event.amount_minor
                assert event.balance_after_minor == self.suspense[event.currency]
                self.move(event, "suspend")
            case transfer_pb2.TransferStarted():
                self.started[event.transfer_id] = event
            case transfer_pb2.TransferCompleted():
                assert self.moves.get(event.transfer_id) == ["debit", "credit"]
                self.end(event.transfer_id, "completed")
            case transfer_pb2.TransferFailed():
                expected = {
                    transfer_pb2.COMPENSATION_NOT_NEEDED: [],
                    transfer_pb2.COMPENSATION_REFUNDED: ["debit", "refund"],
                    transfer_pb2.COMPENSATION_SUSPENDED: ["debit", "suspend"],
                }
                assert self.moves.get(event.transfer_id, []) == expected[event.compensation]
                self.end(event.transfer_id, "failed")

    def move(self, event: Any, name: str) -> None:
        """Money of a transfer moves; never after it ended."""
        started = self.started[event.transfer_id]
        assert event.transfer_id not in self.ended
        assert (event.amount_minor, event.currency) == (started.amount_minor, started.currency)
        self.moves[event.transfer_id].append(name)

    def end(self, transfer_id: str, how: str) -> None:
        """A transfer ends once."""
        assert transfer_id not in self.ended
        self.ended[transfer_id] = how

    def check(self) -> None:
        """Balances, suspense and what is in flight are what was brought."""
        held: dict[str, int] = defaultdict(int, self.suspense)
        for (currency, _), balance in self.balances.items():
            held[currency] += balance
        for transfer_id, moves in self.moves.items():
            assert moves in (["debit"], ["debit", "credit"], ["debit", "refund"], ["debit", "suspend"])
            if moves == ["debit"]:
                started = self.started[transfer_id]
                held[started.currency] += started.amount_minor
        assert {key: each for key, each in held.items() if each} == {key: each for key, each in self.brought.items() if each}


EVENTS = (
    account_pb2.MoneyDeposited,
    account_pb2.MoneyWithdrawn,
    account_pb2.MoneySuspended,
    transfer_pb2.TransferStarted,
    transfer_pb2.TransferCompleted,
    transfer_pb2.TransferFailed,
)


class Transfers(World):
    """Customers move money while accounts are frozen, thawed, emptied, filled and closed under it."""

    def __init__(self) -> None:
        super().__init__()
        self.books = Books()
        self.count = 0

    @initialize()
    def a_bank(self) -> None:
        self.domain.ask(person_types.RegisterPerson(person_id=OWNER, name="Bill"))
        for account_id in (*ACCOUNTS, EUROS):
            currency = "EUR" if account_id == EUROS else "USD"
            self.domain.ask(account_types.OpenAccount(account_id=account_id, owner_id=OWNER, currency=currency, name="blue"))
            self.bring(account_id, 100)

    @rule(
        source=st.sampled_from(ACCOUNTS),
        to=st.sampled_from([*ACCOUNTS, EUROS]),
        amount=st.integers(1, 100),
        currency=st.sampled_from(["USD", "USD", "USD", "EUR"]),
    )
    def a_transfer_starts(self, source: str, to: str, amount: int, currency: str) -> None:
        self.count += 1
        self.domain.ask(
            transfer_types.StartTransfer(
                transfer_id=uid(1000 + self.count),
                from_account_id=source,
                to_account_id=to,
                amount_minor=amount,
                currency=currency,
            )
        )

    @rule(account_id=st.sampled_from(ACCOUNTS), amount=st.sampled_from([10, 100, NEARLY_FULL]))
    def money_is_brought(self, account_id: str, amount: int) -> None:
        self.bring(account_id, amount)

    def bring(self, account_id: str, amount: int) -> None:
        """Money comes from outside."""
        currency = "EUR" if account_id == EUROS else "USD"
        deposit = account_types.DepositMoney(account_id=account_id, amount_minor=amount, currency=currency, **NO_TRANSFER)
        self.domain.ask(deposit)

    @rule(account_id=st.sampled_from(ACCOUNTS))
    def all_money_is_taken(self, account_id: str) -> None:
        amount = self.domain.state("account", account_id).balance_minor
        if amount:
            withdraw = account_types.WithdrawMoney(account_id=account_id, amount_minor=amount, currency="USD", **NO_TRANSFER)
            self.domain.ask(withdraw)

    @rule(
        account_id=st.sampled_from(ACCOUNTS),
        what=st.sampled_from([account_types.FreezeAccount, account_types.UnfreezeAccount, account_types.CloseAccount]),
    )
    def an_account_changes(self, account_id: str, what: Any) -> None:
        self.domain.ask(what(account_id=account_id))

    @invariant()
    def all_is_right(self) -> None:
        """Money is conserved at every position of the line."""
        self.books.read(self.domain.line)

    def settled(self) -> None:
        """Each transfer has ended, and nothing is in flight."""
        assert set(self.books.ended) == set(self.books.started)
        suspended = {key[2] for key, it in self.saga.processes.items() if it.attention == "MONEY_IN_SUSPENSE"}
        assert suspended == {id_ for id_, moves in self.books.moves.items() if moves[-1] == "suspend"}


class Registrations(World):
    """Many ask for few logins."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.wanted: dict[str, str] = {}

    @rule(login=st.sampled_from(LOGINS))
    def a_registration_starts(self, login: str) -> None:
        self.count += 1
        user_id = uid(2000 + self.count)
        start = user_types.StartUserRegistration(user_id=user_id, login=login, email="ann@example.com", password="$argon2id$")
        assert self.domain.ask(start).refusal is None
        self.wanted[user_id] = login.casefold()

    def outcomes(self) -> dict[str, list[str]]:
        """What became of each user, as the line says."""
        found: dict[str, list[str]] = {user_id: [] for user_id in self.wanted}
        for envelope in self.domain.line:
            match message_of(envelope, user_pb2.UserRegistrationSucceeded, user_pb2.UserRegistrationFailed):
                case user_pb2.UserRegistrationSucceeded() as event:
                    found[event.user_id].append("succeeded")
                case user_pb2.UserRegistrationFailed() as event:
                    found[event.user_id].append("failed")
        return found

    @invariant()
    def all_is_right(self) -> None:
        """No registration ends twice; a login has one user at the most, who holds it; states tell nothing personal."""
        outcomes = self.outcomes()
        assert all(len(each) <= 1 for each in outcomes.values())
        succeeded = [user_id for user_id, each in outcomes.items() if each == ["succeeded"]]
        assert len({self.wanted[user_id] for user_id in succeeded}) == len(succeeded)
        holders = {state.state.holder_id: state.state.confirmed for key, state in self.domain.states.items() if key[1] == "login"}
        assert all(holders.get(user_id) for user_id in succeeded)
        assert not any("example.com" in it.state or "ann" in it.state.casefold() for it in self.saga.processes.values())

    def settled(self) -> None:
        """Each registration has ended. Of those for a login exactly one has succeeded, unless an operator took one back."""
        outcomes = self.outcomes()
        assert all(len(each) == 1 for each in outcomes.values())
        meddled = {self.wanted[key[2]] for key in self.saga.cancelled}
        for login in set(self.wanted.values()) - meddled:
            assert [outcomes[user_id] for user_id in self.wanted if self.wanted[user_id] == login].count(["succeeded"]) == 1
        held = {state.state.holder_id for key, state in self.domain.states.items() if key[1] == "login" and state.state.confirmed}
        assert held == {user_id for user_id, each in outcomes.items() if each == ["succeeded"]}


TestTransfers = Transfers.TestCase
TestTransfers.settings = EXPLORE
TestRegistrations = Registrations.TestCase
TestRegistrations.settings = EXPLORE
