"""The open orders: placed on disk, resolved into a machine or into nothing.

An order is resolved exactly once, by whoever learns its outcome first: the launch call's answer, or a
listing that shows a machine with the order's tag. Until then it counts as supply and against the caps.
"""

from __future__ import annotations

from dataclasses import dataclass

from broker.clock import moment
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
from broker.core.model import Event, Instance, Order, Worker, WorkerChanged, WorkerState
from broker.core.policy import Reason

NEVER_LAUNCHED = "never-launched"
VANISHED = "vanished"  # forgotten because nothing was heard of it: it may come back
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
    doubtful: bool = False  # refused when sent again, but its first call may still be on its way


class Orders:
    """See the module."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._open: dict[str, OpenOrder] = {}

    def get(self, order_id: str) -> OpenOrder | None:
        return self._open.get(order_id)

    def doubtful(self, pool: str) -> int:
        """Orders that probably come to nothing: no supply, yet they count against the caps meanwhile."""
        return sum(entry.doubtful and entry.order.pool == pool for entry in self._open.values())

    def unresolved(self) -> list[OpenOrder]:
        return list(self._open.values())

    def reopen(self, order: Order) -> None:
        """An order of an earlier run, whose outcome nobody knows."""
        now = self._context.now()
        self._context.registry.order(order, self._context.pool(order.pool).worker_port, now)
        self._open[order.id] = OpenOrder(order, now, perhaps_launched=True)

    def enter(self, order: Order) -> OpenOrder:
        """A new order, in the books at once: nobody may order the same machine a second time."""
        now = self._context.now()
        self._context.registry.order(order, self._context.pool(order.pool).worker_port, now)
        entry = self._open[order.id] = OpenOrder(order, now, perhaps_launched=False)
        self._context.known_orders.add(order.id)
        return entry

    async def place(self, entry: OpenOrder) -> None:
        """Returns when the order is on disk. Raises StoreError: then it is out of the books again."""
        try:
            await self._context.store.order_placed(entry.order, moment(self._context.clock))
        except StoreError as error:
            self._forget(entry.order.id, OUTCOMES[type(error)])
            raise

    async def launched(self, order: Order, instance: Instance) -> Worker:
        """The order's machine is known. Harmless when somebody has told already."""
        registry, now = self._context.registry, self._context.now()
        worker = registry.get(order.id)
        if worker is None or worker.instance_id not in (None, instance.id):
            # Closed too early, or a second machine for one order: it has our tag, so it is ours to keep.
            worker = registry.by_instance(instance.id)
            if worker is None:
                worker = registry.adopt(
                    instance,
                    order.pool,
                    self._context.pool(order.pool).worker_port,
                    now,
                    order_id=order.id,
                    price=self._context.price(order.pool, instance),
                )
        elif worker.state is WorkerState.ORDERED:
            worker = registry.launched(order.id, instance, now)
        if self._open.pop(order.id, None) is not None:
            self._context.store.soon(self._context.store.order_launched(order.id, instance.id))
        if order.id in self._context.unwanted:
            self._context.unwanted.discard(order.id)
            if worker.state is WorkerState.BOOTING:
                worker = registry.drain(worker.id, Reason.TERMINATE_ALL, now)
        return worker

    def close(self, order: Order, outcome: str) -> None:
        """The order came to nothing, and that is certain."""
        if self._open.get(order.id) is not None:
            self._forget(order.id, outcome)
            self._context.store.soon(self._context.store.order_closed(order.id, outcome))

    def heard(self, event: Event) -> None:
        """Remember whose end has been decided; a machine that is gone closes its order for good."""
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
            if worker.order_id is not None and event.before is not WorkerState.ORDERED:
                context.store.soon(context.store.order_closed(worker.order_id, f"gone: {worker.reason}"))

    def _forget(self, order_id: str, outcome: str) -> None:
        self._open.pop(order_id, None)
        self._context.unwanted.discard(order_id)
        worker = self._context.registry.get(order_id)
        if worker is not None and worker.state is WorkerState.ORDERED:
            self._context.registry.refused(order_id, outcome, self._context.now())
