"""The cloud against the books; the first pass is start-up recovery.

Only a complete listing counts, and what it does not show is not gone: a machine may be missing from a
listing for minutes after its launch, and now and then for no reason. A worker leaves the books when the
cloud says `terminated`, or when it has been missing from many listings over a long time and does not answer
either. A machine with our tag that the books do not know is taken in, whatever else is true of it.

Before anything is acted on, each listing says who is in charge (charge.py).

Between full scans, workers that are about to change (no address yet, being terminated) are asked for by id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from broker.clouds import Cloud
from broker.context import Context
from broker.core import tags
from broker.core.backoff import doubled
from broker.core.errors import BrokerError, CloudUnreachable, SettingsError, StoreError
from broker.core.life import BOOKED, LIVING, USABLE
from broker.core.model import Instance, InstanceState, Worker, WorkerState
from broker.core.policy import Reason, born_at
from broker.core.stock import HALTED, SETTLED_SECONDS, has_started, is_past
from broker.ledger import Ledger
from broker.loops.charge import DEAD, Charge
from broker.loops.recovery import Recovery
from broker.opening import open_provider
from broker.orders import NEVER_LAUNCHED, VANISHED, Orders

SCAN_SECONDS_MAX = 60.0  # a listing that takes longer counts as failed
RETRY_SECONDS = 5.0  # after a failed scan, doubling while it goes on failing
RETRY_SECONDS_MAX = 30.0
WATCH_SECONDS = 1.0  # between looks at single workers that are about to change
WATCH_SECONDS_MAX = 15.0  # the looks grow this rare while nothing changes
BEAT_SECONDS_MAX = 30.0  # between two beats, however rare the scans: a watchdog may count on it
ORDER_GRACE_SECONDS = (
    300.0  # an order that no listing (MISSING_SCANS_MAX) has shown so long after its last call: none came
)
LISTING_GRACE_SECONDS = 120.0  # a machine this young need not be in a listing
MISSING_SECONDS_MAX = 180.0  # missing for so long, and
MISSING_SCANS_MAX = 3  # from so many listings in a row, and silent: gone


SPOT_REASON = "Server.Spot"  # how EC2's reasons for taking a machine back begin (EC2 API, StateReason)
Report = Callable[[str, dict[str, object]], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Missing:
    """A worker that listings do not show."""

    since_at: float
    scans: int


class ReconcileLoop:
    """See the module. `beat` is called after every tick: the loop is alive, whatever the cloud says.

    `charged` hears of a cloud of which we have just come into charge, or ceased to be.
    """

    name = "reconcile"

    def __init__(
        self,
        context: Context,
        orders: Orders,
        ledger: Ledger,
        *,
        broker_id: str,
        report: Report,
        changed: Callable[[], None],
        beat: Callable[[], None],
        charged: Callable[[Cloud], None] = lambda cloud: None,
    ) -> None:
        self._context = context
        self._registry = context.registry
        self._orders = orders
        self._ledger = ledger
        self._broker_id = broker_id
        self._report = report
        self._changed = changed
        self._beat = beat
        self._charge = Charge(context, orders, charged)
        self._scan_at = context.now()
        self._recovery = Recovery(context, orders, ledger)
        self._missing: dict[str, Missing] = {}
        self._halted_at: dict[str, float] = {}  # workers → since when they are shown stopped
        self._watch_seconds = WATCH_SECONDS
        self._scanning = asyncio.Lock()

    async def tick(self) -> float | None:
        try:
            if self._context.now() >= self._scan_at:
                await self._scan_quietly()
            else:
                await self._watch()
        finally:
            self._beat()
        return self._next_at()

    def watch_closely(self) -> None:
        """Something is about to change: look often again."""
        self._watch_seconds = WATCH_SECONDS

    async def scan(self) -> None:
        """List every cloud now and take it in. Raises the first cloud's error, after trying all."""
        async with self._scanning:
            results = await _each(self._scan_cloud(cloud) for cloud in self._context.clouds.all)
            errors = [error for error in results if error is not None]
        self._context.scanned.notify()
        self._changed()
        if errors:
            raise errors[0]

    async def between_scans(self) -> None:
        """Returns when no scan is under way that began before this call."""
        async with self._scanning:
            pass

    def scan_soon(self) -> None:
        """The next tick scans, however short a time ago the last scan was."""
        self._scan_at = self._context.now()

    # --- one scan ----------------------------------------------------------------------------------

    async def _scan_quietly(self) -> None:
        try:
            await self.scan()
        except BrokerError:
            self._scan_at = self._context.now() + self._retry_seconds()
        else:
            self._scan_at = self._context.now() + self._context.settings.broker.reconcile_interval

    def _retry_seconds(self) -> float:
        """As soon as the cloud that has failed for the shortest time deserves, never later than a scan."""
        failures = min((cloud.failures for cloud in self._context.clouds.all if cloud.failures), default=1)
        longest_seconds = min(RETRY_SECONDS_MAX, self._context.settings.broker.reconcile_interval)
        return doubled(RETRY_SECONDS, failures, longest_seconds)

    async def _scan_cloud(self, cloud: Cloud) -> BrokerError | None:
        started_at = self._context.now()
        try:
            async with asyncio.timeout(SCAN_SECONDS_MAX):
                if not cloud.opened or cloud.study_again:
                    await self._open(cloud)
                listing = await cloud.provider.listing()
                cloud.opened = True
        except TimeoutError:
            return self._scan_failed(cloud, CloudUnreachable(f"a scan took over {SCAN_SECONDS_MAX:.0f} s"))
        except BrokerError as error:
            return self._scan_failed(cloud, error)
        self._ledger.listed(cloud, listing, started_at)
        try:
            await self._charge.rule(cloud, [i for i in listing if self._is_ours(i) and i.state not in DEAD])
        except StoreError as error:  # a claim that is not on disk is not made: nothing changes
            return self._scan_failed(cloud, error)
        first, failures = not cloud.recovered, cloud.failures
        if cloud.rival is None:
            await self._take_in(cloud, listing, started_at)
        else:
            self._charge.stand_by(cloud, listing)
            self._give_up_orders(cloud, started_at)
            self._missing = {id_: seen for id_, seen in self._missing.items() if self._registry.get(id_)}
        cloud.scan_succeeded(started_at, self._context.clock.wall())
        if self._context.store.lost and not self._context.unseen(self._context.clouds.all):
            self._context.store.soon(self._context.store.loss_is_over())
        if first:
            self._context.store.soon(self._context.store.leases_are_whole())
            self._report("first scan complete", {"cloud": cloud.provider.name, "machines": len(listing)})
        elif failures:
            self._report(
                "the cloud answers again", {"cloud": cloud.provider.name, "after_failures": failures}
            )
        return None

    async def _open(self, cloud: Cloud) -> None:
        """The provider could not be opened at the start, or not be asked about new settings. What the
        settings got wrong only stops launches."""
        try:
            await open_provider(self._context, cloud)
        except SettingsError as mistake:
            cloud.mistake, cloud.study_again = mistake, False
            self._report("the settings do not work", {"cloud": cloud.provider.name, "error": mistake.message})
        except BrokerError as error:
            if not cloud.opened:
                raise
            self._report("settings not checked", {"cloud": cloud.provider.name, "error": error.message})
        else:
            cloud.mistake, cloud.study_again = None, False

    def _scan_failed(self, cloud: Cloud, error: BrokerError) -> BrokerError:
        cloud.scan_failed(error)
        self._report(
            "scan failed", {"cloud": cloud.provider.name, "error": error.message, "in_a_row": cloud.failures}
        )
        return error

    async def _take_in(self, cloud: Cloud, listing: list[Instance], started_at: float) -> None:
        cloud.instance_ids = frozenset(instance.id for instance in listing)
        foreign = []
        for instance in listing:
            if self._is_ours(instance):
                self.take_in(cloud, instance)
            else:
                foreign.append(instance)
        if foreign:
            await self._claim_all(cloud, foreign)
        self._halted_at = {id_: at for id_, at in self._halted_at.items() if self._registry.get(id_)}
        self._note_missing(cloud, started_at)
        self._give_up_orders(cloud, started_at)
        self._recovery.expect(cloud)
        self._recovery.drop_stored_leases(started_at)

    async def _claim_all(self, cloud: Cloud, foreign: list[Instance]) -> None:
        try:
            async with asyncio.timeout(SCAN_SECONDS_MAX):
                await asyncio.gather(*(self._claim(cloud, instance) for instance in foreign))
        except TimeoutError:
            self._report("claims not finished", {"cloud": cloud.provider.name, "machines": len(foreign)})

    def take_in(self, cloud: Cloud, instance: Instance) -> None:
        """One machine of ours, as the cloud describes it."""
        worker = self._registry.by_instance(instance.id)
        if worker is None:
            worker = self._matched(cloud, instance)
            if worker is None:
                return
        else:
            self._missing.pop(worker.id, None)
            if worker.state in USABLE and _was_reclaimed(instance):
                cloud.cooling.reclaimed(worker.offering, self._context.now())
            if instance.state is InstanceState.TERMINATED:
                self._registry.gone(worker.id, instance.reason or "terminated", self._context.now())
                return
            worker = self._observe(worker, instance)
        self._follow(worker, instance)

    def _observe(self, worker: Worker, instance: Instance) -> Worker:
        now = self._context.now()
        if is_past(worker, instance, now):
            return worker
        if has_started(worker, instance, now) and instance.id not in self._context.ended:
            self._registry.start(worker.id, now)
        return self._registry.observed(worker.id, instance, now)

    def _follow(self, worker: Worker, instance: Instance) -> None:
        """Where the cloud has taken the machine, the worker goes too."""
        now, halted = self._context.now(), instance.state in HALTED and worker.state in USABLE
        if not halted:
            self._halted_at.pop(worker.id, None)
        if is_past(worker, instance, now):
            return
        if instance.state is InstanceState.STOPPED and worker.state is WorkerState.STOPPING:
            self._registry.stopped(worker.id, now)
        elif (halted and self._surely_halted(worker)) or (worker.state in LIVING and instance.state in DEAD):
            self._registry.drain(worker.id, _why_it_ends(worker, instance), now)
        elif halted:
            self._registry.suspect(worker.id, "the cloud shows it stopped", now)

    def _surely_halted(self, worker: Worker) -> bool:
        """Whether a worker that is shown stopped can be taken for it: a listing may be from before its start,
        and then whoever holds it would lose it."""
        now = self._context.now()
        since_at = self._halted_at.setdefault(worker.id, now)
        return not self._registry.busy(worker.id) or now - since_at >= SETTLED_SECONDS

    def _matched(self, cloud: Cloud, instance: Instance) -> Worker | None:
        """The entry for a machine that the books do not know by its id: its order's, or a new one."""
        identity = tags.read(instance.tags)
        entry = self._orders.get(identity.order)
        if instance.state is InstanceState.TERMINATED:
            self._recovery.drop_leases_of(instance.id)
            if entry is not None:
                self._orders.spent(entry.order, instance.id)
            return None
        if entry is not None:
            worker = self._orders.launched(entry.order, instance)
            if instance.id in self._context.ended and worker.state in USABLE:
                return self._recovery.end_again(worker)
            if worker.state in USABLE:  # a lease can be on disk although the launch is not: it was full
                self._recovery.restore_leases(worker)
                if entry.order.id in self._context.reopened:
                    self._recovery.count_forgotten_clients(worker, known=True)
            return worker
        now, name = self._context.now(), identity.pool or "default"
        self._context.home[instance.id] = cloud
        pool = self._context.pool(name)
        known, ends = identity.order in self._context.known_orders, instance.id in self._context.ended
        kept = (
            instance.state in HALTED
            and pool.warm_stopped > 0
            and not ends
            and self._recovery.is_surely_unheld(instance)
        )
        ran_seconds = self._ledger.ran_seconds(instance.id)
        age_seconds = ran_seconds if kept else max(ran_seconds, _age_seconds(cloud, instance, now))
        idle = self._recovery.known_to_be_idle(instance)
        worker = self._registry.adopt(
            instance,
            name,
            pool.worker_port,
            now,
            order_id=identity.order or None,
            born_at=now - age_seconds if idle else born_at(pool, age_seconds, now),
            price=self._context.price(name, instance),
            kept=kept,
        )
        if ends:  # this listing is stale, or Terminate was lost
            return self._recovery.end_again(worker)
        if kept:  # it has no clients
            return worker
        self._recovery.restore_leases(worker)
        self._recovery.count_forgotten_clients(worker, known=known)
        return self._orders.end_surplus(worker)

    async def _claim(self, cloud: Cloud, instance: Instance) -> None:
        """A machine that `adopt_name_tag` asks for: tag it, and the next listing shows it as ours."""
        name = instance.tags.get(tags.NAME)
        pools = self._context.settings.pool.items()
        pool = next((key for key, p in pools if p.adopt_name_tag and p.name_tag == name), None)
        if pool is None or tags.BROKER in instance.tags or instance.state in DEAD:
            return
        try:
            new = {tags.BROKER: self._broker_id, tags.POOL: pool}
            if cloud.provider.contested:
                new[tags.EPOCH] = str(self._context.claim(cloud))
            await cloud.provider.tag(instance.id, new)
        except BrokerError as error:
            self._report("claim failed", {"instance": instance.id, "error": error.message})
        else:
            self._report("claimed by its Name tag", {"instance": instance.id, "pool": pool})

    def _is_ours(self, instance: Instance) -> bool:
        return instance.tags.get(tags.BROKER) == self._broker_id

    # --- what a listing does not show --------------------------------------------------------------

    def _note_missing(self, cloud: Cloud, started_at: float) -> None:
        for worker in self._registry.in_state(*BOOKED - {WorkerState.ORDERED}):
            if self._context.cloud_of(worker) is not cloud or worker.instance_id in cloud.instance_ids:
                continue
            if worker.born_at + LISTING_GRACE_SECONDS > started_at:
                continue
            missing = self._missing.get(worker.id, Missing(started_at, 0))
            missing = self._missing[worker.id] = Missing(missing.since_at, missing.scans + 1)
            long = started_at - missing.since_at >= MISSING_SECONDS_MAX and missing.scans >= MISSING_SCANS_MAX
            if long and not self._answers(worker):
                del self._missing[worker.id]
                self._registry.gone(worker.id, VANISHED, self._context.now())

    def _answers(self, worker: Worker) -> bool:
        """Whether its port has answered of late: then it lives, whatever the listing says."""
        by_port = self._context.pool_of(worker).readiness == "tcp"
        return by_port and worker.state is WorkerState.READY

    def _give_up_orders(self, cloud: Cloud, started_at: float) -> None:
        for entry in self._orders.unresolved():
            known = self._context.cloud_of_order(entry.order)
            here = known is cloud or known is None
            if not here or not entry.perhaps_launched or entry.sent_at + LISTING_GRACE_SECONDS > started_at:
                continue
            entry.absences += 1
            if entry.absences >= MISSING_SCANS_MAX and entry.sent_at + ORDER_GRACE_SECONDS <= started_at:
                self._orders.close(entry.order, NEVER_LAUNCHED)

    # --- between scans -----------------------------------------------------------------------------

    def _changing(self) -> list[Worker]:
        booting = [w for w in self._registry.in_state(WorkerState.BOOTING) if not (w.address and w.running)]
        return booting + self._registry.in_state(WorkerState.STOPPING, WorkerState.TERMINATING)

    async def _watch(self) -> None:
        workers = self._changing()
        if not workers:
            return
        await _each(self._watch_cloud(cloud, workers) for cloud in self._context.clouds.all)
        if {w.id for w in self._changing()} != {w.id for w in workers}:
            self.watch_closely()

    async def _watch_cloud(self, cloud: Cloud, workers: list[Worker]) -> None:
        ids = [w.instance_id for w in workers if w.instance_id and self._context.cloud_of(w) is cloud]
        if not ids or not cloud.recovered or cloud.rival is not None:
            return
        asked_at = self._context.now()
        try:
            async with asyncio.timeout(SCAN_SECONDS_MAX):
                instances = await cloud.provider.describe(ids)
        except (TimeoutError, BrokerError) as error:
            self._report("look failed", {"cloud": cloud.provider.name, "error": str(error)})
            return
        self._ledger.saw(cloud, instances, asked_at)
        for instance in instances if cloud.rival is None else ():
            self.take_in(cloud, instance)

    def _next_at(self) -> float:
        beat_at = self._context.now() + BEAT_SECONDS_MAX
        if not self._changing():
            return min(self._scan_at, beat_at)
        watch_at = self._context.now() + self._watch_seconds
        self._watch_seconds = min(self._watch_seconds * 1.5, WATCH_SECONDS_MAX)
        return min(self._scan_at, watch_at, beat_at)


async def _each(looks: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All at the same time. Most brokers have one cloud, and one needs no task of its own."""
    first, *others = looks
    return list(await asyncio.gather(first, *others)) if others else [await first]


def _why_it_ends(worker: Worker, instance: Instance) -> Reason:
    """A machine that ends before it was ever ready, and not for want of capacity, has failed to boot."""
    if worker.state is WorkerState.BOOTING and not instance.reason.startswith(SPOT_REASON):
        return Reason.BOOT_FAILED
    return Reason.STOPPED if instance.state in HALTED else Reason.RECLAIMED


def _was_reclaimed(instance: Instance) -> bool:
    """Whether the cloud has taken it back, rather than a person or the machine itself."""
    return instance.state in DEAD and instance.reason.startswith(SPOT_REASON)


def _age_seconds(cloud: Cloud, instance: Instance, now: float) -> float:
    """How long ago it was launched, on the cloud's clock: ours may have been set by a day meanwhile."""
    if not instance.launched_unix:
        return 0.0
    return max(0.0, cloud.provider.clock_unix(now).earliest_unix - instance.launched_unix)
