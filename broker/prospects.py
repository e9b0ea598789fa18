"""Why a client waits, and for how long: what PENDING lines and the error of a wait that ends both say."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from broker.context import Context
from broker.core.errors import BrokerError, Code
from broker.core.estimate import BootTimes
from broker.core.model import Offering, Worker, WorkerState
from broker.core.planning import SEATS_MAX
from broker.core.replies import Pending
from broker.waiting import Waiter

BOOTING, QUEUED, STARTING = "BOOTING", "QUEUED", "STARTING"
OBSTACLES = {Code.NO_CAPACITY, Code.LIMIT, Code.BUDGET}  # an obstacle with another code is called CLOUD


class Queue:
    """One pool's queue as it is being walked: which machines on their way those in front are waiting for."""

    def __init__(self, booting: Iterable[Worker], seats: int) -> None:
        """`booting`: the oldest first; `seats`: so many clients share one, at most."""
        self._free: dict[Offering, deque[Worker]] = {}
        for worker in booting:
            self._free.setdefault(worker.offering, deque()).append(worker)
        self._seats = seats
        self._shared: list[tuple[Worker, int]] = []  # with the seats that are left

    def machine_of(self, waiter: Waiter) -> Worker | None:
        """The machine on its way with which this waiter has all it wants; None when that is not ordered."""
        last: Worker | None = None
        lacking = waiter.lacking
        while lacking > 0:
            worker, seats = self._next(waiter)
            if worker is None:
                return None
            here = min(seats, lacking)
            lacking -= here
            if not waiter.exclusive:
                self._shared.append((worker, seats - here))
            last = worker
        return last

    def _next(self, waiter: Waiter) -> tuple[Worker | None, int]:
        """A machine that fits, and how many may have it: one with free seats, or else the oldest."""
        if not waiter.exclusive:
            for number, (worker, seats) in enumerate(self._shared):
                if seats and waiter.wish.fits(worker.offering):
                    del self._shared[number]
                    return worker, seats
        fitting = [free for offering, free in self._free.items() if free and waiter.wish.fits(offering)]
        if not fitting:
            return None, 0
        worker = min(fitting, key=lambda free: free[0].boot_began_at).popleft()
        return worker, 1 if waiter.exclusive else self._seats


@dataclass(slots=True)
class Prospects:
    """See the module."""

    context: Context
    boots: BootTimes = field(default_factory=BootTimes)

    def of(self, pool: str) -> Iterator[tuple[Waiter, Pending]]:
        """Everybody in the pool's queue, and what there is to say to them now."""
        context = self.context
        on_order = [*context.registry.in_state(WorkerState.ORDERED, pool=pool), *context.booting(pool)]
        booting = sorted(on_order, key=lambda worker: worker.boot_began_at)
        queue = Queue(booting, context.pool(pool).seats or SEATS_MAX)
        for position, waiter in enumerate(context.waiting.of(pool), start=1):
            obstacle = context.obstacles.of(pool, waiter.wish)
            machine = context.own_booting(waiter) or queue.machine_of(waiter)
            yield waiter, self._pending(waiter, position, machine, obstacle)

    def starting(self, pool: str) -> Pending:
        """For one who comes before the broker has seen what it has."""
        reason = "the broker has just started and is still looking for its workers"
        return Pending(None, len(self.context.waiting.of(pool)) + 1, STARTING, reason)

    def why(self, waiter: Waiter) -> str:
        """The reason in words, for one whose wait is over; nothing when there is none but the queue."""
        for other, pending in self.of(waiter.pool):
            if other is waiter and pending.code != QUEUED:
                again = "; ask again" if pending.code == BOOTING else ""
                return f"{pending.reason}{again}"
        return ""

    def _pending(
        self, waiter: Waiter, position: int, machine: Worker | None, obstacle: BrokerError | None
    ) -> Pending:
        if machine is not None:
            age_seconds = self.context.now() - machine.boot_began_at
            started = machine.started_at is not None
            eta_seconds = self.boots.eta_seconds(waiter.pool, age_seconds, started=started)
            return Pending(eta_seconds, position, BOOTING, f"one has been booting for {age_seconds:.0f} s")
        if obstacle is not None:
            code = obstacle.code if obstacle.code in OBSTACLES else Code.CLOUD
            return Pending(None, position, str(code), obstacle.message)
        usable = self.context.registry.count(waiter.pool, WorkerState.READY, WorkerState.SUSPECT)
        reason = "every worker that suits is in use" if usable else "a machine is about to be ordered"
        return Pending(None, position, QUEUED, reason)
