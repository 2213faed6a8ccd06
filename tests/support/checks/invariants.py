"""The invariants of the system, checked from outside over all of its data.

    picture = await look(system)                 # waits until the tables have followed the line
    check(picture, acknowledged)                 # what callers were told

Projections are compared with a second implementation (expected_tables.py): the code that made them would prove nothing.
tests/e2e/test_invariants.py shows for each check that it fails on wrong data.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import psycopg
from psycopg.rows import dict_row

from bank.v1 import account_pb2, transfer_pb2, user_pb2
from deploy.local.system import System
from foldline.v1 import command_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.line.ends import AGGREGATE_PURGED
from tests.support.checks.expected_tables import KEYS, Row, fold
from tests.support.checks.kinds import CLOSED, PURGED, decoded
from tests.support.clients.bank import auditor, read_status
from tests.support.system.waiting import eventually

Tables = dict[str, list[Row]]

INT64_MAX = 2**63 - 1
# Whose events were taken over from another system: no command of ours made them.
IMPORTER = "import"


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The answer that a caller got for a command: the receipt, or the reason of the refusal."""

    tenant: str
    command_id: str
    receipt: command_pb2.CommandReceipt | None = None
    reason: str = ""


@dataclass(slots=True)
class Picture:
    """All data of a system: the line as ReadAll returns it, and the rows of its databases."""

    line: list[EventEnvelope]
    # Positions in the table of events, whatever ReadAll says.
    stored: list[int]
    commands: list[Row]
    # Every query table at `position`.
    tables: Tables = field(default_factory=dict)
    position: int = 0


async def look(system: System, *, within_s: float = 15) -> Picture:
    """Reads all data when the tables have followed the line to its end. Tests must not send commands meanwhile.

    Processes may: if the line has grown during the reading, it begins anew.
    """
    picture = await eventually(lambda: _look(system), within_s, every_s=0.05)
    assert picture is not None
    return picture


async def _look(system: System) -> Picture | None:
    async with auditor(system) as reader:
        try:
            line = await reader.line()
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return None  # channels to one address share a connection, and one was refused a moment ago
    head = line[-1].position if line else 0
    picture = Picture(line=line, stored=[], commands=[])
    # One snapshot for the checkpoint and the tables.
    with psycopg.connect(system.databases.read.admin) as connection, connection.cursor(row_factory=dict_row) as cursor:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        picture.position = cursor.execute(_POSITION).fetchall()[0]["position"]
        for table in KEYS:
            picture.tables[table] = cursor.execute(f"SELECT * FROM {table}").fetchall()
    # And one for the log and the table of events.
    with psycopg.connect(system.databases.write.admin) as connection, connection.cursor(row_factory=dict_row) as cursor:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        stored = cursor.execute(_STORED).fetchall()
        picture.stored = [row["position"] for row in stored]
        picture.commands = cursor.execute("SELECT * FROM commands").fetchall()
    return None if picture.position != head or picture.stored[-1:] > [head] else picture


_STORED = """
SELECT position FROM events UNION ALL SELECT position FROM boxed_events UNION ALL SELECT position FROM purged_events
ORDER BY position
"""
_POSITION = "SELECT coalesce(min(position), 0) AS position FROM checkpoints WHERE serves"


def check(picture: Picture, acknowledged: Iterable[Acknowledged] = ()) -> None:
    """Raises AssertionError if an invariant does not hold."""
    dense(picture)
    money_is_conserved(picture.line)
    logins_are_unique(picture.line)
    commands_are_whole(picture)
    acknowledged_are_kept(picture, acknowledged)
    projections_are_the_fold(picture)


def dense(picture: Picture) -> None:
    """3 and 8: positions 1…n in commit order, versions 1…n, no event twice, and ReadAll gives all that is stored."""
    assert [event.position for event in picture.line] == list(range(1, len(picture.line) + 1))
    assert picture.stored == [event.position for event in picture.line], "ReadAll is not what is stored"
    assert len({event.event_id for event in picture.line}) == len(picture.line)
    moments = [event.recorded_at.ToNanoseconds() for event in picture.line if event.type != PURGED]
    assert moments == sorted(moments), "recorded_at decreases"
    versions: dict[tuple[str, str, str], int] = defaultdict(int)
    ended: set[str] = set()
    for event in picture.line:
        if event.type == PURGED:
            assert (event.aggregate_type, event.aggregate_id, event.version, event.payload) == ("", "", 0, b"")
            continue
        assert event.tenant not in ended, f"{event.tenant} was used after its end"
        if event.type == CLOSED:
            ended.add(event.tenant)
        stream = (event.tenant, event.aggregate_type, event.aggregate_id)
        versions[stream] = event.version if event.type == AGGREGATE_PURGED else versions[stream] + 1
        assert event.version == versions[stream], f"{stream} jumps from {versions[stream] - 1} to {event.version}"


def money_is_conserved(line: Sequence[EventEnvelope]) -> None:
    """1: at every position what is on accounts, under way and in suspense is what came in less what went out."""
    books = _Books()
    for envelope in line:
        books.read(envelope)


@dataclass(slots=True)
class _Way:
    """The steps of a transfer's money so far, as names of events."""

    started: transfer_pb2.TransferStarted
    went: list[str] = field(default_factory=list)


class _Books:
    """The money of all tenants, by tenant and currency. What is on an account, it says itself; what moved, the amounts."""

    def __init__(self) -> None:
        self._balances: dict[tuple[str, str], int] = {}
        self._held: dict[tuple[str, str], int] = defaultdict(int)
        self._under_way: dict[tuple[str, str], int] = defaultdict(int)
        self._suspense: dict[tuple[str, str], int] = defaultdict(int)
        self._moved: dict[tuple[str, str], int] = defaultdict(int)
        self._ways: dict[tuple[str, str], _Way] = {}

    def read(self, envelope: EventEnvelope) -> None:
        """One event, and the books are balanced."""
        event = decoded(envelope)
        match event:
            case account_pb2.MoneyDeposited() | account_pb2.MoneyWithdrawn():
                self._balance(envelope.tenant, event)
                if event.HasField("transfer_id"):
                    self._transferred(envelope, event)
                else:
                    sign = 1 if isinstance(event, account_pb2.MoneyDeposited) else -1
                    self._moved[envelope.tenant, event.currency] += sign * event.amount_minor
            case account_pb2.MoneySuspended():
                purse = (envelope.tenant, event.currency)
                self._goes(envelope, "suspended", event.transfer_id, event.amount_minor, event.currency)
                self._suspense[purse] += event.amount_minor
                assert event.balance_after_minor + event.balance_after_wraps * 2**63 == self._suspense[purse]
            case transfer_pb2.TransferStarted():
                way = (envelope.tenant, event.transfer_id)
                assert way not in self._ways, f"{way} began twice"
                self._ways[way] = _Way(event)
                return
            case transfer_pb2.TransferCompleted() | transfer_pb2.TransferFailed():
                self._ended(envelope.tenant, event)
                return
            case _:
                return
        purse = (envelope.tenant, event.currency)
        found = self._held[purse] + self._under_way[purse] + self._suspense[purse]
        assert self._under_way[purse] >= 0
        assert found == self._moved[purse], f"at {envelope.position}: {purse} has {found}, {self._moved[purse]} came in"

    def _balance(self, tenant: str, event: account_pb2.MoneyDeposited | account_pb2.MoneyWithdrawn) -> None:
        assert event.amount_minor > 0
        assert 0 <= event.balance_after_minor <= INT64_MAX
        account = (tenant, event.account_id)
        self._held[tenant, event.currency] += event.balance_after_minor - self._balances.get(account, 0)
        self._balances[account] = event.balance_after_minor

    def _transferred(self, envelope: EventEnvelope, event: account_pb2.MoneyDeposited | account_pb2.MoneyWithdrawn) -> None:
        started = self._ways[envelope.tenant, event.transfer_id].started
        ends = (started.from_account_id, started.to_account_id)
        assert (event.account_id, event.counterparty_account_id) in (ends, ends[::-1])
        here = event.account_id == started.from_account_id
        if isinstance(event, account_pb2.MoneyWithdrawn):
            assert here
            step = "debited"
        else:
            step = "refunded" if here else "credited"
        self._goes(envelope, step, event.transfer_id, event.amount_minor, event.currency)

    def _goes(self, envelope: EventEnvelope, step: str, transfer_id: str, amount_minor: int, currency: str) -> None:
        """It leaves once, and arrives once, at one of three places."""
        way = self._ways[envelope.tenant, transfer_id]
        assert (amount_minor, currency) == (way.started.amount_minor, way.started.currency)
        assert way.went == ([] if step == "debited" else ["debited"]), f"at {envelope.position}: {step} after {way.went}"
        way.went.append(step)
        self._under_way[envelope.tenant, currency] += amount_minor if step == "debited" else -amount_minor

    def _ended(self, tenant: str, event: transfer_pb2.TransferCompleted | transfer_pb2.TransferFailed) -> None:
        """It ends once, and says what became of the money."""
        went = self._ways[tenant, event.transfer_id].went
        if isinstance(event, transfer_pb2.TransferCompleted):
            assert went == ["debited", "credited"], f"{event.transfer_id} completed, the money was {went}"
        else:
            expected = {
                transfer_pb2.COMPENSATION_NOT_NEEDED: [],
                transfer_pb2.COMPENSATION_REFUNDED: ["debited", "refunded"],
                transfer_pb2.COMPENSATION_SUSPENDED: ["debited", "suspended"],
            }
            assert event.reason
            assert went == expected[event.compensation], f"{event.transfer_id} failed, the money was {went}"
        went.append("ended")


def logins_are_unique(line: Sequence[EventEnvelope]) -> None:
    """5: whatever is asked for at once, a login is one user's, and only who holds it for good becomes a user."""
    login_of: dict[tuple[str, str], str] = {}
    asked: dict[tuple[str, str], str] = {}
    holders: dict[tuple[str, str], str] = {}
    kept: dict[tuple[str, str], str] = {}
    ended: set[tuple[str, str]] = set()
    deactivated: set[tuple[str, str]] = set()
    for envelope in line:
        event, tenant = decoded(envelope), envelope.tenant
        match event:
            case user_pb2.UserDeactivated():
                deactivated.add((tenant, event.user_id))
            case user_pb2.UserRegistrationStarted():
                assert (tenant, event.user_id) not in asked, f"{event.user_id} began twice"
                asked[tenant, event.user_id] = event.login_id
                login = (tenant, folded_login(event.login))
                assert login_of.setdefault(login, event.login_id) == event.login_id, f"{login} has two ids"
            case user_pb2.LoginReserved():
                login = (tenant, event.login_id)
                assert login not in kept, f"at {envelope.position}: {login} is {kept[login]}'s for good"
                holders[login] = event.user_id
            case user_pb2.LoginConfirmed():
                login = (tenant, event.login_id)
                assert holders[login] == event.user_id
                assert kept.setdefault(login, event.user_id) == event.user_id
            case user_pb2.LoginReleased():
                login = (tenant, event.login_id)
                assert holders.pop(login) == event.user_id
                kept.pop(login, None)
            case user_pb2.UserRegistrationSucceeded() | user_pb2.UserRegistrationFailed():
                user = (tenant, event.user_id)
                assert user not in ended, f"{user} ended twice"
                ended.add(user)
                holds = kept.get((tenant, asked[user])) == event.user_id
                assert holds == isinstance(event, user_pb2.UserRegistrationSucceeded), f"{user}: {type(event).__name__}"
    assert len(set(login_of.values())) == len(login_of), "two logins have one id"
    still = {(tenant, holder) for (tenant, _), holder in holders.items()} & deactivated
    assert not still, f"{still} are deactivated and hold a login"


def folded_login(login: str) -> str:
    """The form in which logins are compared."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", login).casefold())


def all_have_ended(line: Sequence[EventEnvelope]) -> None:
    """5: every transfer and registration has ended, and of those who asked for a login exactly one has it.

    For a line whose processes have settled, and on which nobody was left to wait until a reservation expired.
    """
    begun: dict[tuple[str, str, str], str] = {}
    ended: dict[tuple[str, str, str], bool] = {}
    for envelope in line:
        event, stream = decoded(envelope), (envelope.tenant, envelope.aggregate_type, envelope.aggregate_id)
        match event:
            case transfer_pb2.TransferStarted():
                begun[stream] = ""
            case user_pb2.UserRegistrationStarted():
                begun[stream] = folded_login(event.login)
            case transfer_pb2.TransferCompleted() | user_pb2.UserRegistrationSucceeded():
                ended[stream] = True
            case transfer_pb2.TransferFailed() | user_pb2.UserRegistrationFailed():
                ended[stream] = False
    assert begun.keys() == ended.keys(), f"these have not ended: {begun.keys() ^ ended.keys()}"
    succeeded: dict[tuple[str, str], int] = defaultdict(int)
    for stream, login in begun.items():
        if login:
            succeeded[stream[0], login] += ended[stream]
    wrong = {login: count for login, count in succeeded.items() if count != 1}
    assert not wrong, f"not exactly one registration succeeded: {wrong}"


def commands_are_whole(picture: Picture) -> None:
    """2: a command's events are all there, together, under one row of the log; a refused one has none."""
    events: dict[tuple[str, str], list[EventEnvelope]] = defaultdict(list)
    for event in picture.line:
        if event.metadata.user_id != IMPORTER and event.type not in (PURGED, CLOSED):
            events[event.tenant, event.metadata.command_id].append(event)
    log = {(row["tenant"], str(row["command_id"])): row for row in picture.commands}
    assert len(log) == len(picture.commands), "a command is in the log twice"
    assert events.keys() <= log.keys(), f"events of commands that are not in the log: {events.keys() - log.keys()}"
    for key, row in log.items():
        own = [event.position for event in events[key]]
        # What is scheduled for later has no outcome yet, and has done nothing.
        ended = ("completed", "rejected", "failed", "cancelled", "scheduled")
        assert row["status"] in ended, f"{key} is {row['status']}"
        assert row["events_appended"] == len(own), f"{key} has {len(own)} events, the log says {row['events_appended']}"
        assert not own or row["status"] == "completed"
        assert not own or own == list(range(own[0], own[0] + len(own))), f"the events of {key} are apart: {own}"
        assert row["position"] == (own[-1] if own else 0)


def acknowledged_are_kept(picture: Picture, acknowledged: Iterable[Acknowledged]) -> None:
    """2: the answers that callers got are those in the log."""
    log = {(row["tenant"], str(row["command_id"])): row for row in picture.commands}
    ended = {event.tenant for event in picture.line if event.type == CLOSED}
    for told in acknowledged:
        if told.tenant in ended:
            continue
        row = log.get((told.tenant, told.command_id))
        assert row is not None, f"{told.command_id} was acknowledged and is lost"
        if told.receipt is None:
            assert row["status"] == "rejected"
            assert read_status(_status(row["error"])).reason == told.reason
        else:
            receipt = told.receipt
            assert row["status"] == "completed"
            otherwise = f"{told.command_id} was answered otherwise than it is logged"
            assert (row["version"], row["events_appended"]) == (receipt.version, receipt.events_appended), otherwise
            assert receipt.position in (row["position"], 0), otherwise  # callers of a tenant are shown none


def _status(raw: bytes) -> Any:
    from google.rpc import status_pb2  # noqa: PLC0415 (untyped)

    return status_pb2.Status.FromString(raw)


def projections_are_the_fold(picture: Picture) -> None:
    """4 and 6: every query table is the fold of the line up to its checkpoint, and so holds no row of another tenant."""
    expected = fold(event for event in picture.line if event.position <= picture.position)
    for table, rows in picture.tables.items():
        found = {_key(table, row): row for row in rows}
        assert len(found) == len(rows)
        assert found.keys() == expected[table].keys(), f"{table}: {found.keys() ^ expected[table].keys()}"
        for key, row in expected[table].items():
            kept = {name: found[key][name] for name in row}
            assert kept == row, f"{table} {key}: {kept}, expected {row}"


def _key(table: str, row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEYS[table])
