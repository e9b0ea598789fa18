"""What clients wait for and what is on its way for them; and telling those for whom nothing is."""

from __future__ import annotations

from collections import Counter

from broker.context import Context
from broker.core.errors import BrokerError, Code
from broker.core.life import BOOKED, USABLE
from broker.core.model import Offering, WorkerState
from broker.core.planning import SEATS_MAX, Need, by_offering, unserved
from broker.core.policy import client_room
from broker.core.wish import Wish
from broker.orders import OpenOrder, Orders
from broker.waiting import Waiter

# What a worker that comes free can help against. A cloud that cannot be asked is told at once: nobody knows
# then whether the worker in use will be there.
PASSING = (Code.NO_CAPACITY, Code.LIMIT, Code.BUDGET)


class Supply:
    """See the module."""

    def __init__(self, context: Context, orders: Orders) -> None:
        self._context = context
        self._orders = orders

    def needs(self, name: str) -> list[Need]:
        """What the pool's clients wait for, as far as they may have it."""
        context, pool = self._context, self._context.pool(name)
        if pool.workers_per_client_max is None:
            return context.waiting.needs(name)
        return context.waiting.needs(name, lambda client: client_room(context.registry, name, pool, client))

    def coming(self, name: str, without: OpenOrder | None = None) -> dict[tuple[Offering, ...], int]:
        """The pool's machines on order and booting, by what each may turn out to be."""
        coming = self._orders.coming(name, without)
        booting = self._context.registry.in_state(WorkerState.BOOTING, pool=name)
        staying = (worker for worker in booting if worker.id not in self._context.leaving)
        for offerings, count in by_offering(staying).items():
            coming[offerings] = coming.get(offerings, 0) + count
        return coming

    def tell(
        self, name: str, error: BrokerError, wish: Wish | None = None, without: OpenOrder | None = None
    ) -> bool:
        """Tell those clients (with that wish) for whom no machine is on its way that none will come. Whether
        anybody goes on waiting.

        When nothing can be had, one that a machine in use would do for goes on: its holder may give it back
        at any moment. It learns why none is bought. What is perhaps launched by the order `without` is no
        hope.
        """
        context = self._context
        offerings, seats = context.offerings(name), context.pool(name).seats or SEATS_MAX
        found = unserved(self.needs(name), self.coming(name, without), offerings, seats=seats)
        if wish is not None:
            found = {key: clients for key, clients in found.items() if key[0] == wish}
        in_use = self._in_use(name) if error.code in PASSING else Counter()
        goes_on = context.waiting.fail(
            name, error, unserved=found, helped=lambda waiter: self._may_come_free(waiter, in_use, seats)
        )
        if goes_on:
            context.obstacles[name] = error
        return goes_on

    def _in_use(self, name: str) -> Counter[Offering]:
        """The workers that may be handed out again once their holders are done."""
        workers = self._context.registry.in_state(*USABLE & BOOKED, pool=name)
        return Counter(
            worker.offering
            for worker in workers
            if worker.state is not WorkerState.BOOTING
            and not (worker.standing_notice or worker.closed or worker.id in self._context.leaving)
        )

    def _may_come_free(self, waiter: Waiter, in_use: Counter[Offering], seats: int) -> bool:
        if waiter.found >= waiter.least:
            return False  # what is free will do
        workers = sum(count for offering, count in in_use.items() if waiter.wish.fits(offering))
        return workers * (1 if waiter.exclusive else seats) >= waiter.least
