"""Holds on workers: chosen and booked in one step, proved, on disk, and given to whoever waits longest.

A worker is handed out only from READY, with a fresh proof that its port answers, and with the client's
lease on disk; after every await each of the three is looked at again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from broker.context import Context
from broker.core.errors import LimitReached, StoreError
from broker.core.life import USABLE
from broker.core.model import Event, Lease, LeaseEnded, LeaseGranted, Worker, WorkerChanged, WorkerState
from broker.core.policy import client_refusal, client_room, lease_room
from broker.core.settings import PoolSettings
from broker.core.wish import Wish
from broker.waiting import Waiter

TURN_SECONDS = 300.0  # longer than a machine takes to boot: what is missing is mostly on its way
CONFIRMED_AT_ONCE_MAX = 64  # connections to worker ports for one command: file descriptors are few
PROOF_GRACE_SECONDS = 1.0  # beyond a client's wait: the proof of a worker that came in its last moment
PROOF_SECONDS_MIN = 0.1  # one that was made for this hand-out is good for so long, whatever the pool says
PROOF_ROUNDS_MAX = 3  # of one hand-out: ports that answer slowly make the others' proofs old

NOT_HANDED_OUT = "not handed out"  # why a lease ends of which no client was told

Prove = Callable[[Worker], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class Kept:
    """Workers that this waiter could have: it lacks some more."""

    waiter: Waiter
    worker_ids: frozenset[str]
    alone: bool  # it has its turn: nobody else is given them


class Granting:
    """See the module. `prove` tries a worker's port now, `reap` tells that a worker may be overdue."""

    def __init__(
        self, context: Context, *, prove: Prove, reap: Callable[[], None], new_id: Callable[[], str]
    ) -> None:
        self._context = context
        self._registry = context.registry
        self._prove = prove
        self._new_id = new_id
        self._now = context.clock.monotonic
        self._reap = reap
        self.pinged: set[str] = set()  # leases on which a PING was told OK
        self._kept: dict[str, Kept] = {}  # by pool, as of the last time that somebody was served
        self._turn_began_at: dict[str, float] = {}  # by pool
        self._writing: dict[str, asyncio.Task[None]] = {}  # lease id → its way to the disk

    def heard(self, event: Event) -> None:
        """Keep the store and the queue up with the books."""
        match event:
            case LeaseGranted(lease=lease, worker=worker):
                if lease.id in self._context.restored:  # a full disk must not end what it has long held
                    self._context.restored.discard(lease.id)
                else:
                    self._write_lease(lease, worker)
            case LeaseEnded(lease=lease, worker=worker):
                self.pinged.discard(lease.id)
                self._writing.pop(lease.id, None)
                self._context.store.soon(self._context.store.lease_ended(lease.id))
                self.serve(worker.pool)
            case WorkerChanged(worker=worker):
                if worker.state is WorkerState.READY:
                    self.serve(worker.pool)

    def take(self, waiter: Waiter, least: int | None = None) -> list[Lease]:
        """The client's holds on workers that suit, decided and booked in one step: all that it wants and may
        have, or at least so many; otherwise none. What is kept for somebody else is not taken.

        Raises LimitReached for one who would hold more workers than it may, or than a pool with new settings
        may ever have.
        """
        if waiter.terms is None:
            lease = self._take_one(waiter)
            return [] if lease is None else [lease]
        places = self._places(waiter)
        allowed = self._allowed(waiter, places)
        wanted = self._wanted(waiter, len(places), len(allowed)) if least is None else least
        if len(allowed) < wanted:
            self._require_allowance(waiter, wanted, len(places))
            return []
        return [self._registry.grant(self._lease(waiter, one), self._now()) for one in allowed]

    def _wanted(self, waiter: Waiter, found: int, allowed: int) -> int:
        """All that the client wants, as far as the caps allow. Raises LimitReached when they never will."""
        pool = self._context.pool(waiter.pool)
        caps = lease_room(pool, self._context.settings.broker.max_workers, exclusive=waiter.exclusive)
        refusal = caps.refusal(waiter.least)
        if refusal is not None:
            raise refusal
        most = caps.at_most(waiter.count)
        room = client_room(self._registry, waiter.pool, pool, waiter.client)
        if room is not None and waiter.exclusive:
            most = min(most, room)
        elif room is not None and found >= most:
            most = min(most, allowed)
        return max(waiter.least, most)

    def _take_one(self, waiter: Waiter) -> Lease | None:
        """The hold of a GET_WORKER: the one that the client has, or a new one. Raises LimitReached."""
        worker = self._registry.available(
            waiter.pool, waiter.client, exclusive=waiter.exclusive, wish=self._test(waiter)
        )
        own = self._registry.workers_held(waiter.pool, waiter.client)
        if worker not in own:
            pool = self._context.pool(waiter.pool)
            refusal = client_refusal(self._registry, waiter.pool, pool, waiter.client)
            if refusal is not None and self._context.own_booting(waiter) is None:
                raise refusal
            if refusal is not None:
                return None  # after a restart its own is looked at again: it comes in a moment
        if worker is None:
            return None
        return self._registry.grant(self._lease(waiter, worker.id), self._now())

    def _lease(self, waiter: Waiter, worker_id: str) -> Lease:
        terms = waiter.terms
        ttl_seconds = None if terms is None else terms.ttl_seconds
        if ttl_seconds is None:
            ttl_seconds = self._context.pool(waiter.pool).idle_timeout
        if terms is None:
            return Lease(self._new_id(), worker_id, waiter.client, ttl_seconds, waiter.exclusive)
        return Lease(
            self._new_id(),
            worker_id,
            waiter.client,
            ttl_seconds,
            waiter.exclusive,
            acquired=True,
            bound=terms.bound,
        )

    def _places(self, waiter: Waiter) -> list[str]:
        return self._registry.places(
            waiter.pool, waiter.count, exclusive=waiter.exclusive, wish=self._test(waiter)
        )

    def _allowed(self, waiter: Waiter, places: list[str]) -> list[str]:
        """Those of the places that the client may have: not more workers than workers_per_client_max."""
        room = client_room(self._registry, waiter.pool, self._context.pool(waiter.pool), waiter.client)
        if room is None:
            return places
        held = {worker.id for worker in self._registry.workers_held(waiter.pool, waiter.client)}
        new = list(dict.fromkeys(one for one in places if one not in held))
        return [one for one in places if one in held or one in new[:room]]

    def _require_allowance(self, waiter: Waiter, wanted: int, found: int) -> None:
        """Raises LimitReached when it is not for want of workers that the client goes without."""
        pool = self._context.pool(waiter.pool)
        room = client_room(self._registry, waiter.pool, pool, waiter.client)
        if room is not None and (found >= wanted or (waiter.exclusive and wanted > room)):
            raise client_refusal(self._registry, waiter.pool, pool, waiter.client) or LimitReached(
                f"the client may have {room} more of the workers of pool '{waiter.pool}' at most, by its "
                f"workers_per_client_max = {pool.workers_per_client_max}; ask for fewer, or release some"
            )

    def _test(self, waiter: Waiter) -> Callable[[Worker], bool] | None:
        """What a worker must be: as the client wishes, and not kept for another one."""
        fits, kept = waiter.wish.test(), self._kept.get(waiter.pool)
        if kept is None or kept.waiter is waiter or not kept.alone:
            return fits
        lease_of = self._registry.lease_of
        return lambda worker: (
            (worker.id not in kept.worker_ids or lease_of(worker.id, waiter.client) is not None)
            and (fits is None or fits(worker))
        )

    def is_kept(self, worker: Worker) -> bool:
        """Whether somebody waits who would have it, and lacks some more: then it is not idle."""
        return worker.id in self._context.wanted.get(worker.pool, ())

    def give_back(self, leases: Iterable[Lease], reason: str) -> None:
        """End leases; their workers stay warm, and are looked at again: they may be overdue. One on which a
        PING was told OK before it was handed out stays, by the client's name: it is at work there."""
        now = self._now()
        for lease in leases:
            if reason == NOT_HANDED_OUT and lease.id in self.pinged:
                self._keep_by_name(lease)
                continue
            ended = self._registry.end_lease(lease.worker_id, lease.key, reason, now)
            worker = self._registry.get(lease.worker_id)
            if ended is not None and worker is not None and worker.state in USABLE:
                self._registry.look_again(worker.id, now)
        self._reap()

    def _keep_by_name(self, lease: Lease) -> None:
        worker = self._registry.get(lease.worker_id)
        if worker is None or self._registry.lease(lease.id) is None:
            return
        ttl_seconds = self._context.pool_of(worker).idle_timeout
        self.pinged.add(self._registry.keep_by_name(lease.id, ttl_seconds, self._now()).id)
        self.serve(worker.pool)  # the client may wait for it on another connection

    async def all_confirmed(
        self, leases: Sequence[Lease], pool: PoolSettings, until_at: float
    ) -> list[Lease]:
        """Those whose workers may be handed out in this instant: each is proved, and each lease on disk.
        Those of which that is not known by `until_at` are not among them.

        Proving one may take so long that the proof of another is old by then. Raises StoreError.
        """
        good, began_at = list(leases), self._now()
        for _ in range(PROOF_ROUNDS_MAX):
            found = await self._confirm_each(good, pool, until_at)
            good = [lease for lease, worker in zip(good, found, strict=True) if worker is not None]
            if all(self._may_go(lease, pool, began_at) for lease in good):
                return good
        return [lease for lease in good if self._may_go(lease, pool, began_at)]

    async def _confirm_each(
        self, leases: Sequence[Lease], pool: PoolSettings, until_at: float
    ) -> list[Worker | None]:
        if len(leases) == 1:
            return [await self.confirmed(leases[0], pool, until_at)]
        places = asyncio.Semaphore(CONFIRMED_AT_ONCE_MAX)

        async def confirm(lease: Lease) -> Worker | None:
            async with places:
                return await self.confirmed(lease, pool, until_at)

        found = await asyncio.gather(*(confirm(lease) for lease in leases), return_exceptions=True)
        for one in found:
            if isinstance(one, BaseException):
                raise one
        return [one for one in found if not isinstance(one, BaseException)]

    def _may_go(self, lease: Lease, pool: PoolSettings, began_at: float) -> bool:
        worker = self._registry.get(lease.worker_id)
        ready = (
            worker is not None
            and worker.state is WorkerState.READY
            and not self._proof_is_old(worker, pool, began_at)
        )
        return ready and self._registry.lease(lease.id) is not None

    async def confirmed(self, lease: Lease, pool: PoolSettings, until_at: float) -> Worker | None:
        """The lease's worker, when its readiness is proved, the lease is on disk, and both are still so.

        None also when that takes longer than until then: the client waits no longer. Raises StoreError.
        """
        try:
            async with asyncio.timeout(max(0.0, until_at - self._now())):
                return await self._confirmed(lease, pool)
        except TimeoutError:
            return None

    async def _confirmed(self, lease: Lease, pool: PoolSettings) -> Worker | None:
        """A slow disk makes the proof old: then there is another one."""
        began_at = self._now()
        for _ in range(PROOF_ROUNDS_MAX):
            worker = self._registry.get(lease.worker_id)
            if worker is None or worker.state is not WorkerState.READY:
                return None
            if self._proof_is_old(worker, pool, began_at) and not await self._prove(worker):
                return None
            await self.written(lease)
            if self._may_go(lease, pool, began_at):
                return self._registry.get(lease.worker_id)
        return None

    def _proof_is_old(self, worker: Worker, pool: PoolSettings, began_at: float) -> bool:
        """Whether it may not be relied upon in a hand-out that began then. Several proofs, or a proof and a
        write to the disk, are not made in one instant."""
        proved_at, now = self._registry.proved_at(worker.id), self._now()
        its_own = proved_at >= began_at and now - proved_at <= PROOF_SECONDS_MIN
        return pool.readiness == "tcp" and now - proved_at > pool.readiness_max_age and not its_own

    def serve(self, pool: str) -> None:
        """Give what has become free to whoever waits longest for it.

        Nobody holds a worker while it waits for others. For the first in the queue that wants several at
        once, what there is of them is kept meanwhile: for TURN_SECONDS, then those behind it are served for
        as long, and so on. So neither can keep the other out for ever.
        """
        self._kept.pop(pool, None)
        self._serve_all(pool)
        self._note_wanted(pool, self._find_some(pool))

    def _find_some(self, pool: str) -> frozenset[str]:
        """Note how many workers each that wants several has found already: the first in the queue, of the
        others the next, and so on. Returns these workers."""
        found: set[str] = set()
        for waiter in self._context.waiting.of(pool):
            if waiter.count > 1:
                places = [one for one in self._places(waiter) if one not in found]
                waiter.found = len(places)
                found.update(places)
        return frozenset(found)

    def _note_wanted(self, pool: str, found: frozenset[str]) -> None:
        """Tell what must not be reaped as idle, and have what may be again be looked at."""
        wanted, now = self._context.wanted, self._now()
        before = wanted.pop(pool, frozenset())
        if found:
            wanted[pool] = found
        for worker_id in before - found:
            worker = self._registry.get(worker_id)
            if worker is not None and worker.state in USABLE:
                self._registry.look_again(worker_id, now)

    def _serve_all(self, pool: str) -> None:
        hopeless: set[tuple[bool, Wish, int, int]] = set()
        first = True
        for waiter in self._context.waiting.of(pool):
            kind = (waiter.exclusive, waiter.wish, waiter.count, waiter.least)
            if waiter.served.done() or (kind in hopeless and not self._has_some(waiter)):
                continue
            try:
                leases = self.take(waiter)
            except LimitReached as error:  # on another connection it has got what it waited for
                waiter.served.set_exception(error)
                waiter.served.exception()  # retrieved: the client may be gone before it hears it
                continue
            if leases:
                waiter.served.set_result(leases)
                continue
            if not self._has_some(waiter):
                hopeless.add(kind)
            if waiter.count > 1 and first:
                first = False
                self._kept[pool] = Kept(waiter, frozenset(self._places(waiter)), alone=self._keeps(pool))

    def _has_some(self, waiter: Waiter) -> bool:
        """Whether it holds workers of the pool: those it may get although others like it cannot."""
        return bool(self._registry.workers_held(waiter.pool, waiter.client))

    def serve_groups(self, pool: str) -> None:
        """To be called every second or so while somebody waits for several: a turn may be over."""
        if any(waiter.count > 1 for waiter in self._context.waiting.of(pool)):
            self.serve(pool)

    def serve_after(self, waiter: Waiter) -> None:
        """Somebody has left the queue: what was kept for it is for those behind."""
        kept = self._kept.get(waiter.pool)
        if kept is not None and kept.waiter is waiter:
            self.serve(waiter.pool)

    def _keeps(self, pool: str) -> bool:
        """Whether workers are kept for one who lacks some: turn and turn about, counted for the pool, or two
        who want many would take turns and leave none to the others."""
        now = self._now()
        began_at = self._turn_began_at.get(pool, float("-inf"))
        if now - began_at >= 2 * TURN_SECONDS:
            began_at = self._turn_began_at[pool] = now
        return now - began_at < TURN_SECONDS

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

    async def written(self, lease: Lease) -> None:
        """Wait until the lease is on disk.

        A full disk does not keep a client from a shared worker. An exclusive one is not given away on a lease
        that a restart would forget: raises StoreError.
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
                raise
