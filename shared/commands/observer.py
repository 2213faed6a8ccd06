"""What is seen of commits from outside: numbers, spans, and a line for each command at level debug.

Everything is taken from a batch once it is durable and its callers are answered: per batch, not per command, so that it
costs a command less than a microsecond as long as its trace is not recorded.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from msgspec import Struct

from shared.commands.decide import Command, Outcome, Plan
from shared.commands.intake import CommandGroup
from shared.platform import tracing
from shared.platform.instruments import SECONDS, SIZES, Histogram
from shared.platform.metrics import Metrics
from shared.platform.probe import DatabaseProbe
from shared.platform.telemetry import logger

log = logger(__name__)

_HEAD = "SELECT coalesce(max(position), 0) FROM events"


class Stopwatch(Struct):
    """When a batch was taken up, when all of it was decided, and how many states had to be loaded for it."""

    began_ns: int
    decided_ns: int = 0
    loaded: int = 0

    def decided(self) -> None:
        """All of the batch is decided: the append begins."""
        self.decided_ns = time.time_ns()


class CommitObserver:
    """Watches one committer."""

    def __init__(self) -> None:
        self.conflicts = 0
        self.failures = 0
        self.head = 0
        self._committed_since_asked = 0
        self.sizes = Histogram("foldline.commit.batch.size", "Commands a commit.", unit="{command}", bounds=SIZES)
        self.durations = Histogram(
            "foldline.commit.duration", "From the batch's beginning until it is durable.", unit="s", bounds=SECONDS
        )
        self.waits = Histogram(
            "foldline.command.queue.wait", "How long the oldest command of a batch had waited for it.", unit="s", bounds=SECONDS
        )
        self._outcomes: Counter[tuple[str, str]] = Counter()
        self._by_tenant: Counter[tuple[str, str]] = Counter()
        self._hits = self._misses = self._events = 0
        self.tenants: frozenset[str] = frozenset()
        """The tenants that metrics tell apart."""

    def start(self) -> Stopwatch:
        """A batch is taken up."""
        return Stopwatch(time.time_ns())

    def committed(self, groups: Sequence[CommandGroup], plan: Plan, watch: Stopwatch, head: int) -> None:
        """A batch is durable, and its callers are answered."""
        if not groups:
            return
        now_ns = time.time_ns()
        batch = plan.batch
        oldest_s = groups[0].commands[0].received_at.timestamp()
        took_s = (now_ns - watch.began_ns) / 1e9
        self.head = max(self.head, head)
        self._committed_since_asked = max(self._committed_since_asked, head)
        self._events += len(batch.events)
        self._hits += max(len(batch.reads) - watch.loaded, 0)
        self._misses += watch.loaded
        self._outcomes.update([(row.type, row.status) for row in batch.commands])
        if len(plan.outcomes) > len(batch.commands):
            self._outcomes["unlogged", "rejected"] += len(plan.outcomes) - len(batch.commands)
        if self.tenants:
            self._by_tenant.update([(row.tenant, row.status) for row in batch.commands if row.tenant in self.tenants])
        example = ""
        if tracing.on():
            example = _trace(groups, plan, watch, now_ns)
        self.sizes.observe(len(plan.outcomes))
        self.waits.observe(max(watch.began_ns / 1e9 - oldest_s, 0.0))
        self.durations.observe(took_s, traceparent=example)
        if log.takes_debug():
            _tell(groups, plan)

    def register(self, metrics: Metrics, tenants: Iterable[str], probe: DatabaseProbe, waiting: Callable[[str], int]) -> None:
        """Makes the numbers part of what the process exports. `waiting` tells how many commands of a tenant wait.

        The write database is asked for the head: other replicas move it too, and so do boxing and purging. After a restore it is
        lower than what was known; only batches committed while the question was under way may be newer than the answer.
        """

        async def ask_head() -> None:
            self._committed_since_asked = 0
            [(position,)] = await probe.rows(_HEAD)
            self.head = max(self._committed_since_asked, position)

        metrics.watch(ask_head)
        self.tenants = frozenset(tenants)
        metrics.add(self.sizes, self.durations, self.waits)
        metrics.counter(
            "foldline.commands",
            "Commands with an outcome of their own, by type.",
            lambda: [(n, {"type": kind, "outcome": outcome}) for (kind, outcome), n in list(self._outcomes.items())],
        )
        metrics.counter(
            "foldline.tenant.commands",
            "Commands of the tenants that metrics tell apart.",
            lambda: [(n, {"tenant": tenant, "outcome": outcome}) for (tenant, outcome), n in list(self._by_tenant.items())],
        )
        metrics.gauge(
            "foldline.tenant.commands.waiting",
            "Commands that wait for their outcomes, of the tenants that metrics tell apart.",
            lambda: [(waiting(tenant), {"tenant": tenant}) for tenant in sorted(self.tenants)],
        )
        metrics.gauge("foldline.head", "The last position of the line.", lambda: [(self.head, {})] if self.head else [])
        metrics.counter("foldline.events.appended", "Events appended to the line.", lambda: [(self._events, {})])
        metrics.counter(
            "foldline.commit.conflicts",
            "Batches decided on states that had changed, and decided again.",
            lambda: [(self.conflicts, {})],
        )
        metrics.counter(
            "foldline.commit.failures", "Batches that failed or met a lost connection.", lambda: [(self.failures, {})]
        )
        metrics.counter(
            "foldline.cache.lookups",
            "Aggregates that batches needed: in memory, or loaded.",
            lambda: [(self._hits, {"result": "hit"}), (self._misses, {"result": "miss"})],
        )


def _trace(groups: Sequence[CommandGroup], plan: Plan, watch: Stopwatch, now_ns: int) -> str:
    """A span for the append, with links to the commands that are traced, and one for each of their decisions.

    Returns the append's traceparent; empty if no command of the batch is traced.
    """
    traced = [
        (command, outcome)
        for group in groups
        for command in group.commands
        if tracing.recorded(command.sender.traceparent) and (outcome := plan.outcomes.get(command.key)) is not None
    ]
    if not traced:
        return ""
    parents = dict.fromkeys(command.sender.traceparent for command, _ in traced)
    append = tracing.start(
        "append_batch",
        "client",
        parent=next(iter(parents)),
        links=parents,
        start_ns=watch.decided_ns,
        attributes={
            "db.system.name": "postgresql",
            "db.stored_procedure.name": "append_batch",
            "foldline.commit.commands": len(plan.outcomes),
            "foldline.commit.events": len(plan.batch.events),
        },
    )
    if append is None:
        return ""
    tracing.end(append, end_ns=now_ns)
    place = tracing.traceparent_of(append)
    for command, outcome in traced:
        _trace_decision(command, outcome, watch, place)
    return place


def _trace_decision(command: Command, outcome: Outcome, watch: Stopwatch, append: str) -> None:
    attributes: dict[str, str | int] = {
        "foldline.command.type": command.type,
        "foldline.command.id": command.key[1],
        "foldline.command.outcome": outcome.status,
        "foldline.aggregate.type": command.aggregate[1],
        "foldline.aggregate.id": command.aggregate[2],
        "foldline.tenant": command.key[0],
        "foldline.events": outcome.events_appended,
    }
    if outcome.refusal is not None:
        attributes["foldline.refusal"] = outcome.refusal.reason
    span = tracing.start(
        f"decide {command.type.rpartition('.')[2].removesuffix('Request')}",
        "internal",
        parent=command.sender.traceparent,
        links=(append,),
        attributes=attributes,
        start_ns=int(command.received_at.timestamp() * 1e9),
    )
    if span is not None:
        tracing.end(span, error="defect" if outcome.status == "failed" else "", end_ns=watch.decided_ns)


def _tell(groups: Sequence[CommandGroup], plan: Plan) -> None:
    for group in groups:
        for command in group.commands:
            if (outcome := plan.outcomes.get(command.key)) is None:
                continue
            log.debug(
                "command",
                command_id=command.key[1],
                tenant=command.key[0],
                type=command.type,
                outcome=outcome.status,
                reason="" if outcome.refusal is None else outcome.refusal.reason,
                events=outcome.events_appended,
                version=outcome.version,
                trace_id=command.sender.traceparent[3:35],
                span_id=command.sender.traceparent[36:52],
            )
