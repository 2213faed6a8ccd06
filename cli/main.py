"""The `foldline` command. gRPC and the engines are imported by the commands that need them, so that help is instant."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli import endpoints
from cli.endpoints import Endpoints, NotRunning, UsageError
from shared.platform.identity import Role

OK, REFUSED, USAGE, UNAVAILABLE = 0, 1, 2, 3
AWAY = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")

ABOUT = """Foldline: commands in, events in order, answers out.

\b
A first session, with `foldline dev` running in another terminal:
  foldline status
  foldline send RegisterPerson person_id=new name="Alice O'Wonderland"
  foldline send RenamePerson person_id=ID name="Alice Cooper"
  foldline get person ID --after TOKEN      (TOKEN: of the last answer)
  foldline get stream person ID
  foldline process list

\b
Exit codes, of every command:
  0  done
  1  refused by a service; the reason is printed
  2  not understood; what to type instead is printed
  3  nothing answers; try again, or start it with `foldline dev`

\b
Environment, for a system that is not in --data:
  FOLDLINE_WRITE_ADDRESS, FOLDLINE_READ_ADDRESS   host:port of the services
  FOLDLINE_SAGA_ADDRESS                           host:port of the saga service, for `process`
  FOLDLINE_TOKEN                                  a bearer token
"""

SEND = """Send one command and print its receipt.

FIELDS are name=value; `new` as an id makes one. With --json they come as one JSON object.

\b
Commands and their fields:
  RegisterPerson         person_id name
  RenamePerson           person_id name
  OpenAccount            account_id owner_id currency name
  DepositMoney           account_id amount_minor currency
  WithdrawMoney          account_id amount_minor currency
  FreezeAccount          account_id
  UnfreezeAccount        account_id
  CloseAccount           account_id
  StartTransfer          transfer_id from_account_id to_account_id amount_minor currency
  StartUserRegistration  user_id login email password

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

The same --command-id again returns the first answer and changes nothing, so a command whose answer was lost is
repeated with it. The consistency token of the answer, given to `foldline get ... --after`, makes the answer there have
this command seen.
"""

app = typer.Typer(help=ABOUT, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
get = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(get, name="get", help="Ask for a person, an account, a transfer, a user, a command or a stream of events.")
process = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(process, name="process", help="See what processes do, and steer them: for operators.")


class Output(StrEnum):
    """How answers are printed."""

    TEXT = "text"
    JSON = "json"


Data = Annotated[Path, typer.Option("--data", envvar="FOLDLINE_DATA", help="The folder that `foldline dev` runs on.")]
Format = Annotated[Output, typer.Option("--output", "-o", help="text for people, json for programs.")]
Tenant = Annotated[str, typer.Option("--tenant", "-t", help="Whose data: picks the token.")]
After = Annotated[str, typer.Option("--after", help="A consistency token: wait until its command is seen.")]

ProcessType = Annotated[str, typer.Argument(metavar="TYPE", help="For example transfer or registration.")]
ProcessId = Annotated[
    str, typer.Argument(metavar="ID", help="Of a transfer's process the transfer's, of a registration's the user's.")
]
Owner = Annotated[str, typer.Option("--tenant", "-t", help="Whose process it is. The token is always the operator's.")]

DATA = Path(".foldline")


@app.command()
def dev(
    data: Data = DATA,
    ephemeral: Annotated[bool, typer.Option("--ephemeral", help="Start from nothing and leave nothing.")] = False,
) -> None:
    """Run the whole system on this machine until Ctrl-C: PostgreSQL, NATS and the services.

    \b
    State is kept in the data folder. DATABASE_URL (an administrator's) and NATS_URL in the environment use servers of
    your own instead of the embedded ones.

    \b
    Examples:
      foldline dev
      foldline dev --ephemeral
      foldline dev --data /tmp/second      (beside the first)
    """
    from deploy.local import dev as deploy_dev

    raise typer.Exit(deploy_dev.run(data, ephemeral=ephemeral))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Where the outcome is written, as JSON.")] = Path("out/demo.json"),
) -> None:
    """Play the reference scenarios on a fresh system, kill it under load, and show that nothing is lost."""
    from deploy.demo import demo as deploy_demo

    raise typer.Exit(deploy_demo.run(out))


@app.command()
def token(
    tenant: Tenant = "acme",
    user: Annotated[str, typer.Option("--user", "-u", help="Who the token speaks for.")] = "alice",
    role: Annotated[list[Role] | None, typer.Option("--role", "-r", help="Repeat it for several. Default: user.")] = None,
    lifetime: Annotated[float, typer.Option("--lifetime", min=1, help="Seconds until it expires.")] = 12 * 3600,
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Print a bearer token of the development issuer, whose key is in the data folder and made if it is not there.

    \b
    Examples:
      foldline token
      foldline token --tenant umbrella --user ada --role user --role tenant_admin
      buf curl -H "authorization: Bearer $(foldline token)" ...
    """
    from shared.platform.tokens import DevelopmentIssuer

    roles = role or [Role.USER]
    try:
        made = DevelopmentIssuer(key_folder(data)).issue(tenant=tenant, user_id=user, roles=roles, lifetime_s=lifetime)
    except ValueError as error:
        fail(UsageError(str(error)), output)
    if output is Output.JSON:
        print_json({"token": made, "tenant": tenant, "user": user, "roles": sorted(roles), "lifetime_s": lifetime})
    else:
        print(made)


@app.command()
def status(data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Show whether the services serve, how far the projections are behind, and which processes need an operator.

    Exits with 3 if a service does not serve or the line cannot be read, with 1 if a projection stopped.
    """

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import calls

        return await calls.status(known)

    found = call(ask, data, output)
    if output is Output.JSON:
        print_json(found)
    else:
        show_status(found)
    away = any(service["health"] != "SERVING" for service in found["services"])
    if away or "error" in (found["line"] or {"error": ""}) or {"projections_error", "processes_error"} & found.keys():
        raise typer.Exit(UNAVAILABLE)
    if any(projection["state"] != "PROJECTION_STATE_RUNNING" for projection in found["projections"]):
        raise typer.Exit(REFUSED)


@app.command(help=SEND)
def send(
    command: Annotated[str, typer.Argument(help="Its name, for example RegisterPerson.")],
    fields: Annotated[list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="Its fields.")] = None,
    as_json: Annotated[str | None, typer.Option("--json", metavar="OBJECT", help="Its fields as a JSON object.")] = None,
    tenant: Tenant = "acme",
    command_id: Annotated[str | None, typer.Option("--command-id", help="A UUID; made if not given.")] = None,
    expected_version: Annotated[
        int | None, typer.Option("--expected-version", min=0, help="Refuse unless the aggregate is at this version.")
    ] = None,
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Sends one command; SEND says the rest."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import calls

        given = read_fields(fields or [], as_json)
        for name, secret in calls.fields_of(command).items():
            if secret and name not in given:
                given[name] = read_secret(name)
        request = calls.build(command, given, command_id=command_id, expected_version=expected_version)
        return await calls.send(known, tenant, request)

    found = call(ask, data, output)
    if output is Output.JSON:
        print_json(found)
    else:
        events = "no event" if found["events_appended"] == 0 else f"events: {found['events_appended']}"
        print(f"accepted: {found['aggregate_type']} {found['aggregate_id']} is at version {found['version']} ({events})")
        print(f"  command id         {found['command_id']}")
        print(f"  consistency token  {found['consistency_token']}")


@get.command("person")
def get_person(
    person_id: str, after: After = "", tenant: Tenant = "acme", data: Data = DATA, output: Format = Output.TEXT
) -> None:
    """Print a person's summary: name, accounts, total balances.

    \b
    Example:
      foldline get person 0190e4a0-0000-7000-8000-000000000000 --after TOKEN
    """

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import calls

        return await calls.get_person(known, tenant, person_id, after)

    show(call(ask, data, output), output)


@get.command("account")
def get_account(
    account_id: str, after: After = "", tenant: Tenant = "acme", data: Data = DATA, output: Format = Output.TEXT
) -> None:
    """Print an account's summary: owner, balance in minor units, status."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import calls

        return await calls.get_account(known, tenant, account_id, after)

    show(call(ask, data, output), output)


@get.command("transfer")
def get_transfer(
    transfer_id: str, after: After = "", tenant: Tenant = "acme", data: Data = DATA, output: Format = Output.TEXT
) -> None:
    """Print a transfer's summary: status, where the money is, and every step with its time."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import calls

        return await calls.get_transfer(known, tenant, transfer_id, after)

    show(call(ask, data, output), output)


@get.command("user")
def get_user(user_id: str, after: After = "", tenant: Tenant = "acme", data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Print a user's summary: login, e-mail, and what became of the registration."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import calls

        return await calls.get_user(known, tenant, user_id, after)

    show(call(ask, data, output), output)


@get.command("command")
def get_command(command_id: str, tenant: Tenant = "acme", data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Print what the log knows of a command: who sent what, when, and what became of it."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import calls

        return await calls.get_command(known, tenant, command_id)

    show(call(ask, data, output), output)


@get.command("stream")
def get_stream(
    aggregate_type: str, aggregate_id: str, tenant: Tenant = "acme", data: Data = DATA, output: Format = Output.TEXT
) -> None:
    """Print the events of an aggregate, oldest first.

    \b
    Example:
      foldline get stream person 0190e4a0-0000-7000-8000-000000000000
    """

    async def ask(known: Endpoints) -> list[dict[str, Any]]:
        from cli import calls

        return await calls.get_stream(known, tenant, aggregate_type, aggregate_id)

    events = call(ask, data, output)
    if output is Output.JSON:
        print_json(events)
        return
    rows = [
        (str(event["version"]), str(event["position"]), event["type"], event.get("recorded_at", ""), one_line(event["payload"]))
        for event in events
    ]
    print_table(("version", "position", "event", "recorded at", "content"), rows)


class ProcessStatus(StrEnum):
    """Whether a process goes on by itself."""

    RUNNING = "running"
    ENDED = "ended"
    PARKED = "parked"


@process.command("list")
def process_list(
    tenant: Annotated[str, typer.Option("--tenant", "-t", help="Only this tenant's.")] = "",
    type_: Annotated[str, typer.Option("--type", help="Only of this type, for example transfer.")] = "",
    status: Annotated[ProcessStatus | None, typer.Option("--status", help="Only of this status.")] = None,
    attention: Annotated[bool, typer.Option("--attention", help="Only those that an operator should look at.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="So many at the most.")] = 50,
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Print processes, the youngest first.

    \b
    Examples:
      foldline process list --attention
      foldline process list --type transfer --status running
    """
    wanted: dict[str, Any] = {"tenant": tenant, "type": type_, "attention": attention}
    if status is not None:
        wanted["status"] = f"PROCESS_STATUS_{status.name}"

    async def ask(known: Endpoints) -> tuple[list[dict[str, Any]], bool]:
        from cli import calls

        return await calls.list_processes(known, wanted, limit)

    found, more = call(ask, data, output)
    if output is Output.JSON:
        print_json(found)
    else:
        show_processes(found)
    if more:
        complain(f"there are more than {limit}: raise --limit to see them")


@process.command("show")
def process_show(
    type_: ProcessType, process_id: ProcessId, tenant: Owner = "acme", data: Data = DATA, output: Format = Output.TEXT
) -> None:
    """Print all that is known of a process: its state, what happened to it, what it waits for.

    \b
    Example:
      foldline process show transfer 0190e4a0-0000-7000-8000-000000000000
    """

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import calls

        return await calls.get_process(known, tenant, type_, process_id)

    found = call(ask, data, output)
    if output is Output.JSON:
        print_json(found)
    else:
        show_process(found)


@process.command("retry")
def process_retry(
    type_: ProcessType, process_id: ProcessId, tenant: Owner = "acme", data: Data = DATA, output: Format = Output.TEXT
) -> None:
    """Let a process go on at once: what it waits for, could not take or gave up is tried again."""
    steer("retry", tenant, type_, process_id, data, output)


@process.command("cancel")
def process_cancel(
    type_: ProcessType, process_id: ProcessId, tenant: Owner = "acme", data: Data = DATA, output: Format = Output.TEXT
) -> None:
    """Take back the command that a process waits for, as if it had been refused: the process makes up for what it did.

    What may have been carried out cannot be taken back: MAY_HAVE_HAPPENED.
    """
    steer("cancel", tenant, type_, process_id, data, output)


def steer(action: str, tenant: str, type_: str, process_id: str, data: Path, output: Output) -> None:
    """Tells a process something, and prints how it is then."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import calls

        return await calls.steer_process(known, action, tenant, type_, process_id)

    show(call(ask, data, output), output)


def call(ask: Callable[[Endpoints], Coroutine[Any, Any, Any]], data: Path, output: Output) -> Any:
    """Makes the calls and returns the answer, or prints why there is none and exits with its code."""
    try:
        known = endpoints.load(data)
        from cli.calls import Refused, told

        try:
            return asyncio.run(ask(known))
        except Refused as refused:
            error = told(refused.refusal)
    except (UsageError, NotRunning) as problem:
        fail(problem, output)
    if output is Output.JSON:
        print_json({"error": error})
    else:
        complain(f"refused: {error['reason']}: {error['text']}")
        for violation in error.get("violations", ()):
            complain(f"  {violation['field'] or 'request'}: {violation['description']}")
        for name, value in error.get("facts", {}).items():
            complain(f"  {name.replace('_', ' ')}: {value}")
    raise typer.Exit(UNAVAILABLE if error["code"] in AWAY else REFUSED)


def fail(problem: UsageError | NotRunning, output: Output) -> NoReturn:
    """Prints what was wrong with what was typed, or that nothing runs, and exits."""
    usage = isinstance(problem, UsageError)
    if output is Output.JSON:
        reason = "USAGE" if usage else "NOT_RUNNING"
        print_json({"error": {"code": reason, "reason": reason, "text": str(problem)}})
    else:
        complain(str(problem))
    raise typer.Exit(USAGE if usage else UNAVAILABLE)


def read_fields(pairs: list[str], as_json: str | None) -> dict[str, Any]:
    """The fields of a command as they were typed; raises UsageError."""
    if as_json is not None:
        try:
            given = json.loads(as_json)
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
    """A field that should not be seen: typed without an echo, or the first line of standard input. Raises UsageError."""
    if sys.stdin.isatty():
        typed: str = typer.prompt(name, hide_input=True, confirmation_prompt=True, err=True)
        return typed
    line = sys.stdin.readline().rstrip("\r\n")
    if not line:
        raise UsageError(f"the {name} is read from standard input, which is empty")
    return line


def key_folder(data: Path) -> Path:
    """Where the issuer's key is of the system that runs on the folder, or will."""
    ephemeral = data / "ephemeral" / "keys"
    return ephemeral if ephemeral.exists() else data / "keys"


def show(found: dict[str, Any], output: Output) -> None:
    """Prints an answer."""
    if output is Output.JSON:
        print_json(found)
        return
    width = max(map(len, found), default=0)
    for name, value in found.items():
        print(f"{name:{width}}  {one_line(value) if isinstance(value, dict | list) else value}")


def show_status(found: dict[str, Any]) -> None:
    """Prints the state of the system as tables."""
    services = [(service["service"], service["address"], service["health"]) for service in found["services"]]
    print_table(("service", "address", "health"), services)
    line = found["line"] or {"error": {"text": "no answer"}}
    if "error" in line:
        print(f"\nline: {line['error']['text']}\n")
    else:
        print(f"\nline: shard {line['shard']}, {line['head_position']} events, history {line['epoch']}\n")
    if error := found.get("projections_error"):
        print(f"projections: {error['text']}")
        return
    projections = [
        (
            one["name"],
            str(one["position"]),
            "?" if one["lag"] is None else str(one["lag"]),
            one["state"].removeprefix("PROJECTION_STATE_"),
            one["reason"],
        )
        for one in found["projections"]
    ]
    print_table(("projection", "position", "lag", "state", "reason"), projections)
    if error := found.get("processes_error"):
        print(f"\nprocesses: {error['text']}")
    elif attention := found.get("attention"):
        more = " at least" if attention["more"] else ""
        print(f"\nprocesses that an operator should look at:{more} {len(attention['processes'])}")
        if attention["processes"]:
            show_processes(attention["processes"])


def show_processes(found: Sequence[dict[str, Any]]) -> None:
    """Prints processes as a table."""
    names = ("tenant", "type", "id", "status", "phase", "started at", "moved at", "attention")
    print_table(names, [process_row(one) for one in found])


def process_row(one: dict[str, Any]) -> tuple[str, ...]:
    """A process as a row; one that has not moved for too long says so."""
    attention = " ".join(filter(None, (one["attention"], "STUCK" if one["stuck"] else "")))
    status = one["status"].removeprefix("PROCESS_STATUS_")
    moments = (one.get("started_at", ""), one.get("moved_at", ""))
    return one["tenant"], one["type"], one["process_id"], status, one["phase"], *moments, attention


def show_process(found: dict[str, Any]) -> None:
    """Prints a process with its history and what it waits for."""
    show_processes([found["process"]])
    print(f"\nstate: {one_line(found['state'])}\n")
    history = []
    for entry in found["history"]:
        what = " ".join(filter(None, (entry["step"], entry["name"])))
        error = entry.get("error")
        tries = str(entry["attempts"] or "")
        refusal = f"{error['reason']}: {error['text']}" if error else ""
        history.append((entry.get("happened_at", ""), entry["kind"], what, entry["id"], tries, entry["phase"], refusal))
    print_table(("happened at", "kind", "what", "id", "tries", "phase after it", "refusal"), history)
    if commands := found["commands"]:
        print()
        rows = [
            (one["step"], one["type"], one["command_id"], str(one["tries"]), one.get("due_at", "given up"), one["last_error"])
            for one in commands
        ]
        print_table(("waits for", "command", "id", "tries", "sent again at", "last error"), rows)
    if timers := found["timers"]:
        print()
        print_table(("timer", "due at"), [(one["name"], one.get("due_at", "")) for one in timers])


def print_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints rows in columns that are as wide as they need, however narrow the terminal: ids are there to be copied."""
    table = Table(*names, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=10_000).print(table, soft_wrap=True)


def one_line(value: Any) -> str:
    """Data as one line of JSON."""
    return json.dumps(value, ensure_ascii=False)


def print_json(value: Any) -> None:
    """Prints data for programs: one document."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def complain(text: str) -> None:
    """Prints to standard error."""
    typer.echo(text, err=True)


# At the end, since these modules use what is above.

if __name__ == "__main__":
    # The groups of commands import this module by its name, so the command is that module's, not that of __main__.
    from cli.main import app as named

    named()
else:
    from cli.delivery import delivery, mail

    app.add_typer(delivery, name="delivery", help="See what is told to the outside, and steer it: for operators.")
    app.command()(mail)
