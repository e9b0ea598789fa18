"""What is missing under the warm targets; the planner orders it with what clients wait for.

A warm launch is a launch like any other: caps, launches an hour, breaker, budgets and cool-downs count. Only
its failures are taken more patiently, because no client waits for it.
"""

from __future__ import annotations

from broker.context import Context
from broker.core import schedule
from broker.core.model import Event, WorkerChanged, WorkerState
from broker.core.policy import Reason
from broker.core.settings import PoolSettings
from broker.core.stock import stock_shortage
from broker.core.warm import LOOK_SECONDS, PAUSE_SECONDS_MAX, warm_shortage
from broker.orders import YIELDED

FAILED_BOOTS = (Reason.BOOT_TIMEOUT, Reason.BOOT_FAILED)


class TopUp:
    """See the module. Whoever has changed the books is heard through `heard`."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._orders: set[str] = set()  # of ours, as long as nothing has come of them
        self.closed = False  # the broker is going down: who comes next tops up

    def shortage(self, name: str) -> int:
        """How many workers are missing, ready or stopped: 0 while the last failures make us wait."""
        context = self._context
        pool, now = context.pool(name), context.now()
        if self.closed or not pool.keeps_warm:
            return 0
        warmth = context.warmth(name)
        if now < warmth.not_before_at:
            return 0
        ready = warm_shortage(context.registry, name, pool, warmth.target, now)
        if warmth.stops.pauses(now):
            return ready
        return ready + stock_shortage(context.registry, name, pool, warmth.target, now)

    def ordered(self, order_id: str) -> None:
        """This order is for workers that nobody waits for."""
        self._orders.add(order_id)

    def refused(self, name: str) -> None:
        """Nothing that the pool could buy may be asked for at the moment."""
        self._context.warmth(name).failed(self._context.now())

    def heard(self, event: Event) -> None:
        """Failed launches make the next ones wait; so does somebody who has ended everything. What a client's
        order meets is no news of ours: it may have wanted something else."""
        if not isinstance(event, WorkerChanged) or not self._context.pool(event.worker.pool).keeps_warm:
            return
        worker, warmth = event.worker, self._context.warmth(event.worker.pool)
        match event.before, worker.state:
            case WorkerState.BOOTING, WorkerState.READY:
                warmth.succeeded()
            case _, WorkerState.DRAINING if worker.reason == Reason.TERMINATE_ALL:
                warmth.pause(PAUSE_SECONDS_MAX, event.at)
            case WorkerState.BOOTING, WorkerState.DRAINING if worker.reason in FAILED_BOOTS:
                warmth.failed(event.at)
            case WorkerState.BOOTING, WorkerState.GONE if worker.reason != YIELDED:
                warmth.failed(event.at)
            case WorkerState.ORDERED, WorkerState.GONE if worker.reason != YIELDED:
                if worker.order_id in self._orders:
                    warmth.failed(event.at)
            case _:
                pass
        if worker.state is not WorkerState.ORDERED:
            self._orders.discard(worker.order_id or "")

    def next_look_at(self) -> float | None:
        """When a target changes or a pause is over; soon in any case, because clocks may be set."""
        moments = [
            self._next_look_at(name)
            for name, pool in self._context.settings.pool.items()
            if pool.keeps_warm and not self.closed
        ]
        return min(moments, default=None)

    def _next_look_at(self, name: str) -> float:
        context, now = self._context, self._context.now()
        moments, now_unix = [now + LOOK_SECONDS], context.pool_unix(name, now)
        not_before_at = context.warmth(name).not_before_at
        if now < not_before_at:
            moments.append(not_before_at)
        if now_unix is not None:
            moments += [now + seconds for seconds in _seconds_to_change(context.pool(name), now_unix)]
        return min(moments)


def _seconds_to_change(pool: PoolSettings, now_unix: float) -> list[float]:
    """Until the target changes, if it does so before the next look: a search through the week costs a hundred
    times as much as two looks at the clock, and a window is a minute long at least."""
    targets = pool.warm_targets
    then_unix = now_unix + LOOK_SECONDS
    if schedule.target(targets, now_unix) == schedule.target(targets, then_unix):
        return []
    change_unix = schedule.next_change_unix(targets, now_unix)
    return [] if change_unix is None else [change_unix - now_unix]
