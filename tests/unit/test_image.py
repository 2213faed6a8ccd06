"""The image holds what its processes import: nothing builds it in these tests, so the lists are compared."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml

from deploy.sbom import bill
from shared.platform.otel import release
from tests.containers.session import on_containers

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()
LOCKS = ("requirements.lock", "local.lock", "deploy/mail.lock")
# Commands that only make sense beside the embedded engines, which the image does not have.
LOCAL = {"deploy.demo", "deploy.engines", "deploy.local"}


def copied() -> set[str]:
    """What the Dockerfile copies from the project's folder, without the wheels."""
    lines = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    return {path.rstrip("/") for line in lines for path in line.split() if not path.startswith("out/")}


def test_what_is_copied_is_not_ignored() -> None:
    """Each path that the Dockerfile copies is let through by .dockerignore, and nothing more is."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert allowed - {"out/wheels"} == copied()


def test_what_is_imported_is_copied() -> None:
    """All packages are in the image, and of `deploy` the modules that what is in the image imports."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = set(project["tool"]["importlinter"]["root_packages"]) - {"deploy"}
    present = copied() | {path.name for path in (ROOT / "protos").iterdir() if path.is_dir()}
    assert packages <= present
    sources = [ROOT / path for path in copied() if (ROOT / path).suffix == ".py"]
    sources += [source for package in packages for source in (ROOT / package).rglob("*.py")]
    wanted = {module for source in sources for module in _imported_from_deploy(source)}
    assert {f"{module.replace('.', '/')}.py" for module in wanted} <= copied()


def test_the_bill_of_materials_names_what_is_installed() -> None:
    """Each package has a name as package URLs spell it, its version and, where it says one, its licence."""
    installed = [package for package in distributions() if package.name in {"grpcio", "typing_extensions"}]
    made = bill("1.2.3", installed)
    assert made["metadata"]["component"] == {"type": "application", "name": "foldline", "version": "1.2.3"}
    grpcio, typing_extensions = made["components"]
    assert grpcio["purl"] == "pkg:pypi/grpcio@1.85.1"
    assert typing_extensions["name"] == "typing-extensions"
    assert typing_extensions["licenses"] == [{"expression": "PSF-2.0"}]


@pytest.mark.parametrize("fails", ["install", "uninstall", "strip", ""])
def test_a_step_that_fails_fails_the_build(fails: str, tmp_path: Path) -> None:
    """As a hash that does not match does: the shell of the build ends with an error, whichever step it is."""
    tools = tmp_path / "tools"
    tools.mkdir()
    # Stands for Python, which makes an environment, and for pip in it.
    _script(tools / "python3", f"mkdir -p $3/bin $3/lib && touch $3/lib/x.so && cp {tools}/pip $3/bin/python")
    _script(tools / "pip", f'test "$3" != "{fails}"')
    _script(tools / "strip", "false" if fails == "strip" else "true")
    [step] = re.findall(r"^RUN (python3 -m venv /opt/foldline .*?[^\\])$", DOCKERFILE, re.MULTILINE | re.DOTALL)
    step = step.replace("\\\n", " ").replace("/opt/foldline", f"{tmp_path}/opt")
    done = subprocess.run(["/bin/sh", "-c", step], cwd=tmp_path, env={"PATH": f"{tools}:/usr/bin:/bin"}, check=False)  # noqa: S603 (of ours)
    assert (done.returncode != 0) == bool(fails)


def test_the_image_says_its_release(tmp_path: Path) -> None:
    """To logs and telemetry what its labels say, which is what the manifests ask for."""
    assert '&& echo "${VERSION}" > VERSION' in DOCKERFILE
    (tmp_path / "VERSION").write_text("1.2.3\n")
    assert release(tmp_path) == "1.2.3"
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"ARG VERSION={version}\n" in DOCKERFILE
    base = yaml.safe_load((ROOT / "deploy/kubernetes/base/kustomization.yaml").read_text())
    assert {"app.kubernetes.io/version": version}.items() <= {
        k: v for row in base["labels"] for k, v in row["pairs"].items()
    }.items()
    production = yaml.safe_load((ROOT / "deploy/kubernetes/overlays/production/kustomization.yaml").read_text())
    assert [image["newTag"] for image in production["images"]] == [version]


def test_the_image_has_labels() -> None:
    """What it is, by whose licence, of which release and commit."""
    found = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', DOCKERFILE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert found == {
        "title": "Foldline",
        "description": project["description"],
        "licenses": project["license"],
        "version": "${VERSION}",
        "revision": "${REVISION}",
    }


def _script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def _imported_from_deploy(source: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deploy"):
            found.add(str(node.module))
    return {module for module in found if not any(module.startswith(each) for each in LOCAL)}


def test_the_mail_server_of_compose_is_that_of_a_developer() -> None:
    """Its own lock pins what local.lock does, so both keep mail in the same way."""
    pins = {name: set(re.findall(r"^\S+==\S+|sha256:\w+", (ROOT / name).read_text(), re.MULTILINE)) for name in LOCKS}
    assert pins["deploy/mail.lock"] < pins["local.lock"]
    assert not any("aiosmtpd" in pin for pin in pins["requirements.lock"])


def test_what_brings_the_containers_up_is_told_the_same_everywhere() -> None:
    """README, operations.md and the file itself: the command, and the alias that stands for `foldline`."""
    texts = [(ROOT / name).read_text() for name in ("deploy/compose.yaml", "docs/operations.md")]
    assert all(told in text for told in on_containers() for text in texts)
