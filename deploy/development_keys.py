"""Keys, tokens and addresses for a system in containers that is tried out, never for one that matters.

`python -m deploy.development_keys FOLDER WRITE READ SAGA POSTGRES` makes in the folder: `keys/jwks.json`, which every service
verifies tokens with, and beside it the private key, which `foldline token` signs with; `seal_keys`; the tokens of the projector
and the saga service; `contacts.json`, whom e-mails go to; `endpoints.json`, which the `foldline` command reads, with the three
addresses and a token for each of two tenants and an operator; and the database administrator's password and URL. A second run
keeps keys, contacts and password and renews the tokens. A real installation has an issuer of its own and gives the processes
tokens from it.

What the `foldline` command reads is readable for the folder's group too, so that it can run under the account of who calls it.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from deploy.bootstrap import write_secret
from shared.platform.identity import Role
from shared.platform.seal import KEY_BYTES
from shared.platform.tokens import DevelopmentIssuer

MONTH_S = 30 * 24 * 3600.0


def make(folder: Path, *, write: str, read: str, saga: str, postgres: str, published: Sequence[str] = (), mail: str = "") -> None:
    """Makes what the module's text says. Killed on the way, the next run makes what is missing.

    `published` are the addresses of the three services for programs outside of the containers' network, `mail` is the folder
    of the mail server.
    """
    issuer = DevelopmentIssuer(folder / "keys")
    issuer.jwks_file.chmod(0o444)
    issuer.jwks_file.parent.chmod(0o755)
    issuer.jwks_file.with_name("issuer.json").chmod(0o440)
    seal_keys_in(folder)
    contacts_in(folder)
    processes = {"projector": [Role.READER], "saga": [Role.READER, Role.PROCESS]}
    callers = {
        "acme": ("acme", "alice", [Role.USER, Role.TENANT_ADMIN]),
        "umbrella": ("umbrella", "ada", [Role.USER, Role.TENANT_ADMIN]),
        "operator": ("operators", "olga", [Role.OPERATOR, Role.READER]),
    }
    for name, roles in processes.items():
        token = issuer.issue(tenant="foldline", user_id=name, roles=roles, lifetime_s=MONTH_S)
        write_secret(folder / f"{name}.token", token)
    tokens = {
        name: issuer.issue(tenant=tenant, user_id=user, roles=roles, lifetime_s=MONTH_S)
        for name, (tenant, user, roles) in callers.items()
    }
    endpoints = {"write": write, "read": read, "saga": saga, "tokens": tokens, "mail": mail}
    endpoints["published"] = dict(zip(("write", "read", "saga"), published, strict=False))
    write_secret(folder / "endpoints.json", json.dumps(endpoints, indent=2))
    (folder / "endpoints.json").chmod(0o440)
    password, admin_url = folder / "postgres_password", folder / "admin_url"
    if not password.exists():
        write_secret(password, secrets.token_urlsafe(24))
        # The database's container reads it as an account of its own.
        password.chmod(0o444)
    write_secret(admin_url, f"postgresql://postgres:{password.read_text().strip()}@{postgres}/postgres")


def seal_keys_in(folder: Path) -> Path:
    """The file with the keys for FOLDLINE_SEAL_KEYS_FILE, made if it is not there. Of two that make it one's stays."""
    file = folder / "seal_keys"
    if not file.exists():
        made = folder / f".seal_keys.{secrets.token_hex(8)}"
        write_secret(made, secrets.token_hex(KEY_BYTES))
        with suppress(FileExistsError):
            file.hardlink_to(made)
        made.unlink()
    return file


def contacts_in(folder: Path) -> Path:
    """The file for FOLDLINE_CONTACTS_FILE: whom tenants have told of what. It is the user's once it is there."""
    file = folder / "contacts.json"
    if not file.exists():
        file.touch(mode=0o600)
        file.write_text(json.dumps({"umbrella": {"owner": {"email": "ada@umbrella.example"}}}, indent=2) + "\n")
    return file


def main() -> int:
    """Makes them where the command line says."""
    parser = argparse.ArgumentParser(prog="python -m deploy.development_keys", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    for name in ("write", "read", "saga", "postgres"):
        parser.add_argument(name, help="its address, host:port")
    services = ("WRITE", "READ", "SAGA")
    parser.add_argument("--published", nargs=3, default=(), metavar=services, help="their addresses for programs outside")
    parser.add_argument("--mail", default="", help="the folder of the mail server")
    arguments = parser.parse_args()
    make(**vars(arguments))
    print(f"keys and tokens are in {arguments.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
