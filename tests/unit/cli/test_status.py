"""What `foldline status` says of deliveries and parked keys."""

from __future__ import annotations

from typing import Any

import pytest

from cli.status import show_deliveries, show_parked


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


@pytest.mark.parametrize(("counts", "told"), [([0, 0], ""), ([7, 2], "9"), ([10_000, 2], "10,002+")])
def test_parked_keys_are_counted_as_far_as_the_read_service_does(
    counts: list[int], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a projection with ten thousand there may be more."""
    show_parked(counts)
    line = f"\nparked keys that an operator should look at: {told} (foldline parked list)\n"
    assert capsys.readouterr().out == (line if told else "")
