"""One command → registry, waiting queue → reply.

`answer_now` answers what needs no waiting, straight from the books; `answer` does the rest. The address of a
worker leaves this module only from READY, with a fresh proof that its port answers, and with the client's
lease on disk; after every await each of the three is looked at again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from broker.clouds import Cloud
from broker.context import Context
from broker.core import protocol
from broker.core.errors import (
    BadRequest,
    BrokerError,
    CloudError,
    Draining,
    LimitReached,
    StoreError,
    WaitTimedOut,
    WorkerNotFound,
)
from broker.core.model import (
    Event,
    Instance,
    InstanceState,
    Lease,
    LeaseEnded,
    LeaseGranted,
    Offering,
    Worker,
    WorkerChanged,
    WorkerState,
)
from broker.core.policy import Reason, client_refusal
from broker.core.protocol import Command, GetWorker, ListAll, Malformed, Ping, Pools, Release, Status
from broker.core.registry import BOOKED, USABLE
from broker.core.settings import PoolSettings
from broker.core.tags import protects, rfc3339
from broker.core.warm import idle_since_at
from broker.core.wish import ANYTHING, Wish
from broker.waiting import Waiter

HAND_OUT_ATTEMPTS_MAX = 20  # a worker may be lost between choice and answer; so often in a row is no accident
WARM_REPLIES_MAX = 10_000  # remembered replies; for a client beyond them the answer only takes the longer way

Prove = Callable[[Worker], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class WarmReply:
    """The last answer a client got, good while the books and the proof have not moved."""

    generation: int
    lease: Lease
    proved_until: float
    reply: bytes


class Service:
    """Answers commands. `prove` tries a worker's port now, `scan` lists the clouds now, `demand` tells that
    somebody waits for a launch, and how many seconds at most, `reap` that somebody is to be terminated,
    `pools` answers POOLS."""

    def __init__(
        self,
        context: Context,
        *,
        prove: Prove,
        scan: Callable[[], Awaitable[None]],
        demand: Callable[[float], None],
        reap: Callable[[], None],
        new_id: Callable[[], str],
        pools: Callable[[], list[dict[str, object]]],
    ) -> None:
        self._context = context
        self._registry = context.registry
        self._prove = prove
        self._scan = scan
        self._demand = demand
        self._reap = reap
        self._new_id = new_id
        self._pools = pools
        self._now = context.clock.monotonic
        self._warm: dict[str, WarmReply] = {}
        self._writing: dict[str, asyncio.Task[None]] = {}  # lease id → its way to the disk
        self._listing: asyncio.Task[list[Instance]] | None = None
        self._closing = False

    # --- commands ----------------------------------------------------------------------------------

    def warm(self, client: str, now: float) -> bytes | None:
        """The reply to a plain GET_WORKER of a client that was served a moment ago, or None."""
        hit = self._warm.get(client)
        if hit is None or hit.generation != self._registry.generation or now > hit.proved_until:
            return None
        self._registry.renew(hit.lease, now)
        return hit.reply

    def answer_now(self, command: Command, peer: str) -> bytes | None:
        """The reply, when it can be given without waiting; otherwise None, and nothing has changed."""
        try:
            match command:
                case GetWorker(pool=None, cores=None, type=None, region=None, exclusive=False):
                    return self.warm(command.client or peer, self._now())
                case Malformed():
                    return protocol.error_line(command.error)
                case Ping() if self._certain_of(command.address):
                    return self._ping_now(command, command.client or peer)
                case Release() if self._certain_of(command.address):
                    return self._release(command, command.client or peer)
                case Status() if any(cloud.recovered for cloud in self._context.clouds.all):
                    return protocol.json_line([self._status(worker) for worker in self._known()])
                case Pools():
                    return protocol.json_line(self._pools())
                case _:
                    return None
        except BrokerError as error:
            return protocol.error_line(error)

    async def answer(self, command: Command, peer: str) -> bytes:
        """The reply to any command. Raises nothing of ours: an error is a reply too."""
        try:
            now = self.answer_now(command, peer)
            return now if now is not None else await self._answer(command, peer)
        except BrokerError as error:
            return protocol.error_line(error)

    async def _answer(self, command: Command, peer: str) -> bytes:
        match command:
            case GetWorker():
                return await self._get_worker(command, command.client or peer)
            case Ping():
                if not self._certain_of(command.address):
                    await self._recovered()
                return await self._ping(command, command.client or peer)
            case ListAll():
                return protocol.json_line([_listed(i) for i in await self._listed()])
            case protocol.TerminateAll():
                return await self._terminate_all()
            case _:
                await self._recovered()
                return self.answer_now(command, peer) or protocol.error_line(
                    CloudError("no answer; ask again")
                )

    def close(self) -> None:
        """The broker is going down: whoever waits hears it now, and nobody else starts to wait."""
        self._closing = True
        for name in self._context.settings.pool:
            self._context.waiting.fail(name, Draining("the broker is restarting; ask again in a moment"))
        self._context.scanned.notify()  # whoever waits for the first scan hears it too

    def reloaded(self) -> None:
        """The settings have changed: no reply is given by the old ones."""
        self._warm.clear()

    def heard(self, event: Event) -> None:
        """Keep the store and the queue up with the books."""
        match event:
            case LeaseGranted(lease=lease, worker=worker):
                if lease.id in self._context.restored:  # a full disk must not end what it has long held
                    self._context.restored.discard(lease.id)
                else:
                    self._write_lease(lease, worker)
            case LeaseEnded(lease=lease, worker=worker):
                self._writing.pop(lease.id, None)
                self._context.store.soon(self._context.store.lease_ended(lease.id))
                self._serve(worker.pool)
            case WorkerChanged(worker=worker):
                if worker.state is WorkerState.READY:
                    self._serve(worker.pool)

    # --- GET_WORKER --------------------------------------------------------------------------------

    async def _get_worker(self, command: GetWorker, client: str) -> bytes:
        name, pool = self._pool(command.pool)
        asked_at, wish = self._now(), Wish.of(command)
        deadline_at = asked_at + (pool.wait if command.wait is None else command.wait)
        exclusive = command.exclusive or pool.exclusive
        await self._recovered(name, deadline_at)
        self._require_possible(name, wish)
        for _ in range(HAND_OUT_ATTEMPTS_MAX):
            _, pool = self._pool(command.pool)  # a reload may have removed it meanwhile
            self._require_charge(self._context.cloud(name))
            held_before = self._held(name, client)
            lease = self._take(name, client, exclusive, wish)
            if lease is None:
                lease = await self._wait(
                    Waiter(name, client, exclusive, wish, asked_at, _future()), deadline_at
                )
            worker = await self._confirmed(lease, pool)
            if worker is not None and worker.address is not None:
                reply = protocol.line(worker.address)
                if name == "default" and wish == ANYTHING and not command.exclusive:
                    self._remember(client, lease, pool, reply)
                return reply
            if lease.id not in held_before:
                self._registry.end_lease(lease.worker_id, client, "not handed out", self._now())
        raise CloudError("workers are lost as fast as they become ready")

    def _take(self, pool: str, client: str, exclusive: bool, wish: Wish) -> Lease | None:
        """The client's hold on a worker that suits, decided and booked in one step; None when none does.

        Raises LimitReached for one who holds as many as it may.
        """
        worker = self._registry.available(pool, client, exclusive=exclusive, wish=wish.test())
        own = self._registry.workers_held(pool, client)
        if worker not in own:
            refusal = client_refusal(self._registry, pool, self._context.pool(pool), client)
            if refusal is not None and not any(one.state is WorkerState.BOOTING for one in own):
                raise refusal
            if refusal is not None:
                return None  # after a restart its own is looked at again: it comes in a moment
        if worker is None:
            return None
        ttl_seconds = self._context.pool(pool).idle_timeout
        return self._registry.grant(
            Lease(self._new_id(), worker.id, client, ttl_seconds, exclusive), self._now()
        )

    async def _confirmed(self, lease: Lease, pool: PoolSettings) -> Worker | None:
        """The lease's worker, when its readiness is proved, the lease is on disk, and both are still so."""
        worker = self._registry.get(lease.worker_id)
        if worker is None or worker.state is not WorkerState.READY:
            return None
        if self._proof_is_old(worker, pool) and not await self._prove(worker):
            return None
        await self._written(lease)
        worker = self._registry.get(lease.worker_id)
        still_held = self._registry.lease_ends_at(lease.id) is not None
        return worker if worker is not None and worker.state is WorkerState.READY and still_held else None

    def _proof_is_old(self, worker: Worker, pool: PoolSettings) -> bool:
        proved_at = self._registry.proved_at(worker.id)
        return pool.readiness == "tcp" and self._now() - proved_at > pool.readiness_max_age

    async def _wait(self, waiter: Waiter, deadline_at: float) -> Lease:
        if self._closing:
            raise Draining
        waiting = self._context.waiting
        held_before = self._held(waiter.pool, waiter.client)
        waiting.join(waiter)
        self._demand(max(0.0, deadline_at - self._now()))
        try:
            async with asyncio.timeout(max(0.0, deadline_at - self._now())):
                return await waiter.served
        except TimeoutError:
            lease = waiter.lease()  # served in the instant in which the time was over
            if lease is not None:
                return lease
            raise WaitTimedOut(self._why_waiting(waiter)) from None
        except asyncio.CancelledError:
            lease = waiter.lease()  # served in the instant in which the client went away
            if lease is not None and lease.id not in held_before:
                self._registry.end_lease(lease.worker_id, waiter.client, "not handed out", self._now())
            raise
        finally:
            waiting.leave(waiter)

    def _why_waiting(self, waiter: Waiter) -> str:
        now, registry = self._now(), self._registry
        seconds = f"no worker became ready within {now - waiter.asked_at:.0f} s"
        obstacle = self._context.obstacles.get(waiter.pool)
        if obstacle:
            return f"{seconds}: {obstacle}"
        booting = registry.in_state(WorkerState.ORDERED, WorkerState.BOOTING, pool=waiter.pool)
        if booting:
            age_seconds = now - min(worker.born_at for worker in booting)
            return f"{seconds}: one has been booting for {age_seconds:.0f} s; ask again"
        return seconds

    def _serve(self, pool: str) -> None:
        """Give what has become free to whoever waits longest for it."""
        hopeless: set[tuple[bool, Wish]] = set()
        for waiter in self._context.waiting.of(pool):
            kind = (waiter.exclusive, waiter.wish)
            if kind in hopeless:
                continue
            try:
                lease = self._take(pool, waiter.client, waiter.exclusive, waiter.wish)
            except LimitReached as error:  # on another connection it has got what it waited for
                waiter.served.set_exception(error)
                waiter.served.exception()  # retrieved: the client may be gone before it hears it
                continue
            if lease is None:
                hopeless.add(kind)
            else:
                waiter.served.set_result(lease)

    def _remember(self, client: str, lease: Lease, pool: PoolSettings, reply: bytes) -> None:
        if len(self._warm) >= WARM_REPLIES_MAX and client not in self._warm:
            del self._warm[next(iter(self._warm))]
        proved_until = self._registry.proved_at(lease.worker_id) + pool.readiness_max_age
        if pool.readiness != "tcp":
            proved_until = float("inf")
        self._warm[client] = WarmReply(self._registry.generation, lease, proved_until, reply)

    def _held(self, pool: str, client: str) -> frozenset[str]:
        return self._registry.held_leases(pool, client)

    def _certain_of(self, address: str) -> bool:
        """Whether the books know what this address is. One dead region must not silence the others' PING."""
        return self._registry.by_address(address) is not None or self._context.clouds.recovered()

    # --- PING, RELEASE, STATUS ---------------------------------------------------------------------

    def _ping_now(self, command: Ping, client: str) -> bytes | None:
        worker = self._held_worker(command.address)
        if worker is None:
            raise WorkerNotFound
        lease = self._registry.lease_of(worker.id, client)
        if lease is None:
            return None
        self._registry.renew(lease, self._now())
        return protocol.OK

    async def _ping(self, command: Ping, client: str) -> bytes:
        """A client without a lease uses the worker, so it gets one, unless somebody else has it alone."""
        worker = self._held_worker(command.address)
        if worker is None:
            raise WorkerNotFound
        pool = self._context.pool_of(worker)
        refusal = client_refusal(self._registry, worker.pool, pool, client)
        if refusal is not None:
            raise refusal
        lease = Lease(self._new_id(), worker.id, client, pool.idle_timeout, pool.exclusive)
        await self._written(self._registry.grant(lease, self._now()))
        self._require_charge(self._context.cloud_of(worker))
        return protocol.OK

    def _release(self, command: Release, client: str) -> bytes:
        worker = self._held_worker(command.address)
        if worker is None:
            return protocol.OK
        now = self._now()
        self._registry.expire_leases(worker.id, now)
        if not command.force or self._is_protected(worker):
            self._registry.end_lease(worker.id, client, "released", now)
        # It is busy when a waiting client just got it. A protected one stays, whoever says what.
        ends = command.force or not self._registry.busy(worker.id)
        if ends and not self._is_protected(worker):
            self._registry.drain(worker.id, Reason.RELEASED, now)
            self._reap()
        return protocol.OK

    def _is_protected(self, worker: Worker) -> bool:
        current = self._registry.get(worker.id)
        return current is not None and current.protected

    def _held_worker(self, address: str) -> Worker | None:
        """The worker at an address. Raises ReadOnly when it is another broker's, or may be."""
        worker = self._registry.by_address(address)
        for cloud in self._context.clouds.all if worker is None else (self._context.cloud_of(worker),):
            self._require_charge(cloud)
        return worker

    def _known(self) -> list[Worker]:
        return sorted(self._registry.in_state(*BOOKED), key=lambda worker: worker.born_at)

    def _status(self, worker: Worker) -> dict[str, object]:
        now, pool = self._now(), self._context.pool_of(worker)
        idle_seconds = max(0.0, now - self._registry.used_at(worker.id))
        ends = worker.state in (WorkerState.READY, WorkerState.SUSPECT) and not worker.protected
        idle_at: float | None = now - idle_seconds
        if not self._registry.busy(worker.id):
            idle_at = idle_since_at(self._registry, worker, pool, self._context.warmth(worker.pool), now)
        ends_in = float("inf") if idle_at is None else idle_at + pool.idle_timeout - now
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
            "age_seconds": round(now - worker.born_at),
            "reason": worker.reason,
            "protected": worker.protected,
            "uses": self._registry.uses(worker.id),
        }

    # --- LIST_ALL, TERMINATE_ALL -------------------------------------------------------------------

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

    async def _terminate_all(self) -> bytes:
        """Whatever the cloud lists under our tag ends, known to the books or not; busy or not. What a person
        protects is spared, and named."""
        unseen: BrokerError | None = None
        try:
            await self._scan()
        except BrokerError as error:
            # Where nobody has looked yet there may be more than the books hold: do not claim all is ended.
            unseen = None if self._context.clouds.recovered() else error
        for cloud in self._context.clouds.all:  # "all" is not ours to end
            self._require_charge(cloud)
        now = self._now()
        for name in self._context.settings.pool:
            self._context.waiting.fail(
                name, Draining("every worker is being terminated on request; ask again")
            )
        self._context.unwanted.update(w.id for w in self._registry.in_state(WorkerState.ORDERED))
        spared = [w.instance_id for w in self._registry.in_state(*BOOKED) if w.protected]
        ended = [worker for worker in self._registry.in_state(*USABLE) if not worker.protected]
        for worker in ended:
            self._registry.drain(worker.id, Reason.TERMINATE_ALL, now)
        self._reap()
        if unseen is not None:
            raise unseen
        reply = {"terminated": [worker.instance_id for worker in ended]}
        return protocol.json_line({**reply, "protected": spared} if spared else reply)

    # --- inside ------------------------------------------------------------------------------------

    def _pool(self, name: str | None) -> tuple[str, PoolSettings]:
        pool = self._context.settings.pool.get(name or "default")
        if pool is None:
            raise self._context.no_such_pool(name or "default")
        return name or "default", pool

    def _require_charge(self, cloud: Cloud | None) -> None:
        """Raises ReadOnly while another broker is in charge of that cloud."""
        error = cloud.read_only() if cloud is not None else None
        if error is not None:
            raise error

    def _require_possible(self, pool: str, wish: Wish) -> None:
        cloud = self._context.cloud(pool)
        if wish == ANYTHING or cloud is None:
            return
        offerings = cloud.provider.offerings(pool)
        if not any(wish.fits(offering) for offering in offerings):
            raise BadRequest(f"pool '{pool}' has nothing with {wish}; it has {_catalogue(offerings)}")

    async def _recovered(self, pool: str | None = None, deadline_at: float | None = None) -> None:
        """Wait for the first complete scan, of one cloud or of all. Raises CloudError, WaitTimedOut."""
        try:
            async with asyncio.timeout(None if deadline_at is None else max(0.0, deadline_at - self._now())):
                while not all(cloud.recovered for cloud in self._clouds_of(pool)):
                    if self._closing:
                        raise Draining("the broker is restarting; ask again in a moment")
                    clouds = self._clouds_of(pool)
                    refusals = [refusal for cloud in clouds if (refusal := cloud.refusal(pool)) is not None]
                    if refusals:
                        raise refusals[0]
                    await self._context.scanned.wait()
        except TimeoutError:
            raise WaitTimedOut("the broker has just started and is still looking for its workers") from None

    def _clouds_of(self, pool: str | None) -> Sequence[Cloud]:
        """Those that have to be known: a reload may change them. None for a pool that there is no more."""
        if pool is None:
            return self._context.clouds.all
        cloud = self._context.cloud(pool)
        return () if cloud is None else (cloud,)

    def _write_lease(self, lease: Lease, worker: Worker) -> None:
        task = asyncio.ensure_future(self._context.store.lease_granted(lease, worker))
        self._writing[lease.id] = task
        task.add_done_callback(lambda done: self._lease_written(lease.id, done))

    def _lease_written(self, lease_id: str, task: asyncio.Task[None]) -> None:
        failed = not task.cancelled() and task.exception() is not None
        # A hold that became exclusive is written once more. A failed write is kept until the lease ends: who
        # asks whether it is on disk may come later than the failure.
        if self._writing.get(lease_id) is task and not failed:
            del self._writing[lease_id]

    async def _written(self, lease: Lease) -> None:
        """Wait until the lease is on disk.

        A full disk does not keep a client from a shared worker. An exclusive one is not given away on a lease
        that a restart would forget: raises StoreError, and the lease ends.
        """
        task, worker = self._writing.get(lease.id), self._registry.get(lease.worker_id)
        if task is None or worker is None:
            return
        if task.done():  # it has failed; perhaps the disk takes it now
            self._write_lease(lease, worker)
            task = self._writing[lease.id]
        try:
            await asyncio.shield(task)
        except StoreError:
            if lease.exclusive:
                self._registry.end_lease(lease.worker_id, lease.client, "not written", self._now())
                raise


def _future() -> asyncio.Future[Lease]:
    return asyncio.get_running_loop().create_future()


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


def _catalogue(offerings: Sequence[Offering]) -> str:
    return ", ".join(
        dict.fromkeys(  # the same in each zone
            f"{o.instance_type} in {o.region} ({o.cores if o.cores else 'an unknown number of'} cores)"
            for o in offerings
        )
    )
