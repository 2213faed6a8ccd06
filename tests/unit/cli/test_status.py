"""What `foldline status` says of deliveries."""

from __future__ import annotations

from typing import Any

import pytest

from cli.status import show_deliveries


@pytest.mark.parametrize(
    ("backlog", "lines"),
    [
        ({"dead": 0}, []),
        ({"dead": 3}, ["deliveries that an operator should look at: 3 (foldline delivery list --status dead)"]),
        (
            {"dead": 0, "waiting_since": "2026-01-02T03:04:05Z"},
            ["the oldest delivery that is tried waits since 2026-01-02T03:04:05Z (foldline delivery list --status pending)"],
        ),
    ],
)
def test_what_has_not_arrived_is_said_and_nothing_else(
    backlog: dict[str, Any], lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The dead ones with the command that lists them; since when the oldest other one waits."""
    show_deliveries(backlog)
    assert [line for line in capsys.readouterr().out.splitlines() if line] == lines
