"""Commands to counters, as the committer's tests send them."""

from __future__ import annotations

from shared.commands.decide import Command
from tests.support.domains.trial import Add, build_registry
from tests.support.fakes.replica import make_command

BUS = build_registry()


def adding(amount: int, counter_id: str = "a", *, expected_version: int | None = None, tenant: str = "acme") -> Command:
    """A command with an id of its own."""
    return make_command(BUS, Add(counter_id=counter_id, amount=amount), expected_version=expected_version, tenant=tenant)
