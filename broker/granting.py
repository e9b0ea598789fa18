"""Holds on workers: chosen and booked in one step, proved, on disk, and given to whoever waits longest.

A worker is handed out only from READY, with a fresh proof that its port answers, and with the client's
lease on disk; after every await each of the three is looked at again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from broker.context import Context
from broker.core.errors import StoreError
from broker.core.model import Event, Lease, LeaseEnded, LeaseGranted, Worker, WorkerChanged, WorkerState
from broker.core.settings import PoolSettings
from broker.core.wish import Wish

Prove = Callable[[Worker], Awaitable[bool]]


class Granting:
    """See the module. `prove` tries a worker's port now."""

    def __init__(self, context: Context, *, prove: Prove, new_id: Callable[[], str]) -> None:
        self._context = context
        self._registry = context.registry
        self._prove = prove
        self._new_id = new_id
        self._now = context.clock.monotonic
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
                self._writing.pop(lease.id, None)
                self._context.store.soon(self._context.store.lease_ended(lease.id))
                self.serve(worker.pool)
            case WorkerChanged(worker=worker):
                if worker.state is WorkerState.READY:
                    self.serve(worker.pool)

    def take(self, pool: str, client: str, exclusive: bool, wish: Wish) -> Lease | None:
        """The client's hold on a worker that suits, decided and booked in one step; None when none does."""
        worker = self._registry.available(pool, client, exclusive=exclusive, wish=wish.test())
        if worker is None:
            return None
        ttl_seconds = self._context.pool(pool).idle_timeout
        return self._registry.grant(
            Lease(self._new_id(), worker.id, client, ttl_seconds, exclusive), self._now()
        )

    async def confirmed(self, lease: Lease, pool: PoolSettings) -> Worker | None:
        """The lease's worker, when its readiness is proved, the lease is on disk, and both are still so."""
        worker = self._registry.get(lease.worker_id)
        if worker is None or worker.state is not WorkerState.READY:
            return None
        if self._proof_is_old(worker, pool) and not await self._prove(worker):
            return None
        await self.written(lease)
        worker = self._registry.get(lease.worker_id)
        still_held = self._registry.lease_ends_at(lease.id) is not None
        return worker if worker is not None and worker.state is WorkerState.READY and still_held else None

    def _proof_is_old(self, worker: Worker, pool: PoolSettings) -> bool:
        proved_at = self._registry.proved_at(worker.id)
        return pool.readiness == "tcp" and self._now() - proved_at > pool.readiness_max_age

    def serve(self, pool: str) -> None:
        """Give what has become free to whoever waits longest for it."""
        hopeless: set[tuple[bool, Wish]] = set()
        for waiter in self._context.waiting.of(pool):
            kind = (waiter.exclusive, waiter.wish)
            if kind in hopeless:
                continue
            lease = self.take(pool, waiter.client, waiter.exclusive, waiter.wish)
            if lease is None:
                hopeless.add(kind)
            else:
                waiter.served.set_result(lease)

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
