"""The addresses of the services, and the tokens for calls."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


class UsageError(Exception):
    """The input cannot be used; the text says what to type instead. Exit code 2."""


class NotRunning(Exception):
    """No system runs. Exit code 3."""


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The addresses and tokens that `foldline dev` wrote; variables of the environment override them."""

    write: str
    read: str
    tokens: dict[str, str]
    # Empty if it is not known.
    saga: str = ""
    # Of a system in containers: where programs outside of its network reach `write`, `read` and `saga`.
    published: Mapping[str, str] = field(default_factory=dict)

    def known_saga(self) -> str:
        """The saga service's address; raises UsageError if it is not known."""
        if not self.saga:
            raise UsageError("the saga service's address is not known: set FOLDLINE_SAGA_ADDRESS")
        return self.saga

    def token(self, tenant: str) -> str:
        """The token for a tenant; raises UsageError if there is none."""
        if token := os.environ.get("FOLDLINE_TOKEN"):
            return token
        if tenant not in self.tokens:
            known = ", ".join(sorted(self.tokens)) or "none"
            raise UsageError(
                f"no token for tenant {tenant!r} (there are: {known}); "
                f"make one: export FOLDLINE_TOKEN=$(foldline token --tenant {tenant})"
            )
        return self.tokens[tenant]


def address(data: Path, service: str) -> str:
    """Where a program on this machine that is none of ours reaches `write`, `read` or `saga`. Raises NotRunning, UsageError.

    Of a system in containers that is the published port; `load` has the address for programs in its network.
    """
    known = load(data)
    if service in known.published:
        return known.published[service]
    return known.known_saga() if service == "saga" else {"write": known.write, "read": known.read}[service]


def mail_folder(data: Path) -> Path:
    """The folder of the e-mails that the mail server of `foldline dev` or compose.yaml has accepted. Raises NotRunning."""
    try:
        return Path(json.loads((data / "endpoints.json").read_text())["mail"])
    except (OSError, ValueError, KeyError):
        raise NotRunning(f"no mail server runs on {data}: start the system with `foldline dev`") from None


def saga_settings(data: Path) -> dict[str, str]:
    """The variables of the saga service of `foldline dev`: its database, and where it reads events. Raises NotRunning."""
    try:
        found = json.loads((data / "endpoints.json").read_text())
        return {
            "FOLDLINE_DATABASE_URL": found["saga_database_url"],
            "FOLDLINE_WRITE_ADDRESS": found["write"],
            "FOLDLINE_TOKEN_FILE": found["saga_token_file"],
        }
    except (OSError, ValueError, KeyError):
        raise NotRunning("the saga database is not known: set FOLDLINE_DATABASE_URL, or start `foldline dev`") from None


def load(data: Path) -> Endpoints:
    """Reads `data/endpoints.json`, which exists while `foldline dev` runs on that folder.

    FOLDLINE_WRITE_ADDRESS and FOLDLINE_READ_ADDRESS together replace the file, with FOLDLINE_SAGA_ADDRESS for processes and
    deliveries, and FOLDLINE_TOKEN for the tokens. Raises NotRunning, and UsageError for an address that is malformed.
    """
    told = {name: _told(f"FOLDLINE_{name.upper()}_ADDRESS") for name in ("write", "read", "saga")}
    write, read, saga = told.values()
    file = data / "endpoints.json"
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        if write and read:
            return Endpoints(write, read, {}, saga)
        raise NotRunning(f"there is no {file}: start the system with `foldline dev`, or name its folder with --data") from None
    except (OSError, ValueError) as error:
        raise NotRunning(f"{file} cannot be read: {error}") from None
    published = {name: address for name, address in found.get("published", {}).items() if not told.get(name)}
    tokens = dict(found["tokens"])
    return Endpoints(write or found["write"], read or found["read"], tokens, saga or found.get("saga", ""), published)


def _told(variable: str) -> str:
    """An address in the environment; empty if it is not set. Raises UsageError."""
    if not (value := os.environ.get(variable, "")):
        return ""
    from shared.platform.urls import service_address

    try:
        return service_address(value)
    except ValueError as error:
        raise UsageError(f"{variable}: {error}") from None
