"""`foldline send`: one command, from what is typed to its receipt."""

from __future__ import annotations

import json
import sys
from decimal import Decimal
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from cli.commands import read_moment, status_of
from cli.endpoints import Endpoints, UsageError
from cli.invoke import call
from cli.options import DATA, Data, Format, Output, Tenant
from cli.output import print_json

HELP = """Send one command and print its receipt.

FIELDS are name=value; `new` as an id makes one. With --json they come as one JSON object.

\b
Commands and their fields:
{commands}

\b
Amounts are whole minor units: 10000 USD are a hundred dollars. Freezing, closing and registering users need a token with
role tenant_admin. A password that is not given is asked for, or read from standard input if that is no terminal: what is
typed as an argument, others on the machine can see.

\b
Examples:
  foldline send RegisterPerson person_id=new name=Alice
  foldline send OpenAccount account_id=new owner_id=ID currency=USD name=blue
  foldline send DepositMoney account_id=ID amount_minor=10000 currency=USD
  foldline send StartTransfer transfer_id=new from_account_id=ID to_account_id=ID amount_minor=6900 currency=USD
  foldline send StartUserRegistration user_id=new login=alice email=alice@example.com
  foldline send RenamePerson --json '{"person_id": "ID", "name": "Alice Cooper"}' --expected-version 1
  foldline send RegisterPerson person_id=new name=Bill --at 2026-12-24T18:00:00+01:00

The same --command-id again returns the first answer and changes nothing, so a command whose answer was lost is
repeated with it. The consistency token of the answer, given to `foldline get ... --after`, makes the answer there have
this command seen.
"""


class SendCommand(TyperCommand):
    """The command `send`. Its help lists the commands of the contracts, which are imported only to show it."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the help."""
        from cli import contract

        self.help = HELP.replace("{commands}", contract.command_table())
        super().format_help(ctx, formatter)


def send(
    command: Annotated[str, typer.Argument(help="Its name, for example RegisterPerson.")],
    fields: Annotated[list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="Its fields.")] = None,
    as_json: Annotated[str | None, typer.Option("--json", metavar="OBJECT", help="Its fields as a JSON object.")] = None,
    tenant: Tenant = "acme",
    command_id: Annotated[str | None, typer.Option("--command-id", help="A UUID; made if not given.")] = None,
    expected_version: Annotated[
        int | None, typer.Option("--expected-version", min=0, help="Refuse unless the aggregate is at this version.")
    ] = None,
    at: Annotated[
        str | None, typer.Option("--at", metavar="MOMENT", help="Not now but then; `foldline commands` shows it.")
    ] = None,
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Sends one command; HELP is what its user reads."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import calls, contract

        given = read_fields(fields or [], as_json)
        for name, secret in contract.fields_of(command).items():
            if secret and name not in given:
                given[name] = read_secret(name)
        request = contract.build(command, given, command_id=command_id, expected_version=expected_version)
        if at is not None:
            return await calls.schedule(known, tenant, request, read_moment(at))
        return await calls.send(known, tenant, request)

    found = call(ask, data, output)
    if output is Output.JSON:
        print_json(found)
    elif at is not None:
        print(f"{status_of(found)}: {found['aggregate_type']} {found['aggregate_id']}")
        print(f"  command id         {found['command_id']}")
    else:
        events = "no event" if found["events_appended"] == 0 else f"events: {found['events_appended']}"
        print(f"accepted: {found['aggregate_type']} {found['aggregate_id']} is at version {found['version']} ({events})")
        print(f"  command id         {found['command_id']}")
        print(f"  consistency token  {found['consistency_token']}")


def read_fields(pairs: list[str], as_json: str | None) -> dict[str, Any]:
    """The fields of a command from the command line. Raises UsageError."""
    if as_json is not None:
        try:
            # Decimal, since a float would not hold every amount.
            given = json.loads(as_json, parse_float=Decimal)
        except ValueError as error:
            raise UsageError(f"--json is not JSON: {error}") from None
        if not isinstance(given, dict):
            raise UsageError('--json takes an object, for example \'{"name": "Alice"}\'')
    else:
        given = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"{pair!r} is not name=value")
        if name in given:
            raise UsageError(f"{name} is given twice")
        given[name] = value
    return given


def read_secret(name: str) -> str:
    """A secret field: typed without an echo, or the first line of standard input. Raises UsageError."""
    if sys.stdin.isatty():
        typed: str = typer.prompt(name, hide_input=True, confirmation_prompt=True, err=True)
        return typed
    line = sys.stdin.readline().rstrip("\r\n")
    if not line:
        raise UsageError(f"the {name} is read from standard input, which is empty")
    return line
