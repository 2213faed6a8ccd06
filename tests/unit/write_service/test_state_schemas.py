"""A snapshot is believed if its schema's number is the state's. So a state that changes must get another number.

`state_schemas.json` holds for each aggregate the number and a fingerprint of what a snapshot rests on: the state's class and
the fold. If this test fails because you changed one of them:

- the meaning of stored states changes: raise `schema` of the aggregate; old snapshots are then ignored and made anew;
- it does not (a name, a comment): keep the number.

Then write the new fingerprints: `python -m tests.unit.write_service.test_state_schemas`.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shared.folds.aggregate import Aggregate
from write_service.passwords import Passwords
from write_service.registry import build_registry

FILE = Path(__file__).with_name("state_schemas.json")


def fingerprint(aggregate: Aggregate[Any, Any]) -> str:
    """Of the state's class and of the fold, without comments, docstrings and layout."""
    text = "\n".join(_plain(each) for each in (type(aggregate.initial), aggregate.evolve))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(thing: Any) -> str:
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def schemas() -> dict[str, dict[str, Any]]:
    """As they are in the code, by category."""
    aggregates = {route.aggregate.category: route.aggregate for route in build_registry(Passwords()).routes.values()}
    return {name: {"schema": each.schema, "fingerprint": fingerprint(each)} for name, each in sorted(aggregates.items())}


def check(noted: dict[str, dict[str, Any]], found: dict[str, dict[str, Any]]) -> None:
    """Fails with what to do for each aggregate that changed."""
    for category, now in found.items():
        before = noted.get(category)
        if before is not None and now["fingerprint"] != before["fingerprint"] and now["schema"] <= before["schema"]:
            pytest.fail(f"the state or the fold of {category} changed and its schema is still {now['schema']}: see {FILE.name}")
    assert noted == found, f"write {FILE.name} anew: python -m {__name__}"


def test_a_state_that_changes_gets_another_schema() -> None:
    """Else snapshots of the old state would be believed."""
    check(json.loads(FILE.read_text()), schemas())


def test_a_changed_fold_or_field_is_seen() -> None:
    """With the same number it fails, with a higher one only the file is old."""

    class State(msgspec.Struct, frozen=True):
        amount: int = 0

    class Other(msgspec.Struct, frozen=True):
        amount: int = 1

    def evolve(state: Any, event: Any) -> Any:
        """One."""
        return event

    def evolve_otherwise(state: Any, event: Any) -> Any:
        """One."""
        return state

    def changed(aggregate: Aggregate[Any, Any]) -> dict[str, dict[str, Any]]:
        return {"it": {"schema": aggregate.schema, "fingerprint": fingerprint(aggregate)}}

    before = changed(Aggregate(category="it", initial=State(), evolve=evolve))
    check(before, changed(Aggregate(category="it", initial=State(), evolve=evolve)))
    for state, fold in ((Other(), evolve), (State(), evolve_otherwise)):
        with pytest.raises(pytest.fail.Exception, match="schema is still 1"):
            check(before, changed(Aggregate(category="it", initial=state, evolve=fold)))
    with pytest.raises(AssertionError, match="anew"):
        check(before, changed(Aggregate(category="it", initial=Other(), evolve=evolve, schema=2)))


if __name__ == "__main__":
    FILE.write_text(json.dumps(schemas(), indent=2) + "\n")
    sys.stdout.write(f"{FILE.name} is written\n")
