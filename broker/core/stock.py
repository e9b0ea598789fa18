"""Workers that are kept stopped: how many are missing, which become stopped, which may be started. Pure.

A stopped machine costs its disk alone, and starting it takes less than a launch: the machine is there, and
its first boot is behind it. Workers come into the stock ready: one that would be terminated as idle is
stopped instead, and one that was launched for the stock is stopped soon after it has shown that it is ready.

EC2's listings show what is past now and then, and a machine has another public address after each start. So
nothing is believed, and nothing done, that a listing from before could contradict: see SETTLED_SECONDS.
"""

from __future__ import annotations

from itertools import islice

from broker.core.model import Instance, InstanceState, Worker, WorkerState
from broker.core.registry import Registry
from broker.core.settings import PoolSettings
from broker.core.warm import expiring

# A listing may show what was a minute ago (ledger.STALE_SECONDS_MAX), and may take a minute
# (reconcile.SCAN_SECONDS_MAX).
SETTLED_SECONDS = 120.0
UNUSED_SECONDS = 120.0  # a worker that nobody has used since it came up: who asked for it may come back
STOPPED_SECONDS_MAX = 7 * 86_400.0  # then it is replaced: images age
STOPPING_SECONDS_MAX = 600.0  # a machine that takes longer to stop is terminated
HALTED = frozenset({InstanceState.STOPPING, InstanceState.STOPPED})
RUNS = frozenset({InstanceState.PENDING, InstanceState.RUNNING})


def stock_shortage(registry: Registry, name: str, pool: PoolSettings, warm_target: int, now: float) -> int:
    """How many machines must be launched so that `warm_stopped` are stopped, or soon will be.

    Unheld ready workers beyond the warm target count: they are stopped when their idle time is over.
    """
    if not pool.warm_stopped:
        return 0
    wanted = max(0, pool.warm_stopped - registry.count(name, *IN_STOCK))
    young = (one for one in registry.unheld(name) if not expiring(one, pool, now) and _will_stop(one))
    ready = sum(1 for _ in islice(young, warm_target + wanted))
    return max(0, wanted - max(0, ready - warm_target))


def _will_stop(worker: Worker) -> bool:
    return not worker.protected and not worker.outdated


def stock_lacks(registry: Registry, worker: Worker, pool: PoolSettings, now: float) -> bool:
    """Whether a ready worker that nobody needs is to be stopped instead of terminated."""
    if worker.state is not WorkerState.READY or worker.standing_notice or expiring(worker, pool, now):
        return False
    if not _will_stop(worker):
        return False
    return registry.count(worker.pool, *IN_STOCK) < pool.warm_stopped


def superfluous(registry: Registry, worker: Worker, pool: PoolSettings) -> bool:
    """Whether a stopped worker is one more than the pool keeps: the latest go first."""
    stopped = registry.in_state(WorkerState.STOPPED, pool=worker.pool)
    return len(stopped) > pool.warm_stopped and worker in stopped[pool.warm_stopped :]


def too_old(worker: Worker, pool: PoolSettings) -> bool:
    """Whether a stopped worker has not enough of its life left to be started. Stopped, it does not age."""
    return expiring(worker, pool, worker.since_at)


def startable(worker: Worker, pool: PoolSettings, now: float) -> bool:
    """Whether a worker may be started. A moment after it was stopped a listing may still show it running, at
    an address that is not its own any more."""
    settled = now - worker.since_at >= SETTLED_SECONDS
    return worker.state is WorkerState.STOPPED and settled and not too_old(worker, pool)


def has_started(worker: Worker, instance: Instance, now: float) -> bool:
    """Whether the cloud shows that a stopped worker runs: a person has started it, or a Start that was given
    up came late."""
    settled = now - worker.since_at >= SETTLED_SECONDS
    return worker.state is WorkerState.STOPPED and instance.state in RUNS and settled


def is_past(worker: Worker, instance: Instance, now: float) -> bool:
    """Whether that the machine is stopped is, or may be, how it was before its last start: EC2's LaunchTime
    is that of the last one (AWS: EC2 API reference, Instance)."""
    if instance.state not in HALTED:
        return False
    if 0 < instance.launched_unix < worker.launched_unix:
        return True
    if 0 < instance.launched_unix <= worker.launched_before_unix:
        return True  # or the start has not arrived: boot_deadline bounds that
    return worker.started_at is not None and now - worker.started_at < SETTLED_SECONDS


IN_STOCK = (WorkerState.STOPPED, WorkerState.STOPPING)
