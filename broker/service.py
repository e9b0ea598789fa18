"""One command → registry, waiting queue → reply.

`answer_now` answers what needs no waiting, straight from the books; `answer` does the rest. The address of a
worker leaves this module only from READY, with a fresh proof that its port answers, and with the client's
lease on disk; after every await each of the three is looked at again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from broker.clouds import Cloud
from broker.context import Context
from broker.core import protocol
from broker.core.errors import (
    BadRequest,
    BrokerError,
    CloudError,
    Draining,
    WaitTimedOut,
    WorkerNotFound,
)
from broker.core.model import (
    Event,
    Lease,
    Offering,
    Worker,
    WorkerState,
)
from broker.core.policy import Reason
from broker.core.protocol import Command, GetWorker, ListAll, Malformed, Ping, Release, Status
from broker.core.settings import PoolSettings
from broker.core.wish import ANYTHING, Wish
from broker.granting import Granting, Prove
from broker.operations import Operations
from broker.waiting import Waiter

HAND_OUT_ATTEMPTS_MAX = 20  # a worker may be lost between choice and answer; so often in a row is no accident
WARM_REPLIES_MAX = 10_000  # remembered replies; for a client beyond them the answer only takes the longer way


@dataclass(frozen=True, slots=True)
class WarmReply:
    """The last answer a client got, good while the books and the proof have not moved."""

    generation: int
    lease: Lease
    proved_until: float
    reply: bytes


class Service:
    """Answers commands. `prove` tries a worker's port now, `scan` lists the clouds now, `demand` tells that
    somebody waits for a launch, and how many seconds at most, `reap` that somebody is to be terminated."""

    def __init__(
        self,
        context: Context,
        *,
        prove: Prove,
        scan: Callable[[], Awaitable[None]],
        demand: Callable[[float], None],
        reap: Callable[[], None],
        new_id: Callable[[], str],
    ) -> None:
        self._context = context
        self._registry = context.registry
        self._granting = Granting(context, prove=prove, new_id=new_id)
        self._operations = Operations(context, scan=scan, reap=reap)
        self._demand = demand
        self._reap = reap
        self._new_id = new_id
        self._now = context.clock.monotonic
        self._warm: dict[str, WarmReply] = {}
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
                    return self._operations.status()
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
                return await self._operations.list_all()
            case protocol.TerminateAll():
                return await self._operations.terminate_all()
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
        self._granting.heard(event)

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
            self._context.require_charge(self._context.cloud(name))
            held_before = self._held(name, client)
            lease = self._granting.take(name, client, exclusive, wish)
            if lease is None:
                lease = await self._wait(
                    Waiter(name, client, exclusive, wish, asked_at, _future()), deadline_at
                )
            worker = await self._granting.confirmed(lease, pool)
            if worker is not None and worker.address is not None:
                reply = protocol.line(worker.address)
                if name == "default" and wish == ANYTHING and not command.exclusive:
                    self._remember(client, lease, pool, reply)
                return reply
            if lease.id not in held_before:
                self._registry.end_lease(lease.worker_id, client, "not handed out", self._now())
        raise CloudError("workers are lost as fast as they become ready")

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

    # --- PING, RELEASE ---------------------------------------------------------------------

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
        lease = Lease(self._new_id(), worker.id, client, pool.idle_timeout, pool.exclusive)
        await self._granting.written(self._registry.grant(lease, self._now()))
        self._context.require_charge(self._context.cloud_of(worker))
        return protocol.OK

    def _release(self, command: Release, client: str) -> bytes:
        worker = self._held_worker(command.address)
        if worker is None:
            return protocol.OK
        now = self._now()
        self._registry.expire_leases(worker.id, now)
        if not command.force:
            self._registry.end_lease(worker.id, client, "released", now)
        if command.force or not self._registry.busy(
            worker.id
        ):  # it is busy when a waiting client just got it
            self._registry.drain(worker.id, Reason.RELEASED, now)
            self._reap()
        return protocol.OK

    def _held_worker(self, address: str) -> Worker | None:
        """The worker at an address. Raises ReadOnly when it is another broker's, or may be."""
        worker = self._registry.by_address(address)
        for cloud in self._context.clouds.all if worker is None else (self._context.cloud_of(worker),):
            self._context.require_charge(cloud)
        return worker

    # --- inside ------------------------------------------------------------------------------------

    def _pool(self, name: str | None) -> tuple[str, PoolSettings]:
        pool = self._context.settings.pool.get(name or "default")
        if pool is None:
            raise self._context.no_such_pool(name or "default")
        return name or "default", pool

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


def _future() -> asyncio.Future[Lease]:
    return asyncio.get_running_loop().create_future()


def _catalogue(offerings: Sequence[Offering]) -> str:
    return ", ".join(
        dict.fromkeys(  # the same in each zone
            f"{o.instance_type} in {o.region} ({o.cores if o.cores else 'an unknown number of'} cores)"
            for o in offerings
        )
    )
