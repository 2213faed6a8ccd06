"""A cache of aggregate states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shared.commands.states import Versioned
from shared.line.event_store import AggregateKey


class Cache:
    """The most recently used states, at most `size_max`. The append detects stale ones."""

    def __init__(self, size_max: int) -> None:
        self._size_max = size_max
        # From the least to the most recently used.
        self._states: dict[AggregateKey, Versioned] = {}

    def get(self, key: AggregateKey) -> Versioned | None:
        """The cached state, or None."""
        at = self._states.pop(key, None)
        if at is not None:
            self._states[key] = at
        return at

    def __contains__(self, key: AggregateKey) -> bool:
        """Whether a state is cached; it does not count as a use."""
        return key in self._states

    def put(self, states: Mapping[AggregateKey, Versioned]) -> None:
        """Adds durable states and removes the least recently used beyond `size_max`."""
        cached = self._states
        for key, at in states.items():
            cached.pop(key, None)
            cached[key] = at
        while len(cached) > self._size_max:
            del cached[next(iter(cached))]

    def drop(self, keys: Sequence[AggregateKey]) -> None:
        """Removes states that may be stale."""
        for key in keys:
            self._states.pop(key, None)
