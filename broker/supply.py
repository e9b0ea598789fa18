"""What clients wait for and what is on its way for them; and telling those for whom nothing is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator

from broker.context import Context
from broker.core.errors import BrokerError, Code
from broker.core.life import BOOKED, USABLE
from broker.core.model import Offering, Worker, WorkerState
from broker.core.planning import SEATS_MAX, Need, Turns, by_offering
from broker.core.policy import client_room
from broker.core.wish import Wish
from broker.orders import OpenOrder, Orders
from broker.waiting import Caps, Waiter

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
        return self._context.waiting.needs(name, self._caps(name), self._has_own(name))

    def one_by_one(self, name: str) -> Iterator[Need]:
        """The same, each client for itself, in the order of the queue."""
        return self._context.waiting.one_by_one(name, self._caps(name), self._has_own(name))

    def coming(self, name: str, without: OpenOrder | None = None) -> dict[tuple[Offering, ...], int]:
        """The pool's machines on order and booting, by what each may turn out to be."""
        coming = self._orders.coming(name, without)
        for offerings, count in by_offering(self._context.booting(name)).items():
            coming[offerings] = coming.get(offerings, 0) + count
        return coming

    def tell(
        self,
        name: str,
        error: BrokerError,
        wish: Wish | None = None,
        without: OpenOrder | None = None,
        unsold: Collection[Wish] = (),
    ) -> bool:
        """Tell those clients (with that wish) for whom no machine is on its way that none will come. Whether
        anybody goes on waiting.

        When nothing can be had, one that a machine in use would do for goes on: its holder may give it back
        at any moment. It learns why none is bought. What is perhaps launched by the order `without` is no
        hope; nor is it for others what clients with `unsold` wishes, for whom as little can be bought, have
        come for before them.
        """
        context, seats = self._context, self._context.pool(name).seats or SEATS_MAX
        turns = self._turns(name, without)
        in_use = self._in_use(name) if error.code in PASSING else Counter()
        told: dict[tuple[str, Wish], bool] = {}  # one client with one wish on many connections: one answer
        for waiter, need in context.waiting.walk(name, self._caps(name), self._has_own(name)):
            if wish is None or waiter.wish == wish or waiter.wish in unsold:
                lacks_all = need.clients > 0 and turns.lacks(need) >= need.clients
                concerned = wish is None or waiter.wish == wish
                helped = self._may_come_free(waiter, in_use, seats)
                told[waiter.need] = lacks_all and concerned and not helped
        anybody = context.waiting.fail(name, error, lambda waiter: told.get(waiter.need, False))
        if anybody:
            context.obstacles.note(name, error, wish)
        return anybody

    def _turns(self, name: str, without: OpenOrder | None = None) -> Turns:
        wishes = {waiter.wish for waiter in self._context.waiting.of(name)}
        seats = self._context.pool(name).seats or SEATS_MAX
        return Turns(self.coming(name, without), wishes, seats=seats)

    def _in_use(self, name: str) -> Counter[Offering]:
        """The workers that may be handed out again once their holders are done."""
        workers = self._context.registry.in_state(*USABLE & BOOKED, pool=name)
        return Counter(worker.offering for worker in workers if self._may_be_handed_out(worker))

    def _may_be_handed_out(self, worker: Worker) -> bool:
        if worker.state is WorkerState.BOOTING or worker.id in self._context.leaving:
            return False
        return not (worker.standing_notice or worker.closed)

    def _may_come_free(self, waiter: Waiter, in_use: Counter[Offering], seats: int) -> bool:
        if waiter.found >= waiter.least:
            return False  # what is free will do
        workers = sum(count for offering, count in in_use.items() if waiter.wish.fits(offering))
        return workers * (1 if waiter.exclusive else seats) >= waiter.least

    def _has_own(self, name: str) -> Callable[[Waiter], object] | None:
        """The test for clients whose own worker will soon be ready; None where there is no such worker."""
        registry = self._context.registry
        booting = registry.in_state(WorkerState.BOOTING, pool=name)
        return self._context.own_booting if any(registry.busy(worker.id) for worker in booting) else None

    def _caps(self, name: str) -> Caps | None:
        context, pool = self._context, self._context.pool(name)
        if pool.workers_per_client_max is None:
            return None
        return Caps(lambda client: client_room(context.registry, name, pool, client), pool.seats or SEATS_MAX)
