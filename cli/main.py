"""The `foldline` command. Each group of commands is a module; this one puts them together.

gRPC and the engines are imported inside the commands that need them, so that help is instant.
"""

from __future__ import annotations

import os

import typer

from cli import local
from cli.archive import archive
from cli.audit import audit
from cli.commands import commands
from cli.delivery import delivery
from cli.get import get
from cli.history import history
from cli.overrides import overrides
from cli.parked import parked
from cli.process import process
from cli.rebuild import add_rebuild
from cli.retention import retention
from cli.schedules import schedules
from cli.send import HELP, SendCommand, send
from cli.status import projection, restored, status
from cli.steering import add_steering
from cli.tenant import tenant
from cli.watch import watch
from cli.why import why
from shared.platform.unknown import unknown_variables

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
  OTEL_EXPORTER_OTLP_ENDPOINT                     record each call as a span: docs/observability.md
"""

app = typer.Typer(help=ABOUT, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@app.callback()
def refuse_unknown_variables() -> None:
    """Ends any command with exit code 2 if a FOLDLINE_* variable is none of this release."""
    if unknown := unknown_variables(os.environ):
        for sentence in unknown:
            typer.echo(sentence, err=True)
        raise typer.Exit(2)


app.command()(local.dev)
app.command()(local.demo)
app.command()(local.token)
app.command()(local.address)
app.command()(status)
app.command(cls=SendCommand, help=HELP)(send)
app.add_typer(get, name="get", help="Ask for a person, an account, a transfer, a user, a command or a stream of events.")
app.command()(why)
app.command()(history)
app.command()(audit)
app.add_typer(watch, name="watch", help="Follow a person, an account, a transfer, a user or lists of them as they change.")
app.add_typer(commands, name="commands", help="See the command log; cancel or move what is scheduled in it.")
app.add_typer(schedules, name="schedules", help="Send a command again and again, at the times of a cron expression.")
app.add_typer(archive, name="archive", help="Move aggregates to the archive and back, and check what is there.")
app.add_typer(retention, name="retention", help="See and set after how long aggregates go to the archive by themselves.")
app.add_typer(overrides, name="overrides", help="See what runs otherwise for a tenant, and switch it on and off.")
add_steering(process)
app.add_typer(process, name="process", help="See what processes do, and steer them: for operators.")
app.add_typer(delivery, name="delivery", help="See what is told to the outside, and steer it: for operators.")
add_rebuild(projection)
app.add_typer(projection, name="projection", help="Rebuild query tables, and let them go on after a restore: for operators.")
app.add_typer(parked, name="parked", help="See rows whose events could not be applied, and retry or skip those: for operators.")
app.add_typer(tenant, name="tenant", help="See what is stored of a tenant, and delete it for ever: for operators.")
app.command()(restored)
app.command()(local.mail)

if __name__ == "__main__":
    app()
