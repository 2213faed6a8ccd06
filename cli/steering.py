"""`foldline process pause`, `skip`, `acknowledge`, `parked` and their like: what operators do beyond retry and cancel."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import typer

from cli.endpoints import Endpoints, NotRunning
from cli.invoke import call
from cli.options import DATA, Data, Format, Output
from cli.output import OK, REFUSED, complain, fail, print_json, print_table, show
from cli.process import Owner, ProcessId, ProcessType

steering = typer.Typer()
acknowledge = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
parked = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

CHECK_FAILED = 4
Reason = Annotated[str, typer.Option("--reason", help="Why, for the record. No personal data.")]
AggregateType = Annotated[str, typer.Argument(metavar="AGGREGATE_TYPE", help="For example account.")]
AggregateId = Annotated[str, typer.Argument(metavar="AGGREGATE_ID")]


@steering.command("pause")
def process_pause(type_: ProcessType, reason: Reason, data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Pause all processes of a type: nothing is sent for them and their timers do not fire, until `resume`.

    Events and answers are still taken. A command that was sent before is carried out.
    """

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import steering_calls

        return await steering_calls.pause(known, type_, reason)

    show(call(ask, data, output), output)


@steering.command("resume")
def process_resume(type_: ProcessType, data: Data = DATA, output: Format = Output.TEXT) -> None:
    """Let a paused type go on; print how it was paused."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import steering_calls

        return await steering_calls.resume(known, type_)

    show(call(ask, data, output), output)


@steering.command("skip")
def process_skip(
    type_: ProcessType,
    process_id: ProcessId,
    step: Annotated[str, typer.Argument(metavar="STEP", help="As `foldline process show` prints it under `waits for`.")],
    reason: Reason,
    tenant: Owner = "acme",
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Let a process go on as if a step had been carried out. Its command may be carried out all the same if it was sent.

    Only steps may be skipped that decide about nothing but the process itself, such as `complete` of a transfer.
    """

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import steering_calls

        return await steering_calls.skip(known, tenant, type_, process_id, step, reason)

    show(call(ask, data, output), output)


@steering.command("retry-all")
def process_retry_all(
    tenant: Annotated[str, typer.Option("--tenant", "-t", help="Only this tenant's.")] = "",
    type_: Annotated[str, typer.Option("--type", help="Only of this type, for example transfer.")] = "",
    reason: Annotated[str, typer.Option("--reason", help="Only those parked for this reason, for example COMMAND_FAILED.")] = "",
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Retry all parked processes, or those of a filter.

    \b
    Example:
      foldline process retry-all --type transfer --reason COMMAND_FAILED
    """

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import steering_calls

        return await steering_calls.retry_all(known, tenant, type_, reason)

    show(call(ask, data, output), output)


@steering.command("check")
def process_check(
    histories: Annotated[
        int | None, typer.Option("--histories", min=0, help="Replay the histories of the N oldest alone; 0: of none.")
    ] = None,
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Check whether all processes in flight go on under the code of this release. Run it before a deployment.

    Each process is copied with its state and all that it waits for, and folded by the new code: every answer that may come, and
    from there the way to its end. Then its history is replayed, from the event that began it: the new code must send the same
    commands and come to the same state. Nothing is written.

    It takes the settings of the saga service: FOLDLINE_DATABASE_URL, and for histories FOLDLINE_WRITE_ADDRESS and
    FOLDLINE_TOKEN_FILE, unless `foldline dev` runs.

    Exits with 1 if there is a mismatch. One in a history (COMMANDS_DIFFER, STATE_DIFFERS and the like) may be meant: the process
    goes on all the same, but is not where the new code would have brought it. `--histories 0` leaves them out.

    Exits with 2 if it is not set up or the processes' code cannot be imported, with 3 if a service does not answer, and with 4 if
    the check itself failed: then nothing is known of the processes.
    """
    import subprocess
    import sys

    from cli import endpoints

    environment = dict(os.environ)
    if not environment.keys() & {"FOLDLINE_DATABASE_URL", "FOLDLINE_DATABASE_URL_FILE"}:
        try:
            environment |= endpoints.saga_settings(data)
        except NotRunning as error:
            fail(error, output)
    # The code of the service is run, never imported: see the contracts in pyproject.toml.
    program = [sys.executable, "-m", "saga_service.check"]
    program += [] if histories is None else ["--histories", str(histories)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 (our own)
    if done.returncode not in (OK, REFUSED) or not done.stdout:
        complain(done.stderr.strip())
        # Code that cannot even be imported ends with 1 as well, but says nothing of any process.
        raise typer.Exit(CHECK_FAILED if done.returncode == REFUSED else done.returncode)
    found = json.loads(done.stdout)
    if output is Output.JSON:
        print_json(found)
    else:
        counts = f"{found['replayed']} histories replayed, {found['failed']} with a mismatch"
        print(f"{found['checked']} processes in flight, {counts} ({found['seconds']} s)")
        names = ("tenant", "type", "process_id", "phase", "what", "where")
        if found["mismatches"]:
            print_table(names, [tuple(one[name] for name in names) for one in found["mismatches"]])
    raise typer.Exit(done.returncode)


@acknowledge.command("ask")
def acknowledge_ask(
    type_: ProcessType,
    process_id: ProcessId,
    attention: Annotated[str, typer.Argument(metavar="ATTENTION", help="As the process says it, for example MONEY_IN_SUSPENSE.")],
    resolution: Annotated[str, typer.Option("--resolution", help="How it was settled. No personal data.")],
    tenant: Owner = "acme",
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Say how it was settled, and ask for another person's confirmation.

    \b
    Another person confirms it with a token of their own:
      export FOLDLINE_TOKEN=$(foldline token --tenant operators --user otto --role operator)
      foldline process acknowledge confirm transfer ID
    """

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import steering_calls

        return await steering_calls.ask(known, tenant, type_, process_id, attention, resolution)

    show(call(ask, data, output), output)


@acknowledge.command("confirm")
def acknowledge_confirm(
    type_: ProcessType, process_id: ProcessId, tenant: Owner = "acme", data: Data = DATA, output: Format = Output.TEXT
) -> None:
    """Confirm what another person has asked for: `foldline process show` prints it."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import steering_calls

        return await steering_calls.confirm(known, tenant, type_, process_id)

    show(call(ask, data, output), output)


@acknowledge.command("reject")
def acknowledge_reject(
    type_: ProcessType,
    process_id: ProcessId,
    reason: Reason,
    tenant: Owner = "acme",
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Drop what was asked for; whoever asked may do so too."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import steering_calls

        return await steering_calls.reject(known, tenant, type_, process_id, reason)

    show(call(ask, data, output), output)


@parked.command("list")
def parked_list(
    tenant: Annotated[str, typer.Option("--tenant", "-t", help="Only this tenant's.")] = "",
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="So many at the most.")] = 50,
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Print the streams that are parked, each with its first parked event."""

    async def ask(known: Endpoints) -> tuple[list[dict[str, Any]], bool]:
        from cli import steering_calls

        return await steering_calls.find_parked(known, tenant, limit)

    found, more = call(ask, data, output)
    if output is Output.JSON:
        print_json(found)
    else:
        show_parked(found)
    if more:
        complain(f"there are more than {limit}: raise --limit to see them")


@parked.command("retry")
def parked_retry(
    aggregate_type: AggregateType,
    aggregate_id: AggregateId,
    tenant: Owner = "acme",
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Take the events of a parked stream again, in order, up to the first that still cannot be taken."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import steering_calls

        return await steering_calls.retry_parked(known, tenant, aggregate_type, aggregate_id)

    show_replayed(call(ask, data, output), output)


@parked.command("discard")
def parked_discard(
    aggregate_type: AggregateType,
    aggregate_id: AggregateId,
    position: Annotated[int, typer.Option("--position", min=1, help="Of the event; it must be the first that is parked.")],
    tenant: Owner = "acme",
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Give up the first event of a parked stream: processes never see it. The later ones are taken."""

    async def ask(known: Endpoints) -> dict[str, Any]:
        from cli import steering_calls

        return await steering_calls.discard_parked(known, tenant, aggregate_type, aggregate_id, position)

    show_replayed(call(ask, data, output), output)


def show_parked(found: list[dict[str, Any]]) -> None:
    """Prints parked streams as a table."""
    names = ("tenant", "aggregate", "id", "events", "first position", "event", "reason", "parked at")
    rows = [
        (
            one["tenant"],
            one["aggregate_type"],
            one["aggregate_id"],
            str(one["events"]),
            str(one["position"]),
            one["type"],
            one["reason"],
            one.get("parked_at", ""),
        )
        for one in found
    ]
    print_table(names, rows)


def show_replayed(found: dict[str, Any], output: Output) -> None:
    """Prints what became of a parked stream."""
    if output is Output.JSON:
        print_json(found)
        return
    print(f"events taken: {found['events']}")
    if stream := found.get("stream"):
        print("the stream stays parked:")
        show_parked([stream])


def add_steering(process: typer.Typer) -> None:
    """Adds these commands to `foldline process`."""
    process.add_typer(steering)
    process.add_typer(acknowledge, name="acknowledge", help="Say how something was settled, and have another person confirm it.")
    process.add_typer(parked, name="parked", help="See events that no process could be found for, and let their streams go on.")
