"""How long workers ran and how long they were in use: an observer of events.

Counts what happens while this process watches: a worker that was taken over after a restart is counted from
then on. What machines cost is the ledger's, which also knows what happened before.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from broker.core.model import Event, LeaseEnded, LeaseGranted, Worker, WorkerChanged, WorkerSeen, WorkerState


@dataclass(frozen=True, slots=True)
class PoolTotals:
    """One pool's sums up to a moment."""

    running_seconds: float
    busy_seconds: float

    @property
    def utilization_ratio(self) -> float:
        """Busy worker-seconds over running worker-seconds; 0 while nothing has run."""
        return min(1.0, self.busy_seconds / self.running_seconds) if self.running_seconds > 0 else 0.0


class Meter:
    """Feed it events with `heard`, read it with `totals`."""

    def __init__(self) -> None:
        self._running_since: dict[str, tuple[str, float]] = {}  # worker id → pool, when it was seen running
        self._busy_since: dict[str, tuple[str, float]] = {}  # worker id → pool, when it became busy
        self._running_seconds: dict[str, float] = defaultdict(float)
        self._busy_seconds: dict[str, float] = defaultdict(float)

    def heard(self, event: Event) -> None:
        match event:
            case WorkerChanged(worker=worker, at=at) | WorkerSeen(worker=worker, at=at):
                self._seen(worker, at)
            case LeaseGranted(worker=worker, first=True, at=at):
                self._busy_since[worker.id] = (worker.pool, at)
            case LeaseEnded(worker=worker, last=True, at=at):
                self._ended(self._busy_since, self._busy_seconds, worker.id, at)

    def totals(self, pool: str, now: float) -> PoolTotals:
        return PoolTotals(
            self._running_seconds[pool] + _open_seconds(self._running_since, pool, now),
            self._busy_seconds[pool] + _open_seconds(self._busy_since, pool, now),
        )

    def _seen(self, worker: Worker, at: float) -> None:
        gone = worker.state is WorkerState.GONE
        if worker.running and not gone:
            self._running_since.setdefault(worker.id, (worker.pool, at))
        else:
            self._ended(self._running_since, self._running_seconds, worker.id, at)
        if gone:
            self._ended(self._busy_since, self._busy_seconds, worker.id, at)

    @staticmethod
    def _ended(
        since: dict[str, tuple[str, float]], seconds: dict[str, float], worker_id: str, at: float
    ) -> None:
        pool, since_at = since.pop(worker_id, ("", at))
        if pool:
            seconds[pool] += max(0.0, at - since_at)


def _open_seconds(since: dict[str, tuple[str, float]], pool: str, now: float) -> float:
    return sum(max(0.0, now - at) for name, at in since.values() if name == pool)
