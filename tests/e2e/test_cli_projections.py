"""`foldline parked` and `foldline projection`, as an operator types them, where a row of a query table is lost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.e2e.conftest import Foldline, foldline_of
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

# Whoever changes rows without moving the checkpoint raises its generation: the projector then reads them again.
REWRITTEN = "UPDATE checkpoints SET generation = generation + 1 WHERE group_name = 'accounts' AND serves"
DROPPED_S = 30


def lost(stack: Stack, account_id: str) -> tuple[Any, ...]:
    """Deletes the row of an account, and returns it."""
    with psycopg.connect(stack.databases.read.app) as app:
        app.execute(REWRITTEN)
        [row] = app.execute("DELETE FROM accounts WHERE account_id = %s RETURNING *", (account_id,)).fetchall()
    return row


def found(stack: Stack, row: tuple[Any, ...]) -> None:
    """Puts a row back."""
    with psycopg.connect(stack.databases.read.app) as app:
        app.execute(REWRITTEN)
        app.execute(f"INSERT INTO accounts VALUES ({', '.join(['%s'] * len(row))})", row)


def account(foldline: Foldline) -> str:
    """An account that the tables show; returns its id."""
    _, person = foldline("send", "RegisterPerson", "person_id=new", "name=Bill")
    words = ("send", "OpenAccount", "account_id=new", f"owner_id={person['aggregate_id']}", "currency=USD", "name=blue")
    _, receipt = foldline(*words)
    assert foldline("get", "account", receipt["aggregate_id"], "--after", receipt["consistency_token"])[0] == 0
    return str(receipt["aggregate_id"])


def deposited(foldline: Foldline, account_id: str, *amounts: int) -> None:
    """Money is deposited on an account without a row, and the tables have come to it."""
    for amount in amounts:
        _, receipt = foldline("send", "DepositMoney", f"account_id={account_id}", f"amount_minor={amount}", "currency=USD")
    code, refused = foldline("get", "account", account_id, "--after", receipt["consistency_token"])
    assert (code, refused["error"]["reason"]) == (1, "ROW_PARKED")


def parked(foldline: Foldline, tenant: str) -> dict[str, Any]:
    """The one key of the tenant that is parked."""
    code, [one] = foldline("parked", "list", "--projection", "accounts", "--tenant", tenant)
    assert code == 0
    return dict(one)


async def no_rebuild(foldline: Foldline) -> None:
    """Waits until nothing is left of a rebuild of accounts."""

    def gone() -> bool:
        _, told = foldline("projection", "rebuild", "accounts", "--follow")
        return bool(told.get("error", {}).get("reason") == "REBUILD_NOT_FOUND")

    await eventually(gone, DROPPED_S)


def test_a_parked_key_is_retried_when_its_cause_is_mended(shared_stack: Stack, foldline: Foldline, tenant: str) -> None:
    """Listed, shown with what waits, still parked by a first retry; then its events are applied, in order."""
    account_id = account(foldline)
    row = lost(shared_stack, account_id)
    deposited(foldline, account_id, 5, 6)
    one = parked(foldline, tenant)
    assert (one["table"], one["key"], one["events"]) == ("accounts", [account_id], 2)
    code, text = foldline("parked", "list", "--tenant", tenant, output="text")
    assert (code, one["parked_id"] in text, f"accounts {account_id}" in text) == (0, True, True)
    code, shown = foldline("parked", "show", one["parked_id"])
    assert (code, shown["parked"]["parked_id"]) == (0, one["parked_id"])
    assert [event["type"] for event in shown["events"]] == ["bank.v1.MoneyDeposited"] * 2
    code, text = foldline("parked", "show", one["parked_id"], output="text")
    assert (code, len(re.findall(r"^[0-9]+ .*bank.v1.MoneyDeposited", text, re.M))) == (0, 2)
    code, text = foldline("parked", "retry", one["parked_id"], output="text")
    assert (code, text.splitlines()[0], one["parked_id"] in text) == (1, "still parked: 0 events applied", True)
    found(shared_stack, row)
    code, text = foldline("parked", "retry", one["parked_id"], output="text")
    assert (code, text) == (0, "released: 2 events applied\n")
    code, shown = foldline("get", "account", account_id)
    assert (code, shown["balance_minor"]) == (0, 11)
    assert foldline("parked", "list", "--tenant", tenant) == (0, [])


@pytest.mark.long
async def test_what_was_skipped_is_there_again_after_a_rebuild(
    shared_stack: Stack, foldline: Foldline, tenant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events are discarded one by one, or all; the rebuild finds the row that differs, is cancelled, and another is switched."""
    account_id = account(foldline)
    lost(shared_stack, account_id)
    deposited(foldline, account_id, 5, 6, 7)
    parked_id = parked(foldline, tenant)["parked_id"]
    code, text = foldline("parked", "discard", parked_id, output="text")
    assert (code, text.splitlines()[:3]) == (1, ["still parked: 0 events applied", "", "skipped, and not in the row: 1"])
    code, told = foldline("parked", "discard", parked_id, "--all")
    assert (code, told["released"], told["skipped"], len(told["skipped_events"])) == (0, True, 2, 2)

    await no_rebuild(foldline)
    with monkeypatch.context() as terminal:
        for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "120"}.items():
            terminal.setenv(name, value)
        words = ("projection", "rebuild", "accounts", "--only-if-same")
        code, text = foldline_of(shared_stack, tenant, tmp_path)(*words, output="text")
    assert (code, "accounts, version" in text, "waiting" in text) == (1, True, True)
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text)
    assert re.search(rf"accounts +{tenant} {account_id}", text)
    assert re.search(r"accounts [━╸╺ ]+ \d+/\d+ [\d,]+/s, \d+ s left", text)
    code, told = foldline("projection", "cancel", "accounts")
    assert (code, told["state"]) == (0, "REBUILD_STATE_ENDING")
    await no_rebuild(foldline)
    assert foldline("get", "account", account_id)[0] == 1

    code, told = foldline("projection", "rebuild", "accounts", "--only-if-same")
    assert (code, told["state"], told["diff"]["rows_differing"]) == (1, "REBUILD_STATE_WAITING", 1)
    code, text = foldline("projection", "switch", "accounts", output="text")
    assert (code, ": switching at event" in text) == (0, True)
    code, told = foldline("projection", "rebuild", "accounts", "--follow")
    assert (code, told["state"]) == (0, "REBUILD_STATE_SWITCHED")
    code, shown = foldline("get", "account", account_id)
    assert (code, shown["balance_minor"]) == (0, 18)
    code, text = foldline("projection", "drop-former", "accounts", output="text")
    assert (code, ": ending at event" in text) == (0, True)
    await no_rebuild(foldline)
