"""Sends Stop for workers that a pool keeps stopped, and Start for those that somebody waits for.

A Stop that arrives late would stop a machine that has been started and given to somebody meanwhile. So a Stop
is sent once, and that the machine ends is on disk before it is: only when EC2 has answered is it taken back,
and only when that is on disk too can the worker be started. Whoever lost the answer, this broker or the one
after it, terminates the machine, which is out of every client's reach by then. A Start is safe to send again:
the machine is in the books, and runs or does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine
from typing import Any

from broker.clouds import Cloud
from broker.context import Context
from broker.core.backoff import doubled
from broker.core.errors import BrokerError, CloudError, OfferingRefused, Throttled
from broker.core.model import Event, Worker, WorkerChanged, WorkerState
from broker.core.policy import Reason, used_up
from broker.core.stock import IN_STOCK, startable
from broker.core.warm import Warmth
from broker.loops.reap import Report

AGAIN_SECONDS = 5.0  # after a call that was not sent, or a Start whose answer was lost
PAUSE_SECONDS_MIN = 60.0  # after a Start that was refused for good, doubling
PAUSE_SECONDS_MAX = 900.0


class StockLoop:
    """See the module. Each call is a task of its own, and `wake` has the loop tick when one is over: a Stop
    that hangs holds up nobody's Start. `changed` is called when the cloud has answered: watch for it."""

    name = "stock"

    def __init__(
        self, context: Context, report: Report, *, wake: Callable[[], None], changed: Callable[[], None]
    ) -> None:
        self._context = context
        self._registry = context.registry
        self._report = report
        self._wake = wake
        self._changed = changed
        self._due_at: dict[str, float] = {}  # workers for which a call is to be made
        self._calls: dict[str, asyncio.Task[None]] = {}
        self._failures: dict[int, int] = {}  # by cloud: Starts that were refused for good, in a row
        self._not_before: dict[int, float] = {}
        self._perhaps_started: set[str] = set()  # workers whose Start was sent and not answered
        self._closed = False  # the broker is going down

    def startable(self, pool: str, clouds: Collection[Cloud]) -> list[Worker]:
        """The pool's workers in those clouds that may be started now, the one stopped first comes first."""
        stopped, now = self._registry.in_state(WorkerState.STOPPED, pool=pool), self._context.now()
        if not stopped or self._context.warmth(pool).starts.pauses(now):
            return []
        settings = self._context.pool(pool)
        return [one for one in stopped if startable(one, settings, now) and self._may_start(one, clouds)]

    def _may_start(self, worker: Worker, clouds: Collection[Cloud]) -> bool:
        context, now = self._context, self._context.now()
        cloud = context.cloud_of(worker)
        if cloud is None or cloud not in clouds or self._not_before.get(id(cloud), now) > now:
            return False
        if worker.id in context.leaving or worker.instance_id in context.ended or worker.id in self._calls:
            return False
        if worker.closed or used_up(self._registry, worker, context.pool(worker.pool)):
            return False
        free, _ = cloud.cooling.usable([worker.offering], now, pool=worker.pool)
        return bool(free)

    def heard(self, event: Event) -> None:
        """Whoever decides that a worker stops or starts moves it in the books; the call is made here."""
        if not isinstance(event, WorkerChanged):
            return
        worker = event.worker
        self._due_at.pop(worker.id, None)
        self._perhaps_started.discard(worker.id)
        match event.before, worker.state:
            case WorkerState.READY, WorkerState.STOPPING:
                self._due_at[worker.id] = event.at
            case WorkerState.STOPPED, WorkerState.BOOTING if not worker.running:
                self._due_at[worker.id] = event.at
            case WorkerState.STOPPING, WorkerState.STOPPED:
                self._warmth(worker).stops.succeeded()
            case WorkerState.STOPPING, WorkerState.DRAINING if worker.reason == Reason.UNRESPONSIVE:
                self._warmth(worker).stops.failed(event.at)
            case WorkerState.BOOTING, WorkerState.READY if worker.started_at is not None:
                self._warmth(worker).starts.succeeded()
            case WorkerState.BOOTING, WorkerState.DRAINING if worker.started_at is not None:
                if worker.reason in (Reason.BOOT_TIMEOUT, Reason.BOOT_FAILED):
                    self._warmth(worker).starts.failed(event.at)
            case _:
                pass

    def _warmth(self, worker: Worker) -> Warmth:
        return self._context.warmth(worker.pool)

    async def settle(self, timeout_seconds: float) -> None:
        """At shutdown: collect the answers that are under way; a Stop without one costs the machine."""
        self._closed = True
        if self._calls:
            await asyncio.wait(self._calls.values(), timeout=timeout_seconds)

    async def tick(self) -> float | None:
        now = self._context.now()
        due = [one for one, at in self._due_at.items() if at <= now and one not in self._calls]
        for worker_id in due if not self._closed else ():
            worker = self._registry.get(worker_id)
            cloud = None if worker is None else self._context.cloud_of(worker)
            runs = worker is not None and worker.state is WorkerState.BOOTING and worker.running
            if worker is None or cloud is None or runs:
                del self._due_at[worker_id]
            elif not cloud.acts(now):
                self._due_at[worker_id] = now + AGAIN_SECONDS
            elif worker.state is WorkerState.STOPPING:
                del self._due_at[worker_id]
                self._begin(worker_id, self._stop(worker, cloud))
            else:
                self._due_at[worker_id] = now + AGAIN_SECONDS
                self._begin(worker_id, self._start(worker, cloud))
        moments = [at for one, at in self._due_at.items() if one not in self._calls]
        return None if self._closed else min(moments, default=None)

    def _begin(self, worker_id: str, call: Coroutine[Any, Any, None]) -> None:
        task = self._calls[worker_id] = asyncio.create_task(call)
        task.add_done_callback(lambda done: self._over(worker_id, done))

    def _over(self, worker_id: str, task: asyncio.Task[None]) -> None:
        self._calls.pop(worker_id, None)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._report("stop or start failed", {"worker": worker_id, "error": repr(error)})
        self._wake()

    # --- stopping ----------------------------------------------------------------------------------

    async def _stop(self, worker: Worker, cloud: Cloud) -> None:
        context, instance_id = self._context, worker.instance_id or ""
        context.ended.add(instance_id)
        try:
            await context.store.end_decided(instance_id, context.clock.wall())
            await self._send_stop(worker, cloud)
            if self._is(worker, *IN_STOCK):
                await context.store.end_revoked(instance_id)
        except BrokerError as error:
            self._not_stopped(worker, error)
        else:
            if self._is(worker, *IN_STOCK):
                context.ended.discard(instance_id)
                self._changed()
            elif instance_id in context.ended:  # its end was decided while the other way was written down
                context.store.soon(context.store.end_decided(instance_id, context.clock.wall()))

    async def _send_stop(self, worker: Worker, cloud: Cloud) -> None:
        """Returns when EC2 has answered, or when there is nothing to stop any more."""
        while self._is(worker, WorkerState.STOPPING) and not self._closed:
            if cloud.acts(self._context.now()):  # else another broker may have given it to somebody
                try:
                    await cloud.provider.stop(worker.instance_id or "")
                    return
                except Throttled:  # it was not sent
                    pass
            await asyncio.sleep(AGAIN_SECONDS)

    def _not_stopped(self, worker: Worker, error: BrokerError) -> None:
        """Whether or not it stops, it is terminated; and the next one is not launched to be stopped soon."""
        now = self._context.now()
        self._warmth(worker).stops.failed(now)
        self._report("stop failed", {"instance": worker.instance_id, "error": error.message})
        if self._is(worker, *IN_STOCK):
            self._registry.drain(worker.id, Reason.NOT_STOPPED, now)

    # --- starting ----------------------------------------------------------------------------------

    async def _start(self, worker: Worker, cloud: Cloud) -> None:
        try:
            await cloud.provider.start(worker.instance_id or "")
        except BrokerError as error:
            if isinstance(error, CloudError) and error.sent:
                self._perhaps_started.add(worker.id)
            elif not isinstance(error, Throttled):
                self._not_started(worker, cloud, error)
        else:
            self._due_at.pop(worker.id, None)
            self._failures.pop(id(cloud), None)
            self._changed()

    def _not_started(self, worker: Worker, cloud: Cloud, error: BrokerError) -> None:
        """It is stopped as before, and whoever waits for it gets another one. What is refused after a Start
        that was perhaps carried out may be on its way up."""
        now, current = self._context.now(), self._registry.get(worker.id)
        if current is None or current.state is not WorkerState.BOOTING or current.running:
            return
        if worker.id in self._perhaps_started and not isinstance(error, OfferingRefused):
            return
        self._due_at.pop(worker.id, None)
        if isinstance(error, OfferingRefused):
            cloud.cooling.refused(worker.offering, error, now, pool=worker.pool)
        else:
            times = self._failures[id(cloud)] = self._failures.get(id(cloud), 0) + 1
            self._not_before[id(cloud)] = now + doubled(PAUSE_SECONDS_MIN, times, PAUSE_SECONDS_MAX)
        self._report("start failed", {"instance": worker.instance_id, "error": error.message})
        if not self._registry.busy(worker.id):
            self._registry.stopped(worker.id, now)

    def _is(self, worker: Worker, *states: WorkerState) -> bool:
        current = self._registry.get(worker.id)
        return current is not None and current.state in states
