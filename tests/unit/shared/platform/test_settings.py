"""Settings come from the environment and from nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from shared.platform.settings import ServerSettings


class Settings(ServerSettings):
    """As a service extends them."""

    database_url: SecretStr


def test_a_service_is_told_by_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """FOLDLINE_ before the field's name; what is a secret does not show itself."""
    monkeypatch.setenv("FOLDLINE_JWKS_FILE", "/keys/jwks.json")
    monkeypatch.setenv("FOLDLINE_DATABASE_URL", "postgresql://app:swordfish@db/write")
    monkeypatch.setenv("FOLDLINE_UVLOOP", "false")
    settings = Settings()  # type: ignore[call-arg]
    assert (settings.jwks_file, settings.uvloop, settings.listen) == (Path("/keys/jwks.json"), False, "127.0.0.1:0")
    assert "swordfish" not in repr(settings)


def test_what_is_missing_or_wrong_is_named_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that fails says which variables are at fault, and no value."""
    monkeypatch.setenv("FOLDLINE_SLOW_CALL_MS", "swordfish")
    with pytest.raises(ValidationError) as caught:
        Settings()  # type: ignore[call-arg]
    assert {error["loc"][0] for error in caught.value.errors()} == {"jwks_file", "database_url", "slow_call_ms"}
    assert "swordfish" not in str(caught.value)
