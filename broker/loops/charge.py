"""Who is in charge of a cloud's machines, by each complete listing, and what it means not to be.

The rule is core/claim.py's. A broker that is not in charge forgets what it knew: its workers, its orders and
what it promised or decided about machines are another's now. When it comes into charge again it is as one
that has just started: it takes in what it finds, as just used.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from broker.clouds import Cloud
from broker.context import Context
from broker.core import claim, tags
from broker.core.life import BOOKED, LIVING
from broker.core.model import Instance, InstanceState, WorkerState
from broker.orders import YIELDED, Orders

DEAD = frozenset({InstanceState.SHUTTING_DOWN, InstanceState.TERMINATED})


class Charge:
    """See the module. `charged` hears of a cloud of which we have just come into charge, or ceased to be."""

    def __init__(self, context: Context, orders: Orders, charged: Callable[[Cloud], None]) -> None:
        self._context, self._orders, self._charged = context, orders, charged
        self._watches: dict[int, claim.Watch] = {}  # by cloud
        self._raising = asyncio.Lock()

    async def rule(self, cloud: Cloud, living: Sequence[Instance]) -> None:
        """Come into charge, stay or yield. `living`: the living machines with our tag of a complete listing.

        A number is on disk before it is used. Raises StoreError.
        """
        context = self._context
        if not cloud.provider.contested:
            return
        cloud.claims = {i.id: claim.read(tags.read(i.tags).epoch) for i in living}
        watch = self._watches.setdefault(id(cloud), claim.Watch(context.owner))
        listed = [one for one in cloud.claims.values() if one is not None]
        now = context.now()
        now_unix = cloud.provider.clock_unix(now).earliest_unix
        ruling = watch.look(listed, now, now_unix, looks_after=self._looks_after(cloud))
        if ruling.rival is None:
            await self._raise_number(ruling.number)
        before, cloud.rival = cloud.rival, ruling.rival
        if (before and before.owner) != (cloud.rival and cloud.rival.owner):
            self._charged(cloud)

    def stand_by(self, cloud: Cloud, listing: Sequence[Instance]) -> None:
        """Another broker is in charge here. What our launches under way bring is its machine too."""
        context, now = self._context, self._context.now()
        refusal = cloud.read_only()
        cloud.instance_ids = frozenset(instance.id for instance in listing)
        for name in context.settings.pool:  # before a worker goes, or whoever waits would be given another
            clouds = context.clouds.of(name)
            nobody_sells = cloud in clouds and all(one.rival is not None for one in clouds)
            if nobody_sells and refusal is not None:
                context.waiting.fail(name, refusal)
        for worker in context.registry.in_state(*BOOKED - {WorkerState.ORDERED}):
            if context.cloud_of(worker) is cloud:
                context.registry.gone(worker.id, YIELDED, now)
        for instance in listing:
            entry = self._orders.get(tags.read(instance.tags).order)
            if entry is not None:
                self._orders.close(entry.order, YIELDED)
            if instance.state not in DEAD and instance.id in context.ended:
                context.ended.discard(instance.id)
                context.store.soon(context.store.end_revoked(instance.id))
        self._forget_what_was(cloud)

    def _looks_after(self, cloud: Cloud) -> bool:
        """Whether there is a machine of this cloud in the books, or on order, that is not on its way out."""
        context = self._context
        workers = context.registry.in_state(WorkerState.ORDERED, *LIVING)
        return any(context.cloud_of(worker) is cloud for worker in workers)

    async def _raise_number(self, number: int) -> None:
        async with self._raising:  # two clouds may want different ones at a time
            if number > self._context.epoch:
                await self._context.store.keep("epoch", str(number))
                self._context.epoch = number

    def _forget_what_was(self, cloud: Cloud) -> None:
        """Leases and machines of an earlier run: whoever is in charge has gone on without them."""
        context = self._context
        for launched in list(context.expected.values()):
            if context.cloud_of_order(launched.order) is cloud or launched.instance_id in cloud.instance_ids:
                del context.expected[launched.instance_id]
                context.store.soon(context.store.machine_gone(launched.instance_id))
        for leases in list(context.stored_leases.values()):
            held = leases[0]
            if context.cloud_of_held(held) is cloud or held.instance_id in cloud.instance_ids:
                del context.stored_leases[held.instance_id]
                for stored in leases:
                    context.store.soon(context.store.lease_ended(stored.lease.id))
