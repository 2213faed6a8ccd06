"""What the `foldline` command makes of what is typed, without a system to talk to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bank.v1 import user_pb2
from cli.calls import plain
from cli.contract import COMMANDS, build, fields_of
from cli.endpoints import UsageError
from cli.main import ABOUT, app
from cli.send import read_fields, read_secret
from cli.summaries import SUMMARIES
from foldline.v1 import command_pb2
from read_service.registry import RPCS
from shared.platform.identity import Role
from shared.platform.keys import KeyFile
from shared.platform.tokens import Verifier
from write_service import servicers

ID = "0190e4a0-0000-7000-8000-000000000000"


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No environment, and an empty folder to be in."""
    for name in ("FOLDLINE_DATA", "FOLDLINE_TOKEN", "FOLDLINE_WRITE_ADDRESS", "FOLDLINE_READ_ADDRESS", "FOLDLINE_SAGA_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def endpoints(tmp_path: Path) -> None:
    """A system that is said to run, where nobody listens."""
    (tmp_path / ".foldline").mkdir()
    nowhere = "127.0.0.1:1"
    content = {"write": nowhere, "read": nowhere, "saga": nowhere, "tokens": {"acme": "a", "operator": "o"}}
    (tmp_path / ".foldline" / "endpoints.json").write_text(json.dumps(content))


def test_the_help_names_every_command_with_its_fields() -> None:
    """What can be sent is found without leaving the terminal, and it is true."""
    lines = [line.split() for line in CliRunner().invoke(app, ["send", "--help"]).output.splitlines()]
    for name in COMMANDS:
        listed = next(words for words in lines if words[:1] == [name])
        assert listed[1:] == list(fields_of(name))
    assert ["RenamePerson", "person_id", "name"] in lines
    assert ["OpenAccount", "account_id", "owner_id", "currency", "name"] in lines
    assert ["StartUserRegistration", "user_id", "login", "email", "password"] in lines
    assert ["ClosePerson", "person_id"] in lines
    assert len(COMMANDS) == 14


def test_every_command_and_summary_of_the_contracts_is_known() -> None:
    """A caller can send and get what the services take and show."""
    assert set(COMMANDS) == {rpc.rpartition("/")[2] for rpc in servicers.COMMANDS}
    assert sorted(SUMMARIES) == sorted(rpcs.summary.name for rpcs in RPCS)


def test_what_only_processes_may_set_is_no_field() -> None:
    """Whoever tries is told so before anything is sent; a transfer's own id is another matter."""
    assert list(fields_of("DepositMoney")) == list(fields_of("WithdrawMoney")) == ["account_id", "amount_minor", "currency"]
    assert "transfer_id" in fields_of("StartTransfer")
    with pytest.raises(UsageError, match="has no transfer_id"):
        build("DepositMoney", {"transfer_id": ID}, command_id=None, expected_version=None)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["dev"],
        ["demo"],
        ["token"],
        ["status"],
        ["send"],
        ["get"],
        ["get", "stream"],
        ["get", "transfer"],
        ["get", "user"],
        ["process"],
        ["process", "list"],
        ["process", "show"],
        ["process", "retry"],
        ["process", "cancel"],
        ["process", "accept-history"],
        ["projection"],
        ["projection", "accept-history"],
        ["restored"],
    ],
)
def test_every_command_explains_itself(words: list[str]) -> None:
    """--help works everywhere, and needs no system."""
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0
    assert "--help" in result.output


def test_help_does_not_load_grpc_or_sqlalchemy() -> None:
    """Whoever asks for help gets it at once."""
    program = (
        "import sys, cli.main\n"
        "from typer.testing import CliRunner\n"
        "assert 'DepositMoney' in CliRunner().invoke(cli.main.app, ['send', '--help']).output\n"
        "print([name for name in ('grpc', 'sqlalchemy', 'psycopg', 'joserfc') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)  # noqa: S603 (ours)
    assert done.stdout == "[]\n"


def test_the_exit_codes_are_documented() -> None:
    """Scripts may rely on them."""
    assert [line.split()[0] for line in ABOUT.splitlines() if line.strip()[:1].isdigit()] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["send", "Nonsense"], 2, "no such command"),
        (["send", "RenamePerson", "colour=red"], 2, "has no colour"),
        (["send", "RenamePerson", "name"], 2, "not name=value"),
        (["send", "RenamePerson", "name=a", "name=b"], 2, "given twice"),
        (["send", "RenamePerson", "--json", "{"], 2, "not JSON"),
        (["send", "RenamePerson", "--json", "[]"], 2, "takes an object"),
        (["send", "DepositMoney", "amount_minor=many"], 2, "amount_minor"),
        (["send", "RenamePerson", "name=a", "--tenant", "elsewhere"], 2, "no token for tenant 'elsewhere'"),
        (["send", "RenamePerson", "--expected-version", "-1"], 2, "--expected-version"),
        (["nonsense"], 2, "nonsense"),
        (["get", "person"], 2, "Missing argument"),
        (["token", "--tenant", "ACME"], 2, "not a tenant"),
        (["token", "--role", "king"], 2, "king"),
        (["send", "RenamePerson", "name=a"], 3, "UNAVAILABLE"),
        (["status"], 3, "UNAVAILABLE"),
        (["get", "transfer", ID], 3, "UNAVAILABLE"),
        (["get", "user", ID], 3, "UNAVAILABLE"),
        (["process", "list"], 3, "UNAVAILABLE"),
        (["process", "list", "--status", "lost"], 2, "lost"),
        (["process", "list", "--limit", "0"], 2, "--limit"),
        (["process", "show"], 2, "Missing argument"),
        (["process", "show", "transfer", ID, ID], 2, "one process at a time"),
        (["process", "show", "transfer", ID], 3, "UNAVAILABLE"),
        (["process", "show", ID], 3, "UNAVAILABLE"),
        (["process", "retry", "transfer", ID], 3, "UNAVAILABLE"),
        (["process", "cancel", "transfer", ID], 3, "UNAVAILABLE"),
        (["send", "StartUserRegistration", "login=a"], 2, "the password is read from standard input, which is empty"),
    ],
)
def test_what_cannot_be_done_says_why(tmp_path: Path, words: list[str], code: int, text: str) -> None:
    """2 for what was typed, 3 for nobody there; each with a sentence."""
    endpoints(tmp_path)
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, text in result.output) == (code, True), result.output


def test_without_a_running_system_the_way_to_one_is_told() -> None:
    """The first thing a newcomer may type."""
    result = CliRunner().invoke(app, ["status"])
    assert result.exit_code == 3
    assert "foldline dev" in result.output


def test_processes_need_the_saga_services_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other commands do without it."""
    monkeypatch.setenv("FOLDLINE_WRITE_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("FOLDLINE_READ_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("FOLDLINE_TOKEN", "t")
    result = CliRunner().invoke(app, ["process", "list"])
    assert (result.exit_code, "FOLDLINE_SAGA_ADDRESS" in result.output) == (2, True)
    monkeypatch.setenv("FOLDLINE_SAGA_ADDRESS", "127.0.0.1:1")
    assert CliRunner().invoke(app, ["process", "list"]).exit_code == 3


class Terminal:
    """Standard input as a terminal; the second line is what is typed when asked again."""

    def isatty(self) -> bool:
        return True


def test_a_password_that_is_not_given_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a terminal without an echo and twice; else the first line of standard input. It is printed nowhere."""
    endpoints(tmp_path)
    sent: list[str] = []

    async def send(endpoints: object, tenant: str, request: user_pb2.StartUserRegistrationRequest) -> None:
        sent.append(request.password)
        raise UsageError("not sent")

    monkeypatch.setattr("cli.calls.send", send)
    words = ["send", "StartUserRegistration", "user_id=new", "login=alice", "email=alice@example.com"]
    piped = CliRunner().invoke(app, words, input="correct horse\nbattery\n")
    given = CliRunner().invoke(app, [*words, "password=given word"], input="correct horse\n")
    asked: list[tuple[str, dict[str, object]]] = []

    def prompt(text: str, **how: object) -> str:
        asked.append((text, how))
        return "typed word"

    monkeypatch.setattr("cli.send.sys.stdin", Terminal())
    monkeypatch.setattr("cli.send.typer.prompt", prompt)
    assert read_secret("password") == "typed word"
    assert sent == ["correct horse", "given word"]
    assert not any(word in result.output for result in (piped, given) for word in ("horse", "given word"))
    assert asked == [("password", {"hide_input": True, "confirmation_prompt": True, "err": True})]


def test_problems_are_data_too(tmp_path: Path) -> None:
    """With -o json a program reads the problem as it reads an answer."""
    endpoints(tmp_path)
    runner = CliRunner()
    usage = json.loads(runner.invoke(app, ["send", "Nonsense", "-o", "json"]).stdout)
    away = json.loads(runner.invoke(app, ["send", "RenamePerson", "--command-id", ID, "-o", "json"]).stdout)
    assert (usage["error"]["code"], usage["error"]["text"].startswith("no such command")) == ("USAGE", True)
    assert (away["error"]["code"], away["error"]["facts"]["command_id"]) == ("UNAVAILABLE", ID)


def test_a_token_is_printed_that_services_believe(tmp_path: Path) -> None:
    """For `buf curl` and scripts: the token and nothing else."""
    result = CliRunner().invoke(app, ["token", "--tenant", "umbrella", "--user", "ada", "--role", "user", "--role", "reader"])
    verifier = Verifier(KeyFile(tmp_path / ".foldline/keys/jwks.json"), issuer="https://foldline.localhost", audience="foldline")
    identity = verifier.verify(result.stdout.strip())
    assert (identity.tenant, identity.user_id, identity.roles) == ("umbrella", "ada", frozenset({Role.USER, Role.READER}))


def test_new_makes_an_id_and_only_for_ids() -> None:
    """`new` spares the newcomer a UUID; a person may be called new."""
    request = build("RegisterPerson", {"person_id": "new", "name": "new"}, command_id=None, expected_version=None)
    assert isinstance(request.person_id, str)  # type: ignore[attr-defined]
    assert len(request.person_id) == 36  # type: ignore[attr-defined]
    assert request.name == "new"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("typed", "amount_minor"),
    [
        ("9007199254740993", 9007199254740993),
        ("9007199254740993.0", 9007199254740993),
        ("9223372036854775807", 9223372036854775807),
        ("1e3", 1000),
    ],
)
def test_an_amount_is_exact_however_it_is_written(typed: str, amount_minor: int) -> None:
    """A float holds 2**53 + 1 as 2**53; what is typed, in a pair or in JSON, never becomes one."""
    pair = build("DepositMoney", read_fields([f"amount_minor={typed}"], None), command_id=ID, expected_version=None)
    assert pair.amount_minor == amount_minor  # type: ignore[attr-defined]
    in_json = build("DepositMoney", read_fields([], f'{{"amount_minor": {typed}}}'), command_id=ID, expected_version=None)
    assert in_json.amount_minor == amount_minor  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "typed", ["5.5", "1e999999999", "9223372036854775807.5", "9223372036854775808", "NaN", "Infinity", "-Infinity", "true"]
)
def test_an_amount_that_is_no_whole_number_is_refused(typed: str) -> None:
    """Before anything is sent, in a sentence that names the field."""
    for fields in (read_fields([f"amount_minor={typed}"], None), read_fields([], f'{{"amount_minor": {typed}}}')):
        with pytest.raises(UsageError, match="amount_minor"):
            build("DepositMoney", fields, command_id=ID, expected_version=None)


def test_options_are_set_apart_from_fields() -> None:
    """The command's id and the expected version are options of this command, and cannot be smuggled in as fields."""
    request = build("RenamePerson", {"name": "a"}, command_id=ID, expected_version=0)
    assert request.options == command_pb2.CommandOptions(command_id=ID, expected_version=0)  # type: ignore[attr-defined]
    with pytest.raises(UsageError):
        build("RenamePerson", {"options": {"command_id": ID}}, command_id=None, expected_version=None)


def test_numbers_of_64_bits_are_numbers() -> None:
    """Whoever reads our JSON need not know that protobuf writes them as text; those inside other messages too."""
    record = command_pb2.CommandRecord(receipt=command_pb2.CommandReceipt(version=7, position=2**53 + 1), user_id="7")
    made = plain(record)
    assert (made["receipt"]["version"], made["receipt"]["position"], made["user_id"]) == (7, 2**53 + 1, "7")


def test_a_check_of_processes_that_crashes_is_no_mismatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that cannot be imported ends with 1, as a mismatch does, and says nothing: exit code 4, and what it said."""
    (tmp_path / "saga_service").mkdir()
    (tmp_path / "saga_service" / "__init__.py").touch()
    (tmp_path / "saga_service" / "check.py").write_text("raise ValueError('broken')\n")
    monkeypatch.setenv("FOLDLINE_DATABASE_URL", "postgresql://app@127.0.0.1:1/saga")
    done = CliRunner().invoke(app, ["process", "check"])
    assert done.exit_code == 4
    assert "ValueError: broken" in done.stderr
