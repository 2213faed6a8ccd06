"""Settings come from the environment and from nowhere else."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
from pydantic import SecretStr, ValidationError

from shared.platform.settings import ServerSettings, load, usage
from shared.platform.unknown import unknown_variables
from shared.platform.urls import DatabaseUrl, NatsUrl

URL = "postgresql://app:swordfish@db:5432/write"
BY_URL = {"FOLDLINE_DATABASE_URL": URL, "FOLDLINE_JWKS_FILE": ""}


class Settings(ServerSettings):
    """As a service extends them."""

    database_url: DatabaseUrl
    """Where the rows are."""
    nats_url: NatsUrl = SecretStr("nats://localhost:4222")
    """Where the events are."""


def test_a_service_is_told_by_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """FOLDLINE_ before the field's name; what is a secret does not show itself."""
    monkeypatch.setenv("FOLDLINE_JWKS_FILE", "/keys/jwks.json")
    monkeypatch.setenv("FOLDLINE_DATABASE_URL", "postgresql://app:swordfish@db/write")
    monkeypatch.setenv("FOLDLINE_UVLOOP", "false")
    settings = Settings()  # type: ignore[call-arg]
    assert (settings.jwks_file, settings.uvloop, settings.listen) == (Path("/keys/jwks.json"), False, "127.0.0.1:0")
    assert "swordfish" not in repr(settings)


def test_the_log_is_told_what_holds_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults too, since they are what one looks for; of a secret only that there is one."""
    monkeypatch.setenv("FOLDLINE_JWKS_FILE", "/keys/jwks.json")
    monkeypatch.setenv("FOLDLINE_DATABASE_URL", URL)
    told = Settings().effective()  # type: ignore[call-arg]
    assert (told["FOLDLINE_JWKS_FILE"], told["FOLDLINE_DRAIN_S"], told["FOLDLINE_REFLECTION"]) == ("/keys/jwks.json", 9, False)
    assert told["FOLDLINE_DATABASE_URL"] == "**********"
    assert "FOLDLINE_JWKS_URL" not in told
    assert "swordfish" not in orjson.dumps(told).decode()


def test_what_is_missing_or_wrong_is_named_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that fails says which variables are at fault, and no value."""
    monkeypatch.setenv("FOLDLINE_SLOW_CALL_MS", "swordfish")
    with pytest.raises(ValidationError) as caught:
        Settings()  # type: ignore[call-arg]
    assert {error["loc"][0] for error in caught.value.errors()} == {"database_url", "slow_call_ms"}
    assert "swordfish" not in str(caught.value)


def test_a_secret_may_be_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The file's last line break is not part of the secret."""
    (tmp_path / "url").write_text("postgresql://app:swordfish@db/write\n")
    monkeypatch.setenv("FOLDLINE_JWKS_FILE", "/keys/jwks.json")
    monkeypatch.setenv("FOLDLINE_DATABASE_URL_FILE", str(tmp_path / "url"))
    assert load(Settings, "a_service", arguments=[]).database_url.get_secret_value() == "postgresql://app:swordfish@db/write"


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({}, "FOLDLINE_DATABASE_URL is missing"),
        ({"FOLDLINE_DATABASE_URL": URL, "FOLDLINE_JWKS_FILE": ""}, "either FOLDLINE_JWKS_FILE or FOLDLINE_JWKS_URL is required"),
        ({"FOLDLINE_DATABASE_URL": URL, "FOLDLINE_JWKS_URL": "https://a/b"}, "either FOLDLINE_JWKS_FILE or FOLDLINE_JWKS_URL is"),
        (
            {**BY_URL, "FOLDLINE_JWKS_URL": "http://a/b"},
            "FOLDLINE_JWKS_URL must begin with https:// unless FOLDLINE_JWKS_PRIVATE",
        ),
        ({**BY_URL, "FOLDLINE_JWKS_URL": "ftp://a/b"}, "FOLDLINE_JWKS_URL: must be like https://issuer/keys"),
        ({**BY_URL, "FOLDLINE_JWKS_URL": "https://u:swordfish@a/b"}, "FOLDLINE_JWKS_URL: must be like https://issuer/keys"),
        ({"FOLDLINE_DATBASE_URL": "swordfish"}, "FOLDLINE_DATBASE_URL is no setting: did you mean FOLDLINE_DATABASE_URL?"),
        ({"FOLDLINE_XYZZY": "swordfish"}, "FOLDLINE_XYZZY is no setting"),
        ({"FOLDLINE_DATABASE_URL": "swordfish", "FOLDLINE_DATABASE_URL_FILE": "/x"}, "are both set: give the secret once"),
        ({"FOLDLINE_DATABASE_URL_FILE": "/not/there"}, "FOLDLINE_DATABASE_URL_FILE: /not/there cannot be read"),
        ({"FOLDLINE_DATABASE_URL": URL, "FOLDLINE_DRAIN_S": "-1"}, "FOLDLINE_DRAIN_S: Input should be greater"),
        ({"FOLDLINE_DATABASE_URL": URL, "FOLDLINE_UVLOOP": "swordfish"}, "FOLDLINE_UVLOOP: "),
        ({"FOLDLINE_DATABASE_URL": "swordfish"}, "FOLDLINE_DATABASE_URL: must be like postgresql://"),
        ({"FOLDLINE_DATABASE_URL": "postgresql://app:swordfish@db:port/write"}, "FOLDLINE_DATABASE_URL: must be like"),
        ({"FOLDLINE_DATABASE_URL": "postgresql://app:swordfish@db"}, "FOLDLINE_DATABASE_URL: must be like"),
        ({"FOLDLINE_DATABASE_URL": URL, "FOLDLINE_NATS_URL": "http://swordfish"}, "FOLDLINE_NATS_URL: must be like nats://"),
        ({"FOLDLINE_DATABASE_URL": URL, "FOLDLINE_NATS_URL": "nats://a,nats://b:x"}, "FOLDLINE_NATS_URL: must be like"),
        ({"FOLDLINE_DATABASE_URL": URL, "FOLDLINE_NATS_URL": "wss://swordfish"}, "FOLDLINE_NATS_URL: must be like nats://"),
        ({"FOLDLINE_DATABASE_URL": URL, "FOLDLINE_LISTEN": "swordfish"}, "FOLDLINE_LISTEN: must be like host:50051"),
        (
            {"FOLDLINE_DATABASE_URL": URL, "FOLDLINE_DRAIN_CALLS_S": "20"},
            "FOLDLINE_DRAIN_CALLS_S must not be larger than FOLDLINE_DRAIN_S",
        ),
        (
            {"FOLDLINE_DATABASE_URL": URL, "FOLDLINE_DEADLINE_MAX_S": "1"},
            "FOLDLINE_DEADLINE_DEFAULT_S must not be larger than FOLDLINE_DEADLINE_MAX_S",
        ),
    ],
)
def test_a_bad_environment_is_one_sentence_and_exit_code_2(
    environment: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The variable is named, its value never."""
    monkeypatch.setenv("FOLDLINE_JWKS_FILE", "/keys/jwks.json")
    for name, value in environment.items():
        if value:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name)
    with pytest.raises(SystemExit) as caught:
        load(Settings, "a_service", arguments=[])
    printed = capsys.readouterr().err
    assert caught.value.code == 2
    assert sentence in printed
    assert len(printed.splitlines()) == 1
    assert "swordfish" not in printed


def test_a_secrets_file_of_any_size_is_not_read_into_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More than 64 KiB is no secret."""
    (tmp_path / "url").write_text("x" * 70_000)
    monkeypatch.setenv("FOLDLINE_DATABASE_URL_FILE", str(tmp_path / "url"))
    with pytest.raises(SystemExit):
        load(Settings, "a_service", arguments=[])
    assert "is larger than 65536 bytes" in capsys.readouterr().err


def test_help_lists_every_variable_with_its_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    """It needs no environment and touches nothing."""
    with pytest.raises(SystemExit) as caught:
        load(Settings, "a_service", arguments=["--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == usage(Settings, "a_service") + "\n"
    text = usage(Settings, "a_service")
    assert "FOLDLINE_DATABASE_URL  (required)\n      Where the rows are. Or FOLDLINE_DATABASE_URL_FILE" in text
    assert "FOLDLINE_UVLOOP  (default: true)" in text


def test_a_process_takes_no_other_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    """A typed option is not silently ignored."""
    with pytest.raises(SystemExit) as caught:
        load(Settings, "a_service", arguments=["--port", "1"])
    assert caught.value.code == 2
    assert "takes no arguments but --help" in capsys.readouterr().err


def test_variables_of_other_programs_and_processes_are_let_be() -> None:
    """Several processes may share one environment, and the shell that runs compose.yaml too."""
    assert (
        unknown_variables({"PATH": "/bin", "FOLDLINE_NATS_URL": "nats://x", "FOLDLINE_TOKEN": "t", "FOLDLINE_IMAGE": "i"}) == []
    )
