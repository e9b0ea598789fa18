"""What should be done: pure decisions that the loops carry out.

`judge` looks at one worker whose deadline has come and says whether it must go, and when to look again.
`launch_room` says how many machines a pool may order, or why none (planning.py says which).
Nothing in here acts, and nothing in here is remembered except in LaunchGuard, which is handed in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf

from broker.core.errors import BrokerError, LimitReached
from broker.core.ledger import Budget
from broker.core.life import COUNTED, LIVING
from broker.core.model import Worker, WorkerState
from broker.core.registry import Registry
from broker.core.settings import PoolSettings
from broker.core.stock import (
    STOPPED_SECONDS_MAX,
    STOPPING_SECONDS_MAX,
    UNUSED_SECONDS,
    stock_lacks,
    superfluous,
    too_old,
)
from broker.core.warm import LOOK_SECONDS, Warmth, idle_since_at

HOUR_SECONDS = 3600.0
BREAKER_SECONDS = (
    600.0  # how long launches pause after the first run of failed boots; doubles with each further one
)
BREAKER_SECONDS_MAX = 4 * HOUR_SECONDS
BREAKER_DOUBLINGS_MAX = 5  # more would exceed BREAKER_SECONDS_MAX; far more would exceed a float
RETIRED = "max lifetime reached"  # the standing notice of a worker that gets no new clients for its age
POOL_REMOVED = "its pool was removed"  # that of one whose pool the operator has taken out of the settings
SUSPECT_SECONDS_MAX = 300.0  # an unheld worker that has not answered for so long is broken


class Reason(StrEnum):
    """Why a worker is drained: a closed list, safe as a metric label."""

    IDLE = "idle"
    RELEASED = "released"
    MAX_LIFETIME = "max-lifetime"
    HARD_LIFETIME = "hard-lifetime"
    USED_UP = "used-up"
    BOOT_TIMEOUT = "boot-timeout"
    BOOT_FAILED = "boot-failed"
    ENDED_BEFORE = "ended-before"
    UNRESPONSIVE = "unresponsive"
    TERMINATE_ALL = "terminate-all"
    RECLAIMED = "reclaimed"
    STOPPED = "stopped"
    OUTDATED = "outdated"
    NOT_STOPPED = "not-stopped"
    SURPLUS = "surplus"
    WRONG_MARKET = "wrong-market"
    REPLACED = "replaced"
    POOL_REMOVED = "pool-removed"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `judge` decided. `next_look_at` is None only for a worker that has no deadline of its own."""

    drain: Reason | None = None
    stop: bool = False  # nobody needs it now: the pool keeps it stopped
    retire: bool = False  # too old for new clients, but somebody still holds it or it is protected
    next_look_at: float | None = None


def judge(
    registry: Registry,
    worker: Worker,
    pool: PoolSettings,
    now: float,
    warmth: Warmth | None = None,
    *,
    leaving: bool = False,
    wanted: bool = False,
) -> Verdict:
    """One worker, after `registry.expire_leases`: must it go? Times are monotonic seconds.

    One that the warm target keeps is not idle, however long nobody has used it, nor is one that is `wanted`
    by somebody who waits until there are more like it. One that is `leaving`,
    because its pool was removed, goes as soon as nobody holds it. A protected one that has come up never
    must; one that has not is drained, so that nobody waits for it. Draining alone ends no machine: `may_end`
    has the last word.
    """
    if leaving and worker.state in LIVING and not registry.busy(worker.id) and not worker.protected:
        return Verdict(drain=Reason.POOL_REMOVED)
    match worker.state:
        case WorkerState.BOOTING:
            return _judge_booting(registry, worker, pool, now)
        case WorkerState.READY | WorkerState.SUSPECT:
            return _judge_usable(registry, worker, pool, now, warmth or Warmth(), wanted=wanted)
        case WorkerState.STOPPING:
            return _drain_at(worker.since_at + STOPPING_SECONDS_MAX, Reason.UNRESPONSIVE, now)
        case WorkerState.STOPPED:
            return _judge_stopped(registry, worker, pool, now)
        case _:
            return Verdict()


def may_end(worker: Worker) -> bool:
    """Whether Terminate may be sent for a worker that is drained, for whatever reason."""
    return not worker.protected


def used_up(registry: Registry, worker: Worker, pool: PoolSettings) -> bool:
    """Whether it has been given to as many holders as it may."""
    return pool.uses_max is not None and registry.uses(worker.id) >= pool.uses_max


def client_refusal(registry: Registry, name: str, pool: PoolSettings, client: str) -> LimitReached | None:
    """Why the client may not have one more worker of the pool beside those that it holds, or None.

    One that does not answer, or is too old for new clients, does not count: it is none to work with.
    """
    if client_room(registry, name, pool, client) != 0:
        return None
    return LimitReached(
        f"client {client} holds {_usable(registry, name, client)} of the workers of pool '{name}', and "
        f"workers_per_client_max = {pool.workers_per_client_max} is reached; release one first"
    )


def client_room(registry: Registry, name: str, pool: PoolSettings, client: str) -> int | None:
    """How many workers more the client may have; None: no limit."""
    allowed = pool.workers_per_client_max
    return None if allowed is None else max(0, allowed - _usable(registry, name, client))


def _usable(registry: Registry, name: str, client: str) -> int:
    held = registry.workers_held(name, client)
    return sum(worker.state is not WorkerState.SUSPECT for worker in held)


@dataclass(frozen=True, slots=True)
class LeaseRoom:
    """How many leases one ACQUIRE may ever be given at once, None for any number; and what allows no more."""

    leases: int | None
    because: str = ""

    def refusal(self, least: int) -> LimitReached | None:
        """Why so many leases will never be there at once, or None."""
        if self.leases is None or least <= max(self.leases, 1):
            return None
        return LimitReached(f"the pool has room for {self.leases} such leases at most, by {self.because}")

    def at_most(self, count: int) -> int:
        """As many of these as may be given."""
        return count if self.leases is None else min(count, max(self.leases, 1))


def lease_room(pool: PoolSettings, max_workers: int | None, *, exclusive: bool) -> LeaseRoom:
    """What the caps leave room for; `max_workers` is the broker's, for all pools together."""
    seats = 1 if exclusive else pool.seats
    if seats is None:
        return LeaseRoom(None)
    caps = [(pool.max_workers, "its max_workers")]
    if max_workers is not None:
        caps.append((max_workers, "the broker's max_workers"))
    if pool.workers_per_client_max is not None:
        caps.append((pool.workers_per_client_max, "its workers_per_client_max"))
    workers, because = min(caps, key=lambda cap: cap[0])
    return LeaseRoom(workers * seats, because)


def room_overall(registry: Registry, max_workers: int | None) -> int | None:
    """How many machines more the broker's `max_workers` allows in all pools together; None: no limit."""
    if max_workers is None:
        return None
    return max(0, max_workers - (len(registry) - len(registry.in_state(WorkerState.STOPPED))))


def born_at(pool: PoolSettings, age_seconds: float, now: float) -> float:
    """When an adopted worker shall count as born: by its age in the cloud's words, but with an idle timeout
    of life left, because whether it is busy is not known yet and the wall clock may be off.

    A pool with a hard lifetime goes by the age alone: otherwise each restart would lengthen it.
    """
    if pool.hard_lifetime is not None:
        return now - max(0.0, age_seconds)
    age_max = max(0.0, pool.max_lifetime - pool.idle_timeout)
    return now - min(max(0.0, age_seconds), age_max)


def _judge_booting(registry: Registry, worker: Worker, pool: PoolSettings, now: float) -> Verdict:
    deadline_at = worker.since_at + pool.boot_deadline
    hard_at = _hard_at(worker, pool)
    if not registry.busy(worker.id):
        return _drain_at(deadline_at, Reason.BOOT_TIMEOUT, now)
    # Taken over from before a restart: its clients decide how long.
    deadline_at = max(deadline_at, _last_lease_end(registry, worker))
    if hard_at < deadline_at:
        return _drain_at(hard_at, Reason.HARD_LIFETIME, now)
    return _drain_at(deadline_at, Reason.BOOT_TIMEOUT, now)


def _judge_usable(
    registry: Registry, worker: Worker, pool: PoolSettings, now: float, warmth: Warmth, *, wanted: bool
) -> Verdict:
    retire_at, hard_at = worker.born_at + pool.max_lifetime, _hard_at(worker, pool)
    if registry.busy(worker.id):
        ends_at = min(registry.lease_ends_at(lease.id) or now for lease in registry.leases(worker.id))
        if now >= hard_at:
            return Verdict(drain=Reason.HARD_LIFETIME)
        if now >= retire_at:
            return Verdict(retire=True, next_look_at=min(ends_at, hard_at))
        return Verdict(next_look_at=min(ends_at, retire_at))
    if worker.protected:  # it stays, but who is too old gets no new clients
        return Verdict(retire=True) if now >= retire_at else Verdict(next_look_at=retire_at)
    if used_up(registry, worker, pool) or worker.closed:
        return Verdict(drain=Reason.USED_UP)
    limits = [(retire_at, Reason.MAX_LIFETIME)]
    idle_at = None if wanted else idle_since_at(registry, worker, pool, warmth, now)
    stops = stock_lacks(registry, worker, pool, now)
    if idle_at is not None:
        limits.append((idle_at + idle_seconds_max(registry, worker, pool, now), Reason.IDLE))
    if worker.state is WorkerState.SUSPECT:
        limits.append((worker.since_at + SUSPECT_SECONDS_MAX, Reason.UNRESPONSIVE))
    deadline_at, reason = min(limits)
    if idle_at is None and deadline_at > now:  # whether it is still of use is looked at again and again
        return Verdict(next_look_at=min(deadline_at, now + LOOK_SECONDS))
    if stops and reason is Reason.IDLE and now >= deadline_at:
        return Verdict(stop=True)
    return _drain_at(deadline_at, reason, now)


def idle_seconds_max(registry: Registry, worker: Worker, pool: PoolSettings, now: float) -> float:
    """How long a worker that nobody needs stays: less, when it was launched to be stopped."""
    unused = not registry.uses(worker.id) and stock_lacks(registry, worker, pool, now)
    return min(UNUSED_SECONDS, pool.idle_timeout) if unused else pool.idle_timeout


def _judge_stopped(registry: Registry, worker: Worker, pool: PoolSettings, now: float) -> Verdict:
    if not worker.protected and superfluous(registry, worker, pool):
        return Verdict(drain=Reason.IDLE)
    if not worker.protected and (used_up(registry, worker, pool) or worker.closed):
        return Verdict(drain=Reason.USED_UP)
    if not worker.protected and (too_old(worker, pool) or now - worker.since_at >= STOPPED_SECONDS_MAX):
        return Verdict(drain=Reason.MAX_LIFETIME)
    return Verdict(next_look_at=now + LOOK_SECONDS)


def _hard_at(worker: Worker, pool: PoolSettings) -> float:
    if pool.hard_lifetime is None or worker.protected:
        return inf
    return worker.born_at + pool.hard_lifetime


def _drain_at(deadline_at: float, reason: Reason, now: float) -> Verdict:
    return Verdict(drain=reason) if now >= deadline_at else Verdict(next_look_at=deadline_at)


def _last_lease_end(registry: Registry, worker: Worker) -> float:
    return max(registry.lease_ends_at(lease.id) or 0.0 for lease in registry.leases(worker.id))


class BreakerState(StrEnum):
    """Whether failed boots pause the launches of a pool. A breaker that is open lets nothing through."""

    CLOSED = "closed"
    OPEN = "open"


@dataclass(frozen=True, slots=True)
class Breaker:
    """A pool's breaker at a moment: `failures` in a row since it closed or opened last, `openings` in a row
    without a machine that came up between them."""

    state: BreakerState = BreakerState.CLOSED
    seconds_left: float = 0.0  # until it closes
    failures: int = 0
    openings: int = 0


@dataclass(slots=True)
class LaunchGuard:
    """One pool's memory against runaway launches: attempts of the last hour, and the breaker.

    `changed` is called when the breaker is not any more what it was.
    """

    attempts: deque[float] = field(default_factory=deque)
    boot_failures: int = 0
    opened: int = 0
    closed_until_at: float = 0.0
    changed: Callable[[], None] = lambda: None

    def attempted(self, now: float) -> None:
        """Count an attempt before it is made, so that failed and pending ones count too."""
        self.attempts.append(now)

    def booted(self) -> None:
        """A machine became ready: the image works, whatever failed before."""
        if self.boot_failures or self.opened:
            self.boot_failures = self.opened = 0
            self.closed_until_at = 0.0
            self.changed()

    def boot_failed(self, pool: PoolSettings, now: float) -> None:
        """Count a failed boot; at `boot_failures_max` in a row launches pause, longer each time."""
        self.boot_failures += 1
        if self.boot_failures >= pool.boot_failures_max:
            doublings = min(self.opened, BREAKER_DOUBLINGS_MAX)
            pause_seconds = min(BREAKER_SECONDS * 2**doublings, BREAKER_SECONDS_MAX)
            self.closed_until_at = now + pause_seconds
            self.opened += 1
            self.boot_failures = 0
        self.changed()

    def breaker(self, now: float) -> Breaker:
        """Its state now."""
        seconds_left = max(0.0, self.closed_until_at - now)
        state = BreakerState.OPEN if seconds_left else BreakerState.CLOSED
        return Breaker(state, seconds_left, self.boot_failures, self.opened)

    def recall(self, breaker: Breaker, now: float) -> None:
        """The breaker as it was before a restart. No clock makes it longer than it can be."""
        self.boot_failures, self.opened = breaker.failures, breaker.openings
        self.closed_until_at = now + min(breaker.seconds_left, BREAKER_SECONDS_MAX)

    def launches_last_hour(self, now: float) -> int:
        """How many attempts count against `launches_per_hour` at the moment."""
        return sum(at > now - HOUR_SECONDS for at in self.attempts)

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
    max_workers: int | None = None,
) -> Room:
    """How many machines the caps leave room for. Machines on order count as if they were there, stopped ones
    only once they are started.

    `price_usd_micros_per_hour` is that of the dearest machine that might be ordered: each counts with it
    before the next is allowed. `max_workers` is the broker's, for all pools together.
    """
    refusal = guard.refusal(pool, now)
    if refusal is not None:
        return Room(0, refusal)
    room = pool.max_workers - registry.count(name, *COUNTED)
    if room <= 0:
        return Room(0, LimitReached(f"the pool's max_workers = {pool.max_workers} is reached"))
    overall = room_overall(registry, max_workers)
    if overall == 0:
        return Room(0, LimitReached(f"the broker's max_workers = {max_workers} is reached"))
    room = min(room, pool.launches_per_hour - len(guard.attempts), room if overall is None else overall)
    for budget in budgets:
        room = budget.launches(price_usd_micros_per_hour, room)
        if room <= 0:
            return Room(0, budget.refusal())
    return Room(room)
