"""How long workers ran, how long they were in use, and what that cost: an observer of events.

Counts what happens while this process watches. A worker that was taken over after a restart is counted from
then on, and the 60-second minimum is charged only for machines whose launch this process has seen.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from broker.core.model import Event, LeaseEnded, LeaseGranted, Worker, WorkerChanged, WorkerSeen, WorkerState
from broker.core.money import cost_usd_micros


@dataclass(slots=True)
class Run:
    """One worker that is billed at the moment."""

    pool: str
    since_at: float
    price_usd_micros_per_hour: int
    whole: bool  # its launch was seen, so the minimum is its to pay

    def cost_usd_micros(self, now: float) -> int:
        seconds = max(0.0, now - self.since_at)
        if self.whole:
            return cost_usd_micros(self.price_usd_micros_per_hour, seconds)
        return round(self.price_usd_micros_per_hour * seconds / 3600)


@dataclass(frozen=True, slots=True)
class PoolTotals:
    """One pool's sums up to a moment."""

    running_seconds: float
    busy_seconds: float
    cost_usd_micros: int
    cost_usd_micros_per_hour: int

    @property
    def utilization_ratio(self) -> float:
        """Busy worker-seconds over running worker-seconds; 0 while nothing has run."""
        return min(1.0, self.busy_seconds / self.running_seconds) if self.running_seconds > 0 else 0.0


class Meter:
    """Feed it events with `heard`, read it with `totals`."""

    def __init__(self) -> None:
        self._runs: dict[str, Run] = {}
        self._busy_since: dict[str, tuple[str, float]] = {}  # worker id → pool, when it became busy
        self._ordered: set[str] = set()
        self._running_seconds: dict[str, float] = defaultdict(float)
        self._busy_seconds: dict[str, float] = defaultdict(float)
        self._cost_usd_micros: dict[str, int] = defaultdict(int)

    def heard(self, event: Event) -> None:
        match event:
            case WorkerChanged(worker=worker, before=before, at=at):
                if before is None and worker.state is WorkerState.ORDERED:
                    self._ordered.add(worker.id)
                self._seen(worker, at)
            case WorkerSeen(worker=worker, at=at):
                self._seen(worker, at)
            case LeaseGranted(worker=worker, first=True, at=at):
                self._busy_since[worker.id] = (worker.pool, at)
            case LeaseEnded(worker=worker, last=True, at=at):
                self._not_busy(worker.id, at)

    def totals(self, pool: str, now: float) -> PoolTotals:
        runs = [run for run in self._runs.values() if run.pool == pool]
        busy = sum(max(0.0, now - at) for name, at in self._busy_since.values() if name == pool)
        return PoolTotals(
            self._running_seconds[pool] + sum(now - run.since_at for run in runs),
            self._busy_seconds[pool] + busy,
            self._cost_usd_micros[pool] + sum(run.cost_usd_micros(now) for run in runs),
            sum(run.price_usd_micros_per_hour for run in runs),
        )

    def _seen(self, worker: Worker, at: float) -> None:
        gone = worker.state is WorkerState.GONE
        if worker.running and not gone and worker.id not in self._runs:
            price = worker.offering.price_usd_micros_per_hour
            self._runs[worker.id] = Run(worker.pool, at, price, worker.id in self._ordered)
        elif (gone or not worker.running) and worker.id in self._runs:
            run = self._runs.pop(worker.id)
            self._ordered.discard(worker.id)  # a stale `pending` must not cost the minimum a second time
            self._running_seconds[run.pool] += at - run.since_at
            self._cost_usd_micros[run.pool] += run.cost_usd_micros(at)
        if gone:
            self._ordered.discard(worker.id)
            self._not_busy(worker.id, at)

    def _not_busy(self, worker_id: str, at: float) -> None:
        pool, since_at = self._busy_since.pop(worker_id, ("", at))
        if pool:
            self._busy_seconds[pool] += max(0.0, at - since_at)
