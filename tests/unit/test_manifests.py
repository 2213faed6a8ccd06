"""The Kubernetes overlay for production: every process accepts its settings, and all that it serves and calls is over TLS."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr

from read_service.app import ReadSettings
from read_service.projector import ProjectorSettings
from saga_service.app import SagaSettings
from shared.platform.settings import ProcessSettings, load
from tests.support.system.authority import Authority
from write_service.app import WriteSettings
from write_service.relay import RelaySettings

OVERLAYS = Path(__file__).parents[2] / "deploy/kubernetes/overlays"
PROCESSES: dict[str, type[ProcessSettings]] = {
    "write": WriteSettings,
    "relay": RelaySettings,
    "read": ReadSettings,
    "projector": ProjectorSettings,
    "saga": SagaSettings,
}


def render(folder: Path) -> list[dict[str, Any]]:
    """The objects of a kustomization."""
    kubectl = Path(sys.executable).with_name("kubectl")
    done = subprocess.run([kubectl, "kustomize", folder], check=True, capture_output=True)  # noqa: S603 (of ours)
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module")
def production() -> list[dict[str, Any]]:
    """The objects of the overlay."""
    return render(OVERLAYS / "production")


@pytest.fixture
def mounted(tmp_path: Path) -> Path:
    """What the secrets would bring, below a folder of the test."""
    authority = Authority(tmp_path)
    files = authority.issue()
    run = tmp_path / "run"
    databases = f"postgresql://app:secret@postgres-rw:5432/db?sslmode=verify-full&sslrootcert={run}/postgres/ca.crt"
    for name, content in {
        "tls/tls.crt": files.cert.read_text(),
        "tls/tls.key": files.key.read_text(),
        "tls/ca.crt": authority.ca.read_text(),
        "postgres/ca.crt": authority.ca.read_text(),
        "secrets/seal/keys": "00" * 32,
        **{f"secrets/foldline/{role}": databases for role in ("write_app", "read_app", "read_query", "saga_app")},
    }.items():
        file = run / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return run


@pytest.mark.parametrize("name", PROCESSES)
def test_production_is_over_tls(
    name: str, production: list[dict[str, Any]], mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its certificates are mounted where the settings look for them, and its probes are those of the HTTP port."""
    [deployment] = [it for it in production if it["kind"] == "Deployment" and it["metadata"]["name"] == name]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    [told] = [it["data"] for it in production if it["kind"] == "ConfigMap" and it["metadata"]["name"] == "foldline"]
    environment = told | {row["name"]: row["value"] for row in container["env"]}
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value.replace("/run/", f"{mounted}/"))
    settings = load(PROCESSES[name], name, arguments=[])
    assert settings.tls_required
    paths = tuple(mount["mountPath"] for mount in container["volumeMounts"])
    files = [value for variable, value in environment.items() if variable.endswith("_FILE")]
    needed = [value for value in files if value.startswith(("/run/tls", "/run/nats", "/run/secrets"))]
    assert len(needed) > 5
    assert all(value.startswith(paths) for value in needed)
    assert "/run/postgres" in paths
    probes = ("startupProbe", "livenessProbe", "readinessProbe")
    assert {container[probe]["httpGet"]["port"] for probe in probes} == {"admin"}
    assert not any("grpc" in container[probe] for probe in probes)


def test_the_component_for_mail_brings_its_settings(tmp_path: Path, mounted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server and the sender are those of its secret, which is mounted where the setting looks; contacts are optional."""
    folder = tmp_path / "overlay"
    folder.mkdir()
    named = [os.path.relpath(OVERLAYS.parent / it, folder.resolve()) for it in ("overlays/production", "components/mail")]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump({"resources": named[:1], "components": named[1:]}))
    objects = render(folder)
    [saga] = [it["spec"]["template"]["spec"] for it in objects if it["kind"] == "Deployment" and it["metadata"]["name"] == "saga"]
    [container] = saga["containers"]
    volumes = {volume["name"]: volume.get("secret", {}) for volume in saga["volumes"]}
    paths = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert paths["/run/contacts"] == {"secretName": "foldline-contacts", "optional": True, "defaultMode": 0o440}
    assert paths["/run/mail"]["secretName"] == "foldline-mail"
    secret = {"smtp_url": "smtps://bank:s3cret@mail.example", "from": "The Bank <bank@example.com>"}
    (mounted / "mail").mkdir()
    (mounted / "mail/smtp_url").write_text(secret["smtp_url"])
    [told] = [it["data"] for it in objects if it["kind"] == "ConfigMap" and it["metadata"]["name"] == "foldline"]
    for variable, value in told.items():
        monkeypatch.setenv(variable, value.replace("/run/", f"{mounted}/"))
    for row in container["env"]:
        value = row["value"] if "value" in row else secret[row["valueFrom"]["secretKeyRef"]["key"]]
        monkeypatch.setenv(row["name"], value.replace("/run/", f"{mounted}/"))
    settings = load(SagaSettings, "saga", arguments=[])
    assert (settings.smtp_url, settings.mail_from) == (SecretStr(secret["smtp_url"]), secret["from"])
    assert settings.contacts_file == mounted / "contacts/contacts.json"
