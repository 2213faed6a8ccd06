"""The state diagram of a process as text: its phases as a tree, with the path that was taken and the time of each step.

    TransferStarted ━━▶ ● debiting     12:03:04.120     14 ms
    ├─ debit accepted ━━▶ ● crediting  12:03:04.134  2.1 s so far
    │  ├─ credit accepted ──▶ ○ completing
    ...

A phase that several arrows lead to is drawn once with what follows it; elsewhere it has an ellipsis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from rich.text import Text

DIM, TAKEN = "dim", "bold green"


class Passed(NamedTuple):
    """A phase that a process came to: when, by what, and the reason of the refusal that led to it, if one did."""

    phase: str
    at: datetime
    cause: str
    reason: str


def passed(history: Sequence[dict[str, Any]]) -> list[Passed]:
    """The phases that a process went through, in order."""
    taken: list[Passed] = []
    for entry in history:
        if entry["phase"] and (not taken or entry["phase"] != taken[-1].phase):
            at = datetime.fromisoformat(entry["happened_at"])
            taken.append(Passed(entry["phase"], at, _cause(entry), (entry.get("error") or {}).get("reason", "")))
    return taken


def draw(arrows: Sequence[dict[str, Any]], taken: Sequence[Passed], *, over: bool, now: datetime) -> list[Text]:
    """The lines of the diagram; `over` if the process does not go on, so that its last phase takes no time."""
    picture = _Picture(arrows, taken)
    lines = [line for arrow in picture.leading_on("", 0) for line in picture.lines(arrow, "", "", "")]
    width = max((line.text.cell_len for line in lines if line.place is not None), default=0)
    return [_with_time(line, width, taken, over=over, now=now) for line in lines]


class _Arrow(NamedTuple):
    """An arrow, with the place on the path of the phase that it leads to; None if it was not taken."""

    label: str
    target: str
    ends: bool
    place: int | None


class _Line(NamedTuple):
    text: Text
    place: int | None


@dataclass(slots=True)
class _Picture:
    arrows: Sequence[dict[str, Any]]
    taken: Sequence[Passed]
    drawn: set[str] = field(default_factory=set)

    def leading_on(self, source: str, following: int | None) -> list[_Arrow]:
        """The arrows from a phase. That to the place `following` of the path is among them, whatever the definition says."""
        found = [_Arrow(it["label"], it["target"], it["ends"], None) for it in self.arrows if it["source"] == source]
        if following is None or following >= len(self.taken):
            return found
        step = self.taken[following]
        for number, it in enumerate(found):
            if (it.label, it.target) == (step.cause, step.phase):
                found[number] = it._replace(place=following)
                return found
        ends = any(it["ends"] for it in self.arrows if it["target"] == step.phase)
        return [*found, _Arrow(step.cause, step.phase, ends, following)]

    def lines(self, arrow: _Arrow, branch: str, stem: str, more: str) -> Iterator[_Line]:
        """An arrow and all that follows it: after `stem` and `branch`, with `more` in the place of the branch below it."""
        taken = arrow.place is not None
        again = arrow.target in self.drawn or (not taken and any(it.phase == arrow.target for it in self.taken))
        text = Text().append(f"{stem}{branch}", DIM)
        text.append(f"{arrow.label} {'━━▶ ●' if taken else '──▶ ○'} {arrow.target}", TAKEN if taken else DIM)
        if again and not taken and not arrow.ends:
            text.append(" …", DIM)
        yield _Line(text, arrow.place)
        following = self.leading_on(arrow.target, None if arrow.place is None else arrow.place + 1)
        if again:  # what else leads on from here is drawn elsewhere
            following = [it for it in following if it.place is not None]
        else:
            self.drawn.add(arrow.target)
        for it in following:
            last = it is following[-1]
            yield from self.lines(it, "└─ " if last else "├─ ", stem + more, "   " if last else "│  ")


def _with_time(line: _Line, width: int, taken: Sequence[Passed], *, over: bool, now: datetime) -> Text:
    text, place = line
    if place is None:
        return text
    step, last = taken[place], place == len(taken) - 1
    text.pad_right(width - text.cell_len + 2)
    shown = step.at.strftime("%H:%M:%S.") + f"{step.at.microsecond // 1000:03}"
    if step.at.date() != taken[0].at.date():
        shown = f"{step.at.date()} {shown}"
    if last and over:
        spent = "the end"
    else:
        spent = _lasted((now if last else taken[place + 1].at) - step.at) + (" so far" if last else "")
    text.append(shown).append(f"  {spent:>8}", "bold")
    if step.reason:
        text.append(f"  {step.reason}", "yellow")
    return text


def _cause(entry: dict[str, Any]) -> str:
    """What an entry of the history is, in the words of the diagram's arrows."""
    if entry["kind"] == "answer":
        return f"{entry['step']} {'refused' if entry.get('error') else 'accepted'}"
    if entry["kind"] == "operator":
        return " ".join(filter(None, ("operator:", entry["name"], entry["step"])))
    if entry["kind"] == "timer_fired":
        return f"timer {entry['name']}"
    return str(entry["name"].rpartition(".")[2])


def _lasted(time: timedelta) -> str:
    seconds = time.total_seconds()
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 120 else str(timedelta(seconds=int(seconds)))
