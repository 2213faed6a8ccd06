"""Settings of TLS: files that cannot be used, and what is not over TLS where it must be, end the start in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import get_args

import pytest

from docs.generate import PROCESSES
from read_service.app import ReadSettings
from saga_service.app import SagaSettings
from saga_service.check import EventStore, SagaDatabase
from shared.platform.settings import ProcessSettings, load
from shared.platform.urls import OverTls
from tests.support.system.authority import Authority
from tests.support.system.sealing import KEYS

YEAR = timedelta(days=365)
DATABASE = "postgresql://app:swordfish@db:5432/saga"


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """An authority, and an environment in which everything is over TLS."""
    authority = Authority(tmp_path)
    files, client = authority.issue(), authority.issue("client")
    environment = {
        "JWKS_FILE": "/keys/jwks.json",
        "TOKEN_FILE": "/keys/token",
        "TLS_REQUIRED": "true",
        "TLS_CERT_FILE": files.cert,
        "TLS_KEY_FILE": files.key,
        "TLS_CLIENT_CA_FILE": authority.ca,
        "DATABASE_URL": f"{DATABASE}?sslmode=verify-full&sslrootcert={authority.ca}",
        "WRITE_ADDRESS": "grpcs://write:50051",
        "CA_FILE": authority.ca,
        "CLIENT_CERT_FILE": client.cert,
        "CLIENT_KEY_FILE": client.key,
        "NATS_URL": "tls://app:swordfish@a:4222, tls://app:swordfish@b:4222",
        "NATS_CA_FILE": authority.ca,
    }
    for name, value in environment.items():
        monkeypatch.setenv(f"FOLDLINE_{name}", str(value))
    return authority


def test_a_process_that_must_use_tls_starts_when_all_is_over_tls(good: Authority) -> None:
    """Its own certificate, the database, the write service, NATS."""
    settings = load(SagaSettings, "a_service", arguments=[])
    assert settings.tls_required
    assert settings.write_tls.ca_file == settings.nats_tls.ca_file == good.ca


@pytest.mark.parametrize("url", ["smtps://mail", "smtp://mail", "smtp://u:p@mail:587?starttls=required"])
def test_mail_over_tls_is_no_reason_not_to_start(url: str, good: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """STARTTLS is required unless the URL says otherwise."""
    del good
    monkeypatch.setenv("FOLDLINE_SMTP_URL", url)
    assert load(SagaSettings, "a_service", arguments=[]).smtp_url is not None


@pytest.mark.parametrize("settings", [*PROCESSES.values(), EventStore, SagaDatabase])
def test_every_address_that_must_lead_over_tls_is_looked_at(settings: type[ProcessSettings]) -> None:
    """One that may be absent too: what is said within its type is said of the whole field."""
    for name, field in settings.model_fields.items():
        assert set(_over_tls(field.annotation)) <= {said for said in field.metadata if isinstance(said, OverTls)}, name


def _over_tls(annotation: object) -> Iterator[OverTls]:
    for part in get_args(annotation):
        if isinstance(part, OverTls):
            yield part
        yield from _over_tls(part)


def test_the_read_service_sends_no_token_to_a_write_service_in_plain_text(
    good: Authority, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It does without an address; one that is not over TLS ends the start. A caller's token would travel there."""
    query = f"{DATABASE}?sslmode=verify-full&sslrootcert={good.ca}"
    monkeypatch.setenv("FOLDLINE_QUERY_DATABASE_URL", query)
    monkeypatch.setenv("FOLDLINE_SEAL_KEYS", KEYS)
    assert load(ReadSettings, "a_service", arguments=[]).write_address == "grpcs://write:50051"
    for name in ("CA_FILE", "CLIENT_CERT_FILE", "CLIENT_KEY_FILE"):
        monkeypatch.delenv(f"FOLDLINE_{name}")
    monkeypatch.setenv("FOLDLINE_WRITE_ADDRESS", "write:50051")
    with pytest.raises(SystemExit) as caught:
        load(ReadSettings, "a_service", arguments=[])
    assert caught.value.code == 2
    assert "FOLDLINE_TLS_REQUIRED: FOLDLINE_WRITE_ADDRESS must begin with grpcs://" in capsys.readouterr().err
    monkeypatch.delenv("FOLDLINE_WRITE_ADDRESS")
    assert load(ReadSettings, "a_service", arguments=[]).write_address is None


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("DATABASE_URL", DATABASE, "FOLDLINE_TLS_REQUIRED: FOLDLINE_DATABASE_URL must say sslmode=verify-full"),
        (
            "DATABASE_URL",
            f"{DATABASE}?sslmode=require",
            "FOLDLINE_TLS_REQUIRED: FOLDLINE_DATABASE_URL must say sslmode=verify-full",
        ),
        (
            "DATABASE_URL",
            f"{DATABASE}?sslmode=verify-full",
            "FOLDLINE_DATABASE_URL: with this sslmode must have sslrootcert=FILE",
        ),
        ("DATABASE_URL", f"{DATABASE}?sslmode=verify-full&sslrootcert=/no", "FOLDLINE_DATABASE_URL: with this sslmode must have"),
        (
            "TLS_REQUIRED,NATS_URL",
            ",tls://app:swordfish@a nats://app:swordfish@b",
            "FOLDLINE_NATS_CA_FILE and FOLDLINE_NATS_CERT_FILE need tls:// in FOLDLINE_NATS",
        ),
        ("NATS_CA_FILE,NATS_URL", ",nats://app:swordfish@b", "FOLDLINE_TLS_REQUIRED: FOLDLINE_NATS_URL must begin with tls://"),
        (
            "TLS_REQUIRED,WRITE_ADDRESS",
            ",write:50051",
            "FOLDLINE_CA_FILE and FOLDLINE_CLIENT_CERT_FILE need FOLDLINE_WRITE_ADDRESS=grpcs://",
        ),
        (
            "CA_FILE,CLIENT_CERT_FILE,CLIENT_KEY_FILE,WRITE_ADDRESS",
            ",,,write:50051",
            "FOLDLINE_TLS_REQUIRED: FOLDLINE_WRITE_ADDRESS must begin with grpcs://",
        ),
        ("WRITE_ADDRESS", "https://write:50051", "FOLDLINE_WRITE_ADDRESS: must be like host:50051, or grpcs://host:50051"),
        ("SMTP_URL", "smtp://mail:25?starttls=off", "FOLDLINE_TLS_REQUIRED: FOLDLINE_SMTP_URL must begin with smtps://, or have"),
        (
            "SMTP_URL",
            "smtp://u:swordfish@mail?starttls=opportunistic",
            "FOLDLINE_TLS_REQUIRED: FOLDLINE_SMTP_URL must begin with",
        ),
        ("MAIL_FROM", "bank", "FOLDLINE_MAIL_FROM: a sender is one e-mail address, as in bank@example.com or The Bank"),
        ("SMTP_URL", "http://u:swordfish@mail", "FOLDLINE_SMTP_URL: the SMTP URL is smtp://host:port or smtps://host:port"),
        (
            "JWKS_FILE,JWKS_PRIVATE,JWKS_URL",
            ",true,http://issuer/keys",
            "FOLDLINE_TLS_REQUIRED: FOLDLINE_JWKS_URL must begin with https://",
        ),
        ("TLS_CERT_FILE,TLS_KEY_FILE,TLS_CLIENT_CA_FILE", ",,", "FOLDLINE_TLS_REQUIRED needs FOLDLINE_TLS_CERT_FILE"),
        ("TLS_CERT_FILE,TLS_KEY_FILE", ",", "FOLDLINE_TLS_CLIENT_CA_FILE needs FOLDLINE_TLS_CERT_FILE"),
        ("TLS_KEY_FILE", "", "FOLDLINE_TLS_CERT_FILE and FOLDLINE_TLS_KEY_FILE need each other"),
        ("TLS_CERT_FILE", "/not/there", "FOLDLINE_TLS_CERT_FILE: /not/there cannot be read"),
        ("CLIENT_KEY_FILE", "authority/server.key", "FOLDLINE_CLIENT_CERT_FILE: the key in"),
        ("NATS_CA_FILE", "authority/server.key", "FOLDLINE_NATS_CA_FILE: "),
        ("TLS_CERT_FILE,TLS_KEY_FILE", "authority/old.pem,authority/old.key", "FOLDLINE_TLS_CERT_FILE: the certificate in"),
        ("CLIENT_CERT_FILE,CLIENT_KEY_FILE", "authority/old.pem,authority/old.key", "old.pem expired at"),
        ("CLIENT_CERT_FILE,CLIENT_KEY_FILE", "authority/early.pem,authority/early.key", "early.pem is not valid before"),
    ],
)
def test_what_is_not_over_tls_or_cannot_be_used_is_one_sentence_and_exit_code_2(
    variable: str,
    value: str,
    sentence: str,
    tmp_path: Path,
    good: Authority,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The variable is named, what is secret is not shown, and nothing was touched."""
    good.issue("old", begins_in=-YEAR)
    good.issue("early", begins_in=YEAR)
    names, values = variable.split(","), value.split(",") if "," in variable else [value]
    for name, one in zip(names, values, strict=True):
        if one:
            told = str(tmp_path / one) if one.startswith("authority/") else one
            monkeypatch.setenv(f"FOLDLINE_{name}", told.replace(" ", ","))
        else:
            monkeypatch.delenv(f"FOLDLINE_{name}")
    with pytest.raises(SystemExit) as caught:
        load(SagaSettings, "a_service", arguments=[])
    printed = capsys.readouterr().err
    assert caught.value.code == 2
    assert sentence in printed
    assert len(printed.splitlines()) == 1
    assert "swordfish" not in printed
    assert "PRIVATE" not in printed
