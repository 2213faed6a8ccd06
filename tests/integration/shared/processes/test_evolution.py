"""A deployment that adds, renames or removes a step while processes are in flight, and the check that is run before it."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import aclosing
from datetime import timedelta
from typing import Any

import pytest
from psycopg.errors import IdleInTransactionSessionTimeout

from deploy.bootstrap import Database
from foldline.v1.event_store_pb2 import EventEnvelope
from saga_service.check import look
from saga_service.check import main as check_program
from shared.folds.errors import Unavailable
from shared.folds.process import Answer, ProcessDefinition, Send, Step
from shared.line.follower import Line, LineAway
from shared.line.lookup import GAP_MAX
from shared.platform.postgres import connect
from shared.processes import live
from tests.support.checks.history import connected
from tests.support.domains import gifts
from tests.support.domains.gifts import GIFT, TENANT, Gift, World, deposit, on_answer
from tests.support.fakes.line import StoreLine, uid
from tests.support.system.waiting import eventually


def answered_renamed(state: Gift, answer: Answer) -> Step[Gift]:
    """The fold of a release in which the first step is called `present`, and the end is told to nobody."""
    if answer.step == "gift":
        raise LookupError("there is no such step")
    return on_answer(state, dataclasses.replace(answer, step="gift") if answer.step == "present" else answer)


def answered_removed(state: Gift, answer: Answer) -> Step[Gift]:
    """The fold of a release that has no gifts: it does not expect their answers."""
    return Step(state=state) if answer.step == "gift" else on_answer(state, answer)


def answered_added(state: Gift, answer: Answer) -> Step[Gift]:
    """The fold of a release with a step `card` before the end."""
    if answer.step == "bonus":
        card = Send(step="card", command=deposit(state.account_id, 7))
        return Step(state=dataclasses.replace(state, phase="writing"), send=(card,))
    return on_answer(state, answer)


def answered_for_ever(state: Gift, answer: Answer) -> Step[Gift]:
    """The fold of a release that goes round in circles."""
    return Step(state=state, send=(Send(step=answer.step, command=deposit(state.account_id, 1)),))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Present:
    """The state of a release that calls the account `receiver`."""

    phase: str = ""
    receiver: str = ""


def migrated(fields: dict[str, Any]) -> dict[str, Any]:
    """Its migration."""
    return {"phase": fields["phase"], "receiver": fields["account_id"]}


def present_answered(state: Present, answer: Answer) -> Step[Present]:
    """Its fold: a bonus, and the end."""
    if answer.step == "gift":
        bonus = Send(step="bonus", command=deposit(state.receiver, 100))
        return Step(state=dataclasses.replace(state, phase="topping up"), send=(bonus,))
    return Step(state=dataclasses.replace(state, phase="given"), ended=True)


def release(on_answer: Any, **more: Any) -> ProcessDefinition[Any]:
    """A later release of the process."""
    return dataclasses.replace(GIFT, on_answer=on_answer, **more)


PRESENT: ProcessDefinition[Any] = dataclasses.replace(
    GIFT,
    initial=Present(),  # type: ignore[arg-type]
    schema=2,
    migrations={1: migrated},
    on_answer=present_answered,  # type: ignore[arg-type]
    on_timer=lambda state, name: None,
)


BADLY_MIGRATED = dataclasses.replace(PRESENT, migrations={1: lambda fields: {"receiver": 7}})
OLDER = dataclasses.replace(GIFT)


async def stranded(world: World, *numbers: int) -> None:
    """Processes whose first command is on its way when the old release is stopped."""
    world.write.decide = lambda command: Unavailable("AWAY", "away")
    world.open(*numbers)
    async with world.running():

        async def waiting() -> bool:
            return (await world.statuses())["running"] == len(numbers)

        await eventually(waiting)
    world.write.decide = lambda command: None


async def checked(world: World, definition: ProcessDefinition[Any], line: Line | None = None) -> list[tuple[str, str]]:
    """What the check says of a release; of histories too, if there is a line."""
    found = await look(world.database.app, [definition], line=line)
    assert found["failed"] == len(found["mismatches"])
    return [(one["what"], one["where"]) for one in found["mismatches"]]


@pytest.mark.parametrize(
    ("definition", "amounts"),
    [
        (release(answered_renamed, renamed={"gift": "present"}), (500, 100)),
        (release(answered_added), (500, 100, 7)),
        (PRESENT, (500, 100)),
    ],
    ids=["renamed", "added", "migrated"],
)
async def test_a_process_in_flight_goes_on_under_a_new_release(
    world: World, definition: ProcessDefinition[Any], amounts: tuple[int, ...]
) -> None:
    """The check finds nothing; deployed, the process ends, and each step is taken once, under the ids it had."""
    await stranded(world, 1)
    assert await checked(world, definition) == []
    async with world.running(world.runner(manager=definition)):

        async def ended() -> bool:
            return (await world.statuses())["ended"] == 1

        await eventually(ended)
    assert world.write.carried_out == {(uid(1), amount): 1 for amount in amounts}
    [(schema,)] = await world.query("SELECT schema FROM processes")
    assert schema == definition.schema


@pytest.mark.parametrize(
    ("definition", "mismatch"),
    [
        (release(answered_renamed), ("FOLD_FAILED", "gift accepted: LookupError")),
        (release(answered_removed), ("ANSWER_IGNORED", "gift accepted")),
        (release(answered_for_ever), ("NEVER_ENDS", "gift accepted")),
        (BADLY_MIGRATED, ("STATE_UNREADABLE", "schema 1: ValidationError")),
        (OLDER, ("STATE_UNREADABLE", "schema 2: ValueError")),
        (dataclasses.replace(GIFT, type="present"), ("TYPE_UNKNOWN", "")),
    ],
    ids=["renamed", "removed", "circle", "not migrated", "older", "unknown"],
)
async def test_the_check_names_what_would_not_go_on(
    world: World, definition: ProcessDefinition[Any], mismatch: tuple[str, str]
) -> None:
    """Before it is deployed; and the check writes nothing."""
    await stranded(world, 1)
    if definition is OLDER:
        async with connected(world.database.admin) as connection:
            await connection.execute("UPDATE processes SET schema = 2")
            await connection.commit()
    before = await world.query("SELECT * FROM processes, process_commands, checkpoints")
    assert await checked(world, definition) == [mismatch]
    assert await world.query("SELECT * FROM processes, process_commands, checkpoints") == before


def answered_instead(state: Gift, answer: Answer) -> Step[Gift]:
    """The fold of a release that has a card in place of the bonus: what waits for the bonus goes on, but is past the card."""
    if answer.step == "gift":
        card = Send(step="card", command=deposit(state.account_id, 7))
        return Step(state=dataclasses.replace(state, phase="topping up"), send=(card,))
    return on_answer(state, answer)


async def test_histories_are_replayed(world: World) -> None:
    """With the events of the line; what a release would have done otherwise is named, though the process would go on."""
    world.write.decide = lambda command: Unavailable("AWAY", "away") if command.amount_minor == 100 else None
    world.open(1)
    for number in range(100, 100 + 2 * GAP_MAX):  # events of nobody lie between those of the two
        world.store.rename(TENANT, uid(number), "Alice")
    world.open(2)
    async with world.running():

        async def waiting() -> bool:
            return [await world.process(number) for number in (1, 2)] == [("running", "", "", "topping up")] * 2

        await eventually(waiting)
        world.freeze(2)

        async def frozen() -> bool:
            return ("event", "AccountFrozen") in await world.history(2)

        await eventually(frozen)
    line = StoreLine(world.store, page=3)
    assert await checked(world, GIFT, line) == []
    sent = "answer gift: sent bonus (bank.v1.DepositMoneyRequest), now card (bank.v1.DepositMoneyRequest)"
    assert await checked(world, release(answered_instead), line) == [("COMMANDS_DIFFER", sent)] * 2
    assert await checked(world, release(answered_instead)) == []
    found = await look(world.database.app, [release(answered_instead)], line=line, histories_max=1)
    assert (found["checked"], found["replayed"], [it["process_id"] for it in found["mismatches"]]) == (2, 1, [uid(1)])
    world.store.away = True
    with pytest.raises(LineAway):
        await look(world.database.app, [GIFT], line=line)


async def test_the_check_tries_the_inputs_that_wait_for_a_mended_fold(world: World) -> None:
    """A parked process counts as mended when the new release can take what parked it."""
    gifts.DEFECTS.accounts.add(uid(1))
    world.open(1)
    async with world.running():

        async def parked() -> bool:
            return (await world.statuses())["parked"] == 1

        await eventually(parked)
    assert await checked(world, GIFT) == [("FOLD_FAILED", "waiting event bank.v1.AccountOpened: ValueError")]
    gifts.DEFECTS.accounts.clear()
    assert await checked(world, GIFT) == []


async def test_the_database_does_not_end_the_check_while_events_are_read(world: World) -> None:
    """Between two pages it waits in a transaction, longer than one of its role may: here another with the same limit is ended."""
    await stranded(world, 1)
    impatient = f"{world.database.app}?options=-c%20idle_in_transaction_session_timeout%3D500ms"
    async with (
        await connect(impatient, application_name="test") as connection,
        await connect(impatient, application_name="test") as other,
        aclosing(live.pages(connection, histories_max=None)) as pages,
    ):
        assert len(await anext(pages)) == 1
        await other.execute("BEGIN")

        async def ended() -> bool:
            return not await world.query("SELECT 1 FROM pg_stat_activity WHERE pid = %s", other.info.backend_pid)

        await eventually(ended)
        with pytest.raises(IdleInTransactionSessionTimeout):
            await other.execute("SELECT 1")
        assert [page async for page in pages] == []


def test_a_database_that_cannot_be_read_is_no_mismatch(
    read_db: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One without processes: one sentence and exit code 3, where 1 would say that processes would not go on."""
    monkeypatch.setenv("FOLDLINE_DATABASE_URL", read_db.app)
    monkeypatch.setattr(sys, "argv", ["check", "--histories", "0"])
    assert check_program() == 3
    assert capsys.readouterr().err.startswith('the saga database cannot be read: relation "processes" does not exist')


def test_a_check_that_fails_is_no_mismatch(
    saga_db: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 4; what went wrong is told, and no processes are counted."""
    monkeypatch.setenv("FOLDLINE_DATABASE_URL", saga_db.app)
    monkeypatch.setattr(sys, "argv", ["check", "--histories", "0"])
    monkeypatch.setattr("saga_service.check.process_types", {}.__getitem__)
    assert check_program() == 4
    printed = capsys.readouterr()
    assert "TypeError" in printed.err
    assert printed.out == ""


async def test_ended_processes_are_not_looked_at(world: World) -> None:
    """They do nothing any more, whatever the new release makes of them."""
    world.open(1)
    async with world.running():

        async def ended() -> bool:
            return (await world.statuses())["ended"] == 1

        await eventually(ended)
    found = await look(world.database.app, [])
    assert (found["checked"], found["mismatches"]) == (0, [])


@pytest.mark.long
async def test_a_hundred_thousand_in_flight_are_checked_within_a_minute(world: World) -> None:
    """Each with its state, a command, a timer and its history; all mismatches are counted, a thousand are named.

    Each began with an event of a line that has three others between two of them.
    """
    await stranded(world, 1)
    copies = """
    INSERT INTO processes SELECT 'acme', 'gift', 'p' || n, state, schema, status, '', '', phase, '', '', '', '', '', entries,
      started_at + n * interval '1 ms', moved_at FROM processes, generate_series(2, 100000) AS n;
    INSERT INTO process_commands SELECT 'acme', 'gift', 'p' || n, step, 1, gen_random_uuid(), command_type, payload, '', '', '',
      due_at, 1 FROM process_commands, generate_series(2, 100000) AS n;
    INSERT INTO process_timers SELECT 'acme', 'gift', 'p' || n, name, due_at FROM process_timers, generate_series(2, 100000) AS n;
    INSERT INTO process_history SELECT 'acme', 'gift', 'p' || n, number, happened_at, kind, name, step, id,
      CASE WHEN position > 0 THEN 4 * n - 3 ELSE 0 END, attempts, error, phase, note
      FROM process_history, generate_series(2, 100000) AS n
    """
    async with connected(world.database.admin) as connection:
        for statement in copies.split(";"):
            await connection.execute(statement)
        await connection.commit()
    [opened] = world.store.events
    for position in range(2, 400_001):
        event = EventEnvelope()
        event.CopyFrom(opened)
        event.position = position
        world.store.events.append(event)

    found = await look(world.database.app, [GIFT], line=StoreLine(world.store))
    assert (found["checked"], found["replayed"], found["failed"]) == (100_000, 100_000, 0)
    assert timedelta(seconds=found["seconds"]) < timedelta(minutes=1)
    found = await look(world.database.app, [release(answered_removed)])
    assert (found["failed"], len(found["mismatches"])) == (100_000, 1000)


def test_migrations_have_no_gap() -> None:
    """A definition whose migrations do not lead to its schema is refused when it is made."""
    with pytest.raises(TypeError, match="do not lead to schema 3"):
        dataclasses.replace(PRESENT, schema=3)
    with pytest.raises(TypeError, match="do not lead to schema 1"):
        dataclasses.replace(PRESENT, schema=1)
