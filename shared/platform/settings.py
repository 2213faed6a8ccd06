"""What every process is told from outside: environment variables that begin with `FOLDLINE_`, and nothing else.

A service adds its own fields in a subclass and reads them once, at the top of its `__main__`:

    class WriteSettings(ServerSettings):
        database_url: SecretStr

    settings = WriteSettings()      # FOLDLINE_DATABASE_URL, FOLDLINE_LISTEN, ...; raises ValidationError, naming each
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

Seconds = Annotated[float, Field(ge=0)]
Bytes = Annotated[int, Field(gt=0)]

MEBIBYTE = 1024 * 1024


class ProcessSettings(BaseSettings):
    """What every process has."""

    model_config = SettingsConfigDict(env_prefix="FOLDLINE_", frozen=True, extra="ignore", hide_input_in_errors=True)

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    # The faster event loop. It has an open crash report, so it can be switched off.
    uvloop: bool = True


class ServerSettings(ProcessSettings):
    """What every process has that serves gRPC."""

    # Where to listen; port 0 lets the system choose one.
    listen: str = "127.0.0.1:0"
    # The public keys that tokens are believed by, as a JSON Web Key Set. The file is read again when it changes.
    jwks_file: Path
    token_issuer: str = "https://foldline.localhost"
    token_audience: str = "foldline"
    token_leeway_s: Seconds = 30
    reflection: bool = True

    # A call without a deadline gets the first, one with a longer deadline than the second gets the second.
    deadline_default_s: Annotated[float, Field(gt=0)] = 30
    deadline_max_s: Annotated[float, Field(gt=0)] = 60
    # A request of more is refused, unless the table of RPCs gives it more room.
    request_size_max: Bytes = MEBIBYTE
    # More calls at once are refused, to be tried again in a moment.
    calls_at_once_max: Annotated[int, Field(gt=0)] = 2000
    slow_call_ms: Annotated[float, Field(gt=0)] = 500
    # From SIGTERM to the end: how long calls in flight may take, and how long all of it may.
    drain_calls_s: Seconds = 6
    drain_s: Seconds = 9
