"""Any commands, in any batches, interleavings and repeats, come to the same as one after another in memory."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter as Tally
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy.bootstrap import Database
from shared.commands.decide import Command, decide
from shared.commands.intake import Limits
from shared.commands.log import CommandKey
from shared.commands.states import Versioned, load
from shared.line.event_store import AggregateKey
from tests.support.checks.history import check_line, connected, events_of
from tests.support.fakes.replica import NOW, make_command, reasons, replica
from tests.support.system.engines import Engines
from write_service.domain import account_types, person_types
from write_service.passwords import Passwords
from write_service.registry import build_registry

BUS = build_registry(Passwords())
PEOPLE = ("p0", "p1")
ACCOUNTS = ("a0", "a1", "a2")
CURRENCIES = ("USD", "USD", "USD", "EUR")

# What only processes may set.
NO_TRANSFER: Any = dict.fromkeys(("transfer_id", "counterparty_account_id", "not_after_ms"), st.none())

_tenants = (f"tenant-{number}" for number in itertools.count())

contents = st.one_of(
    st.builds(person_types.RegisterPerson, person_id=st.sampled_from(PEOPLE), name=st.sampled_from(["Alice", "Ada"])),
    st.builds(person_types.RenamePerson, person_id=st.sampled_from(PEOPLE), name=st.sampled_from(["Alice", "Ada"])),
    st.builds(person_types.ClosePerson, person_id=st.sampled_from(PEOPLE)),
    st.builds(
        account_types.OpenAccount,
        account_id=st.sampled_from(ACCOUNTS),
        owner_id=st.sampled_from(PEOPLE),
        currency=st.sampled_from(CURRENCIES),
        name=st.just("blue"),
    ),
    st.builds(
        account_types.DepositMoney,
        account_id=st.sampled_from(ACCOUNTS),
        amount_minor=st.one_of(st.integers(1, 100), st.just(2**63 - 1)),
        currency=st.sampled_from(CURRENCIES),
        **NO_TRANSFER,
    ),
    st.builds(
        account_types.WithdrawMoney,
        account_id=st.sampled_from(ACCOUNTS),
        amount_minor=st.integers(1, 100),
        currency=st.sampled_from(CURRENCIES),
        **NO_TRANSFER,
    ),
    st.builds(account_types.CloseAccount, account_id=st.sampled_from(ACCOUNTS)),
    st.builds(account_types.FreezeAccount, account_id=st.sampled_from(ACCOUNTS)),
    st.builds(account_types.UnfreezeAccount, account_id=st.sampled_from(ACCOUNTS)),
)


@dataclass(frozen=True)
class Asked:
    """A command to make, or, if it names an earlier one, that one again."""

    content: Any
    expected_version: int | None
    again: int | None


asked = st.builds(
    Asked,
    content=contents,
    expected_version=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 4)),
    again=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 30)),
)
# Rounds follow one another. In a round several callers ask at once, each for units; a unit of several is atomic.
rounds = st.lists(st.lists(st.lists(st.lists(asked, min_size=1, max_size=4), max_size=4), min_size=1, max_size=4), max_size=5)


FIRST_DEPOSIT = account_types.DepositMoney(
    account_id="a0", amount_minor=50, currency="USD", transfer_id=None, counterparty_account_id=None, not_after_ms=None
)

# What every example begins with, so that money moves in most of them.
BEGIN = [
    [
        [[Asked(person_types.RegisterPerson(person_id=name, name="Alice"), None, None)] for name in PEOPLE],
        [[Asked(account_types.OpenAccount(account_id="a0", owner_id="p0", currency="USD", name="blue"), None, None)]],
        [[Asked(account_types.OpenAccount(account_id="a1", owner_id="p1", currency="USD", name="red"), None, None)]],
        [[Asked(FIRST_DEPOSIT, None, None)]],
    ]
]


@dataclass
class Model:
    """The write service, one command after another, in memory."""

    states: dict[AggregateKey, Versioned] = field(default_factory=dict)
    outcomes: dict[CommandKey, tuple[str, int]] = field(default_factory=dict)

    def lookup(self, key: AggregateKey) -> Versioned:
        """Everything is at hand."""
        return self.states.get(key) or Versioned(0, BUS.aggregate_of(key[1]).initial)

    def carry_out(self, unit: list[Command]) -> list[tuple[str, int]]:
        """What a unit comes to: of each command its status or why not, and the version it left its aggregate at."""
        known = {command.key: self.outcomes[command.key] for command in unit if command.key in self.outcomes}
        fresh = [command for command in {command.key: command for command in unit}.values() if command.key not in known]
        if any(reason != "completed" for reason, _ in known.values()):
            known |= {command.key: ("ATOMIC_BATCH_REFUSED", 0) for command in fresh}
            fresh = []
        if fresh:
            plan = decide(BUS, [fresh], self.lookup, NOW)
            self.states |= plan.states
            told = {
                key: (outcome.refusal.reason if outcome.refusal else outcome.status, outcome.version)
                for key, outcome in plan.outcomes.items()
            }
            known |= told
            self.outcomes |= {key: each for key, each in told.items() if each[0] != "ATOMIC_BATCH_REFUSED"}
        return [known[command.key] for command in unit]


@pytest.fixture(scope="module")
def module_db(engines: Engines) -> Iterator[Database]:
    """One database for all examples, each of which has a tenant of its own. In the end the line they made is whole."""
    database = engines.clone("write")
    yield database
    assert asyncio.run(check_line(database))
    engines.drop(database)


def commands_of(rounds: list[list[list[list[Asked]]]], tenant: str) -> list[list[list[list[Command]]]]:
    """The commands that were drawn. What is asked again is of an earlier round: else the answer may be "under way"."""
    made: list[Command] = []
    rounds_made = []
    for callers in rounds:
        before = list(made)

        def command(one: Asked, before: list[Command] = before) -> Command:
            if one.again is not None and before:
                return before[one.again % len(before)]
            new = make_command(BUS, one.content, tenant=tenant, expected_version=one.expected_version)
            made.append(new)
            return new

        # Of repeats in one round, only those of single commands are answered alike whoever comes first.
        seen: Tally[CommandKey] = Tally()
        round_made = []
        for units in callers:
            caller_made = []
            for unit in units:
                unit_made = [command(one) for one in unit]
                if all(seen[each.key] == 0 for each in unit_made):
                    seen.update(each.key for each in unit_made)
                    caller_made.append(unit_made)
            round_made.append(caller_made)
        rounds_made.append(round_made)
    return rounds_made


@given(rounds=rounds, batch=st.integers(1, 9), cached=st.integers(0, 4), ahead=st.integers(1, 4))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_batches_come_to_the_same_as_one_after_another(
    module_db: Database, rounds: list[list[list[list[Asked]]]], batch: int, cached: int, ahead: int
) -> None:
    """Same answers, same versions, same states: whatever the batches' limit and however little is cached."""
    tenant, model = next(_tenants), Model()

    async def example() -> None:
        limits = Limits(batch_commands_max=batch, cached_aggregates_max=cached, decide_ahead_min=ahead)
        async with replica(module_db, BUS, limits=limits) as one:
            for callers in commands_of(BEGIN + rounds, tenant):
                # Callers are taken in the order in which they come, so one after another is what they must come to.
                expected = [[model.carry_out(unit) for unit in units] for units in callers]
                answers = await asyncio.gather(*(one.committer.submit(units) for units in callers))
                assert expected == [
                    [
                        [(reason, outcome.version) for reason, outcome in zip(reasons(outcomes), outcomes, strict=True)]
                        for outcomes in units
                    ]
                    for units in answers
                ]
        async with connected(module_db.app) as connection:
            keys = [(tenant, "person", name) for name in PEOPLE] + [(tenant, "account", name) for name in ACCOUNTS]
            assert await load(connection, BUS, keys) == {key: model.lookup(key) for key in keys}

    asyncio.run(example())


@given(rounds=rounds, seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_interleaving_of_two_replicas_keeps_what_is_always_true(
    module_db: Database, rounds: list[list[list[list[Asked]]]], seed: int
) -> None:
    """Half of the callers ask here and half there, and every command is asked at both: no order is given.

    Each command then has one answer, the states are the fold of the streams, and no money is made or lost.
    """
    tenant, chance = next(_tenants), random.Random(seed)

    async def example() -> None:
        limits = Limits(batch_commands_max=chance.randint(1, 9), cached_aggregates_max=4, decide_ahead_min=chance.randint(1, 4))
        async with replica(module_db, BUS, limits=limits) as one, replica(module_db, BUS, limits=limits) as two:
            for callers in commands_of(BEGIN + rounds, tenant):
                singles = [command for units in callers for unit in units for command in unit]
                mixed = chance.sample(singles, len(singles))
                here, there = await asyncio.gather(one.ask(*singles), two.ask(*mixed))
                told = dict(zip((command.key for command in mixed), there, strict=True))
                for command, outcome in zip(singles, here, strict=True):
                    other = told[command.key]
                    assert reasons([outcome]) == reasons([other])
                    assert (outcome.version, outcome.position) == (other.version, other.position)
        async with connected(module_db.app) as connection:
            keys = [(tenant, "account", name) for name in ACCOUNTS]
            states = await load(connection, BUS, keys)
        balances: Tally[str] = Tally()
        for event in await events_of(module_db):
            if event.tenant == tenant and event.category == "account":
                match BUS.codecs.decode(event.type, event.payload):
                    case account_types.MoneyDeposited() as deposited:
                        balances[event.aggregate_id] += deposited.amount_minor
                        assert deposited.balance_after_minor == balances[event.aggregate_id]
                    case account_types.MoneyWithdrawn() as withdrawn:
                        balances[event.aggregate_id] -= withdrawn.amount_minor
                        assert withdrawn.balance_after_minor == balances[event.aggregate_id]
                assert 0 <= balances[event.aggregate_id] < 2**63
        assert {key[2]: at.state.balance_minor for key, at in states.items()} == {name: balances[name] for name in ACCOUNTS}

    asyncio.run(example())
