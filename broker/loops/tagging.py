"""Writes onto the machines when they were last used, for people and brokers that find them later.

Written behind, once a minute, in one call for all the machines of a cloud that were used since: the number of
calls does not grow with the number of workers. They all get the moment of the latest of these uses, which is
less than a minute from their own. Losing it loses nothing.
"""

from __future__ import annotations

from collections import defaultdict

from broker.clouds import Cloud
from broker.context import Context
from broker.core import tags
from broker.core.errors import BrokerError, PermanentRefusal
from broker.core.model import Worker, WorkerState
from broker.loops.reap import Report

INTERVAL_SECONDS = 60.0
REFUSED_SECONDS = 600.0  # a missing permission is a person's to mend: it is not asked for every minute


class TaggingLoop:
    """See the module."""

    name = "tagging"

    def __init__(self, context: Context, report: Report) -> None:
        self._context = context
        self._report = report
        self._written: dict[str, float] = {}  # worker id → the last use that its tag tells of
        self._due_at: float | None = None  # None: there is nothing to write on
        self._refused_until_at: dict[int, float] = {}  # by cloud

    async def tick(self) -> float | None:
        registry, now = self._context.registry, self._context.now()
        workers = registry.in_state(WorkerState.READY, WorkerState.SUSPECT)
        self._written = {w.id: self._written.get(w.id, w.born_at) for w in workers}
        if not workers:
            self._due_at = None
        elif self._due_at is None:
            self._due_at = now + INTERVAL_SECONDS
        elif self._due_at <= now:
            self._due_at = now + INTERVAL_SECONDS
            await self._write([w for w in workers if registry.used_at(w.id) > self._written[w.id]])
        return self._due_at

    async def _write(self, used: list[Worker]) -> None:
        clouds: dict[int, Cloud] = {}
        by_cloud: dict[int, list[Worker]] = defaultdict(list)
        for worker in used:
            cloud = self._context.cloud_of(worker)
            if cloud is None or self._refused_until_at.get(id(cloud), 0.0) > self._context.now():
                continue
            if cloud.rival is None and worker.instance_id is not None:
                clouds[id(cloud)] = cloud
                by_cloud[id(cloud)].append(worker)
        for key, workers in by_cloud.items():
            await self._write_all(clouds[key], workers)

    async def _write_all(self, cloud: Cloud, workers: list[Worker]) -> None:
        clock = self._context.clock
        used_at = {worker.id: self._context.registry.used_at(worker.id) for worker in workers}
        used_unix = clock.wall() - (clock.monotonic() - max(used_at.values()))
        instance_ids = [worker.instance_id for worker in workers if worker.instance_id is not None]
        try:
            await cloud.provider.tag_all(instance_ids, {tags.LAST_USED: tags.rfc3339(used_unix)})
        except PermanentRefusal as error:
            self._refused_until_at[id(cloud)] = self._context.now() + REFUSED_SECONDS
            self._report("tagging refused", {"cloud": cloud.provider.name, "error": error.message})
        except BrokerError as error:
            self._report("tagging failed", {"cloud": cloud.provider.name, "error": error.message})
        else:
            self._written |= used_at
