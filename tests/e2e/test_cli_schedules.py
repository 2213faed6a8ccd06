"""Recurring schedules by the `foldline` command, against running services."""

from __future__ import annotations

from typing import Any

import psycopg

from tests.e2e.conftest import Foldline
from tests.support.clients.bank import new_id
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

NEW_YEAR = ("0 9 1 1 *", "DepositMoney")


async def test_a_schedule_from_its_creation_to_its_end(foldline: Foldline, shared_stack: Stack) -> None:
    """Created, listed, paused, resumed; when its time comes it fires, and its outcome is shown; then it is ended."""
    _, person = foldline("send", "RegisterPerson", "person_id=new", "name=Alice")
    _, account = foldline(
        "send", "OpenAccount", "account_id=new", f"owner_id={person['aggregate_id']}", "currency=USD", "name=blue"
    )
    fields = (f"account_id={account['aggregate_id']}", "amount_minor=5", "currency=USD")
    code, created = foldline("schedules", "create", *NEW_YEAR, *fields, "--zone", "Europe/Berlin", "--catch-up", "one")
    assert (code, created["status"], created["user_id"]) == (0, "SCHEDULE_STATUS_ACTIVE", "alice")
    assert (created["catch_up"], created["next_due_at"][4:]) == ("CATCH_UP_ONE", "-01-01T08:00:00Z")
    assert "last_due_at" not in created
    name = created["schedule_id"]

    code, paused = foldline("schedules", "pause", name)
    assert (code, paused["status"], "next_due_at" in paused) == (0, "SCHEDULE_STATUS_PAUSED", False)
    code, resumed = foldline("schedules", "resume", name)
    assert (code, resumed["next_due_at"]) == (0, created["next_due_at"])

    with psycopg.connect(shared_stack.databases.write.admin) as owner:  # New Year comes
        owner.execute("UPDATE schedules SET due_at = due_at - interval '1 year' WHERE schedule_id = %s", (name,))

    async def has_fired() -> dict[str, Any] | None:
        _, shown = foldline("schedules", "show", name)
        return shown if shown.get("last_firing", {}).get("status") == "COMMAND_STATUS_COMPLETED" else None

    shown = await eventually(has_fired, 20, every_s=0.2)
    assert shown is not None
    code, listed = foldline("commands", "list", "--cause", name)
    assert [one["receipt"]["command_id"] for one in listed["commands"]] == [shown["last_firing"]["command_id"]]
    assert listed["commands"][0]["user_id"] == "alice"

    code, text = foldline("schedules", "list", output="text")
    assert code == 0
    assert all(word in text for word in (name, "active", "0 9 1 1 *", "Europe/Berlin", "DepositMoneyRequest", "completed"))
    code, ended = foldline("schedules", "end", name)
    assert (code, ended["status"], ended["changed_by"]) == (0, "SCHEDULE_STATUS_ENDED", "alice")
    assert [one["schedule_id"] for one in foldline("schedules", "list", "--ended")[1]["schedules"]] == [name]


def test_what_cannot_be_is_refused_with_the_field(foldline: Foldline) -> None:
    """As any other refusal: exit code 1 and its name."""
    code, told = foldline("schedules", "create", "0 9 30 2 *", "FreezeAccount", f"account_id={new_id()}")
    assert (code, told["error"]["reason"]) == (1, "CRON_NEVER_FIRES")
    assert foldline("schedules", "pause", new_id(), output="text")[1].startswith("refused: SCHEDULE_NOT_FOUND")
