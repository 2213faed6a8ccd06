"""Foldline's processes over given databases and a given NATS. `dev`, `demo` and the tests all run them this way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio

from deploy.bootstrap import Databases
from deploy.development_keys import contacts_in, seal_keys_in
from deploy.engines.child import free_port
from deploy.local.supervisor import Program, Supervisor
from shared.platform.identity import Role
from shared.platform.tokens import DevelopmentIssuer
from shared.rpc import client

WRITE, RELAY, READ, PROJECTOR, SAGA = "write_service", "relay", "read_service", "projector", "saga_service"
MONTH_S = 30 * 24 * 3600.0


class System(Supervisor):
    """The processes of Foldline as children, with an issuer of tokens that they accept.

    Logs and keys are kept in `folder`.
    """

    def __init__(
        self,
        folder: Path,
        databases: Databases,
        nats_url: str,
        *,
        ports: Mapping[str, int] | None = None,
        settings: Mapping[str, str] | None = None,
        smtp_url: str = "",
    ) -> None:
        """`ports` for the three services are chosen if not given. `settings` go to every process.

        `smtp_url` is the mail server's; without one no e-mail is sent.
        """
        super().__init__(folder / "logs")
        self.databases = databases
        self.issuer = DevelopmentIssuer(folder / "keys")
        write_port = (ports or {}).get(WRITE) or free_port()
        read_port = (ports or {}).get(READ) or free_port()
        saga_port = (ports or {}).get(SAGA) or free_port()
        token_file = self._token_file("projector", [Role.READER])
        saga_token_file = self._token_file("saga", [Role.READER, Role.PROCESS])
        # From SIGTERM to the end in 6 s, so that both waves end within the 10 s that a user is promised.
        drain = {"FOLDLINE_DRAIN_CALLS_S": "4", "FOLDLINE_DRAIN_S": "6"}
        common = {**drain, "FOLDLINE_JWKS_FILE": str(self.issuer.jwks_file), "FOLDLINE_NATS_URL": nats_url}
        archive = (folder / "archive").resolve().as_uri()
        # The tokens of our own processes are made once, with the system.
        common |= {"FOLDLINE_REFLECTION": "true", "FOLDLINE_TOKEN_LIFETIME_S_MAX": str(MONTH_S)}
        self.seal_keys = seal_keys_in(folder / "keys")
        sealed = {**common, "FOLDLINE_SEAL_KEYS_FILE": str(self.seal_keys)}
        write = {**sealed, "FOLDLINE_DATABASE_URL": databases.write.app}
        read = {**sealed, "FOLDLINE_QUERY_DATABASE_URL": databases.read.query or "", "FOLDLINE_DATABASE_URL": databases.read.app}
        to_write = {"FOLDLINE_WRITE_ADDRESS": f"127.0.0.1:{write_port}"}
        source = {**to_write, "FOLDLINE_TOKEN_FILE": str(token_file)}
        saga = {**common, **source, "FOLDLINE_DATABASE_URL": databases.saga.app, "FOLDLINE_TOKEN_FILE": str(saga_token_file)}
        if smtp_url:
            saga |= {"FOLDLINE_SMTP_URL": smtp_url, "FOLDLINE_CONTACTS_FILE": str(contacts_in(folder))}
        self._settings = dict(settings or {})
        self._serve(WRITE, "write_service", {**write, "FOLDLINE_ARCHIVE_URL": archive}, port=write_port)
        self._serve(RELAY, "write_service.relay", {**common, "FOLDLINE_DATABASE_URL": databases.write.app}, wave=1)
        self._serve(READ, "read_service", {**read, **to_write}, port=read_port)
        self._serve(PROJECTOR, "read_service.projector", {**read, **source}, wave=1)
        self._serve(SAGA, "saga_service", saga, port=saga_port)

    def _serve(self, name: str, module: str, settings: Mapping[str, str], *, port: int | None = None, wave: int = 0) -> None:
        """Makes a program known. One without a port of its own answers health on one that nobody else needs to know."""
        health_port, admin_port = port or free_port(), free_port()
        every = {**settings, **_listen(health_port, admin_port), **self._settings}
        program = Program(
            name=name, module=module, wave=wave, settings=every, port=port, health_port=health_port, admin_port=admin_port
        )
        self.add(program)

    def _token_file(self, user_id: str, roles: Iterable[Role]) -> Path:
        """A file with a token for one of our processes, which reads it for every call."""
        file = self.issuer.jwks_file.with_name(f"{user_id}.token")
        file.touch(mode=0o600)
        file.write_text(self.token("foldline", user_id, roles, lifetime_s=MONTH_S))
        return file

    def replica(self, name: str, *, settings: Mapping[str, str] | None = None) -> str:
        """Makes another instance of a program known, on a port of its own, and returns its name; `start` starts it."""
        like = self.programs[name]
        health_port, admin_port = free_port(), free_port()
        number = sum(program.module == like.module for program in self.programs.values()) + 1
        copy = replace(
            like,
            name=f"{name}-{number}",
            port=None if like.port is None else health_port,
            health_port=health_port,
            admin_port=admin_port,
            settings={**like.settings, **_listen(health_port, admin_port), **(settings or {})},
        )
        self.add(copy)
        return copy.name

    def token(
        self,
        tenant: str = "acme",
        user_id: str = "alice",
        roles: Iterable[Role] = (Role.USER, Role.TENANT_ADMIN),
        *,
        lifetime_s: float = 12 * 3600,
    ) -> str:
        """A bearer token that every process of this system accepts."""
        return self.issuer.issue(tenant=tenant, user_id=user_id, roles=roles, lifetime_s=lifetime_s)

    def channel(self, name: str) -> grpc.aio.Channel:
        """A channel to a program that serves gRPC. The caller closes it."""
        return client.channel(self.programs[name].address, retries=False)


def _listen(port: int, admin_port: int) -> dict[str, str]:
    return {"FOLDLINE_LISTEN": f"127.0.0.1:{port}", "FOLDLINE_ADMIN_LISTEN": f"127.0.0.1:{admin_port}"}
