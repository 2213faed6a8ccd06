"""README and ARCHITECTURE name files, functions and commands. All of them exist, under the names that the texts give."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from cli.main import app

ROOT = Path(__file__).parents[2]
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
TEXTS = {name: (ROOT / name).read_text() for name in ("README.md", "ARCHITECTURE.md")}
# Names in capitals stand for what the reader adds; `out` and the like are made by running.
PLACEHOLDER = re.compile("NAME")
PACKAGES = ("shared", "write_service", "read_service", "saga_service", "cli", "deploy", "upcasters", "protos", "docs", "tests")


def quoted(text: str) -> list[str]:
    """What stands in backquotes, outside of the blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def section(title: str) -> str:
    """A section of ARCHITECTURE by its title."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", ARCHITECTURE, flags=re.DOTALL | re.MULTILINE)
    assert found is not None, title
    return found[1]


def paths(text: str) -> list[str]:
    """The quoted paths of the project, without the name of a function behind them."""
    found = (each.split(":")[0].split()[0].rstrip("/") for each in quoted(text))
    return [each for each in found if each.split("/")[0] in PACKAGES and "/" in each and not PLACEHOLDER.search(each)]


@pytest.mark.parametrize("name", TEXTS)
def test_every_path_is_there(name: str) -> None:
    """A path that was renamed is renamed in the texts."""
    missing = [path for path in paths(TEXTS[name]) if "{" not in path and not (ROOT / path).exists()]
    assert missing == []


def test_every_definition_stands_in_the_file_that_is_named_with_it() -> None:
    """As in `shared/commands/append.py: append`, or in `path`, `name`: behind a bold path."""
    pairs = [(path, name) for path, name in re.findall(r"`([\w/]+\.py): (\w+)`", ARCHITECTURE)]
    pairs += re.findall(r"\*\*`([\w/]+\.py)`\*\*,\s+`([\w.]+)`", ARCHITECTURE)
    assert len(pairs) >= 5
    missing = [
        (path, name)
        for path, name in pairs
        if not all(
            re.search(rf"^\s*(?:(?:async )?def|class) {part}\b", (ROOT / path).read_text(), re.M) for part in name.split(".")
        )
    ]
    assert missing == []


@pytest.mark.parametrize("title", ["One command's way", "Workflows that always end"])
def test_a_way_leads_through_ten_files_at_most(title: str) -> None:
    """Those that a step is named after, in bold."""
    way = set(re.findall(r"\*\*`([\w/]+\.py)`\*\*", section(title)))
    assert 3 <= len(way) <= 12


def test_the_tree_shows_every_package_and_module() -> None:
    """Each folder of the kernel has its line, and what the line names is in that folder."""
    tree = section("Where things are")
    packages = {path.name for path in (ROOT / "shared").iterdir() if (path / "__init__.py").exists()}
    lines = dict(re.findall(r"^  (\w+)/ +(\S.*(?:\n {10,}\S.*)*)", tree, flags=re.MULTILINE))
    assert set(lines) == packages
    tops = set(re.findall(r"^(\w+)/", tree, flags=re.MULTILINE))
    assert tops == set(PACKAGES) | {"examples"} & tops


def ways(command: Any, prefix: str = "foldline") -> Iterator[tuple[str, bool]]:
    """Every way to call the command line, and whether it is a group of commands."""
    inner = getattr(command, "commands", {})
    yield prefix, bool(inner)
    for name, each in inner.items():
        yield from ways(each, f"{prefix} {name}")


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_exists(name: str) -> None:
    """A command of the command line, or a group of them; what follows a command are its arguments."""
    known = dict(ways(typer.main.get_command(app)))
    named = re.findall(r"^foldline [a-z].*", TEXTS[name], flags=re.MULTILINE)
    named += [each for each in quoted(TEXTS[name]) if re.match(r"foldline [a-z]", each)]
    assert named
    unknown = [
        each
        for each in named
        if not any(each == way or each.startswith(f"{way} --" if is_group else f"{way} ") for way, is_group in known.items())
    ]
    assert unknown == []


def test_every_target_of_make_exists() -> None:
    """A target of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {each for text in TEXTS.values() for each in re.findall(r"\bmake ([a-z-]+)", "\n".join(quoted(text)))}
    assert named <= targets
