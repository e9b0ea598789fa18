"""What operators ask: STATUS from the books, LIST_ALL from the clouds, and the end of everything."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from broker.context import Context
from broker.core import protocol
from broker.core.errors import BrokerError, CloudError, Draining
from broker.core.life import BOOKED, LIVING
from broker.core.model import Instance, InstanceState, Worker, WorkerState
from broker.core.policy import Reason, idle_seconds_max
from broker.core.tags import protects, rfc3339
from broker.core.warm import idle_since_at


class Operations:
    """See the module. `scan` lists the clouds now, `reap` tells that somebody is to be terminated."""

    def __init__(
        self, context: Context, *, scan: Callable[[], Awaitable[None]], reap: Callable[[], None]
    ) -> None:
        self._context = context
        self._registry = context.registry
        self._scan = scan
        self._reap = reap
        self._now = context.clock.monotonic
        self._listing: asyncio.Task[list[Instance]] | None = None

    def status(self) -> bytes:
        """Every worker in the books, oldest first, as one line of JSON."""
        return protocol.json_line([self._status(worker) for worker in self._known()])

    async def list_all(self) -> bytes:
        """What the clouds list, as one line of JSON. Raises BrokerError where one cannot be looked at."""
        return protocol.json_line([_listed(i) for i in await self._listed()])

    async def terminate_all(self) -> bytes:
        """Whatever the cloud lists under our tag ends, known to the books or not; busy or not. What a person
        protects is spared, and named."""
        unseen: BrokerError | None = None
        try:
            await self._scan()
        except BrokerError as error:
            # Where nobody has looked yet there may be more than the books hold: do not claim all is ended.
            unseen = None if self._context.clouds.recovered() else error
        for cloud in self._context.clouds.all:  # "all" is not ours to end
            self._context.require_charge(cloud)
        now = self._now()
        for name in self._context.settings.pool:
            self._context.waiting.fail(
                name, Draining("every worker is being terminated on request; ask again")
            )
        self._context.unwanted.update(w.id for w in self._registry.in_state(WorkerState.ORDERED))
        spared = [w.instance_id for w in self._registry.in_state(*BOOKED) if w.protected]
        ended = [worker for worker in self._registry.in_state(*LIVING) if not worker.protected]
        for worker in ended:
            self._registry.drain(worker.id, Reason.TERMINATE_ALL, now)
        self._reap()
        if unseen is not None:
            raise unseen
        reply = {"terminated": [worker.instance_id for worker in ended]}
        return protocol.json_line({**reply, "protected": spared} if spared else reply)

    # --- inside ------------------------------------------------------------------------------------

    def _known(self) -> list[Worker]:
        return sorted(self._registry.in_state(*BOOKED), key=lambda worker: worker.born_at)

    def _status(self, worker: Worker) -> dict[str, object]:
        now, pool = self._now(), self._context.pool_of(worker)
        idle_seconds = max(0.0, now - self._registry.used_at(worker.id))
        ends = worker.state in (WorkerState.READY, WorkerState.SUSPECT) and not worker.protected
        idle_at: float | None = now - idle_seconds
        if not self._registry.busy(worker.id):
            idle_at = idle_since_at(self._registry, worker, pool, self._context.warmth(worker.pool), now)
        idle_seconds_left = idle_seconds_max(self._registry, worker, pool, now) - now
        ends_in = float("inf") if idle_at is None else idle_at + idle_seconds_left
        if not self._registry.busy(worker.id):
            ends_in = min(ends_in, worker.born_at + pool.max_lifetime - now)
        if pool.hard_lifetime is not None:
            ends_in = min(ends_in, worker.born_at + pool.hard_lifetime - now)
        return {
            "instance_id": worker.instance_id,
            "ip": worker.address,
            "idle_seconds": round(idle_seconds),
            "will_terminate_in": round(max(0.0, ends_in)) if ends else None,
            "state": str(worker.state),
            "pool": worker.pool,
            "leases": len(self._registry.leases(worker.id)),
            "instance_type": worker.offering.instance_type,
            "cores": worker.cores,
            "market": str(worker.offering.market),
            "price_assumed": worker.offering.price_assumed,
            "age_seconds": round(worker.age_seconds(now)),
            "state_seconds": round(now - worker.since_at),
            "reason": worker.reason,
            "protected": worker.protected,
            "uses": self._registry.uses(worker.id),
            "breaker": str(self._context.guard(worker.pool).breaker(now).state),
        }

    async def _listed(self) -> list[Instance]:
        """What the clouds list. Everybody who asks at the same time shares one look."""
        if self._listing is None or self._listing.done():
            self._listing = asyncio.create_task(self._list_clouds())
            self._listing.add_done_callback(_retrieved)  # whoever asked may be gone by then
        return await asyncio.shield(self._listing)

    async def _list_clouds(self) -> list[Instance]:
        found: list[Instance] = []
        for cloud in self._context.clouds.all:
            if not cloud.opened:
                raise cloud.refusal() or CloudError(f"{cloud.provider.name} has not answered yet")
            found += await cloud.provider.listing()
        return [i for i in found if i.state is not InstanceState.TERMINATED]


def _retrieved(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()


def _listed(instance: Instance) -> dict[str, object]:
    return {
        "instance_id": instance.id,
        "instance_type": instance.instance_type,
        "ip": instance.address,
        "launch_time": rfc3339(instance.launched_unix),
        "state": str(instance.state),
        "zone": instance.zone,
        "market": str(instance.market),
        "protected": protects(instance.tags),
    }
