"""`foldline dev`, `demo`, `token`, `address` and `mail`: the system on this machine, and what belongs to it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cli import endpoints
from cli.endpoints import NotRunning, UsageError
from cli.options import DATA, Data, Format, Output, Tenant
from cli.output import fail, print_json
from shared.platform.identity import Role


class Service(StrEnum):
    """What clients call."""

    WRITE = "write"
    READ = "read"
    SAGA = "saga"


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


def demo(
    out: Annotated[Path, typer.Option("--out", help="Where the outcome is written, as JSON.")] = Path("out/demo.json"),
) -> None:
    """Play the reference scenarios on a fresh system, kill it under load, and show that nothing is lost."""
    from deploy.demo import demo as deploy_demo

    raise typer.Exit(deploy_demo.run(out))


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


def address(service: Annotated[Service, typer.Argument(metavar="SERVICE")], data: Data = DATA) -> None:
    """Print where other clients on this machine reach a service, write, read or saga, as host:port.

    \b
    Example:
      buf curl ... http://$(foldline address write)/bank.v1.PersonService/RegisterPerson
    """
    try:
        print(endpoints.address(data, service.value))
    except (NotRunning, UsageError) as error:
        fail(error, Output.TEXT)


def mail(
    limit: Annotated[int, typer.Option("--limit", min=1, max=500, help="The last so many.")] = 20,
    data: Data = DATA,
    output: Format = Output.TEXT,
) -> None:
    """Print the e-mails that the mail server of `foldline dev`, or that of compose.yaml, has taken, the newest last."""
    from deploy.mailbox import messages

    try:
        folder = endpoints.mail_folder(data)
    except NotRunning as error:
        fail(error, output)
    found = [
        {
            "message_id": str(message["Message-ID"]),
            "date": str(message["Date"]),
            "to": str(message["To"]),
            "subject": str(message["Subject"]),
            "text": body.get_content() if (body := message.get_body(("plain",))) is not None else "",
        }
        for message in messages(folder)[-limit:]
    ]
    if output is Output.JSON:
        print_json(found)
        return
    for message in found:
        for name in ("message_id", "date", "to", "subject"):
            print(f"{name.replace('_', '-'):<10}  {message[name]}")
        print(f"\n{message['text']}")
    if not found:
        print("no mail yet")


def key_folder(data: Path) -> Path:
    """Where the issuer's key is of the system that runs on the folder, or will."""
    ephemeral = data / "ephemeral" / "keys"
    return ephemeral if ephemeral.exists() else data / "keys"
