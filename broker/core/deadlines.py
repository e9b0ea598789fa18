"""When to look at what again: a heap of moments, in which a later word replaces an earlier one."""

from __future__ import annotations

from heapq import heappop, heappush
from math import inf


class Deadlines:
    """One moment for each key. Moments are monotonic seconds."""

    def __init__(self) -> None:
        self._at: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def __contains__(self, key: str) -> bool:
        return key in self._at

    def set(self, key: str, at: float) -> None:
        """Have `due` name the key at `at`; replaces what was set before."""
        if self._at.get(key) != at:
            self._at[key] = at
            heappush(self._heap, (at, key))

    def no_later(self, key: str, at: float) -> None:
        """Have `due` name the key at `at`, unless it does so before."""
        if at < self._at.get(key, inf):
            self.set(key, at)

    def drop(self, key: str) -> None:
        self._at.pop(key, None)

    def due(self, now: float) -> list[str]:
        """The keys whose moment has come. They have none any more."""
        found = []
        while self._heap and self._heap[0][0] <= now:
            at, key = heappop(self._heap)
            if self._at.get(key) == at:
                del self._at[key]
                found.append(key)
        return found

    def next_at(self) -> float | None:
        """When `due` will have something, or None."""
        while self._heap and self._at.get(self._heap[0][1]) != self._heap[0][0]:
            heappop(self._heap)  # an entry that a later word replaced
        return self._heap[0][0] if self._heap else None
