"""Addresses in settings, looked at before anything is done: one that is malformed would be waited for, for ever.

What is wrong is told without the address, which may hold a password.
"""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, SecretStr

_NATS_SCHEMES = ("nats", "tls", "ws", "wss")


def _database_url(value: SecretStr) -> SecretStr:
    from psycopg import ProgrammingError  # noqa: PLC0415 (--help needs no driver)
    from psycopg.conninfo import conninfo_to_dict  # noqa: PLC0415

    try:
        known = conninfo_to_dict(value.get_secret_value())
    except ProgrammingError:
        known = {}
    ports = str(known.get("port") or "").split(",")
    if not known.get("dbname") or not all(port.isdigit() for port in ports if port):
        raise ValueError("must be like postgresql://user:password@host:5432/database")
    return value


def _nats_url(value: SecretStr) -> SecretStr:
    for one in value.get_secret_value().split(","):
        if not _has_host(one.strip(), _NATS_SCHEMES):
            raise ValueError("must be like nats://user:password@host:4222, or several of these separated by commas")
    return value


def _address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host.strip("[]") or not port.isdigit() or not 0 <= int(port) < 2**16:
        raise ValueError("must be like host:50051")
    return value


def _has_host(url: str, schemes: tuple[str, ...]) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in schemes and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


DatabaseUrl = Annotated[SecretStr, AfterValidator(_database_url)]
"""A URL or a connection string of PostgreSQL that names a database."""
NatsUrl = Annotated[SecretStr, AfterValidator(_nats_url)]
"""One or several URLs of NATS servers."""
Address = Annotated[str, AfterValidator(_address)]
"""A host and a port."""
