"""The state diagram of a process, found by folding: every answer, timer and event is tried in every state that is reached.

A diagram also tells what is wrong with a definition: an input that its folds do not take, or after which a process would wait
for nothing. A definition with such a flaw is refused at start-up.

A state that counts has no last value, so the search is bounded (STATES_MAX, PLACES_MAX). A flaw that lies behind the bound is not
found; a flaw that is found is one. A phase from which the search came to its bound may end behind it: it is no flaw.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from google.protobuf.message import Message

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.process import CANCELLED_BY_OPERATOR, ProcessDefinition, Step
from shared.processes.compatibility import FOLD_FAILED, NEVER_ENDS, Mismatch, answer, dumped
from shared.processes.process_type import ProcessType

STATES_MAX = 16
"""So many states are tried in each phase with the same commands and timers; a counter in the state would make them endless."""
PLACES_MAX = 2000
"""So many states are tried in all."""

NEVER_BEGINS = "NEVER_BEGINS"
STRANDED = "STRANDED"

Fold = Callable[[], Step[Any] | None]


class Arrow(NamedTuple):
    """A transition of a process: from a phase, on an answer, timer or event, to a phase. `ends` if the process ends there.

    The source of those that begin a process is empty.
    """

    source: str
    label: str
    target: str
    ends: bool


@dataclass(frozen=True, slots=True)
class Diagram:
    """The transitions of a definition, and what is wrong with it: NEVER_BEGINS, FOLD_FAILED, STRANDED, NEVER_ENDS."""

    arrows: Sequence[Arrow]
    flaws: Sequence[Mismatch]


class _Place(NamedTuple):
    """A state, the steps whose answers are waited for, the timers that are set, and the examples that have not come."""

    state: Any
    commands: frozenset[str]
    timers: frozenset[str]
    events: tuple[Message, ...]


def examples(definition: ProcessDefinition[Any]) -> tuple[Message, ...]:
    """The events that are tried."""
    return definition.examples or tuple(message() for message in definition.key)


def explore(kind: ProcessType) -> Diagram:
    """The diagram of a definition, and its flaws.

    Commands are answered with acceptance and with a refusal of no particular reason. Mandatory steps are refused by an operator
    only, which is no arrow. Each event of `examples` comes once. A refusal that is told by its reason is not tried.
    """
    return _Exploration(kind).diagram()


def refuse_flawed(definitions: Iterable[ProcessDefinition[Any]]) -> None:
    """Raises TypeError for a definition that misses a state: one whose processes could meet an input and never end."""
    for definition in definitions:
        if flaws := explore(ProcessType(definition)).flaws:
            raise TypeError(f"the process {definition.type}: " + "; ".join(f"{it.what}: {it.where}" for it in flaws[:5]))


@dataclass(slots=True)
class _Exploration:
    kind: ProcessType
    arrows: dict[Arrow, None] = field(default_factory=dict)
    flaws: dict[Mismatch, None] = field(default_factory=dict)
    waiting: deque[_Place] = field(default_factory=deque)
    seen: dict[tuple[str, frozenset[str], frozenset[str]], list[Any]] = field(default_factory=dict)
    unsearched: set[str] = field(default_factory=set)
    """The phases of states that were reached and not tried."""

    def diagram(self) -> Diagram:
        manager = self.kind.manager
        self._try_events(_Place(manager.initial, frozenset(), frozenset(), examples(manager)), "")
        if not self.waiting and not self.flaws:
            self.flaws[Mismatch(NEVER_BEGINS, "no example of an event begins it")] = None
        for _ in range(PLACES_MAX):
            if not self.waiting:
                break
            place = self.waiting.popleft()
            source = manager.phase(place.state)
            for step in sorted(place.commands):
                left = place._replace(commands=place.commands - {step})
                for accepted in (True, False):
                    self._try_answer(left, source, step, accepted=accepted)
            for name in sorted(place.timers):
                left = place._replace(timers=place.timers - {name})
                self._take(left, source, f"timer {name}", partial(manager.on_timer, place.state, name))
            self._try_events(place, source)
        self.unsearched |= {manager.phase(place.state) for place in self.waiting}
        if not self.flaws:
            self._find_phases_without_end()
        return Diagram(list(self.arrows), list(self.flaws))

    def _try_answer(self, left: _Place, source: str, step: str, *, accepted: bool) -> None:
        insisted = not accepted and step in self.kind.manager.mandatory
        given = answer(step, accepted=accepted, reason=CANCELLED_BY_OPERATOR if insisted else None)
        label = f"{step} {'accepted' if accepted else 'refused'}"
        self._take(left, source, label, partial(self.kind.manager.on_answer, left.state, given), drawn=not insisted)

    def _try_events(self, place: _Place, source: str) -> None:
        for event in place.events:
            left = place._replace(events=tuple(it for it in place.events if it is not event))
            fold = partial(self.kind.manager.react, place.state, event, EventEnvelope())
            self._take(left, source, type(event).DESCRIPTOR.name, fold, concerns_it=False)

    def _take(self, left: _Place, source: str, label: str, fold: Fold, *, drawn: bool = True, concerns_it: bool = True) -> None:
        """Folds an input, behind which the process waits for what is `left`, and what the step adds."""
        where = f"{source}, {label}" if source else label
        try:
            taken = fold()
            if taken is None and not concerns_it:
                return
            step = Step(state=left.state) if taken is None else dumped(self.kind, taken)
            waits = step.send or left.commands or self._timers(left, step) or self._an_event_leads_on(step.state)
            stranded = not (step.ended or waits)
        except Exception as error:  # noqa: BLE001 (whatever it raises is what is looked for)
            self.flaws[Mismatch(FOLD_FAILED, f"{where}: {type(error).__name__}")] = None
            return
        target = self.kind.manager.phase(step.state)
        if drawn and (target != source or step.send or step.ended):
            self.arrows[Arrow(source, label, target, step.ended)] = None
        if stranded:
            self.flaws[Mismatch(STRANDED, where)] = None
        if stranded or step.ended:
            return
        commands, timers = left.commands | {send.step for send in step.send}, self._timers(left, step)
        states = self.seen.setdefault((target, commands, timers), [])
        if (step.state, left.events) in states:
            return
        if len(states) == STATES_MAX:
            self.unsearched.add(target)
            return
        states.append((step.state, left.events))
        self.waiting.append(_Place(step.state, commands, timers, left.events))

    def _timers(self, left: _Place, step: Step[Any]) -> frozenset[str]:
        return (left.timers | {timer.name for timer in step.timers}) - set(step.cancel_timers)

    def _an_event_leads_on(self, state: Any) -> bool:
        for event in examples(self.kind.manager):
            taken = self.kind.manager.react(state, event, EventEnvelope())
            if taken is not None and (taken.ended or taken.send or taken.timers or taken.state != state):
                return True
        return False

    def _find_phases_without_end(self) -> None:
        leads_on = {arrow.target for arrow in self.arrows if arrow.ends} | self.unsearched
        for _ in self.arrows:
            leads_on |= {arrow.source for arrow in self.arrows if arrow.target in leads_on}
        for phase in dict.fromkeys(arrow.target for arrow in self.arrows):
            if phase not in leads_on:
                self.flaws[Mismatch(NEVER_ENDS, phase)] = None
