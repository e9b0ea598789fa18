"""What only this broker knows of its machines and pools, and must know again after a restart: how often each
machine has been given to somebody, that it is protected, that it has come up; and how each breaker stands.

An observer of events. Everything is written behind, on the thread of the store and in the order in which it
happened: a use is queued before the lease that it belongs to, so it is on disk when that is. Losing it loses
no machine.
"""

from __future__ import annotations

from dataclasses import replace

from broker.clock import moment
from broker.context import Context
from broker.core.model import (
    UNKNOWN_CLIENT,
    Event,
    LeaseGranted,
    ProtectionChanged,
    Worker,
    WorkerChanged,
    WorkerState,
)
from broker.core.policy import Reason
from broker.limits import close_when_used_up
from broker.orders import FORGOTTEN, YIELDED
from broker.store import MachineNote
from broker.store_schema import NOTES_MAX


class Memory:
    """See the module."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._notes: dict[str, MachineNote] = {}  # by instance, as on disk
        context.guard_changed = self._breaker_changed

    def recall(self) -> None:
        """Take in what an earlier broker has written."""
        context, now = self._context, moment(self._context.clock)
        self._notes = {machine.instance_id: machine for machine in context.store.notes()}
        for pool, breaker in context.store.breakers(now).items():
            context.guard(pool).recall(breaker, now.at)

    def heard(self, event: Event) -> None:
        match event:
            case WorkerChanged():
                self._worker_changed(event)
            case LeaseGranted(lease=lease, worker=worker) if lease.client != UNKNOWN_CLIENT:
                self._keep(worker, uses=self._context.registry.uses(worker.id))
            case ProtectionChanged(worker=worker):
                self._keep(worker, protected=worker.protected)

    def _worker_changed(self, event: WorkerChanged) -> None:
        worker, before = event.worker, event.before
        if before is None or worker.state is WorkerState.BOOTING:
            self._met_again(worker, event.at)
        if before is WorkerState.BOOTING:
            self._booted_or_not(worker, event.at)  # asks whether it had come up before
        if worker.state is WorkerState.READY:
            self._keep(worker, ready=True)
        elif worker.state is WorkerState.GONE and worker.reason not in FORGOTTEN:
            self._forget(worker.instance_id or "")

    def _met_again(self, worker: Worker, now: float) -> None:
        """A machine has entered the books: what is known of it holds before anybody decides about it."""
        known = self._notes.get(worker.instance_id or "")
        if known is not None:
            registry = self._context.registry
            worker = registry.recall(worker.id, uses=known.uses, protected=known.protected, now=now)
            close_when_used_up(self._context, worker)

    def _booted_or_not(self, worker: Worker, now: float) -> None:
        """Failed boots in a row open the breaker. A machine that had come up before a restart is no boot."""
        known = self._notes.get(worker.instance_id or "")
        if worker.reason == YIELDED or (known is not None and known.ready):
            return
        guard = self._context.guard(worker.pool)
        if worker.state is WorkerState.READY:
            guard.booted()
        elif worker.state is WorkerState.GONE or worker.reason in (Reason.BOOT_TIMEOUT, Reason.BOOT_FAILED):
            guard.boot_failed(self._context.pool_of(worker), now)

    def _keep(
        self, worker: Worker, *, ready: bool = False, uses: int = 0, protected: bool | None = None
    ) -> None:
        if worker.instance_id is None:
            return
        known = self._notes.get(worker.instance_id, MachineNote(worker.instance_id))
        after = replace(
            known,
            ready=known.ready or ready,
            uses=max(known.uses, uses),
            protected=known.protected if protected is None else protected,
        )
        if after != known or worker.instance_id not in self._notes:
            self._notes[worker.instance_id] = after
            if len(self._notes) > NOTES_MAX:  # of those that other brokers have taken over
                del self._notes[next(iter(self._notes))]
            self._context.store.soon(self._context.store.note_changed(after))

    def _forget(self, instance_id: str) -> None:
        if self._notes.pop(instance_id, None) is not None:
            self._context.store.soon(self._context.store.note_dropped(instance_id))

    def _breaker_changed(self, pool: str) -> None:
        context, now = self._context, moment(self._context.clock)
        breaker = context.guard(pool).breaker(now.at)
        context.store.soon(context.store.breaker_changed(pool, breaker, now))
