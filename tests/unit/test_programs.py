"""The five programs, the bootstrap and the command line: what they print of their settings, and which settings they refuse."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from deploy.bootstrap import main as bootstrap
from docs.generate import PROCESSES
from shared.platform.settings import rows

DATABASE = "postgresql://app:swordfish@db:5432/write"
ENVIRONMENT = {
    "DATABASE_URL": DATABASE,
    "QUERY_DATABASE_URL": DATABASE,
    "NATS_URL": "nats://nats:4222",
    "WRITE_ADDRESS": "write:50051",
    "TOKEN_FILE": "/run/token",
    "JWKS_FILE": "/run/jwks.json",
    "SEAL_KEYS": "00" * 32,
}
NEVER = "this program would have begun"


def main_of(program: str) -> Callable[[], int]:
    """The program's `main`."""
    module = program if program.count(".") else f"{program}.__main__"
    main: Callable[[], int] = importlib.import_module(module).main
    return main


@pytest.fixture(autouse=True)
def settings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program ends with its settings: whatever begins after them is a failure."""

    def begins(*_: object, **__: object) -> int:
        raise AssertionError(NEVER)

    monkeypatch.setattr("shared.platform.startup.run", begins)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(f"FOLDLINE_{name}", value)
    for name in ("DATABASE_URL", "DATABASE_URL_FILE"):  # the bootstrap's
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("program", PROCESSES)
def test_help_lists_all_variables(program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the program itself, whatever the environment is."""
    monkeypatch.setenv("FOLDLINE_LISTEN", "nonsense")
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit) as ended:
        main_of(program)()
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"python -m {program}\n")
    for variable, default, text in rows(PROCESSES[program]):
        assert f"  {variable}  ({default})\n      {text}\n" in f"{printed}\n"


@pytest.mark.parametrize(
    ("program", "told", "sentence"),
    [
        ("write_service", {"COMMAND_SIZE_MAX": "1048577"}, "COMMAND_SIZE_MAX must not be larger than FOLDLINE_REQUEST_SIZE_MAX"),
        ("write_service", {"REQUEST_SIZE_MAX": "4194305"}, "REQUEST_SIZE_MAX: Input should be less than or equal to 4194304"),
        ("write_service", {"ARCHIVE_URL": "gopher://x"}, "FOLDLINE_ARCHIVE_URL: the archive's URL cannot be used"),
        ("write_service", {"ARCHIVE_URL": "file://archive"}, "cannot be used: a folder is named like file:///folder"),
        ("write_service", {"ARCHIVE_URL": "file:///dev/null/x"}, "ARCHIVE_URL: the archive's URL cannot be used: [Errno"),
        ("saga_service", {"PROCESS_ARCHIVE_URL": "s3://"}, "FOLDLINE_PROCESS_ARCHIVE_URL: the archive's URL cannot be used"),
        ("saga_service", {"PROCESS_ARCHIVE_URL": "file:///dev/null/x"}, "ARCHIVE_URL: the archive's URL cannot be used: [Errno"),
        ("read_service", {"WATCHES_MAX": "2000"}, "FOLDLINE_WATCHES_MAX must be smaller than FOLDLINE_CALLS_AT_ONCE_MAX"),
        ("read_service", {"CALLS_AT_ONCE_MAX": "1500"}, "FOLDLINE_WATCHES_MAX must be smaller than FOLDLINE_CALLS_AT_ONCE_MAX"),
        ("read_service", {"WATCHES_PER_TENANT_MAX": "1501"}, "must not be larger than FOLDLINE_WATCHES_MAX"),
        ("read_service", {"WATCHED_LISTS_PER_TENANT_MAX": "151"}, "must not be larger than FOLDLINE_WATCHED_LISTS_MAX"),
        (
            "read_service.projector",
            {"PROJECTOR_GROUPS": "people, acounts"},
            "FOLDLINE_PROJECTOR_GROUPS: there is no group acounts, there are people, accounts, transfers, users",
        ),
        ("write_service.relay", {"LISTEN": "127.0.0.1:7", "ADMIN_LISTEN": "127.0.0.1:7"}, "must not be the same address"),
        ("read_service.projector", {"LISTEN": "0.0.0.0:7", "ADMIN_LISTEN": "127.0.0.1:7"}, "must not be the same address"),
        ("read_service", {"ADMIN_LISTN": "127.0.0.1:7"}, "FOLDLINE_ADMIN_LISTN is no setting: did you mean"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_one_sentence(
    program: str, told: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And exit code 2, before anything begins."""
    for name, value in told.items():
        monkeypatch.setenv(f"FOLDLINE_{name}", value)
    monkeypatch.setattr(sys, "argv", [program])
    with pytest.raises(SystemExit) as ended:
        main_of(program)()
    assert ended.value.code == 2
    [printed] = capsys.readouterr().err.splitlines()
    assert sentence in printed


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("TRACES_EXPORTER", "console", "OTEL_TRACES_EXPORTER: must be one of otlp, none"),
        ("METRICS_EXPORTER", "otlp,console", "OTEL_METRICS_EXPORTER: must be one of otlp, none, prometheus"),
        ("EXPORTER_OTLP_PROTOCOL", "http/protobuf", "OTEL_EXPORTER_OTLP_PROTOCOL: must be grpc"),
        ("EXPORTER_OTLP_TRACES_PROTOCOL", "http/json", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL: must be grpc"),
    ],
)
def test_an_export_that_is_not_there_is_refused_by_name(
    variable: str, value: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rather than nothing being exported, unless the SDK is disabled anyway."""
    monkeypatch.setenv(f"OTEL_{variable}", value)
    monkeypatch.setattr(sys, "argv", ["write_service.relay"])
    with pytest.raises(SystemExit) as ended:
        main_of("write_service.relay")()
    assert ended.value.code == 2
    [printed] = capsys.readouterr().err.splitlines()
    assert printed.startswith(sentence)
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    with pytest.raises(AssertionError, match=NEVER):
        main_of("write_service.relay")()


@pytest.mark.parametrize("program", PROCESSES)
def test_the_environment_of_these_tests_would_do(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So what is refused above is refused for what the test says; and two ports that the system chooses are not one address."""
    monkeypatch.setenv("FOLDLINE_LISTEN", "127.0.0.1:0")
    monkeypatch.setattr(sys, "argv", [program])
    with pytest.raises(AssertionError, match=NEVER):
        main_of(program)()


@pytest.mark.parametrize(("program", "variable"), [("write_service", "ARCHIVE_URL"), ("saga_service", "PROCESS_ARCHIVE_URL")])
def test_nothing_is_touched_before_all_settings_are_good(
    program: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive's folder is made when nothing is left to refuse."""
    folder = tmp_path / "archive"
    monkeypatch.setenv(f"FOLDLINE_{variable}", folder.as_uri())
    monkeypatch.setenv("FOLDLINE_DRAIN_CALLS_S", "99")
    monkeypatch.setattr(sys, "argv", [program])
    with pytest.raises(SystemExit):
        main_of(program)()
    assert not folder.exists()
    monkeypatch.delenv("FOLDLINE_DRAIN_CALLS_S")
    with pytest.raises(AssertionError, match=NEVER):
        main_of(program)()
    assert folder.is_dir()


def test_an_archive_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the start, and not when the first aggregate is boxed. Root may write anything, so the system's answer is a fake."""
    monkeypatch.setattr("shared.line.files.os.access", lambda *_: False)
    monkeypatch.setenv("FOLDLINE_ARCHIVE_URL", tmp_path.as_uri())
    monkeypatch.setattr(sys, "argv", ["write_service"])
    with pytest.raises(SystemExit) as ended:
        main_of("write_service")()
    assert ended.value.code == 2
    assert f"{tmp_path} cannot be written" in capsys.readouterr().err


def test_the_bootstrap_refuses_unknown_variables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Before it looks for a server."""
    monkeypatch.setattr(sys, "argv", ["bootstrap"])
    monkeypatch.setenv("DATABASE_URL", DATABASE)
    monkeypatch.setenv("FOLDLINE_DATBASE_URL", "swordfish")
    assert bootstrap() == 2
    assert capsys.readouterr().err == "FOLDLINE_DATBASE_URL is no setting: did you mean FOLDLINE_DATABASE_URL?\n"


@pytest.mark.parametrize(
    ("told", "words", "sentence"),
    [
        ({}, [], "set DATABASE_URL to an administrator's URL, or DATABASE_URL_FILE to a file that holds it"),
        ({"DATABASE_URL": DATABASE, "DATABASE_URL_FILE": "/x"}, [], "DATABASE_URL and DATABASE_URL_FILE are both set: give"),
        ({"DATABASE_URL_FILE": "/not/there"}, [], "DATABASE_URL_FILE: /not/there cannot be read: No such file or directory"),
        ({"DATABASE_URL_FILE": "/dev/null"}, [], "DATABASE_URL_FILE: must be like postgresql://user:password@host:5432/postgres"),
        ({"DATABASE_URL": "swordfish"}, [], "DATABASE_URL: must be like postgresql://user:password@host:5432/postgres"),
        ({"DATABASE_URL": "host=db password=swordfish"}, [], "DATABASE_URL: must be like postgresql://"),
        ({"DATABASE_URL": "postgresql://u:swordfish@db:port/x"}, [], "DATABASE_URL: must be like postgresql://"),
        ({"DATABASE_URL": "postgresql://u:swordfish@db/x?y=z"}, [], "DATABASE_URL: must be like postgresql://"),
        ({"DATABASE_URL": DATABASE}, ["Foldline"], "the prefix 'Foldline' is no plain name"),
        ({"DATABASE_URL": DATABASE}, ["--files", "/not/there"], "--files: the folder /not/there cannot be read: No such file"),
        ({"DATABASE_URL": DATABASE}, ["--files", "/dev/null"], "--files: the folder /dev/null cannot be read: Not a directory"),
        # No file can be made there, whoever tries.
        ({"DATABASE_URL": DATABASE}, ["--files", "/proc"], "--files: the folder /proc cannot be written: "),
    ],
)  # fmt: skip
def test_what_the_bootstrap_cannot_use_is_one_sentence(
    told: dict[str, str], words: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And exit code 2, before it looks for a server: what is secret is not shown, and no role's password is changed."""

    def looked(*_: object, **__: object) -> None:
        raise AssertionError("it looked for a server")

    monkeypatch.setattr("deploy.bootstrap.psycopg.connect", looked)
    monkeypatch.setattr(sys, "argv", ["bootstrap", *words])
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert bootstrap() == 2
    [printed] = capsys.readouterr().err.splitlines()
    assert printed.startswith(sentence)
    assert "swordfish" not in printed


def test_the_command_line_refuses_unknown_variables() -> None:
    """Before a command does anything; help is printed all the same."""
    told = {"FOLDLINE_WRITE_ADRESS": "swordfish"}
    refused = CliRunner().invoke(app, ["status"], env=told)
    assert refused.exit_code == 2
    assert refused.stderr == "FOLDLINE_WRITE_ADRESS is no setting: did you mean FOLDLINE_WRITE_ADDRESS?\n"
    assert "A first session" in CliRunner().invoke(app, ["--help"], env=told).output
