"""The `foldline` command against running services, as its user types it."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from deploy.engines.child import free_port
from tests.e2e.conftest import Foldline, foldline_of
from tests.support.system.stack import Stack


def test_a_first_session(foldline: Foldline) -> None:
    """Register, rename, read it at once, read the stream and the log: what the help shows works, each in a process of its own."""
    foldline = partial(foldline, anew=True)
    code, registered = foldline("send", "RegisterPerson", "person_id=new", "name=Alice O'Wonderland")
    person_id = registered["aggregate_id"]
    assert (code, registered["version"], registered["events_appended"]) == (0, 1, 1)
    code, renamed = foldline("send", "RenamePerson", "--json", json.dumps({"person_id": person_id, "name": "Alice Cooper"}))
    assert (code, renamed["version"]) == (0, 2)
    code, person = foldline("get", "person", person_id, "--after", renamed["consistency_token"])
    assert (code, person["name"], person["version"]) == (0, "Alice Cooper", 2)
    code, stream = foldline("get", "stream", "person", person_id)
    assert code == 0
    assert [(event["version"], event["type"], event["payload"]["name"]) for event in stream] == [
        (1, "bank.v1.PersonRegistered", "Alice O'Wonderland"),
        (2, "bank.v1.PersonRenamed", "Alice Cooper"),
    ]
    code, command = foldline("get", "command", registered["command_id"])
    assert (code, command["user_id"], command["receipt"]["aggregate_id"]) == (0, "alice", person_id)


def test_a_collector_that_is_away_is_not_seen(
    shared_stack: Stack, tenant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that shall record its calls prints what it always does, and ends."""
    _, registered = foldline_of(shared_stack, tenant, tmp_path)("send", "RegisterPerson", "person_id=new", "name=Bill")
    asked = ("get", "person", registered["aggregate_id"], "--after", registered["consistency_token"])
    before = foldline_of(shared_stack, tenant, tmp_path)(*asked, output="text")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    assert foldline_of(shared_stack, tenant, tmp_path)(*asked, output="text") == before
    assert before[0] == 0


def test_money_in_whole_minor_units(foldline: Foldline) -> None:
    """An account is opened, filled and asked for."""
    _, person = foldline("send", "RegisterPerson", "person_id=new", "name=Bill")
    _, account = foldline(
        "send", "OpenAccount", "account_id=new", f"owner_id={person['aggregate_id']}", "currency=USD", "name=blue"
    )
    account_id = account["aggregate_id"]
    code, deposited = foldline("send", "DepositMoney", f"account_id={account_id}", "amount_minor=10000", "currency=USD")
    assert code == 0
    code, found = foldline("get", "account", account_id, "--after", deposited["consistency_token"])
    assert (code, found["balance_minor"], found["currency"], found["name"]) == (0, 10000, "USD", "blue")


def opened(foldline: Foldline, name: str, amount_minor: int) -> str:
    """An account with money on it; returns its id."""
    _, person = foldline("send", "RegisterPerson", "person_id=new", f"name={name}")
    _, account = foldline(
        "send", "OpenAccount", "account_id=new", f"owner_id={person['aggregate_id']}", "currency=USD", f"name={name}"
    )
    account_id: str = account["aggregate_id"]
    foldline("send", "DepositMoney", f"account_id={account_id}", f"amount_minor={amount_minor}", "currency=USD")
    return account_id


def ended(foldline: Foldline, *words: str) -> dict[str, Any]:
    """What `foldline get` prints when it has ended."""
    give_up_at = time.monotonic() + 30
    while time.monotonic() < give_up_at:
        code, found = foldline("get", *words)
        if code == 0 and not found["status"].endswith("_STARTED"):
            return dict(found)
        time.sleep(0.1)
    raise AssertionError(f"{words} has not ended")


def test_a_transfer_and_its_process(foldline: Foldline, tenant: str) -> None:
    """Started, followed to its end, and looked at from the operator's side; what has ended cannot be steered."""
    blue, red = opened(foldline, "Bill", 100_00), opened(foldline, "Ted", 100_00)
    code, started = foldline(
        *("send", "StartTransfer", "transfer_id=new", f"from_account_id={blue}", f"to_account_id={red}"),
        *("amount_minor=6900", "currency=USD"),
    )
    assert code == 0
    transfer_id = started["aggregate_id"]
    transfer = ended(foldline, "transfer", transfer_id)
    assert (transfer["status"], transfer["amount_minor"]) == ("TRANSFER_STATUS_COMPLETED", 69_00)
    assert [step["name"] for step in transfer["steps"]] == ["started", "debited", "credited", "completed"]
    name = ("transfer", transfer_id, "--tenant", tenant)

    code, shown = foldline("process", "show", *name)
    give_up_at = time.monotonic() + 30
    while shown["process"]["status"] != "PROCESS_STATUS_ENDED" and time.monotonic() < give_up_at:
        code, shown = foldline("process", "show", *name)
    assert (code, shown["process"]["phase"], shown["state"]["phase"]) == (0, "completed", "completed")
    assert [entry["step"] for entry in shown["history"] if entry["kind"] == "answer"] == ["debit", "credit", "complete"]
    code, text = foldline("process", "show", *name, output="text")
    assert (code, "bank.v1.TransferStarted" in text) == (0, True)
    assert [line.split("●")[1].split()[0] for line in text.splitlines() if "━━▶ ●" in line] == [
        "debiting",
        "crediting",
        "completing",
        "completed",
    ]
    assert foldline("process", "show", transfer_id, "--tenant", tenant) == (0, shown)

    code, listed = foldline("process", "list", "--tenant", tenant, "--type", "transfer", "--status", "ended")
    assert (code, [one["process_id"] for one in listed]) == (0, [transfer_id])
    assert foldline("process", "list", "--tenant", tenant, "--attention") == (0, [])
    code, text = foldline("process", "list", "--tenant", tenant, output="text")
    assert (code, transfer_id in text, "ENDED" in text) == (0, True, True)

    code, refused = foldline("process", "cancel", *name)
    assert (code, refused["error"]["reason"]) == (1, "PROCESS_ENDED")
    code, refused = foldline("process", "retry", *name)
    assert (code, refused["error"]["reason"]) == (1, "NOTHING_TO_RETRY")
    code, refused = foldline("process", "show", "transfer", str(uuid4()), "--tenant", tenant)
    assert (code, refused["error"]["reason"]) == (1, "PROCESS_NOT_FOUND")


@pytest.mark.long
def test_the_list_of_processes_is_cut_where_it_is_told_to(foldline: Foldline, tenant: str) -> None:
    """And says that there are more."""
    blue, red = opened(foldline, "Bill", 100_00), opened(foldline, "Ted", 100_00)
    ids = []
    for _ in range(3):
        _, started = foldline(
            *("send", "StartTransfer", "transfer_id=new", f"from_account_id={blue}", f"to_account_id={red}"),
            *("amount_minor=1", "currency=USD"),
        )
        ids.append(started["aggregate_id"])
        ended(foldline, "transfer", ids[-1])
    code, listed = foldline("process", "list", "--tenant", tenant, "--limit", "2")
    assert (code, [one["process_id"] for one in listed]) == (0, [ids[2], ids[1]])
    code, text = foldline("process", "list", "--tenant", tenant, "--limit", "2", output="text")
    assert (code, "there are more than 2" in text) == (0, True)
    code, text = foldline("process", "list", "--tenant", tenant, "--limit", "3", output="text")
    assert (code, "there are more" in text) == (0, False)


def test_a_user_whose_password_is_read_from_standard_input(foldline: Foldline) -> None:
    """Registered with a login of its own; the password is in no answer."""
    words = ("send", "StartUserRegistration", "user_id=new", "login=Alice", "email=alice@example.com")
    code, started = foldline(*words, typed="correct horse battery\n")
    assert (code, started["version"]) == (0, 1)
    user = ended(foldline, "user", started["aggregate_id"])
    assert (user["status"], user["login"], user["reason"]) == ("REGISTRATION_STATUS_SUCCEEDED", "Alice", "")
    code, second = foldline(*words, typed="correct horse battery\n")
    other = ended(foldline, "user", second["aggregate_id"])
    assert (other["status"], other["reason"]) == ("REGISTRATION_STATUS_FAILED", "LOGIN_TAKEN")
    code, record = foldline("get", "command", started["command_id"])
    assert (code, "horse" in json.dumps(record)) == (0, False)


def test_a_refusal_is_1_with_its_reason_and_the_command_id(foldline: Foldline) -> None:
    """A script can branch on the reason, and a person can read it."""
    code, refused = foldline("send", "RenamePerson", f"person_id={uuid4()}", "name=Nobody")
    assert (code, refused["error"]["reason"]) == (1, "PERSON_NOT_FOUND")
    assert len(refused["error"]["facts"]["command_id"]) == 36
    code, text = foldline("get", "person", str(uuid4()), output="text")
    assert (code, text.startswith("refused: PERSON_NOT_FOUND")) == (1, True)


def test_the_same_command_id_is_the_same_command(foldline: Foldline) -> None:
    """What was sent and not heard of is sent again."""
    words = ("send", "RegisterPerson", f"person_id={uuid4()}", "name=Alice", "--command-id", str(uuid4()))
    first, second = foldline(*words), foldline(*words)
    assert first == second
    assert first[0] == 0


def test_an_expected_version_that_is_stale_is_refused(foldline: Foldline) -> None:
    """As anywhere."""
    _, person = foldline("send", "RegisterPerson", "person_id=new", "name=Alice", "--expected-version", "0")
    words = ("send", "RenamePerson", f"person_id={person['aggregate_id']}", "name=Bob", "--expected-version", "7")
    code, refused = foldline(*words)
    assert (code, refused["error"]["reason"]) == (1, "VERSION_MISMATCH")


def test_status_shows_services_line_and_lag(foldline: Foldline) -> None:
    """All that an operator asks first."""
    code, found = foldline("status")
    assert code == 0
    assert [service["health"] for service in found["services"]] == ["SERVING", "SERVING", "SERVING"]
    assert found["line"]["head_position"] >= 0
    assert found["projections"]
    assert all(projection["lag"] >= 0 for projection in found["projections"])
    code, text = foldline("status", output="text")
    assert (code, "SERVING" in text, "projection" in text, "processes that" in text) == (0, True, True, True)
    assert found["attention"].keys() == {"processes", "more"}


def test_history_shows_what_was_and_what_changed(foldline: Foldline) -> None:
    """Now, at a version, at a moment, and between two versions."""
    _, alice = foldline("send", "RegisterPerson", "person_id=new", "name=Alice O'Wonderland")
    who = ("person", alice["aggregate_id"])
    foldline("send", "RenamePerson", f"person_id={who[1]}", "name=Alice Cooper")
    code, now = foldline("history", *who)
    assert (code, now["version"], now["state"]["name"]) == (0, 2, "Alice Cooper")
    assert (now["aggregate"]["snapshot_versions"], now["aggregate"]["boxed"]) == ([], False)
    _, first = foldline("history", *who, "--version", "1")
    assert first["state"]["name"] == "Alice O'Wonderland"
    _, then = foldline("history", *who, "--at", first["recorded_at"])
    assert then["state"] == first["state"]
    code, changed = foldline("history", *who, "--diff", "1", "2")
    assert (code, changed) == (0, [{"field": "name", "from": "Alice O'Wonderland", "to": "Alice Cooper"}])
    code, text = foldline("history", *who, output="text")
    assert (code, "2 events" in text, "Alice Cooper" in text) == (0, True, True)
    code, text = foldline("history", *who, "--diff", "1", "2", output="text")
    assert (code, "version 1" in text, "Alice Cooper" in text) == (0, True, True)
    code, refused = foldline("history", *who, "--at", "1999-12-31")
    assert (code, refused["error"]["reason"]) == (1, "VERSION_NOT_FOUND")
    assert foldline("history", *who, "--version", "1", "--diff", "1", "2")[0] == 2


def test_the_audit_shows_who_did_what(foldline: Foldline) -> None:
    """Each event before its command, the newest first, also what a process did on the user's behalf; cut where it is told to."""
    blue, red = opened(foldline, "Bill", 100), opened(foldline, "Ted", 0)
    _, refused = foldline("send", "WithdrawMoney", f"account_id={red}", "amount_minor=9", "currency=USD")
    _, started = foldline(
        *("send", "StartTransfer", "transfer_id=new", f"from_account_id={blue}", f"to_account_id={red}"),
        *("amount_minor=60", "currency=USD"),
    )
    ended(foldline, "transfer", started["aggregate_id"])
    code, found = foldline("audit", "--correlation", started["command_id"])
    told = [
        one["event"]["type"] if "event" in one else f"{one['command']['command']['@type']} by {one['command']['on_behalf_of']}"
        for one in found["entries"]
    ]
    assert (code, found["more"]) == (0, False)
    assert told[-2:] == ["bank.v1.TransferStarted", "type.googleapis.com/bank.v1.StartTransferRequest by "]
    assert told[:2] == ["bank.v1.TransferCompleted", "type.googleapis.com/bank.v1.CompleteTransferRequest by alice"]
    code, found = foldline("audit", "--cause", refused["error"]["facts"]["command_id"])
    [only] = found["entries"]
    assert (code, only["command"]["receipt"]["error"]["reason"]) == (0, "INSUFFICIENT_FUNDS")
    code, text = foldline("audit", "--user", "alice", "--limit", "3", output="text")
    assert code == 0
    assert "MoneyDeposited" in text
    assert "more than 3" in text


def test_a_person_goes_to_the_archive_and_comes_back(foldline: Foldline) -> None:
    """Box, list, verify, unbox; what is refused meanwhile says why."""
    _, alice = foldline("send", "RegisterPerson", "person_id=new", "name=Alice")
    who = ("person", alice["aggregate_id"])
    code, boxed = foldline("archive", "box", *who)
    assert (code, boxed["version"], boxed["aggregate_id"]) == (0, 2, who[1])
    code, listed = foldline("archive", "list", *who)
    assert (code, [one["events"] for one in listed["boxes"]], listed["more"]) == (0, [1], False)
    code, text = foldline("archive", "verify", *who, output="text")
    assert (code, text.startswith("whole: 1 events in ")) == (0, True)
    code, text = foldline("history", *who, output="text")
    assert (code, "boxed, in the archive" in text) == (0, True)
    code, refused = foldline("send", "RenamePerson", f"person_id={who[1]}", "name=Bob")
    assert (code, refused["error"]["reason"]) == (1, "AGGREGATE_BOXED")
    code, text = foldline("archive", "unbox", *who, output="text")
    assert (code, text) == (0, f"unboxed: person {who[1]}, version 3\n")
    code, text = foldline("archive", "list", output="text")
    assert (code, who[1] in text) == (0, True)
    code, refused = foldline("archive", "verify", "person", str(uuid4()))
    assert (code, refused["error"]["reason"]) == (1, "BOX_NOT_FOUND")


def test_a_rule_of_retention_is_planned_set_and_ended(foldline: Foldline) -> None:
    """What was changed a moment ago is not past any date; a type that is not there is refused by name."""
    foldline("send", "RegisterPerson", "person_id=new", "name=Alice")
    days = ("--box-after-days", "365", "--purge-after-days", "3650")
    code, planned = foldline("retention", "plan", "person", *days)
    assert (code, planned) == (0, {"boxes": [], "purges": [], "more": False})
    code, text = foldline("retention", "set", "person", *days, output="text")
    assert (code, text) == (0, "person is boxed after 365 days and purged after 3650 days\n")
    code, rules = foldline("retention")
    assert (code, {"aggregate_type": "person", "box_after_days": 365, "purge_after_days": 3650} in rules) == (0, True)
    code, refused = foldline("retention", "set", "person")
    assert (code, refused["error"]["reason"]) == (2, "USAGE")
    code, refused = foldline("retention", "set", "account", "--purge-after-days", "1")
    assert (code, refused["error"]["reason"]) == (1, "NEVER_PURGED")
    code, text = foldline("retention", "end", "person", output="text")
    assert (code, text) == (0, "person has no rule\n")
    code, refused = foldline("retention", "set", "zebra", "--box-after-days", "1")
    assert (code, refused["error"]["reason"]) == (1, "AGGREGATE_TYPE_NOT_FOUND")


def test_an_account_is_watched(foldline: Foldline) -> None:
    """As it is, and after the last line that was printed only what has changed."""
    _, person = foldline("send", "RegisterPerson", "person_id=new", "name=Alice")
    fields = (f"owner_id={person['aggregate_id']}", "currency=USD", "name=blue")
    _, opened = foldline("send", "OpenAccount", "account_id=new", *fields)
    account_id = opened["aggregate_id"]
    foldline("get", "account", account_id, "--after", opened["consistency_token"])
    code, first = foldline("watch", "account", account_id, "--count", "1")
    assert (code, first["account"]["balance_minor"]) == (0, 0)
    foldline("send", "DepositMoney", f"account_id={account_id}", "amount_minor=5", "currency=USD")
    code, change = foldline("watch", "account", account_id, "--count", "1", "--resume", first["resume_token"])
    assert (code, change["account"]["balance_minor"]) == (0, 5)
    code, refused = foldline("watch", "account", str(uuid4()))
    assert (code, refused["error"]["reason"]) == (1, "ACCOUNT_NOT_FOUND")


def test_a_list_is_watched(foldline: Foldline) -> None:
    """The accounts of an owner, and after the last line that was printed only what has changed."""
    _, person = foldline("send", "RegisterPerson", "person_id=new", "name=Alice")
    owner = person["aggregate_id"]
    _, opened = foldline("send", "OpenAccount", "account_id=new", f"owner_id={owner}", "currency=USD", "name=blue")
    account_id = opened["aggregate_id"]
    foldline("get", "account", account_id, "--after", opened["consistency_token"])
    asked = ("watch", "accounts", "--owner", owner, "--status", "active", "--count", "1")
    code, first = foldline(*asked)
    assert (code, first["change"], first["account"]["balance_minor"]) == (0, "entered", 0)
    foldline("send", "FreezeAccount", f"account_id={account_id}")
    code, change = foldline(*asked, "--resume", first["resume_token"])
    assert (code, change["change"], change["account_id"]) == (0, "left", account_id)
    assert foldline("watch", "accounts", "--colour", "blue")[0] == 2


def test_parked_keys_are_listed(foldline: Foldline) -> None:
    """There are none, and one that is not there is refused by name."""
    assert foldline("parked", "list") == (0, [])
    for words in (("show",), ("retry",), ("discard", "--all")):
        code, refused = foldline("parked", *words, str(uuid4()))
        assert (code, refused["error"]["reason"]) == (1, "PARKED_NOT_FOUND")


def test_what_a_tenant_has_in_all(foldline: Foldline) -> None:
    """`get totals`, as data and as text; for administrators, which the development token is."""
    opened(foldline, "Mad Hatter", 100)
    code, totals = foldline("get", "totals")
    assert (code, totals["stale"]) == (0, False)
    assert totals["active_accounts"]["count"] >= 1
    assert "USD" in [balance["currency"] for balance in totals["balances"]]
    code, text = foldline("get", "totals", output="text")
    assert (code, "active_persons" in text) == (0, True)


def test_what_was_and_why(foldline: Foldline) -> None:
    """`get --at` and `--at-token`, and `why`, also of one field, page by page, and what is not understood."""
    account_id = opened(foldline, "Mad Hatter", 100)
    _, deposited = foldline("send", "DepositMoney", f"account_id={account_id}", "amount_minor=11", "currency=USD")
    foldline("send", "FreezeAccount", f"account_id={account_id}")
    code, then = foldline("get", "account", account_id, "--at-token", deposited["consistency_token"])
    assert (code, then["balance_minor"], then["status"], then["origin"]["position"]) == (0, 111, "ACCOUNT_STATUS_ACTIVE", 0)
    _, same = foldline("get", "account", account_id, "--at", then["origin"]["recorded_at"])
    assert same == then
    code, told = foldline("why", "account", account_id, "--field", "balance_minor")
    changes = [(change["type"], change["fields"]) for change in told["changes"]]
    assert (code, told["more"], told["stale"]) == (0, False, False)
    assert changes == [
        ("bank.v1.MoneyDeposited", [{"field": "balance_minor", "from": 100, "to": 111}]),
        ("bank.v1.MoneyDeposited", [{"field": "balance_minor", "from": 0, "to": 100}]),
        ("bank.v1.AccountOpened", [{"field": "balance_minor", "from": None, "to": 0}]),
    ]
    code, text = foldline("why", "account", account_id, "--limit", "1", output="text")
    assert text.splitlines()[1].split()[1:4] == ["AccountFrozen", "status", '"ACCOUNT_STATUS_ACTIVE"']
    assert (code, "more than 1" in text) == (0, True)
    for words in (("account", account_id, "--at", "2026-01-01", "--at-position", "1"), ("zebra", account_id)):
        assert foldline("why", *words)[0] == 2
    code, refused = foldline("why", "account", account_id, "--at-position", "1")
    assert (code, refused["error"]["reason"]) == (1, "ROLE_MISSING")
