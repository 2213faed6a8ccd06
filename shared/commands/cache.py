"""The states of the aggregates that were used last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shared.commands.states import Versioned
from shared.line.event_store import AggregateKey


class Cache:
    """The states of the aggregates that were used last, at most `size_max`. A stale one is found by the append."""

    def __init__(self, size_max: int) -> None:
        self._size_max = size_max
        # From the least to the most recently used.
        self._states: dict[AggregateKey, Versioned] = {}

    def get(self, key: AggregateKey) -> Versioned | None:
        """The state as it was last seen, if it is still here."""
        at = self._states.pop(key, None)
        if at is not None:
            self._states[key] = at
        return at

    def put(self, states: Mapping[AggregateKey, Versioned]) -> None:
        """Keeps states that are durable; the least recently used go."""
        cached = self._states
        for key, at in states.items():
            cached.pop(key, None)
            cached[key] = at
        while len(cached) > self._size_max:
            del cached[next(iter(cached))]

    def drop(self, keys: Sequence[AggregateKey]) -> None:
        """Forgets states that may be stale."""
        for key in keys:
            self._states.pop(key, None)
