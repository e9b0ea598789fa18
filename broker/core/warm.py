"""Warm workers: ready before anybody asks. How many are missing, and which of the unheld ones are kept.

The longest unheld ones are kept, so that one that was used a moment ago goes its ordinary way: it is there
for its idle timeout, counted from its use, and then it ends. One that will soon be too old does not count any
more, so that its replacement is ready when it goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from broker.core.backoff import Backoff, doubled
from broker.core.model import UNKNOWN_CLIENT, Worker, WorkerState
from broker.core.registry import Registry
from broker.core.settings import PoolSettings

LOOK_SECONDS = 60.0  # a clock that was set, and a changed configuration, are noticed within this time
PAUSE_SECONDS_MIN = 60.0  # after a failed launch, doubling: no client waits for it
PAUSE_SECONDS_MAX = 900.0
STOCK_PAUSE_SECONDS_MAX = 14_400.0  # after Stops and Starts that failed: each costs a machine
FAILURES_MAX = 10  # counted; more would pause no longer, and far more would exceed a float
LEAD_SHARE_MAX = 0.25  # of its life: a worker that lives short is not replaced for half of it


def stock_backoff() -> Backoff:
    """After a Stop or a Start that failed: perhaps none works, and each costs a machine."""
    return Backoff(PAUSE_SECONDS_MAX, STOCK_PAUSE_SECONDS_MAX)


@dataclass(slots=True)
class Warmth:
    """One pool's warm target, as it was last looked at, and what must be remembered around it."""

    target: int = 0
    not_before_at: float = float("-inf")  # launches pause until then
    failures: int = 0  # in a row
    wanted_until_at: dict[int, float] = field(default_factory=dict)  # place → when the target fell below it
    stops: Backoff = field(default_factory=stock_backoff)  # of workers that were to be kept stopped
    starts: Backoff = field(default_factory=stock_backoff)  # of workers that were stopped

    def seen(self, target: int, now: float) -> None:
        """The target at this moment."""
        self.wanted_until_at.update(dict.fromkeys(range(target, self.target), now))
        self.target = target

    def failed(self, now: float) -> None:
        """A launch came to nothing. Those of one moment count once."""
        if now < self.not_before_at:
            return
        self.failures = min(self.failures + 1, FAILURES_MAX)
        self.pause(doubled(PAUSE_SECONDS_MIN, self.failures, PAUSE_SECONDS_MAX), now)

    def pause(self, seconds: float, now: float) -> None:
        """No warm launches for so long, at least."""
        self.not_before_at = max(self.not_before_at, now + seconds)

    def succeeded(self) -> None:
        """A machine became ready."""
        self.failures = 0


def warm_shortage(registry: Registry, name: str, pool: PoolSettings, target: int, now: float) -> int:
    """How many workers are missing so that `target` are ready beyond those that are held.

    Machines that are coming are not counted here: the planner takes off those that no client needs.
    """
    young = (worker for worker in registry.unheld(name) if not expiring(worker, pool, now))
    ready = sum(1 for _ in islice(young, target))
    # After the store was lost nobody knows whether these are in use: no second one is launched beside them.
    perhaps = len(registry.held_leases(name, UNKNOWN_CLIENT)) if ready < target else 0
    return max(0, target - ready - perhaps)


def spare(registry: Registry, worker: Worker, pool: PoolSettings, target: int, now: float) -> bool:
    """Whether the worker is one of the unheld ones that the target keeps from being reaped as idle."""
    return _place(registry, worker, pool, target, now) is not None


def idle_since_at(
    registry: Registry, worker: Worker, pool: PoolSettings, warmth: Warmth, now: float
) -> float | None:
    """Since when an unheld worker has been of no use; None for a spare.

    A target that falls starts the idle time of those that it does not keep any more.
    """
    used_at = registry.used_at(worker.id)
    if worker.state is WorkerState.SUSPECT:  # a spare that has just fallen silent was of use until then
        return max(used_at, worker.since_at) if warmth.target else used_at
    if spare(registry, worker, pool, warmth.target, now):
        return None
    place = _place(registry, worker, pool, max(warmth.wanted_until_at, default=-1) + 1, now)
    return used_at if place is None else max(used_at, warmth.wanted_until_at.get(place, used_at))


def expiring(worker: Worker, pool: PoolSettings, now: float) -> bool:
    """Whether the worker reaches its max_lifetime before a machine that is ordered now must have booted."""
    lead_seconds = min(pool.boot_deadline, pool.max_lifetime * LEAD_SHARE_MAX)
    return now >= worker.born_at + pool.max_lifetime - lead_seconds


def _place(registry: Registry, worker: Worker, pool: PoolSettings, places: int, now: float) -> int | None:
    """Which of the first so many unheld ones of its pool the worker is; None when it is none of them."""
    for place, other in zip(range(places), _in_order(registry, worker.pool, pool, now), strict=False):
        if other.id == worker.id:
            return place
    return None


def _in_order(registry: Registry, name: str, pool: PoolSettings, now: float) -> Iterator[Worker]:
    """The unheld workers, those that shall stay longest first."""
    yield from (one for one in registry.unheld(name) if not expiring(one, pool, now))
    yield from (one for one in registry.unheld(name) if expiring(one, pool, now))
