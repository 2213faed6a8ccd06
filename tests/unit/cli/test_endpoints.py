"""Where the services are, as `foldline address` and the other commands are told."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from cli import endpoints
from cli.endpoints import NotRunning, UsageError
from cli.local import key_folder
from deploy.development_keys import make
from shared.platform.tokens import DevelopmentIssuer

INSIDE = {"write": "write:50051", "read": "read:50051", "saga": "saga:50051"}


def test_other_clients_are_told_the_published_ports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a system in containers; its own clients use the names of its network. The environment's addresses come before both."""
    make(tmp_path, **INSIDE, postgres="postgres:5432", published=["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"], mail="/mail")
    assert [endpoints.address(tmp_path, service) for service in INSIDE] == ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"]
    known = endpoints.load(tmp_path)
    assert {"write": known.write, "read": known.read, "saga": known.saga} == INSIDE
    assert endpoints.mail_folder(tmp_path) == Path("/mail")
    monkeypatch.setenv("FOLDLINE_WRITE_ADDRESS", "elsewhere:7")
    assert [endpoints.address(tmp_path, service) for service in INSIDE] == ["elsewhere:7", "127.0.0.1:2", "127.0.0.1:3"]


def test_without_containers_there_is_one_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the file, or of the environment; nothing is made up."""
    with pytest.raises(NotRunning):
        endpoints.address(tmp_path, "write")
    monkeypatch.setenv("FOLDLINE_WRITE_ADDRESS", "localhost:7")
    monkeypatch.setenv("FOLDLINE_READ_ADDRESS", "localhost:8")
    assert endpoints.address(tmp_path, "read") == "localhost:8"
    with pytest.raises(UsageError):
        endpoints.address(tmp_path, "saga")
    (tmp_path / "endpoints.json").write_text(json.dumps({"write": "a:1", "read": "b:2", "saga": "c:3", "tokens": {}}))
    assert endpoints.address(tmp_path, "saga") == "c:3"


@pytest.mark.parametrize("malformed", ["swordfish", "localhost:x", "localhost:", ":7", "http://localhost:7", "grpcs://localhost"])
def test_an_address_that_is_malformed_is_refused_by_its_variable(
    malformed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than called in vain; one over TLS is taken as it is."""
    monkeypatch.setenv("FOLDLINE_READ_ADDRESS", "grpcs://localhost:8")
    monkeypatch.setenv("FOLDLINE_WRITE_ADDRESS", malformed)
    with pytest.raises(UsageError, match=r"^FOLDLINE_WRITE_ADDRESS: must be like host:50051, or grpcs://host:50051 for TLS$"):
        endpoints.load(tmp_path)
    monkeypatch.setenv("FOLDLINE_WRITE_ADDRESS", "localhost:7")
    assert endpoints.load(tmp_path).read == "grpcs://localhost:8"


def test_the_command_line_may_run_under_another_account(tmp_path: Path) -> None:
    """What it reads is open to the folder's group, the rest to its owner alone; it signs tokens with the key of the services."""
    make(tmp_path, **INSIDE, postgres="postgres:5432")
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.rglob("*") if file.is_file()}
    assert {name for name, mode in modes.items() if mode & 0o040} == {
        "endpoints.json",
        "issuer.json",
        "jwks.json",
        "postgres_password",
    }
    assert not any(mode & 0o022 for mode in modes.values())
    assert DevelopmentIssuer(key_folder(tmp_path)).jwks_file == tmp_path / "keys/jwks.json"


def test_a_second_run_keeps_what_there_is(tmp_path: Path) -> None:
    """Keys, contacts and the password; tokens are new."""
    make(tmp_path, **INSIDE, postgres="postgres:5432")
    (tmp_path / "contacts.json").write_text("{}")
    kept = {name: (tmp_path / name).read_bytes() for name in ("keys/issuer.json", "seal_keys", "contacts.json", "admin_url")}
    make(tmp_path, **INSIDE, postgres="postgres:5432")
    assert kept == {name: (tmp_path / name).read_bytes() for name in kept}
