"""Writes onto the machines when they were last used, for people and brokers that find them later.

Written behind, at most once a minute for each worker and only when it changed: losing it loses nothing.
"""

from __future__ import annotations

from broker.context import Context
from broker.core import tags
from broker.core.errors import BrokerError
from broker.core.model import Worker, WorkerState
from broker.loops.reap import Report

INTERVAL_SECONDS = 60.0


class TaggingLoop:
    """See the module."""

    name = "tagging"

    def __init__(self, context: Context, report: Report) -> None:
        self._context = context
        self._report = report
        self._written: dict[str, float] = {}  # worker id → the last use that its tag tells of
        self._due_at: dict[str, float] = {}

    async def tick(self) -> float | None:
        registry, now = self._context.registry, self._context.now()
        workers = registry.in_state(WorkerState.READY, WorkerState.SUSPECT)
        self._written = {w.id: self._written.get(w.id, w.born_at) for w in workers}
        self._due_at = {w.id: self._due_at.get(w.id, now + INTERVAL_SECONDS) for w in workers}
        for worker in workers:
            if self._due_at[worker.id] <= now:
                self._due_at[worker.id] = now + INTERVAL_SECONDS
                await self._write(worker)
        return min(self._due_at.values(), default=None)

    async def _write(self, worker: Worker) -> None:
        context, clock = self._context, self._context.clock
        cloud = context.cloud_of(worker)
        if context.registry.get(worker.id) is None or cloud is None or worker.instance_id is None:
            return
        if cloud.rival is not None:
            return
        used_at = context.registry.used_at(worker.id)
        if used_at <= self._written[worker.id]:
            return
        used_unix = clock.wall() - (clock.monotonic() - used_at)
        try:
            await cloud.provider.tag(worker.instance_id, {tags.LAST_USED: tags.rfc3339(used_unix)})
        except BrokerError as error:
            self._report("tagging failed", {"instance": worker.instance_id, "error": error.message})
        else:
            self._written[worker.id] = used_at
