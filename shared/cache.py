"""The states of the aggregates that were used last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from shared.event_store import Key, Versioned


class Cache:
    """The states of the aggregates that were used last, at most `size_max`. A stale one is found by the append."""

    def __init__(self, size_max: int) -> None:
        self._size_max = size_max
        self._states: OrderedDict[Key, Versioned] = OrderedDict()

    def get(self, key: Key) -> Versioned | None:
        """The state as it was last seen, if it is still here."""
        at = self._states.get(key)
        if at is not None:
            self._states.move_to_end(key)
        return at

    def put(self, states: Mapping[Key, Versioned]) -> None:
        """Keeps states that are durable; the least recently used go."""
        for key, at in states.items():
            self._states[key] = at
            self._states.move_to_end(key)
        while len(self._states) > self._size_max:
            self._states.popitem(last=False)

    def drop(self, keys: Sequence[Key]) -> None:
        """Forgets states that may be stale."""
        for key in keys:
            self._states.pop(key, None)
