"""Rows of fields that this release does not know: a filter that was passed over would be a wrong answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from cli.summaries import SUMMARIES
from foldline.v1 import as_of_pb2, audit_pb2, command_pb2, range_pb2
from tests.e2e.errors.row import NO_ID, Row, get_account, newer, schedule, with_options
from tests.e2e.scene import Place, Scene
from tests.support.clients.bank import (
    freeze,
    item,
    packed,
    query,
)


def unknown(situation: str, call: Callable[[Scene, Place], Awaitable[object]], field: str) -> Row:
    """A row of a field that this release does not know."""
    return Row(f"unknown field: {situation}", call, "INVALID_ARGUMENT", "UNKNOWN_FIELD", (field,))


def filtered(rpc: str, name: str) -> Row:
    """A row of a filter that would be passed over by a List or a Watch of a list."""

    async def call(scene: Scene, _: Place) -> object:
        method, request = query(scene.bank, name, f"{rpc}{name.title()}s")
        asked = request()
        asked.filter.CopyFrom(newer(type(asked.filter)()))
        answer = method(asked, metadata=scene.bank.who, timeout=20)
        return await (answer.read() if rpc == "Watch" else answer)

    return unknown(f"filter of {rpc}{name.title()}s", call, "filter.999")


UNKNOWN = [
    *(filtered(rpc, name) for rpc in ("List", "Watch") for name in SUMMARIES),
    unknown(
        "in a range", lambda s, p: s.accounts(filter={"balance_minor": newer(range_pb2.WholeRange())}), "filter.balance_minor.999"
    ),
    unknown(
        "Get",
        lambda s, p: s.bank.call(s.bank.account_queries.GetAccount, newer(get_account(p, ""))),
        "999",
    ),
    unknown("when", lambda s, p: s.past("Get", "account", account_id=p.blue, as_of=newer(as_of_pb2.AsOf())), "as_of.999"),
    unknown("command", lambda s, p: s.bank.call(s.bank.accounts.FreezeAccount, newer(freeze(p.blue))), "999"),
    unknown(
        "options of a command",
        lambda s, p: s.bank.call(
            s.bank.accounts.FreezeAccount, with_options(p, newer(command_pb2.CommandOptions(command_id=NO_ID[:-1] + "7")))
        ),
        "options.999",
    ),
    unknown("packed command", lambda s, p: s.send(command_pb2.SendRequest(command=packed(newer(freeze(p.blue))))), "command.999"),
    unknown("scheduled command", lambda s, p: schedule(s, newer(freeze(p.blue))), "command.999"),
    unknown("recurring command", lambda s, p: s.create_schedule(newer(freeze(p.blue))), "command.999"),
    unknown("item of a batch", lambda s, p: s.bank.batch(item(freeze(p.blue)), newer(item(freeze(p.blue)))), "items[1].999"),
    unknown("streamed item", lambda s, p: s.stream(newer(item(freeze(p.blue)))), "item.999"),
    unknown("what is audited", lambda s, p: s.bank.call(s.bank.audit.ListAudit, newer(audit_pb2.ListAuditRequest())), "999"),
]
