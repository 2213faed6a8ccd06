"""Addresses in settings, looked at before anything is done: one that is malformed would be waited for, for ever.

What is wrong is told without the address, which may hold a password.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, SecretStr

TLS_SCHEME = "grpcs://"
"""Before the address of a service that is called over TLS."""

_NATS_SCHEMES = ("nats", "tls")


@dataclass(frozen=True, slots=True)
class OverTls:
    """Says of the type of an address whether one leads over TLS, and what it should be like."""

    leads: Callable[[str], bool]
    like: str


def refuse_admin_url(value: str) -> None:
    """Raises ValueError, without the value, unless it is a URL of PostgreSQL, which may name no database.

    Those of the services are made from it, so a connection string of names and values will not do.
    """
    if not (value.startswith(("postgresql://", "postgres://")) and _is_sound(_known(value))):
        raise ValueError("must be like postgresql://user:password@host:5432/postgres")


def _known(value: str) -> dict[str, Any]:
    """What a URL or a connection string says, by name; nothing if it is malformed."""
    from psycopg import ProgrammingError  # noqa: PLC0415 (--help needs no driver)
    from psycopg.conninfo import conninfo_to_dict  # noqa: PLC0415

    try:
        return conninfo_to_dict(value)
    except ProgrammingError:
        return {}


def _is_sound(known: Mapping[str, Any]) -> bool:
    return bool(known) and all(port.isdigit() for port in str(known.get("port") or "").split(",") if port)


def _database_url(value: SecretStr) -> SecretStr:
    known = _known(value.get_secret_value())
    if not known.get("dbname") or not _is_sound(known):
        raise ValueError("must be like postgresql://user:password@host:5432/database")
    root = known.get("sslrootcert")
    if str(known.get("sslmode")).startswith("verify-") and root != "system" and not (root and Path(str(root)).is_file()):
        raise ValueError("with this sslmode must have sslrootcert=FILE, a file that can be read, or sslrootcert=system")
    return value


def _database_is_verified(value: str) -> bool:
    return _known(value).get("sslmode") == "verify-full"


def client_certificate(value: str) -> Path | None:
    """The file of the client certificate that a URL of PostgreSQL names, if it does."""
    file = _known(value).get("sslcert")
    return Path(str(file)) if file else None


def refuse_nats_url(value: str) -> None:
    """Raises ValueError, without the value, unless it is one or several URLs of NATS servers."""
    if not all(_has_host(one.strip(), _NATS_SCHEMES) for one in value.split(",")):
        raise ValueError("must be like nats://user:password@host:4222, or several of these separated by commas")


def _nats_url(value: SecretStr) -> SecretStr:
    refuse_nats_url(value.get_secret_value())
    return value


def nats_is_verified(value: str) -> bool:
    """Whether each of the URLs is one of a server that is reached over TLS."""
    return all(urlsplit(one.strip()).scheme == "tls" for one in value.split(","))


def _keys_url(value: str) -> str:
    if not _has_host(value, ("https", "http")) or "@" in urlsplit(value).netloc:
        raise ValueError("must be like https://issuer/keys, without user and password")
    return value


def service_address(value: str) -> str:
    """The address unchanged. Raises ValueError unless it is a host and a port, with or without `grpcs://` before them."""
    try:
        if value.startswith(("http://", "https://")):
            raise ValueError
        _address(value.removeprefix(TLS_SCHEME))
    except ValueError:
        raise ValueError("must be like host:50051, or grpcs://host:50051 for TLS") from None
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


DatabaseUrl = Annotated[SecretStr, AfterValidator(_database_url), OverTls(_database_is_verified, "must say sslmode=verify-full")]
"""A URL or a connection string of PostgreSQL that names a database."""
NatsUrl = Annotated[SecretStr, AfterValidator(_nats_url), OverTls(nats_is_verified, "must begin with tls://")]
"""One or several URLs of NATS servers."""
KeysUrl = Annotated[str, AfterValidator(_keys_url)]
"""A URL of a set of keys."""
Address = Annotated[str, AfterValidator(_address)]
"""A host and a port."""
_SERVICE_OVER_TLS = OverTls(lambda value: value.startswith(TLS_SCHEME), f"must begin with {TLS_SCHEME}")
ServiceAddress = Annotated[str, AfterValidator(service_address), _SERVICE_OVER_TLS]
"""A host and a port of a service, with `grpcs://` before it for TLS."""
PerhapsServiceAddress = Annotated[ServiceAddress | None, _SERVICE_OVER_TLS]
"""The same, or None. What is said of one member of a union is not in the field's metadata, so `OverTls` is said of the whole."""
