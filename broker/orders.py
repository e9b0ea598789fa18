"""The open orders: placed on disk, resolved into a machine or into nothing.

An order has a place in the books for each machine it asks for. Whoever learns of a machine first gives it a
place: the launch call's answer, or a listing that shows a machine with the order's tag. The order is resolved
when no place is vacant, or when it is certain that no more machines come. Until then its places count as
supply and against the caps.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from broker.clock import moment
from broker.clouds import Cloud
from broker.context import Context
from broker.core.errors import (
    BrokerError,
    CloudUnreachable,
    CredentialsRefused,
    OfferingRefused,
    OrderMismatch,
    OrderSpent,
    PermanentRefusal,
    QuotaReached,
    StoreError,
    Throttled,
)
from broker.core.life import USABLE
from broker.core.model import Bought, Event, Instance, Offering, Order, Worker, WorkerChanged, WorkerState
from broker.core.money import Price
from broker.core.policy import Reason

LAUNCHED = "launched"
NEVER_LAUNCHED = "never-launched"
VANISHED = "vanished"  # forgotten because nothing was heard of it: it may come back
WITHDRAWN = "withdrawn"  # its pool was removed before the launch call was made
YIELDED = "yielded"  # another broker is in charge of it now: here it is forgotten, there it lives on
FORGOTTEN = (VANISHED, YIELDED)  # reasons that say nothing of the machine's end
ENDING = (WorkerState.DRAINING, WorkerState.GONE)
OUTCOMES: dict[
    type[BrokerError], str
] = {  # why an order came to nothing: a closed list, safe as a metric label
    OfferingRefused: "no-capacity",
    QuotaReached: "quota",
    Throttled: "throttled",
    PermanentRefusal: "permanent",
    CredentialsRefused: "credentials",
    CloudUnreachable: "unreachable",
    OrderMismatch: "mismatch",
    OrderSpent: "spent",
    StoreError: "store",
}


@dataclass(slots=True)
class OpenOrder:
    """An order and what has been tried."""

    order: Order
    sent_at: float  # when its last call was made: absence from a listing counts only a good while after it
    perhaps_launched: bool  # a call may have been carried out without an answer
    resend_at: float = 0.0  # not before; never, once the cloud has refused the same order as a different one
    stranded: bool = False  # perhaps launched where nothing can be asked now, while its pool buys elsewhere
    absences: int = 0  # listings that should have shown its machine and did not
    doubtful: bool = False  # refused when sent again, but its first call may still be on its way
    vacant: dict[str, None] = field(default_factory=dict)  # places without a machine
    machines: set[str] = field(default_factory=set)  # that have taken a place, also those that have ended

    def __post_init__(self) -> None:
        self.vacant = dict.fromkeys(self.order.places)


def sold_as_ordered(order: Order, instance: Instance) -> bool:
    """EC2 has sold on-demand machines for spot orders (aws-sdk-js issue 1915): three times the price."""
    return any(one.market is instance.market for one in order.offerings)


class Orders:
    """See the module."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._open: dict[str, OpenOrder] = {}

    def get(self, order_id: str) -> OpenOrder | None:
        return self._open.get(order_id)

    def doubtful(self, pool: str) -> int:
        """Machines that probably never come: no supply, yet they count against the caps meanwhile."""
        entries = (entry for entry in self._open.values() if entry.order.pool == pool)
        return sum(len(entry.vacant) for entry in entries if not self._is_supply(entry))

    def withdrawn(self, entry: OpenOrder) -> bool:
        """Whether its pool was removed meanwhile: what comes of it ends at once."""
        return any(place in self._context.leaving for place in entry.vacant)

    def strand(self, pool: str, sellers: Collection[Cloud]) -> None:
        """The pool can buy in these regions: what it has perhaps launched elsewhere is not waited for
        meanwhile. A call that is under way is: its answer comes, or is lost."""
        for entry in self._open.values():
            if entry.order.pool == pool:
                there = self._context.cloud_of_order(entry.order) in sellers
                entry.stranded = entry.perhaps_launched and not there

    def _is_supply(self, entry: OpenOrder) -> bool:
        return not (entry.doubtful or entry.stranded or self.withdrawn(entry))

    def coming(self, pool: str, without: OpenOrder | None = None) -> dict[tuple[Offering, ...], int]:
        """The pool's machines on order, by what each may turn out to be; without the doubtful ones, and those
        of one order that is in doubt now."""
        found: dict[tuple[Offering, ...], int] = {}
        for entry in self._open.values():
            if entry.order.pool == pool and entry is not without and self._is_supply(entry):
                found[entry.order.offerings] = found.get(entry.order.offerings, 0) + len(entry.vacant)
        return found

    def unresolved(self) -> list[OpenOrder]:
        return list(self._open.values())

    def reopen(self, order: Order) -> None:
        """An order of an earlier run, whose outcome nobody knows."""
        self._enter(order, perhaps_launched=True)

    def enter(self, order: Order) -> OpenOrder:
        """A new order, in the books at once: nobody may order the same machines a second time."""
        self._context.known_orders[order.id] = order.count
        return self._enter(order, perhaps_launched=False)

    def _enter(self, order: Order, *, perhaps_launched: bool) -> OpenOrder:
        now, port = self._context.now(), self._context.pool(order.pool).worker_port
        entry = self._open[order.id] = OpenOrder(order, now, perhaps_launched)
        for place in order.places:
            self._settle_home(order, place)
            self._context.registry.order(order, port, now, place=place)
        return entry

    async def place(self, entry: OpenOrder) -> None:
        """Returns when the order is on disk. Raises StoreError: then it is out of the books again."""
        try:
            await self._context.store.order_placed(entry.order, moment(self._context.clock))
        except StoreError as error:
            self._forget(entry.order.id, OUTCOMES[type(error)])
            raise

    def launched(self, order: Order, instance: Instance) -> Worker:
        """A machine of the order is known. Harmless when somebody has told already."""
        registry, now = self._context.registry, self._context.now()
        worker = registry.by_instance(instance.id)
        if worker is not None:
            return worker
        entry = self._open.get(order.id)
        if entry is None or not entry.vacant:
            # Closed too early, or a machine too many: it has our tag, so it is ours to look after.
            return self._adopt(order, instance)
        place = self._take_place(entry, instance.id)
        worker = registry.launched(place, instance, now, price=self._price(order, instance))
        self._context.store.soon(self._context.store.order_launched(order.id, instance.id))
        if not entry.vacant:
            self._resolve(entry, LAUNCHED)
        if place in self._context.unwanted:
            self._context.unwanted.discard(place)
            if worker.state is WorkerState.BOOTING:
                worker = registry.drain(worker.id, Reason.TERMINATE_ALL, now)
        elif not sold_as_ordered(order, instance) and worker.state is WorkerState.BOOTING:
            worker = registry.drain(worker.id, Reason.WRONG_MARKET, now)
        return worker

    def answered(self, order: Order, bought: Bought, outcome: str) -> None:
        """The launch call has its answer: these machines and no others. `outcome`: why there are not more."""
        for instance in bought.instances:
            if instance.id in self._context.ended:  # an answer repeated long after: its end has been decided
                self.spent(order, instance.id)
            else:
                self.end_surplus(self.launched(order, instance))
        self.close(order, outcome)

    def spent(self, order: Order, instance_id: str) -> None:
        """A machine of the order has ended before the books knew it: it takes a place, and frees it."""
        entry = self._open.get(order.id)
        if entry is None or instance_id in entry.machines:
            return
        place = self._take_place(entry, instance_id)
        self._context.unwanted.discard(place)
        self._context.registry.refused(place, OUTCOMES[OrderSpent], self._context.now())
        if not entry.vacant:
            self._resolve(entry, OUTCOMES[OrderSpent])

    def end_surplus(self, worker: Worker) -> Worker:
        """Have a machine go that nobody ordered: its order has as many as it asked for."""
        registry, ordered = self._context.registry, self._context.known_orders.get(worker.order_id or "")
        if ordered is None or len(registry.of_order(worker.order_id or "")) <= ordered:
            return worker
        if worker.id != worker.instance_id or worker.state not in USABLE or registry.busy(worker.id):
            return worker  # one that has a place in the order is no surplus
        if worker.protected:
            return worker
        return registry.drain(worker.id, Reason.SURPLUS, self._context.now())

    def close(self, order: Order, outcome: str) -> None:
        """No more machines come of the order, and that is certain."""
        entry = self._open.get(order.id)
        if entry is not None:
            self._refuse_rest(entry, outcome)
            self._resolve(entry, LAUNCHED if entry.machines else outcome)

    def heard(self, event: Event) -> None:
        """Remember whose end has been decided; a machine that is gone leaves its order for good."""
        if not isinstance(event, WorkerChanged):
            return
        worker, context = event.worker, self._context
        instance_id = (
            worker.instance_id if worker.state in ENDING and worker.reason not in FORGOTTEN else None
        )
        if instance_id is not None and instance_id not in context.ended:
            context.ended.add(instance_id)
            context.store.soon(context.store.end_decided(instance_id, context.clock.wall()))
        if worker.state is WorkerState.GONE:
            context.home.pop(worker.id, None)
            context.leaving.pop(worker.id, None)
            if worker.instance_id is not None and worker.order_id is not None:
                context.store.soon(context.store.machine_gone(worker.instance_id))

    # --- inside ------------------------------------------------------------------------------------

    def _take_place(self, entry: OpenOrder, instance_id: str) -> str:
        place = next(iter(entry.vacant))
        del entry.vacant[place]
        entry.machines.add(instance_id)
        return place

    def _adopt(self, order: Order, instance: Instance) -> Worker:
        context = self._context
        self._settle_home(order, instance.id)
        price, port = context.price(order.pool, instance), context.pool(order.pool).worker_port
        return context.registry.adopt(
            instance, order.pool, port, context.now(), order_id=order.id, price=price
        )

    def _price(self, order: Order, instance: Instance) -> Price | None:
        """What the machine costs, when it is not the first choice; None: what the first choice costs."""
        first = order.offerings[0]
        if (instance.instance_type, instance.market) == (first.instance_type, first.market):
            return None
        return self._context.price(order.pool, instance)

    def _resolve(self, entry: OpenOrder, outcome: str) -> None:
        self._open.pop(entry.order.id, None)
        self._context.store.soon(self._context.store.order_closed(entry.order.id, outcome))

    def _settle_home(self, order: Order, worker_id: str) -> None:
        """Its machine is where it was ordered, although the pool may buy elsewhere before it is there."""
        cloud = self._context.cloud_of_order(order)
        if cloud is not None:
            self._context.home[worker_id] = cloud

    def _forget(self, order_id: str, outcome: str) -> None:
        entry = self._open.pop(order_id, None)
        if entry is not None:
            self._refuse_rest(entry, outcome)

    def _refuse_rest(self, entry: OpenOrder, outcome: str) -> None:
        vacant, entry.vacant = entry.vacant, {}
        for place in vacant:
            self._context.unwanted.discard(place)
            worker = self._context.registry.get(place)
            if worker is not None and worker.state is WorkerState.ORDERED:
                self._context.registry.refused(place, outcome, self._context.now())
