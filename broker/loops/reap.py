"""Carries out what policy decides about workers whose time has come, and sees every Terminate through.

A worker is DRAINING, and so out of every client's reach, before Terminate is sent; it leaves the books only
when the cloud says that it is gone. A Terminate that fails is sent again, and so is one that has been
answered but not obeyed. A worker that a person protects is drained like any other when its time has come,
but no Terminate is sent for it while it is protected.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from functools import partial

from broker.clouds import Cloud
from broker.context import Context
from broker.core.backoff import doubled
from broker.core.buying import is_fallback, to_replace
from broker.core.errors import BrokerError
from broker.core.model import Worker, WorkerState
from broker.core.policy import RETIRED, Reason, judge, may_end
from broker.limits import close_when_used_up

PAUSE_SECONDS_MIN = 2.0  # after a failed Terminate, doubling
PAUSE_SECONDS_MAX = 60.0
AGAIN_SECONDS = 120.0  # a machine may take so long to shut down before Terminate is sent once more
LOOK_SECONDS_MIN = 0.5
UNJUDGED_SECONDS = 60.0  # a worker over which a tick has failed is looked at again
FALLBACK_LOOK_SECONDS = 30.0  # between looks at whether spot can replace an on-demand worker
STUCK_SECONDS = 900.0  # after that somebody should look

Report = Callable[[str, dict[str, object]], None]


class ReapLoop:
    """See the module. `terminated` is called when Terminate was answered: watch for the end."""

    name = "reap"

    def __init__(self, context: Context, report: Report, terminated: Callable[[], None]) -> None:
        self._context = context
        self._registry = context.registry
        self._report = report
        self._terminated = terminated
        self._failures: dict[int, int] = defaultdict(int)  # by cloud
        self._not_before: dict[int, float] = {}
        self._sent_at: dict[str, float] = {}
        self._started_at = context.now()

    async def tick(self) -> float | None:
        now = self._context.now()
        to_judge = self._registry.due(now)
        for worker in to_judge:  # before the first is judged: a fault over one must not make others immortal
            self._registry.look_again(worker.id, now + UNJUDGED_SECONDS)
        for worker in to_judge:
            self._judge(worker, now)
        fallbacks = self._replace_fallbacks(now)
        by_cloud: dict[int, list[Worker]] = defaultdict(list)
        clouds: dict[int, Cloud] = {}
        for worker in self._to_terminate(now):
            cloud = self._context.cloud_of(worker)
            if cloud is not None and cloud.acts(now):
                clouds[id(cloud)] = cloud
                by_cloud[id(cloud)].append(worker)
        due = [key for key in by_cloud if self._not_before.get(key, now) <= now]
        await asyncio.gather(*(self._terminate(clouds[key], by_cloud[key]) for key in due))
        return self._next_at(now + FALLBACK_LOOK_SECONDS if fallbacks else None)

    def _replace_fallbacks(self, now: float) -> bool:
        """End on-demand workers that stand in for spot, once spot can be had again. Whether there are any."""
        found = False
        for name, pool in self._context.settings.pool.items():
            clouds = self._context.clouds.of(name) if len(pool.markets) > 1 else ()
            acting = [cloud for cloud in clouds if cloud.acts(now)]
            workers = self._registry.in_state(WorkerState.READY, pool=name) if acting else []
            found |= any(is_fallback(worker.offering, pool) for worker in workers)
            for cloud in acting:
                unused = to_replace(
                    self._registry,
                    name,
                    pool,
                    cloud.provider.offerings(name),
                    cooling=cloud.cooling,
                    spot_prices=cloud.quotes.known(now),
                    now=now,
                    is_here=partial(self._is_in, cloud),
                    known_at=self._started_at,
                )
                for worker_id in unused:
                    if self._is_wanted(name, worker_id):
                        continue
                    self._registry.drain(worker_id, Reason.REPLACED, now)
        return found

    def _is_in(self, cloud: Cloud, worker: Worker) -> bool:
        return self._context.cloud_of(worker) is cloud

    def _is_wanted(self, pool: str, worker_id: str) -> bool:
        return worker_id in self._context.wanted.get(pool, ())

    def _judge(self, worker: Worker, now: float) -> None:
        self._registry.expire_leases(worker.id, now)
        current = self._registry.get(worker.id)
        if current is None:
            return
        close_when_used_up(self._context, current)
        leaving, pool = current.id in self._context.leaving, self._context.pool_of(current)
        warmth = None if leaving else self._context.warmth(current.pool)
        wanted = self._is_wanted(current.pool, current.id)
        verdict = judge(self._registry, current, pool, now, warmth, leaving=leaving, wanted=wanted)
        if verdict.retire and not current.standing_notice:
            self._registry.suspect(worker.id, RETIRED, now, standing=True)
        if verdict.next_look_at is not None:
            # Not at every single lease's end: ten thousand of them end in a few looks, not one by one.
            self._registry.look_again(worker.id, max(verdict.next_look_at, now + LOOK_SECONDS_MIN))
        if verdict.drain is not None:
            self._registry.drain(worker.id, verdict.drain, now)
        elif verdict.stop:
            self._registry.stop(worker.id, Reason.IDLE, now)

    def _to_terminate(self, now: float) -> list[Worker]:
        draining, terminating = self._ending(WorkerState.DRAINING), self._ending(WorkerState.TERMINATING)
        ids = {worker.id for worker in terminating}
        self._sent_at = {id_: at for id_, at in self._sent_at.items() if id_ in ids}
        return draining + [
            w for w in terminating if self._sent_at.get(w.id, w.since_at) + AGAIN_SECONDS <= now
        ]

    def _ending(self, state: WorkerState) -> list[Worker]:
        return [worker for worker in self._registry.in_state(state) if may_end(worker)]

    async def _terminate(self, cloud: Cloud, workers: list[Worker]) -> None:
        key = id(cloud)
        await self._decided([worker.instance_id for worker in workers if worker.instance_id])
        workers = [worker for worker in workers if self._still_ends(worker)]
        ids = [worker.instance_id for worker in workers if worker.instance_id]
        if not ids:
            return
        try:
            await cloud.provider.terminate(ids)
        except BrokerError as error:
            self._failures[key] += 1
            pause_seconds = doubled(PAUSE_SECONDS_MIN, self._failures[key], PAUSE_SECONDS_MAX)
            self._not_before[key] = self._context.now() + pause_seconds
            self._report(
                "terminate failed", {"instances": ids, "error": error.message, "again_in": pause_seconds}
            )
            return
        self._failures[key] = 0
        now = self._context.now()
        for worker in workers:
            self._sent(worker, now)
        self._terminated()

    def _still_ends(self, worker: Worker) -> bool:
        """Whether nobody has protected it while its end was written to disk."""
        current = self._registry.get(worker.id)
        return current is None or may_end(current)

    async def _decided(self, ids: list[str]) -> None:
        """Returns when the end of these machines is on disk. A Terminate can arrive long after its broker has
        died: the next one must know, or it would hand out what is about to end. A full disk keeps nobody
        alive."""
        store, now_unix = self._context.store, self._context.clock.wall()
        await asyncio.gather(*(store.end_decided(one, now_unix) for one in ids), return_exceptions=True)

    def _sent(self, worker: Worker, now: float) -> None:
        self._sent_at[worker.id] = now
        after = self._registry.get(worker.id)
        if after is not None and after.state is WorkerState.DRAINING:
            self._registry.terminating(worker.id, now)
        elif after is not None and now - after.since_at > STUCK_SECONDS:
            minutes = (now - after.since_at) / 60
            self._report("still shutting down", {"instance": after.instance_id, "minutes": round(minutes)})

    def _next_at(self, look_at: float | None) -> float | None:
        moments = [at for at in (self._registry.next_look_at(), look_at) if at is not None]
        # No sooner than that, or a Terminate that fails again keeps this loop spinning through its pause.
        floor = max(self._context.now() + PAUSE_SECONDS_MIN, *self._not_before.values(), 0.0)
        if self._ending(WorkerState.DRAINING):
            moments.append(floor)
        terminating = self._ending(WorkerState.TERMINATING)
        moments += [max(floor, self._sent_at.get(w.id, w.since_at) + AGAIN_SECONDS) for w in terminating]
        return min(moments, default=None)
