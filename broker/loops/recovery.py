"""What an earlier run of the broker has left: machines that a listing finds or misses, and their leases.

A restart forgets nobody. A machine whose clients the store may not know counts as in use until they have had
time to PING; one whose end was decided ends; and one that was there and is not listed yet is entered all the
same, otherwise somebody who waits would be given a second one.
"""

from __future__ import annotations

from dataclasses import replace

from broker.clouds import Cloud
from broker.context import Context
from broker.core import tags
from broker.core.model import UNKNOWN_CLIENT, Instance, InstanceState, Lease, Order, Worker
from broker.core.policy import Reason
from broker.ledger import Ledger
from broker.orders import Orders
from broker.store import LaunchedOrder

EXPECTED_SECONDS = 600.0  # what was there before the start may stay out of listings for so long


class Recovery:
    """See the module. Reconcile asks it about every machine that the books do not know."""

    def __init__(self, context: Context, orders: Orders, ledger: Ledger) -> None:
        self._context = context
        self._registry = context.registry
        self._orders = orders
        self._ledger = ledger
        self._began_at = context.now()

    def is_surely_unheld(self, instance: Instance) -> bool:
        """Whether the store knows of its launch, and of no lease on it."""
        known = tags.read(instance.tags).order in self._context.known_orders
        return known and self._has_no_lease(instance.id)

    def known_to_be_idle(self, instance: Instance) -> bool:
        """The store remembers its launch and no lease on it: it is surely unused, so its age counts."""
        launched = instance.id in self._context.expected and instance.launched_unix > 0
        return launched and self._has_no_lease(instance.id)

    def _has_no_lease(self, instance_id: str) -> bool:
        """Whether the store has every lease, and none on this machine."""
        return not self._context.store.leases_missing and instance_id not in self._context.stored_leases

    def end_again(self, worker: Worker) -> Worker:
        """Its end was decided before the start: nothing brings it back, not even a lease left on disk."""
        self.drop_leases_of(worker.instance_id or "")
        return self._registry.drain(worker.id, Reason.ENDED_BEFORE, self._context.now())

    def drop_leases_of(self, instance_id: str) -> None:
        """What an earlier run has left on disk: its machine ends, or has ended."""
        for stored in self._context.stored_leases.pop(instance_id, ()):
            self._context.store.soon(self._context.store.lease_ended(stored.lease.id))

    def restore_leases(self, worker: Worker) -> None:
        """A restart forgets nobody, and the time the broker was away is not held against its clients."""
        for stored in self._context.stored_leases.pop(worker.instance_id or "", ()):
            lease = replace(stored.lease, worker_id=worker.id)
            self._context.restored.add(lease.id)
            self._registry.grant(lease, self._context.now(), counts=False)

    def count_forgotten_clients(self, worker: Worker, *, known: bool) -> None:
        """A machine may have clients of which the store does not tell: it knows nothing of the machine (it
        was lost, or the machine was somebody else's), or the disk did not take every lease. Then nobody is
        given it alone, and no RELEASE ends it, until its clients have had time to PING."""
        if known and not self._context.store.leases_missing:
            return
        pool = self._context.pool_of(worker)
        alone = pool.exclusive or any(lease.exclusive for lease in self._registry.leases(worker.id))
        if not (alone and self._registry.busy(worker.id)):
            lease_id = f"unknown-{worker.id}"
            lease = Lease(lease_id, worker.id, UNKNOWN_CLIENT, pool.idle_timeout, pool.exclusive)
            self._registry.grant(lease, self._context.now())

    def expect(self, cloud: Cloud) -> None:
        """Machines that were there before the start and that the listing does not show (yet).

        Those launched a short while ago, or last seen running or kept stopped, are entered all the same,
        otherwise somebody who waits would be given a second one; so are those that somebody holds, otherwise
        their PING would be answered with an error.
        """
        for launched in list(self._context.expected.values()):
            order = launched.order
            if self._context.cloud_of_order(order) is cloud:
                del self._context.expected[launched.instance_id]
                self._expect_launched(cloud, launched)
        for leases in list(self._context.stored_leases.values()):
            held = leases[0]
            unseen = held.instance_id not in cloud.instance_ids
            if self._context.cloud_of_held(held) is cloud and unseen and held.address:
                pending = Instance(held.instance_id, InstanceState.PENDING, held.address)
                self._enter_unseen(cloud, pending, held.pool, None)

    def _expect_launched(self, cloud: Cloud, launched: LaunchedOrder) -> None:
        instance_id, now = launched.instance_id, self._context.now()
        if self._registry.by_instance(instance_id) is not None:
            return
        order, offering, held = launched.order, launched.order.offerings[0], self._context.stored_leases
        stopped = self._context.pool(order.pool).warm_stopped > 0 and self._ledger.has_ended(instance_id)
        kept = stopped and self._has_no_lease(instance_id)
        old = now - launched.placed_at > EXPECTED_SECONDS and not self._ledger.runs_on(instance_id)
        listed = instance_id in cloud.instance_ids  # and not taken in: so it has ended
        if listed or (old and not kept and instance_id not in held):
            self._context.store.soon(self._context.store.machine_gone(instance_id))
            return
        unseen = Instance(
            instance_id,
            InstanceState.STOPPED if kept else InstanceState.PENDING,
            next((lease.address for lease in held.get(instance_id, ())), None) or None,
            instance_type=offering.instance_type,
            region=offering.region,
            zone=offering.zone,
            market=offering.market,
            cores=offering.cores,
        )
        ages = self._context.pool(order.pool).hard_lifetime is not None
        self._enter_unseen(cloud, unseen, order.pool, order, launched.placed_at if ages else None)

    def _enter_unseen(
        self, cloud: Cloud, unseen: Instance, pool: str, order: Order | None, born_at: float | None = None
    ) -> None:
        self._context.home[unseen.id] = cloud
        kept = unseen.state is InstanceState.STOPPED
        if unseen.address and self._registry.by_address(unseen.address) is not None:
            unseen = replace(unseen, address=None)  # the listing has shown whose it is now
        if order is not None and self._orders.get(order.id) is not None:  # others of its machines are awaited
            worker = self._orders.launched(order, unseen)
        else:
            port, price = self._context.pool(pool).worker_port, self._context.price(pool, unseen)
            now, order_id = self._context.now(), None if order is None else order.id
            worker = self._registry.adopt(
                unseen, pool, port, now, order_id=order_id, born_at=born_at, price=price, kept=kept
            )
        if unseen.id in self._context.ended:
            self.end_again(worker)
        elif not kept:
            self.restore_leases(worker)
            self.count_forgotten_clients(worker, known=True)

    def drop_stored_leases(self, started_at: float) -> None:
        """A lease whose machine no listing has shown for a good while has ended with it."""
        if started_at - self._began_at < EXPECTED_SECONDS or not self._context.clouds.recovered():
            return
        for instance_id in list(self._context.stored_leases):
            self.drop_leases_of(instance_id)
