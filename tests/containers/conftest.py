"""The engine, the images and the system in containers. All of it is made once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.containers.composed import Composed
from tests.containers.engine import NoEngine, Podman
from tests.containers.images import Images, prepare


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Podman:
    """The container engine; without one the tests fail."""
    try:
        return Podman(tmp_path_factory.mktemp("podman"))
    except NoEngine as error:
        pytest.exit(f"no container engine: {error}", returncode=1)


@pytest.fixture(scope="session")
def images(podman: Podman, tmp_path_factory: pytest.TempPathFactory) -> Images:
    """Foldline's image, built, and those of the engines."""
    try:
        return prepare(podman, tmp_path_factory.mktemp("images"))
    except NoEngine as error:
        pytest.exit(f"no images: {error}", returncode=1)


@pytest.fixture(scope="session")
def composed(podman: Podman, images: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composed]:
    """compose.yaml, up. It is taken down with its volumes."""
    system = Composed(podman, images, tmp_path_factory.mktemp("compose"))
    try:
        system.down()  # what a run that was killed left
        system.up()
        yield system
    finally:
        system.down()
