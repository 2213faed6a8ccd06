"""Decisions, docstrings, `.proto` comments and docs/refusals.md name the same refusals in the same order."""

from __future__ import annotations

import re

import pytest

from docs import generate, refusals
from write_service.passwords import Passwords
from write_service.registry import build_registry
from write_service.servicers import COMMANDS

REGISTRY = build_registry(Passwords())
DECISIONS = refusals.decisions(REGISTRY)


@pytest.mark.parametrize("name", DECISIONS)
def test_a_docstring_names_what_the_decision_raises_in_order_of_precedence(name: str) -> None:
    """A caller who reads the docstring knows every refusal, and which of two comes first."""
    decide = DECISIONS[name]
    assert refusals.documented(decide) == [each.reason for each in refusals.refusals_of(decide)]


@pytest.mark.parametrize("rpc", COMMANDS)
def test_the_comment_of_an_rpc_names_the_refusals_of_its_command(rpc: str) -> None:
    """Those of the decision, then those of the reactions in its transaction."""
    expected = [each.reason for each in refusals.refusals_of_command(REGISTRY, COMMANDS[rpc])]
    assert refusals.named(_comment(rpc)) == expected


def _comment(rpc: str) -> str:
    """The lines of comment above an RPC in its `.proto`."""
    service, _, method = rpc.rpartition(".")[2].partition("/")
    for path in (refusals.ROOT / "protos/bank/v1").glob("*.proto"):
        _, _, text = path.read_text().partition(f"service {service} {{")
        if found := re.search(rf"((?: *//.*\n)*) *rpc {method}\(", text):
            return " ".join(line.strip().removeprefix("//") for line in found[1].splitlines())
    raise AssertionError(f"no .proto has {rpc}")


def test_the_page_is_that_of_the_code() -> None:
    """`make docs` was run after the last change."""
    path = refusals.ROOT / "docs/refusals.md"
    assert path.read_text() == generate.pages()[path]


def test_the_page_says_what_a_command_is_refused_for_by_a_reaction_to_its_event() -> None:
    """To open an account can be refused by the person whose it would be."""
    found = refusals.refusals_of_command(REGISTRY, "bank.v1.OpenAccountRequest")
    assert [(each.reason, each.code, each.text) for each in found] == [
        ("ACCOUNT_ALREADY_OPEN", "ALREADY_EXISTS", "an account with this id is open"),
        ("PERSON_NOT_FOUND", "NOT_FOUND", "there is no person with this id"),
        ("PERSON_CLOSED", "FAILED_PRECONDITION", "the person is no customer any more"),
        ("TOO_MANY_ACCOUNTS", "FAILED_PRECONDITION", "a person may have 1000 accounts"),
    ]
