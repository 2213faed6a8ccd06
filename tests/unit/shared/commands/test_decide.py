"""Deciding in memory: what a batch comes to, without a database."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from foldline.v1 import event_store_pb2
from shared.commands.decide import EVENT_BYTES_MAX, REACHED_MAX, REACTIONS_DEPTH_MAX, Command, Outcome, Plan, decide
from shared.commands.registry import CommandRegistry
from shared.commands.states import Versioned
from shared.folds.aggregate import Meta
from shared.folds.errors import Code, Refusal
from shared.line.event_store import AggregateKey
from tests.support.domains import trial
from tests.support.domains.trial import (
    Add,
    Added,
    Blurt,
    Chain,
    Counter,
    GoOffDuty,
    Linked,
    Move,
    Moved,
    SetPassword,
    Share,
    Shared,
    Swell,
    build_registry,
)
from tests.support.fakes.replica import NOW, make_command, reasons, refusal
from tests.support.logs import capture_logs

BUS = build_registry()
A, B = (("acme", "counter", name) for name in "ab")

World = dict[AggregateKey, Versioned]


def at(total: int, version: int = 1, *, off_duty: bool = False) -> Versioned:
    """A counter as it is in the database."""
    return Versioned(version, Counter(total=total, off_duty=off_duty))


def lookup(world: World) -> Callable[[AggregateKey], Versioned]:
    """Everything is at hand; what is not in the world does not exist."""
    return lambda key: world.get(key, Versioned(0, Counter()))


def decided(world: World, *units: Command | list[Command], bus: CommandRegistry = BUS) -> Plan:
    """The plan for units of commands."""
    return decide(bus, [unit if isinstance(unit, list) else [unit] for unit in units], lookup(world), NOW)


def command(content: object, *, bus: CommandRegistry = BUS, **more: Any) -> Command:
    """A command with an id of its own."""
    return make_command(bus, content, **more)


def outcomes(plan: Plan, *commands: Command) -> list[Outcome]:
    """Of these commands, in order."""
    return [plan.outcomes[command.key] for command in commands]


def events(plan: Plan) -> list[tuple[str, int, object]]:
    """Aggregate, version and content of the events to append."""
    return [(event.key[2], event.version, BUS.codecs.decode(event.type, event.payload)) for event in plan.batch.events]


def test_each_command_sees_what_those_before_it_changed() -> None:
    """Three on one counter: the second needs the first, the third finds too little left."""
    first, second, third = (command(Add(counter_id="a", amount=amount)) for amount in (5, -8, -1))
    plan = decided({A: at(3, version=7)}, first, second, third)
    assert events(plan) == [("a", 8, Added(counter_id="a", amount=5)), ("a", 9, Added(counter_id="a", amount=-8))]
    assert reasons(outcomes(plan, first, second, third)) == ["completed", "completed", "BELOW_ZERO"]
    assert plan.states == {A: at(0, version=9)}
    assert plan.batch.reads == {A: 7}


def test_an_outcome_names_its_version_its_events_and_its_place_in_the_batch() -> None:
    """The place is counted from 1 over the whole batch, and is of the command's last event."""
    first = command(Add(counter_id="a", amount=5))
    second = command(Move(counter_id="a", to_id="b", amount=2))
    nothing = command(Add(counter_id="b", amount=0))
    plan = decided({}, first, second, nothing)
    assert outcomes(plan, first, second, nothing) == [
        Outcome("completed", 1, 1, 1, 0),
        Outcome("completed", 2, 2, 3, 0),
        Outcome("completed", 1, 0, 0, 0),
    ]
    assert [(row.status, row.version, row.events_appended, row.last_event) for row in plan.batch.commands] == [
        ("completed", 1, 1, 1),
        ("completed", 2, 2, 3),
        ("completed", 1, 0, 0),
    ]


def test_what_is_missing_is_named_and_the_plan_is_void() -> None:
    """All that the pass could find out is named at once, so that one query loads it."""
    plan = decide(BUS, [[command(Add(counter_id="a", amount=1))], [command(Add(counter_id="b", amount=1))]], World().get, NOW)
    assert plan.missing == {A, B}
    plan = decide(BUS, [[command(GoOffDuty(counter_id="a", colleague_id="b"))]], World({A: at(0)}.items()).get, NOW)
    assert plan.missing == {B}


def test_what_was_read_is_to_be_checked_even_if_it_was_refused_or_changed_nothing() -> None:
    """A refusal and a no-op rest on versions as an acceptance does."""
    commands = [
        command(Add(counter_id="a", amount=-1)),
        command(Add(counter_id="b", amount=0)),
        command(GoOffDuty(counter_id="c", colleague_id="d")),
        command(Add(counter_id="e", amount=1), expected_version=9),
    ]
    world = {(*A[:2], name): at(0, version=version, off_duty=name == "d") for version, name in enumerate("abcde", start=1)}
    plan = decided(world, *commands)
    assert reasons(outcomes(plan, *commands)) == ["BELOW_ZERO", "completed", "NOBODY_ON_DUTY", "VERSION_MISMATCH"]
    assert plan.batch.reads == {(*A[:2], name): version for version, name in enumerate("abcde", start=1)}
    assert plan.batch.events == []


def test_a_refused_command_undoes_its_own_events_alone() -> None:
    """Its neighbours stay; a reaction's refusal undoes the events before it."""
    before, culprit, after = (
        command(Add(counter_id="a", amount=700)),
        command(Move(counter_id="a", to_id="b", amount=600)),
        command(Add(counter_id="a", amount=-700)),
    )
    plan = decided({B: at(500)}, before, culprit, after)
    assert reasons(outcomes(plan, before, culprit, after)) == ["completed", "FULL", "completed"]
    assert [version for _, version, _ in events(plan)] == [1, 2]
    assert plan.states[A] == at(0, version=2)
    assert B not in plan.states


def test_a_reaction_is_in_the_same_unit_and_comes_after_what_caused_it() -> None:
    """Both events are the command's, in order."""
    moving = command(Move(counter_id="a", to_id="b", amount=30))
    plan = decided({A: at(100), B: at(1)}, moving)
    assert events(plan) == [("a", 2, Moved(counter_id="a", to_id="b", amount=30)), ("b", 2, Added(counter_id="b", amount=30))]
    for event in plan.batch.events:
        assert event_store_pb2.EventMetadata.FromString(event.metadata).command_id == str(moving.key[1])


def test_a_reaction_may_come_back_to_the_aggregate_it_began_at() -> None:
    """The state it then sees has the first event in it."""
    plan = decided({A: at(100)}, command(Move(counter_id="a", to_id="a", amount=30)))
    assert [version for _, version, _ in events(plan)] == [2, 3]
    assert plan.states[A] == at(100, version=3)


def test_an_atomic_unit_stands_or_falls_as_a_whole() -> None:
    """The culprit's refusal is kept; the others are told that another was refused, and are not kept."""
    first, culprit, last = (command(Add(counter_id="a", amount=amount)) for amount in (5, -9, 1))
    alone = command(Add(counter_id="a", amount=2))
    plan = decided({}, [first, culprit, last], alone)
    assert reasons(outcomes(plan, first, culprit, last, alone)) == [
        "ATOMIC_BATCH_REFUSED",
        "BELOW_ZERO",
        "ATOMIC_BATCH_REFUSED",
        "completed",
    ]
    assert refusal(plan.outcomes[culprit.key]).facts == {"total": "5"}
    assert {row.command_id: row.status for row in plan.batch.commands} == {culprit.key[1]: "rejected", alone.key[1]: "completed"}
    assert plan.states == {A: at(2, version=1)}


def test_commands_of_an_atomic_unit_see_each_other() -> None:
    """Positions count on through the unit."""
    first, second = command(Add(counter_id="a", amount=5)), command(Add(counter_id="a", amount=-5))
    plan = decided({}, [first, second])
    assert outcomes(plan, first, second) == [Outcome("completed", 1, 1, 1, 0), Outcome("completed", 2, 1, 2, 0)]


@pytest.mark.parametrize(
    ("expected", "reason"), [(7, "completed"), (6, "VERSION_MISMATCH"), (8, "VERSION_MISMATCH"), (0, "VERSION_MISMATCH")]
)
def test_an_expected_version_is_exact(expected: int, reason: str) -> None:
    """Neither an earlier nor a later version will do, and 0 means that it must not exist."""
    asked = command(Add(counter_id="a", amount=5), expected_version=expected)
    plan = decided({A: at(0, version=7)}, asked)
    assert reasons(outcomes(plan, asked)) == [reason]
    if reason != "completed":
        assert refusal(plan.outcomes[asked.key]).facts == {"expected": str(expected), "actual": "7"}
        assert plan.outcomes[asked.key].version == 7


def test_an_expected_version_counts_what_the_batch_has_changed_already() -> None:
    """Two that expect the same version: one of them is stale."""
    first, second = (command(Add(counter_id="a", amount=1), expected_version=0) for _ in range(2))
    plan = decided({}, first, second)
    assert reasons(outcomes(plan, first, second)) == ["completed", "VERSION_MISMATCH"]


def test_a_stale_expectation_comes_before_the_refusals_of_the_decision() -> None:
    """Whoever expected another version decided on another state."""
    asked = command(Add(counter_id="a", amount=-1), expected_version=3)
    assert reasons(outcomes(decided({}, asked), asked)) == ["VERSION_MISMATCH"]


def test_a_defect_fails_its_command_alone_and_its_text_goes_nowhere() -> None:
    """Neither into the answer nor into the row nor into the log line."""
    before, culprit, after = (
        command(Add(counter_id="a", amount=1)),
        command(Blurt(counter_id="a", text="hunter2")),
        command(Add(counter_id="a", amount=1)),
    )
    with capture_logs() as logs:
        plan = decided({}, before, culprit, after)
    assert reasons(outcomes(plan, before, culprit, after)) == ["completed", "INTERNAL", "completed"]
    assert [row.status for row in plan.batch.commands] == ["completed", "failed", "completed"]
    [line] = logs
    assert (line["event"], line["defect"], line["command_id"]) == ("command_failed", "ValueError", str(culprit.key[1]))
    assert "hunter2" not in repr(logs)
    row = plan.batch.commands[1]
    assert row.error is not None
    assert b"hunter2" not in row.error
    assert refusal(plan.outcomes[culprit.key]).code is Code.INTERNAL


def test_a_snapshot_is_taken_at_every_multiple_of_the_interval() -> None:
    """Of 25 events on one counter from version 0, with an interval of 10: at 10 and at 20, with the states of then."""
    plan = decided({}, *(command(Add(counter_id="a", amount=1)) for _ in range(25)))
    assert [(row.key, row.version, row.schema) for row in plan.batch.snapshots] == [(A, 10, 1), (A, 20, 1)]
    assert [BUS.load_state("counter", row.state) for row in plan.batch.snapshots] == [Counter(total=10), Counter(total=20)]


def test_no_snapshot_of_what_was_undone() -> None:
    """The tenth event is of a refused unit."""
    plan = decided({A: at(9, version=9)}, [command(Add(counter_id="a", amount=1)), command(Add(counter_id="a", amount=-99))])
    assert plan.batch.snapshots == []


def test_side_rows_are_saved_only_with_their_command() -> None:
    """Of two commands with a password, only the accepted one's hash is kept; nor is one kept of an undone unit."""
    good, weak, undone = (
        command(SetPassword(counter_id="a", subject_id=subject, word=word))
        for subject, word in (("u1", "hunter2"), ("u2", ""), ("u3", "hunter3"))
    )
    plan = decided({}, good, weak, [undone, command(Add(counter_id="a", amount=-1))])
    assert [(row.tenant, row.subject_id, row.password_hash) for row in plan.batch.credentials] == [
        ("acme", "u1", "hash(hunter2)")
    ]
    assert "hunter2" not in repr(plan)


def sharing(*to_ids: str, amount: int = 1) -> Command:
    """A counter shares with others."""
    return command(Share(counter_id="a", to_ids=to_ids, amount=amount))


def test_a_reaction_may_reach_many() -> None:
    """Each once and in order, the aggregate that it began at too, and each is told whose state it has."""
    asked = sharing("c", "b", "c", "a")
    plan = decided({}, asked)
    assert events(plan) == [
        ("a", 1, Shared(counter_id="a", to_ids=("c", "b", "c", "a"), amount=1)),
        *[(name, 2 if name == "a" else 1, Added(counter_id=name, amount=1)) for name in "cba"],
    ]
    assert outcomes(plan, asked) == [Outcome("completed", 2, 4, 4, 0)]
    assert plan.batch.reads == dict.fromkeys([(*A[:2], name) for name in "abc"], 0)


def test_if_one_of_many_refuses_nothing_is_kept_of_any() -> None:
    """The last has no room: those before it are as they were."""
    refused_, after = sharing("b", "c", "d", amount=2), command(Add(counter_id="c", amount=1))
    plan = decided({(*A[:2], "d"): at(999)}, refused_, after)
    assert reasons(outcomes(plan, refused_, after)) == ["FULL", "completed"]
    assert events(plan) == [("c", 1, Added(counter_id="c", amount=1))]


def test_a_command_reaches_a_thousand_others_and_not_one_more() -> None:
    """Two that are the same are one, and its own aggregate does not count."""
    assert REACHED_MAX == 1000
    names = [f"c{nth}" for nth in range(1001)]
    most, too_many = sharing("a", names[0], *names[:1000]), sharing(*names)
    plan = decided({}, most, too_many)
    assert reasons(outcomes(plan, most, too_many)) == ["completed", "TOO_MANY_REACTIONS"]
    assert refusal(plan.outcomes[too_many.key]).code is Code.FAILED_PRECONDITION
    assert len(plan.batch.events) == 1002


def test_an_atomic_batch_reaches_no_more_than_a_command() -> None:
    """Else two hundred commands would make one transaction of two hundred thousand events."""
    halves = [[f"{half}{nth}" for nth in range(500)] for half in "cd"]
    fits = [sharing(*names) for names in halves]
    too_many = [sharing(*halves[0]), sharing(*halves[1], "one more")]
    plan = decided({}, fits, too_many)
    assert reasons(outcomes(plan, *fits, *too_many)) == [
        "completed", "completed", "ATOMIC_BATCH_REFUSED", "TOO_MANY_REACTIONS",
    ]  # fmt: skip
    assert len(plan.batch.events) == 1002


def test_all_that_a_reaction_reaches_is_loaded_in_one_query() -> None:
    """Whatever is missing of a round is named at once, whichever of them is at hand."""
    names = [f"c{nth}" for nth in range(100)]
    world = World({A: at(0), (*A[:2], "c7"): at(0)})
    plan = decide(BUS, [[sharing(*names)]], world.get, NOW)
    assert plan.missing == {(*A[:2], name) for name in names if name != "c7"}


def test_a_reaction_may_be_of_one_tenant() -> None:
    """Everybody else's events lead to nothing more; what is for all is for that tenant as well."""

    def note(counter: Counter, event: Moved, meta: Meta) -> Sequence[trial.CounterEvent]:
        return [Linked(counter_id=meta.aggregate_id, links=0)]

    bus = build_registry()
    bus.rows_of(trial.COUNTER).react(Moved, note, id=lambda e: "c", tenant="umbrella", name="noted")
    bus.rows_of(trial.COUNTER).react_each(Moved, note, ids=lambda e: ("d", "e"), tenant="umbrella", name="noted")
    for tenant, changed in (("acme", "ab"), ("umbrella", "abcde")):
        asked = command(Move(counter_id="a", to_id="b", amount=0), bus=bus, tenant=tenant)
        plan = decided({}, asked, bus=bus)
        assert [event.key[2] for event in plan.batch.events] == list(changed)
        assert {event.key[0] for event in plan.batch.events} == {tenant}


@pytest.mark.parametrize("links", [0, 1, REACTIONS_DEPTH_MAX - 1])
def test_reactions_go_on_until_quiet(links: int) -> None:
    """Each link is a round."""
    asked = command(Chain(counter_id="a", links=links))
    plan = decided({}, asked)
    assert [event for _, _, event in events(plan)] == [Linked(counter_id="a", links=left) for left in range(links, -1, -1)]
    assert plan.outcomes[asked.key].events_appended == links + 1


def test_endless_reactions_are_a_defect_and_not_a_hang() -> None:
    """Nothing of them is kept, and their neighbours are not touched."""
    endless, after = command(Chain(counter_id="a", links=-1)), command(Add(counter_id="a", amount=1))
    with capture_logs() as logs:
        plan = decided({}, endless, after)
    assert reasons(outcomes(plan, endless, after)) == ["INTERNAL", "completed"]
    assert [version for _, version, _ in events(plan)] == [1]
    assert [line["defect"] for line in logs] == ["RecursionError"]


def test_an_event_that_is_too_large_is_refused_and_nothing_of_it_is_kept() -> None:
    """Not even in the command log: too large to keep is too large for that too."""
    size = (
        EVENT_BYTES_MAX
        - len(BUS.codecs.of(trial.Swollen(counter_id="a", text="")).encode(trial.Swollen(counter_id="a", text="")))
        - 4
    )
    fits, too_large = command(Swell(counter_id="a", amount=size)), command(Swell(counter_id="a", amount=size + 1))
    plan = decided({}, fits, too_large)
    assert reasons(outcomes(plan, fits, too_large)) == ["completed", "EVENT_TOO_LARGE"]
    assert [len(event.payload) for event in plan.batch.events] == [EVENT_BYTES_MAX]
    assert [row.command_id for row in plan.batch.commands] == [fits.key[1]]


def test_a_tenants_own_decision_replaces_everybodys() -> None:
    """For that tenant, and no other."""
    bus = build_registry()
    bus.rows_of(trial.COUNTER).override(trial.ADD, trial.twice_as_much, tenant="umbrella", name="other")
    mine, theirs = (command(Add(counter_id="a", amount=5), bus=bus, tenant=tenant) for tenant in ("umbrella", "acme"))
    plan = decided({}, mine, theirs, bus=bus)
    assert plan.states == {("umbrella", "counter", "a"): at(10), A: at(5)}


def test_tenants_have_different_aggregates_of_the_same_id() -> None:
    """Also in reactions: they stay in the command's tenant."""
    moving = command(Move(counter_id="a", to_id="b", amount=1), tenant="umbrella")
    plan = decided({A: at(100), B: at(100), ("umbrella", "counter", "a"): at(1)}, moving)
    assert {event.key for event in plan.batch.events} == {("umbrella", "counter", "a"), ("umbrella", "counter", "b")}


def test_a_decision_is_told_who_asks_and_when() -> None:
    """The moment is the batch's; nobody reads a clock."""
    seen: list[Meta] = []

    def note(counter: Counter, content: Add, meta: Meta) -> Sequence[trial.CounterEvent]:
        seen.append(meta)
        return []

    bus = build_registry()
    bus.rows_of(trial.COUNTER).override(trial.ADD, note, tenant="acme", name="other")
    asked = command(Add(counter_id="a", amount=1), bus=bus, on_behalf_of="bob", user_id="saga")
    decided({}, asked, bus=bus)
    assert seen == [
        Meta(
            command_id=str(asked.key[1]),
            aggregate_id="a",
            tenant="acme",
            user_id="saga",
            on_behalf_of="bob",
            roles=frozenset({"user"}),
            now=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        )
    ]


def test_events_carry_who_and_why() -> None:
    """An audit needs no other table."""
    cause, correlation = str(UUID(int=1)), str(UUID(int=2))
    asked = command(
        Add(counter_id="a", amount=1),
        causation_id=cause,
        correlation_id=correlation,
        on_behalf_of="bob",
        traceparent="00-1-2-01",
    )
    [event] = decided({}, asked).batch.events
    assert event_store_pb2.EventMetadata.FromString(event.metadata) == event_store_pb2.EventMetadata(
        command_id=str(asked.key[1]),
        correlation_id=correlation,
        causation_id=cause,
        user_id="alice",
        on_behalf_of="bob",
        traceparent="00-1-2-01",
    )


def test_an_unregistered_event_is_a_defect_of_its_command() -> None:
    """A decision that returns what nobody can store fails alone."""
    bus = build_registry()
    unknown: Any = object()
    bus.rows_of(trial.COUNTER).override(trial.ADD, lambda counter, content, meta: [unknown], tenant="acme", name="other")
    asked, after = command(Add(counter_id="a", amount=1), bus=bus), command(Chain(counter_id="a", links=0), bus=bus)
    with capture_logs():
        plan = decided({}, asked, after, bus=bus)
    assert reasons(outcomes(plan, asked, after)) == ["INTERNAL", "completed"]


def test_a_refusal_is_what_the_decision_raised() -> None:
    """With its text and facts, for the answer and, as a status, for the log."""
    asked = command(Add(counter_id="a", amount=-1))
    no: Refusal = refusal(decided({}, asked).outcomes[asked.key])
    assert (no.reason, no.text, no.facts) == ("BELOW_ZERO", "the total would be below zero", {"total": "0"})
