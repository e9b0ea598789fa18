"""Closes a worker to new clients in the moment in which it has been given to `uses_max` of them, and has it
looked at in the moment in which the last of them is done.

An observer of events, so that every way to hand a worker out is counted alike, and nothing else can be handed
out between the last use and the closing.
"""

from __future__ import annotations

from collections.abc import Callable

from broker.context import Context
from broker.core.life import USABLE
from broker.core.model import Event, LeaseEnded, LeaseGranted, Worker
from broker.core.policy import Reason, used_up


def close_when_used_up(context: Context, worker: Worker) -> None:
    """No new clients for a worker that has been given to as many as it may."""
    if worker.state in USABLE and used_up(context.registry, worker, context.pool_of(worker)):
        context.registry.close(worker.id, Reason.USED_UP, context.now())


class UseLimit:
    """See the module. `reap` has the reap loop tick."""

    def __init__(self, context: Context, reap: Callable[[], None]) -> None:
        self._context = context
        self._reap = reap

    def heard(self, event: Event) -> None:
        match event:
            case LeaseGranted(worker=worker):
                close_when_used_up(self._context, worker)
            case LeaseEnded(worker=worker, last=True, at=at) if worker.closed and worker.state in USABLE:
                self._context.registry.look_again(worker.id, at)
                self._reap()
