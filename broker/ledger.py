"""What machines have cost and may cost: one Run each, in memory and on disk, fed with every look at them.

All time in here is the cloud's (Provider.clock_unix), so that the wall clock of this machine may be wrong.
Runs are on disk when they begin, when they are first seen running and when they end; how far they have been
followed is written every SAVE_SECONDS, which is all that a crash can cost a machine that ends while nobody
looks. A budget is asked before every launch and answers with the high ends, pending orders counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from broker.clouds import Cloud
from broker.context import Context
from broker.core import ledger, tags
from broker.core.cloudtime import Span
from broker.core.errors import StoreError
from broker.core.ledger import Bracket, Budget, Run
from broker.core.model import Instance, Worker, WorkerState
from broker.core.money import USD_MICROS

SAVE_SECONDS = 300.0  # between two writes of how far the runs were followed
KEPT_SECONDS = 2 * ledger.DAY_SECONDS  # in memory after the end: longer than EC2 shows them, and than a day
MISSING_SECONDS_MAX = 180.0  # neither in the books nor, for so long, and
MISSING_SCANS_MAX = 3  # in so many listings in a row: ended, as reconcile has it


@dataclass(frozen=True, slots=True)
class Missing:
    """A run that is open although listings do not show its machine. `by_unix`: the first such listing."""

    since_at: float
    by_unix: float
    scans: int


class Ledger:
    """See the module. `saw` and `listed` take looks in, everything else answers."""

    def __init__(self, context: Context, broker_id: str) -> None:
        self._context = context
        self._broker_id = broker_id
        self._runs: dict[str, Run] = {}
        self._former: dict[str, list[str]] = defaultdict(list)  # by instance: keys of its earlier runs
        self._clouds: dict[str, Cloud] = {}  # by instance; one that no configured cloud explains has none
        self._missing: dict[str, Missing] = {}
        self._dirty: set[str] = set()
        self._saved_at = context.now()
        self._before: dict[str, int] = {}  # pool → micro-dollars of before the first scan
        self._dropped: dict[str, int] = defaultdict(int)  # pool → of runs that are not in memory any more
        self._counted: dict[str, int] = defaultdict(int)  # pool → what `cost_usd_micros` has answered

    def recall(self) -> None:
        """Take in what an earlier broker has written."""
        clouds = self._context.clouds
        only = clouds.all if len(clouds.all) == 1 else ()
        for run in self._context.store.runs():
            self._runs[run.instance_id] = run
            if ledger.machine_of(run) != run.instance_id:
                self._former[ledger.machine_of(run)].append(run.instance_id)
            launched = self._context.expected.get(run.instance_id)
            ordered = None if launched is None else self._context.cloud_of_order(launched.order)
            # Of several regions the first listing that shows it says which.
            cloud = ordered or next(iter(clouds.of(run.pool) or only), None)
            if cloud is not None:
                self._clouds[run.instance_id] = cloud

    # --- looks -------------------------------------------------------------------------------------

    def saw(self, cloud: Cloud, instances: Iterable[Instance], asked_at: float) -> None:
        """The cloud has answered what these machines are; the question left at `asked_at` (monotonic)."""
        self._saw(cloud, instances, self._look(cloud, asked_at))

    def _saw(self, cloud: Cloud, instances: Iterable[Instance], look: Span) -> None:
        for instance in instances:
            if instance.tags.get(tags.BROKER) == self._broker_id:
                self._clouds[instance.id] = cloud
                self._missing.pop(instance.id, None)
                self._take_in(instance, look)
        if self._context.now() >= self._saved_at + SAVE_SECONDS:
            self.save()

    def listed(self, cloud: Cloud, listing: Sequence[Instance], asked_at: float) -> None:
        """A complete listing: what it does not show for long has ended."""
        look = self._look(cloud, asked_at)
        before = {} if cloud.recovered else {pool: self._total(pool) for pool in self._before}
        self._saw(cloud, listing, look)
        shown = {instance.id for instance in listing}
        for run in list(self._runs.values()):
            if self._clouds.get(run.instance_id) is not cloud:
                continue
            if run.ended_by_unix is None and run.instance_id not in shown:
                self._miss(run, asked_at, look)
            elif self._is_over(run, look) and not self._is_there(ledger.machine_of(run), shown):
                self._drop(run)
        if not cloud.recovered:
            for pool, total in before.items():
                if cloud in self._context.clouds.of(pool):  # another of its regions was listed earlier
                    self._before[pool] += self._total(pool) - total
            self._note_what_was_before(cloud)

    def follows(self, cloud: Cloud) -> bool:
        """Whether a machine there is not known to have ended."""
        return any(
            run.ended_by_unix is None and self._clouds.get(id_) is cloud for id_, run in self._runs.items()
        )

    def has_lost_sight(self) -> bool:
        """Whether there is a machine that is not known to have ended, and in no cloud that is known."""
        return any(run.ended_by_unix is None and id_ not in self._clouds for id_, run in self._runs.items())

    def runs_on(self, instance_id: str) -> bool:
        """Whether the machine was seen running, by this broker or an earlier one, and not to have ended."""
        run = self._runs.get(instance_id)
        return run is not None and run.running_from_unix is not None and run.ended_by_unix is None

    def ran_seconds(self, instance_id: str) -> float:
        """How long the machine has run, at least, in all its runs."""
        keys = (instance_id, *self._former.get(instance_id, ()))
        runs = (self._runs[key] for key in keys if key in self._runs)
        return sum(run.running_seconds(self._at_unix(run)).low for run in runs)

    def has_ended(self, instance_id: str) -> bool:
        """Whether the machine was seen not to run any more: it was stopped, or is gone."""
        run = self._runs.get(instance_id)
        return run is not None and run.ended_by_unix is not None

    def reloaded(self) -> None:
        """There may be new pools at clouds that were scanned long ago: what they cost is counted from now."""
        for cloud in self._context.clouds.all:
            if cloud.recovered:
                self._note_what_was_before(cloud)

    def save(self) -> None:
        """Have written how far the runs were followed, and what could not be written before."""
        self._saved_at = self._context.now()
        unsaved, self._dirty = self._dirty, set()
        for instance_id in sorted(unsaved):
            if instance_id in self._runs:
                self._write_soon(self._runs[instance_id])

    def _look(self, cloud: Cloud, asked_at: float) -> Span:
        clock = cloud.provider.clock_unix
        return Span(clock(asked_at).earliest_unix, clock(self._context.now()).latest_unix)

    def _take_in(self, instance: Instance, look: Span) -> None:
        before = self._runs.get(instance.id)
        if self._is_of_a_former_run(instance):
            return
        after_unix = 0.0
        if before is not None and ledger.runs_anew(before, instance, look):
            former = ledger.missed(before, instance.launched_unix or look.earliest_unix)
            self._set_aside(former)
            after_unix, before = former.ended_by_unix or 0.0, None
        if before is None:
            pool = tags.read(instance.tags).pool or "default"
            price = self._context.price(pool, instance)
            after = ledger.first_seen(instance, pool, price, look, after_unix)
        else:
            may_stop = self._context.pool(before.pool).warm_stopped > 0
            after = ledger.seen(before, instance, look, may_stop=may_stop)
        if after == before:
            return
        self._runs[instance.id] = after
        if before is None or _turned(before, after):
            self._write_soon(after)
        else:
            self._dirty.add(instance.id)

    @staticmethod
    def _is_over(run: Run, look: Span) -> bool:
        return run.ended_by_unix is not None and look.earliest_unix - run.ended_by_unix > KEPT_SECONDS

    def _is_there(self, instance_id: str, shown: set[str]) -> bool:
        """Whether the machine still exists: it may be stopped for a week, and start again."""
        return instance_id in shown or self._context.registry.by_instance(instance_id) is not None

    def _is_of_a_former_run(self, instance: Instance) -> bool:
        """Whether what a stale listing shows is how the machine was before its last start."""
        former = [self._runs[key] for key in self._former.get(instance.id, ()) if key in self._runs]
        ended_unix = max((run.ended_by_unix or 0.0 for run in former), default=0.0)
        return 0 < instance.launched_unix <= ended_unix

    def _set_aside(self, run: Run) -> None:
        """Its machine was stopped, and runs again: that is another run."""
        began_unix = int(run.not_running_until_unix)
        former = replace(run, instance_id=f"{run.instance_id}{ledger.FORMER}{began_unix}")
        self._runs[former.instance_id] = former
        if former.instance_id not in self._former[run.instance_id]:
            self._former[run.instance_id].append(former.instance_id)
        self._clouds[former.instance_id] = self._clouds[run.instance_id]
        self._write_soon(former)

    def _miss(self, run: Run, asked_at: float, look: Span) -> None:
        """As long as the books have the machine, reconcile has not given it up."""
        id_ = run.instance_id
        known = self._missing.get(id_, Missing(asked_at, look.latest_unix, 0))
        missing = self._missing[id_] = replace(known, scans=known.scans + 1)
        long = asked_at - missing.since_at >= MISSING_SECONDS_MAX and missing.scans >= MISSING_SCANS_MAX
        if long and self._context.registry.by_instance(id_) is None:
            del self._missing[id_]
            self._runs[id_] = ledger.missed(run, missing.by_unix)
            self._write_soon(self._runs[id_])

    def _drop(self, run: Run) -> None:
        """It stays on disk: `runs` shows it."""
        assert run.ended_by_unix is not None
        self._dropped[run.pool] += run.cost_usd_micros_max(run.ended_by_unix)
        del self._runs[run.instance_id]
        self._clouds.pop(run.instance_id, None)
        self._former.pop(run.instance_id, None)

    def _write_soon(self, run: Run) -> None:
        self._dirty.discard(run.instance_id)
        self._context.store.soon(self._write(run))

    async def _write(self, run: Run) -> None:
        try:
            await self._context.store.run_changed(run)
        except StoreError:
            self._dirty.add(run.instance_id)  # the next save tries again
            raise

    # --- answers -----------------------------------------------------------------------------------

    def runs(self) -> dict[str, Run]:
        """Every run known, by its key; those that ended long ago are read from the disk."""
        return {run.instance_id: run for run in self._context.store.runs()} | self._runs

    def billed_seconds(self) -> dict[str, Bracket]:
        """What the cloud bills each machine for at this moment lies in between."""
        found: dict[str, Bracket] = {}
        for run in self.runs().values():
            id_, billed = ledger.machine_of(run), run.billed_seconds(self._at_unix(run))
            before = found.get(id_, ledger.NOTHING)
            found[id_] = Bracket(before.low + billed.low, before.high + billed.high)
        return found

    def cost_usd_micros(self, pool: str) -> int:
        """The most that the pool has cost since this broker first saw its cloud; never less than before.

        What turns out to cost less than it seemed (a reclaimed machine is free) is made up for by what is
        spent next, because whoever draws this would take a step down for a restart.
        """
        if pool in self._before:
            since_start = self._total(pool) - self._before[pool]
            self._counted[pool] = max(self._counted[pool], since_start)
        return self._counted[pool]

    def cost_usd_micros_per_hour(self, pool: str) -> int:
        """Of the machines that were seen running and not seen to have ended."""
        return sum(
            run.price_usd_micros_per_hour
            for run in self._of(pool)
            if run.running_from_unix is not None and run.ended_by_unix is None
        )

    def cost_usd_micros_today(self, pool: str) -> int:
        """The most that the pool can have cost since midnight, UTC."""
        return sum(ledger.spent_usd_micros([run], self._at_unix(run)) for run in self._of(pool))

    def budgets(self, pool: str) -> list[Budget]:
        """Those that a launch of this pool has to respect."""
        settings = self._context.settings
        limits = (
            ("the pool's", self._context.pool(pool).budget_usd_per_day, {pool}),
            ("the broker's", settings.broker.budget_usd_per_day, self._pools()),
        )
        return [self._budget(whose, limit, pools) for whose, limit, pools in limits if limit is not None]

    def _budget(self, whose: str, limit_usd: float, pools: set[str]) -> Budget:
        return Budget(
            whose,
            round(limit_usd * USD_MICROS),
            sum(self.cost_usd_micros_today(pool) for pool in pools),
            sum(worker.offering.price_usd_micros_per_hour for worker in self._starting(pools)),
        )

    def _starting(self, pools: set[str]) -> Iterable[Worker]:
        """On order, or not yet seen running."""
        for worker in self._context.registry.in_state(WorkerState.ORDERED, WorkerState.BOOTING):
            run = self._runs.get(worker.instance_id or "")
            runs = run is not None and run.running_from_unix is not None and run.ended_by_unix is None
            if worker.pool in pools and not runs:
                yield worker

    def _pools(self) -> set[str]:
        """Those of the settings, and those that only runs remember."""
        return {*self._context.settings.pool, *(run.pool for run in self._runs.values())}

    def _of(self, pool: str) -> list[Run]:
        """A run at a place that is not configured any more is not counted: nobody could ever end it."""
        return [run for id_, run in self._runs.items() if run.pool == pool and id_ in self._clouds]

    def _total(self, pool: str) -> int:
        costs = (run.cost_usd_micros_max(self._at_unix(run)) for run in self._of(pool))
        return self._dropped[pool] + sum(costs)

    def _note_what_was_before(self, cloud: Cloud) -> None:
        for pool in self._pools():
            clouds = self._context.clouds.of(pool)
            if cloud in clouds or not clouds:
                self._before.setdefault(pool, self._total(pool))

    def _at_unix(self, run: Run) -> float:
        """Now, on the clock of the run's cloud, at the latest."""
        cloud = self._clouds.get(run.instance_id) or self._context.clouds.all[0]
        return cloud.provider.clock_unix(self._context.now()).latest_unix


def _turned(before: Run, after: Run) -> bool:
    """Whether more has changed than how far it was followed."""
    return (before.running_from_unix, before.ended_by_unix, before.reclaimed) != (
        after.running_from_unix,
        after.ended_by_unix,
        after.reclaimed,
    )
