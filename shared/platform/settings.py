"""What every process is told from outside: environment variables that begin with `FOLDLINE_`, and nothing else.

A service adds its own fields in a subclass, each with a docstring under it, which `--help` and docs/settings.md print, and
reads them once, at the top of its `__main__`:

    settings = load(WriteSettings, "write_service")      # FOLDLINE_DATABASE_URL, FOLDLINE_LISTEN, ...

A secret may be given by the name of a file that holds it: `FOLDLINE_DATABASE_URL_FILE`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from shared.platform.certificates import TlsFiles, read_authorities, read_pair
from shared.platform.otel import unsupported
from shared.platform.unknown import PREFIX, unknown_variables
from shared.platform.urls import Address, KeysUrl, OverTls

SECRET_BYTES_MAX = 64 * 1024
MEBIBYTE = 1024 * 1024
MESSAGE_SIZE_MAX = 4 * MEBIBYTE
"""The largest message that gRPC takes here, whatever a setting says."""
EVERY_ADDRESS = frozenset({"0.0.0.0", "[::]"})  # noqa: S104 (to compare with)

Seconds = Annotated[float, Field(ge=0)]
Bytes = Annotated[int, Field(gt=0)]

SettingsT = TypeVar("SettingsT", bound="ProcessSettings")


class CannotStart(Exception):
    """What a setting names cannot be used: an address is taken, a file cannot be read. The text is one sentence."""


class ProcessSettings(BaseSettings):
    """What every process has."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="ignore", hide_input_in_errors=True, use_attribute_docstrings=True
    )

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe log lines that are written."""
    uvloop: bool = True
    """Whether to run on uvloop, the faster event loop."""
    listen: Address = "127.0.0.1:0"
    """The address to listen on, host:port; port 0 lets the system choose one. gRPC health is answered here by every process."""
    admin_listen: Address = "127.0.0.1:0"
    """The address of /healthz, /readyz and /metrics over HTTP. They need no token: keep it on the operator's network."""
    tls_cert_file: Path | None = None
    """The certificate that gRPC is served with, its own first and then its chain, as PEM; read again when it changes. Without one
    gRPC is plain text. The admin port is HTTP in any case."""
    tls_key_file: Path | None = None
    """The certificate's private key, as PEM without a passphrase."""
    tls_client_ca_file: Path | None = None
    """Authorities, as PEM: only clients that show a certificate of one of them may connect, health checks included."""
    tls_required: bool = False
    """Whether to refuse to start unless gRPC is served over TLS, and PostgreSQL, NATS, the write service, the mail server and the
    issuer of keys are called over it. Webhooks are then sent over https alone."""
    metric_tenants: str = ""
    """The tenants that metrics tell apart, separated by commas. All others are in the sums alone."""

    @property
    def tenants_told_apart(self) -> frozenset[str]:
        """The names in `metric_tenants`."""
        return frozenset(filter(None, map(str.strip, self.metric_tenants.split(","))))

    def effective(self) -> dict[str, object]:
        """What holds, by variable, for the log. Of a secret only that there is one."""
        return {f"{PREFIX}{name.upper()}": value for name, value in self.model_dump(mode="json").items() if value is not None}

    def prepare(self) -> None:
        """Makes what settings name and the process needs, once all of them are found to be good. Raises ValueError."""

    @property
    def listens_locally(self) -> bool:
        """Whether `listen` is an address of this machine that no other machine reaches."""
        host = self.listen.rpartition(":")[0].strip("[]")
        return host in {"localhost", "::1"} or host.startswith("127.")

    @cached_property
    def server_tls(self) -> TlsFiles:
        """The certificate that gRPC is served with, if any, and the authorities of those that clients must show."""
        return TlsFiles(self.tls_client_ca_file, self.tls_cert_file, self.tls_key_file, what="server")

    @model_validator(mode="after")
    def _listens_at_two_places(self) -> ProcessSettings:
        (host, port), (admin_host, admin_port) = (it.rsplit(":", 1) for it in (self.listen, self.admin_listen))
        if int(port) == int(admin_port) != 0 and (host == admin_host or {host, admin_host} & EVERY_ADDRESS):
            raise ValueError(f"{PREFIX}LISTEN and {PREFIX}ADMIN_LISTEN must not be the same address")
        return self

    @model_validator(mode="after")
    def _tls_agrees(self) -> ProcessSettings:
        refuse_unusable(self, "tls_cert_file", "tls_key_file", "tls_client_ca_file")
        if self.tls_client_ca_file is not None and self.tls_cert_file is None:
            raise ValueError(f"{PREFIX}TLS_CLIENT_CA_FILE needs {PREFIX}TLS_CERT_FILE")
        if self.tls_required:
            if self.tls_cert_file is None:
                raise ValueError(f"{PREFIX}TLS_REQUIRED needs {PREFIX}TLS_CERT_FILE")
            for name, field in type(self).model_fields.items():
                value = getattr(self, name)
                text = value.get_secret_value() if isinstance(value, SecretStr) else value
                for over in field.metadata:
                    if isinstance(over, OverTls) and text is not None and not over.leads(text):
                        raise ValueError(f"{PREFIX}TLS_REQUIRED: {PREFIX}{name.upper()} {over.like}")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then the environment, then the files that the environment names. No `.env` file is ever read."""
        return init_settings, env_settings, SecretFiles(settings_cls)


class ServerSettings(ProcessSettings):
    """What every process has that serves gRPC."""

    jwks_file: Path | None = None
    """The public keys that tokens are verified with, a JSON Web Key Set; the file is read again when it changes. Either this or
    FOLDLINE_JWKS_URL is required."""
    jwks_url: KeysUrl | None = None
    """Where the key set is fetched from, https://issuer/keys: at the start, every five minutes, and when a token names a key that
    is not in it, at most every ten seconds. While it is away the keys that are known stay valid."""
    jwks_ca_file: Path | None = None
    """The authorities of the certificate of that URL's server, as PEM; without it the usual public ones."""
    jwks_private: bool = False
    """Whether that URL may lead to private addresses, and to those by plain http: for an issuer in the same network."""
    token_issuer: str = "https://foldline.localhost"
    """The issuer that tokens must name."""
    token_audience: str = "foldline"
    """The audience that tokens must name."""
    token_leeway_s: Seconds = 30
    """How far the clocks of issuer and service may differ, in seconds."""
    token_lifetime_s_max: Annotated[float, Field(gt=0)] = 24 * 3600
    """The longest time from a token's issue to its end, in seconds; one that is valid for longer is refused."""
    reflection: bool = False
    """Whether to serve gRPC reflection, which needs no token and tells everybody the contracts."""

    deadline_default_s: Annotated[float, Field(gt=0)] = 30
    """The deadline of a call that brings none, in seconds."""
    deadline_max_s: Annotated[float, Field(gt=0)] = 60
    """The longest deadline of a call, in seconds; a longer one is cut to it."""
    stream_s_max: Annotated[float, Field(gt=0)] = 600
    """How long a client may stream requests over one call, in seconds; then what came is answered, and the stream ends."""
    request_size_max: Annotated[Bytes, Field(le=MESSAGE_SIZE_MAX)] = MEBIBYTE
    """The largest request, in bytes. SendBatch takes 4 MiB."""
    calls_at_once_max: Annotated[int, Field(gt=0)] = 2000
    """How many calls of tenants are served at once. Tenants share them; what is more is refused, to be tried again."""
    slow_call_ms: Annotated[float, Field(gt=0)] = 500
    """A call that takes longer is logged as slow, in milliseconds."""
    drain_calls_s: Seconds = 6
    """After SIGTERM: how long calls in flight may take, in seconds."""
    drain_s: Seconds = 9
    """After SIGTERM: how long the process may take to end, in seconds."""

    @model_validator(mode="after")
    def _agree(self) -> ServerSettings:
        if (self.jwks_file is None) == (self.jwks_url is None):
            raise ValueError(f"either {PREFIX}JWKS_FILE or {PREFIX}JWKS_URL is required")
        if self.jwks_url is not None and self.jwks_url.startswith("http:"):
            if self.tls_required:
                raise ValueError(f"{PREFIX}TLS_REQUIRED: {PREFIX}JWKS_URL must begin with https://")
            if not self.jwks_private:
                raise ValueError(f"{PREFIX}JWKS_URL must begin with https:// unless {PREFIX}JWKS_PRIVATE is set")
        refuse_larger(self, deadline_default_s="deadline_max_s", drain_calls_s="drain_s")
        return self


class SecretFiles(PydanticBaseSettingsSource):
    """Secrets from files: the value of the field `database_url` from the file that FOLDLINE_DATABASE_URL_FILE names.

    One line break at the end of the file is dropped. Raises ValueError if the file cannot be read, is larger than
    64 KiB, or the variable itself is set as well.
    """

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """The content of the file that the field's variable names; None if the variable is not set."""
        return self._read(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        """The values of all secrets that are given by a file."""
        found = {name: self._read(name) for name, field in self.settings_cls.model_fields.items() if is_secret(field)}
        return {name: value for name, value in found.items() if value is not None}

    def _read(self, name: str) -> str | None:
        variable = f"{PREFIX}{name.upper()}"
        path = os.environ.get(f"{variable}_FILE")
        if not path:
            return None
        if os.environ.get(variable):
            raise ValueError(f"{variable} and {variable}_FILE are both set: give the secret once")
        try:
            with Path(path).open("rb") as file:
                content = file.read(SECRET_BYTES_MAX + 1)
            if len(content) > SECRET_BYTES_MAX:
                raise ValueError(f"{variable}_FILE: {path} is larger than {SECRET_BYTES_MAX} bytes")
            return content.decode().removesuffix("\n").removesuffix("\r")
        except OSError as error:
            raise ValueError(f"{variable}_FILE: {path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ValueError(f"{variable}_FILE: {path} is not UTF-8 text") from None


def load(settings: type[SettingsT], program: str, *, arguments: Sequence[str] | None = None) -> SettingsT:
    """The settings of a process, from its environment.

    With `--help` it prints them and exits with 0. A variable that is missing, malformed, unknown or contradicts another
    is named in one sentence on standard error, without its value, and the process exits with 2, before it touches anything.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--help" in arguments or "-h" in arguments:
        print(usage(settings, program))
        raise SystemExit(0)
    if arguments:
        _refuse([f"{program} takes no arguments but --help: it is set up by environment variables"])
    if refused := unknown_variables(os.environ) + unsupported():
        _refuse(refused)
    try:
        found = settings()
        found.prepare()
    except ValidationError as error:
        _refuse([_sentence(each) for each in error.errors(include_url=False, include_input=False)])
    except ValueError as error:
        _refuse([str(error)])
    return found


def refuse_larger(settings: ProcessSettings, **pairs: str) -> None:
    """Raises ValueError if the field on the left of a pair has a larger number than the one on the right."""
    for less, more in pairs.items():
        if getattr(settings, less) > getattr(settings, more):
            raise ValueError(f"{PREFIX}{less.upper()} must not be larger than {PREFIX}{more.upper()}")


def refuse_unusable(settings: ProcessSettings, cert: str, key: str, authorities: str = "") -> None:
    """Raises ValueError, with the variable's name, unless the files that these fields name can be used, and fit each other."""
    cert_file, key_file = getattr(settings, cert), getattr(settings, key)
    if (cert_file is None) != (key_file is None):
        raise ValueError(f"{PREFIX}{cert.upper()} and {PREFIX}{key.upper()} need each other")
    if cert_file is not None:
        named(cert, lambda: read_pair(cert_file, key_file))
    if authorities and (file := getattr(settings, authorities)) is not None:
        named(authorities, lambda: read_authorities(file))


def named(field: str, read: Callable[[], object]) -> None:
    """Calls `read`, and says which variable is at fault if that raises ValueError."""
    try:
        read()
    except ValueError as error:
        raise ValueError(f"{PREFIX}{field.upper()}: {error}") from None


def is_secret(field: FieldInfo) -> bool:
    """Whether a field is a secret, which may be given by a file."""
    return field.annotation is SecretStr or SecretStr in getattr(field.annotation, "__args__", ())


def usage(settings: type[ProcessSettings], program: str) -> str:
    """What `--help` prints: the program and each of its variables."""
    lines = [f"python -m {program}", "", (settings.__doc__ or "").partition("\n")[0], "", "Environment variables:"]
    for variable, default, text in rows(settings):
        lines += [f"  {variable}  ({default})", f"      {text}"]
    return "\n".join(lines)


def rows(settings: type[ProcessSettings]) -> list[tuple[str, str, str]]:
    """For each setting its variable, its default as text (or `required`) and what it means; what is required comes first."""
    found = []
    for name, field in settings.model_fields.items():
        text = " ".join((field.description or "").split())
        if is_secret(field):
            text += f" Or {PREFIX}{name.upper()}_FILE, a file that holds it."
        found.append((f"{PREFIX}{name.upper()}", _default(field), text))
    return sorted(found, key=lambda row: row[1] != "required")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
    return "default: none" if field.default in (None, "") else f"default: {value}"


def _sentence(error: Any) -> str:
    """One of pydantic's errors, with the variable's name in front and without its value."""
    place = ".".join(str(part) for part in error["loc"])
    if not place:
        return str(error["msg"]).removeprefix("Value error, ")
    variable = f"{PREFIX}{place.upper()}"
    if error["type"] == "missing":
        return f"{variable} is missing"
    return f"{variable}: {str(error['msg']).removeprefix('Value error, ')}"


def _refuse(sentences: Sequence[str]) -> NoReturn:
    for sentence in sentences:
        print(sentence, file=sys.stderr)
    raise SystemExit(2)
