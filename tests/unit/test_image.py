"""The image holds what its processes import: nothing builds it in these tests, so the lists are compared."""

from __future__ import annotations

import ast
import re
import tomllib
from importlib.metadata import distributions
from pathlib import Path

from deploy.sbom import bill

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()
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


def _imported_from_deploy(source: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deploy"):
            found.add(str(node.module))
    return {module for module in found if not any(module.startswith(each) for each in LOCAL)}
