"""How a process begins: the first line of its log."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from pydantic import SecretStr

from shared.platform import program, startup, telemetry
from shared.platform.otel import release
from shared.platform.peers import BrokerPeer
from shared.platform.settings import CannotStart
from tests.support.logs import capture_logs


@pytest.fixture(autouse=True)
def log_of_the_tests() -> Iterator[None]:
    """What a process sets up for itself ends with the test."""
    with capture_logs():
        yield


async def nothing() -> None:
    """A process that ends at once."""


def lines_of(printed: str) -> list[dict[str, object]]:
    """The lines of a log."""
    return [json.loads(line) for line in printed.splitlines()]


def test_the_first_line_has_version_and_settings_without_secrets(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On standard output, with what holds by default as well."""
    monkeypatch.setattr(program, "run", lambda *_, **__: telemetry.logger("a").warning("ran"))
    settings = BrokerPeer(nats_url=SecretStr("nats://app:swordfish@nats:4222"))
    assert startup.run("relay", settings, nothing) == 0
    printed = capfd.readouterr()
    assert "swordfish" not in printed.out + printed.err
    first, second = lines_of(printed.out)
    assert (first["event"], first["level"], first["service"], first["version"]) == ("process_starts", "info", "relay", release())
    told = first["settings"]
    assert isinstance(told, dict)
    assert (told["FOLDLINE_NATS_URL"], told["FOLDLINE_LOG_LEVEL"]) == ("**********", "info")
    assert second["event"] == "ran"


def test_what_a_process_refuses_to_run_on_is_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """And exit code 1, without a traceback."""

    def refuses(*_: object, **__: object) -> None:
        raise CannotStart("the address is taken")

    monkeypatch.setattr(program, "run", refuses)
    assert startup.run("relay", BrokerPeer(nats_url=SecretStr("nats://nats:4222")), nothing) == 1
    *_, last = lines_of(capfd.readouterr().out)
    assert (last["event"], last["level"], last["error"]) == ("process_refuses_to_run", "error", "the address is taken")
