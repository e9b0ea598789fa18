"""What should be done: pure decisions that the loops carry out.

`judge` looks at one worker whose deadline has come and says whether it must go, and when to look again.
`launch_room` says how many machines a pool may order, or why none (planning.py says which).
Nothing in here acts, and nothing in here is remembered except in LaunchGuard, which is handed in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from broker.core.errors import BrokerError, LimitReached
from broker.core.ledger import Budget
from broker.core.model import Worker, WorkerState
from broker.core.registry import BOOKED, USABLE, Registry
from broker.core.settings import PoolSettings
from broker.core.warm import LOOK_SECONDS, Warmth, idle_since_at

HOUR_SECONDS = 3600.0
BREAKER_SECONDS = (
    600.0  # how long launches pause after the first run of failed boots; doubles with each further one
)
BREAKER_SECONDS_MAX = 4 * HOUR_SECONDS
BREAKER_DOUBLINGS_MAX = 5  # more would exceed BREAKER_SECONDS_MAX; far more would exceed a float
RETIRED = "max lifetime reached"  # the standing notice of a worker that gets no new clients for its age
SUSPECT_SECONDS_MAX = 300.0  # an unheld worker that has not answered for so long is broken


class Reason(StrEnum):
    """Why a worker is drained: a closed list, safe as a metric label."""

    IDLE = "idle"
    RELEASED = "released"
    MAX_LIFETIME = "max-lifetime"
    BOOT_TIMEOUT = "boot-timeout"
    BOOT_FAILED = "boot-failed"
    ENDED_BEFORE = "ended-before"
    UNRESPONSIVE = "unresponsive"
    TERMINATE_ALL = "terminate-all"
    RECLAIMED = "reclaimed"
    STOPPED = "stopped"
    SURPLUS = "surplus"
    WRONG_MARKET = "wrong-market"
    REPLACED = "replaced"
    POOL_REMOVED = "pool-removed"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `judge` decided. `next_look_at` is None only for a worker that has no deadline of its own."""

    drain: Reason | None = None
    retire: bool = False  # too old for new clients, but somebody still holds it
    next_look_at: float | None = None


def judge(
    registry: Registry,
    worker: Worker,
    pool: PoolSettings,
    now: float,
    warmth: Warmth | None = None,
    *,
    leaving: bool = False,
) -> Verdict:
    """One worker, after `registry.expire_leases`: must it go? Times are monotonic seconds.

    One that the warm target keeps is not idle, however long nobody has used it. One that is `leaving`,
    because its pool was removed, goes as soon as nobody holds it.
    """
    if leaving and worker.state in USABLE and not registry.busy(worker.id):
        return Verdict(drain=Reason.POOL_REMOVED)
    match worker.state:
        case WorkerState.BOOTING:
            deadline_at = worker.since_at + pool.boot_deadline
            if registry.busy(worker.id):  # taken over from before a restart: its clients decide how long
                deadline_at = max(deadline_at, _last_lease_end(registry, worker))
            return _drain_at(deadline_at, Reason.BOOT_TIMEOUT, now)
        case WorkerState.READY | WorkerState.SUSPECT:
            return _judge_usable(registry, worker, pool, now, warmth or Warmth())
        case _:
            return Verdict()


def born_at(pool: PoolSettings, age_seconds: float, now: float) -> float:
    """When an adopted worker shall count as born: by its age in the cloud's words, but with an idle timeout
    of life left, because whether it is busy is not known yet and the wall clock may be off."""
    age_max = max(0.0, pool.max_lifetime - pool.idle_timeout)
    return now - min(max(0.0, age_seconds), age_max)


def _judge_usable(
    registry: Registry, worker: Worker, pool: PoolSettings, now: float, warmth: Warmth
) -> Verdict:
    retire_at = worker.born_at + pool.max_lifetime
    if registry.busy(worker.id):
        ends_at = min(registry.lease_ends_at(lease.id) or now for lease in registry.leases(worker.id))
        if now >= retire_at:
            return Verdict(retire=True, next_look_at=ends_at)
        return Verdict(next_look_at=min(ends_at, retire_at))
    limits = [(retire_at, Reason.MAX_LIFETIME)]
    idle_at = idle_since_at(registry, worker, pool, warmth, now)
    if idle_at is not None:
        limits.append((idle_at + pool.idle_timeout, Reason.IDLE))
    if worker.state is WorkerState.SUSPECT:
        limits.append((worker.since_at + SUSPECT_SECONDS_MAX, Reason.UNRESPONSIVE))
    deadline_at, reason = min(limits)
    if idle_at is None and deadline_at > now:  # whether it is still a spare is looked at again and again
        return Verdict(next_look_at=min(deadline_at, now + LOOK_SECONDS))
    return _drain_at(deadline_at, reason, now)


def _drain_at(deadline_at: float, reason: Reason, now: float) -> Verdict:
    return Verdict(drain=reason) if now >= deadline_at else Verdict(next_look_at=deadline_at)


def _last_lease_end(registry: Registry, worker: Worker) -> float:
    return max(registry.lease_ends_at(lease.id) or 0.0 for lease in registry.leases(worker.id))


@dataclass(slots=True)
class LaunchGuard:
    """One pool's memory against runaway launches: attempts of the last hour, and the breaker."""

    attempts: deque[float] = field(default_factory=deque)
    boot_failures: int = 0
    opened: int = 0
    closed_until_at: float = 0.0

    def attempted(self, now: float) -> None:
        """Count an attempt before it is made, so that failed and pending ones count too."""
        self.attempts.append(now)

    def booted(self) -> None:
        """A machine became ready: the image works, whatever failed before."""
        self.boot_failures = self.opened = 0
        self.closed_until_at = 0.0

    def boot_failed(self, pool: PoolSettings, now: float) -> None:
        """Count a failed boot; at `boot_failures_max` in a row launches pause, longer each time."""
        self.boot_failures += 1
        if self.boot_failures >= pool.boot_failures_max:
            doublings = min(self.opened, BREAKER_DOUBLINGS_MAX)
            pause_seconds = min(BREAKER_SECONDS * 2**doublings, BREAKER_SECONDS_MAX)
            self.closed_until_at = now + pause_seconds
            self.opened += 1
            self.boot_failures = 0

    def refusal(self, pool: PoolSettings, now: float) -> BrokerError | None:
        """Why no launch is allowed now, or None."""
        while self.attempts and self.attempts[0] <= now - HOUR_SECONDS:
            self.attempts.popleft()
        if now < self.closed_until_at:
            return LimitReached(
                f"{pool.boot_failures_max} machines in a row did not become ready; launches pause for "
                f"{self.closed_until_at - now:.0f} s more. Is the image or its user data broken?"
            )
        if len(self.attempts) >= pool.launches_per_hour:
            return LimitReached(f"the pool's launches_per_hour = {pool.launches_per_hour} is reached")
        return None


@dataclass(frozen=True, slots=True)
class Room:
    """How many machines may be ordered now, and when there is no room at all, why."""

    machines: int
    why: BrokerError | None = None


def launch_room(
    registry: Registry,
    name: str,
    pool: PoolSettings,
    guard: LaunchGuard,
    now: float,
    *,
    budgets: Sequence[Budget] = (),
    price_usd_micros_per_hour: int = 0,
) -> Room:
    """How many machines the caps leave room for. Machines on order count as if they were there.

    `price_usd_micros_per_hour` is that of the dearest machine that might be ordered: each counts with it
    before the next is allowed.
    """
    refusal = guard.refusal(pool, now)
    if refusal is not None:
        return Room(0, refusal)
    room = pool.max_workers - registry.count(name, *BOOKED)
    if room <= 0:
        return Room(0, LimitReached(f"the pool's max_workers = {pool.max_workers} is reached"))
    room = min(room, pool.launches_per_hour - len(guard.attempts))
    for budget in budgets:
        room = budget.launches(price_usd_micros_per_hour, room)
        if room <= 0:
            return Room(0, budget.refusal())
    return Room(room)
