"""The diagram that `foldline process show` draws, from the arrows of the transfer's definition and histories."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from io import StringIO
from typing import Any

from rich.console import Console

from cli.diagram import draw, passed
from saga_service.transfer import TRANSFER
from shared.processes.diagram import explore
from shared.processes.process_type import ProcessType

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ARROWS = [arrow._asdict() for arrow in explore(ProcessType(TRANSFER)).arrows]


def entry(after_ms: int, kind: str, phase: str, *, step: str = "", name: str = "", refused: str = "") -> dict[str, Any]:
    """A line of a history."""
    at = NOW + timedelta(milliseconds=after_ms)
    made = {"happened_at": at.isoformat(), "kind": kind, "name": name, "step": step, "phase": phase}
    return {**made, "error": {"reason": refused}} if refused else made


STARTED = entry(0, "event", "debiting", name="bank.v1.TransferStarted")
DEBITED = entry(14, "answer", "crediting", step="debit")


def lines(*history: dict[str, Any], over: bool = True) -> list[str]:
    """What is drawn for a history, four seconds after its begin."""
    drawn = draw(ARROWS, passed(history), over=over, now=NOW + timedelta(seconds=4))
    return [line.plain.rstrip() for line in drawn]


def test_the_path_is_marked_with_its_times_in_the_whole_diagram() -> None:
    """A transfer that was refunded: when it came to each phase, how long it stayed, and why it was refused."""
    history = (
        STARTED,
        entry(0, "command", "debiting", step="debit"),
        DEBITED,
        entry(2014, "answer", "refunding", step="credit", refused="ACCOUNT_FROZEN"),
        entry(2114, "answer", "failing", step="refund"),
        entry(2120, "answer", "failed", step="fail"),
    )
    assert lines(*history) == [
        "TransferStarted ━━▶ ● debiting          03:04:05.000     14 ms",
        "├─ debit accepted ━━▶ ● crediting       03:04:05.014     2.0 s",
        "│  ├─ credit accepted ──▶ ○ completing",
        "│  │  └─ complete accepted ──▶ ○ completed",
        "│  └─ credit refused ━━▶ ● refunding    03:04:07.014    100 ms  ACCOUNT_FROZEN",
        "│     ├─ refund accepted ━━▶ ● failing  03:04:07.114      6 ms",
        "│     │  └─ fail accepted ━━▶ ● failed  03:04:07.120   the end",
        "│     └─ refund refused ──▶ ○ suspending",
        "│        └─ suspend accepted ──▶ ○ failing …",
        "└─ debit refused ──▶ ○ failing …",
    ]


def test_a_process_in_flight_says_how_long_it_has_waited() -> None:
    """The last phase takes until now; what may follow is drawn, none of it marked."""
    drawn = lines(STARTED, DEBITED, over=False)
    assert drawn[1] == "├─ debit accepted ━━▶ ● crediting  03:04:05.014  4.0 s so far"
    assert [line for line in drawn if "●" in line] == drawn[:2]


def test_on_a_terminal_the_path_stands_out() -> None:
    """Bright, with its times; what was not taken is dim."""
    drawn = draw(ARROWS, passed([STARTED, DEBITED]), over=False, now=NOW)
    console = Console(file=StringIO(), force_terminal=True, color_system="standard", width=200)
    for line in drawn[:3]:
        console.print(line)
    assert isinstance(console.file, StringIO)
    began, debited, may = console.file.getvalue().splitlines()
    green, dim = "\x1b[1;32m", "\x1b[2m"
    assert began.startswith(f"{green}TransferStarted ━━▶ ● debiting\x1b[0m     03:04:05.000")
    assert f"{green}debit accepted ━━▶ ● crediting\x1b[0m  03:04:05.014" in debited
    assert may == f"{dim}│  ├─ \x1b[0m{dim}credit accepted ──▶ ○ completing\x1b[0m"


def test_what_the_definition_does_not_have_is_drawn_all_the_same() -> None:
    """A step that an operator skipped, a phase of an earlier release, and one that is come to twice."""
    history = (
        STARTED,
        entry(5, "answer", "crediting", step="debit"),
        entry(10, "timer_fired", "asking", name="late"),
        entry(20, "answer", "crediting", step="ask"),
        entry(30, "operator", "completed", name="skip", step="complete"),
    )
    drawn = lines(*history)
    assert [line.split("  0")[0].strip("│├└─ ") for line in drawn if "●" in line] == [
        "TransferStarted ━━▶ ● debiting",
        "debit accepted ━━▶ ● crediting",
        "timer late ━━▶ ● asking",
        "ask accepted ━━▶ ● crediting",
        "operator: skip complete ━━▶ ● completed",
    ]
    assert sum("credit refused" in line for line in drawn) == 1


def test_a_type_that_the_service_does_not_know_has_its_path_alone() -> None:
    """Its definition is not in this release; the history is."""
    drawn = draw([], passed([STARTED, DEBITED]), over=False, now=NOW)
    assert [line.plain.split()[:5] for line in drawn] == [
        ["TransferStarted", "━━▶", "●", "debiting", "03:04:05.000"],
        ["└─", "debit", "accepted", "━━▶", "●"],
    ]


def test_nothing_has_happened_yet() -> None:
    """The diagram alone."""
    assert draw(ARROWS, [], over=False, now=NOW)[0].plain == "TransferStarted ──▶ ○ debiting"
