"""New settings while the broker runs: read and checked in full, then swapped in one step.

A file with a mistake changes nothing, and says so wherever an operator looks. What is about running workers
(timeouts, caps, prices) applies at once; what is about a launch (image, types, user data) to the next one: an
order on disk keeps its exact parameters. A lease keeps the time that it was granted for.

A pool that is removed, or that buys elsewhere now, is left by its workers: nobody gets in any more, and each
ends when nobody holds it, by the timeouts that its pool had. Its provider stays until nothing of it is in the
books. When the pool comes back, so do the workers that are still there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from broker.clouds import Cloud
from broker.context import Context
from broker.core.errors import BrokerError, CloudUnreachable, LimitReached, SettingsError, StoreError
from broker.core.life import LIVING
from broker.core.model import Event, LeaseEnded, Worker, WorkerChanged, WorkerState
from broker.core.policy import POOL_REMOVED, Reason
from broker.core.settings import BrokerSettings, PoolSettings, Settings
from broker.core.stock import IN_STOCK
from broker.ledger import Ledger
from broker.loops.reap import Report
from broker.opening import keep_cores, open_provider
from broker.places import PLACES, write_places
from broker.providers.base import Change, Provider

LOOK_SECONDS = 10.0  # between looks whether a provider that serves no pool is still needed
OPEN_SECONDS_MAX = 5.0  # for a provider that is new; one that is silent is opened by the next scan
PROVABLE = (WorkerState.READY, WorkerState.SUSPECT)
# What sockets, files and tags were made with at the start; `connections_max` has set the limit of open files.
RESTART = ("id", "state_dir", "insecure_listen", "listen", "http", "connections_max", "log_format")
# Settings whose mending may be what a breaker waits for.
BOOTS_BY = (
    "provider",
    "image",
    "image_arm64",
    "in_",
    "user_data",
    "user_data_file",
    "command",
    "instance_types",
)

MADE_BY = ("image", "image_arm64", "user_data", "user_data_file")  # what a machine has on its disk


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What a reload has changed: pools by name, and the settings of before."""

    before: Settings
    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    needs_restart: tuple[str, ...]  # [broker] keys that the file says otherwise and that stay as they are


@dataclass(frozen=True, slots=True)
class Studied:
    """One provider's answer to new settings, not applied yet."""

    cloud: Cloud
    change: Change


class ReloadLoop:
    """See the module. `load` reads and parses the file, `providers` says who serves which pool then.

    `applied` is called in the same step in which new settings come into force, `prove` tries a worker's port,
    `wake` has this loop tick, and `idle` is awaited before a provider that is not needed any more is closed:
    nobody uses it afterwards.
    """

    name = "reload"

    def __init__(
        self,
        context: Context,
        ledger: Ledger,
        *,
        load: Callable[[], Settings],
        providers: Callable[[Settings], Mapping[str, Sequence[Provider]]],
        applied: Callable[[Reloaded], None],
        refused: Callable[[SettingsError], None],
        prove: Callable[[Worker], Awaitable[bool]],
        idle: Callable[[], Awaitable[None]],
        report: Report,
        wake: Callable[[], None],
        wake_reap: Callable[[], None],
    ) -> None:
        self._context, self._registry, self._ledger = context, context.registry, ledger
        self._load, self._providers = load, providers
        self._applied, self._refused, self._prove, self._idle = applied, refused, prove, idle
        self._report, self._wake, self._wake_reap = report, wake, wake_reap
        self._asked = self._under_way = False
        self._returned: list[Worker] = []  # taken back by the reload that is under way
        self._former: dict[tuple[str, int], PoolSettings] = {}  # (pool, cloud that it left) → as it was there

    @property
    def busy(self) -> bool:
        """Whether a reload is asked for or under way."""
        return self._asked or self._under_way

    def ask(self) -> None:
        """Reload as soon as possible; asked again meanwhile, once more after that."""
        self._asked = True
        self._wake()

    async def tick(self) -> float | None:
        if self._asked:
            self._asked, self._under_way = False, True
            try:
                await self._reload()
            except Exception:
                self._context.outdated = ("the reload met a fault of the broker's own: see its log",)
                raise
            finally:
                self._under_way = False
        await self._let_go()
        return self._context.now() + LOOK_SECONDS if self._context.clouds.idle() else None

    def heard(self, event: Event) -> None:
        """A machine of a pool that has left may turn up late; a held one goes with its last lease."""
        match event:
            case WorkerChanged(worker=worker, before=None) if worker.state in LIVING:
                former = self._former.get((worker.pool, id(self._context.cloud_of(worker))))
                if former is not None:
                    self._leave(worker, former)
            case WorkerChanged(worker=worker, before=WorkerState.ORDERED):
                if worker.id in self._context.leaving and worker.state is WorkerState.BOOTING:
                    self._leave(worker, self._context.leaving[worker.id])
            case LeaseEnded(worker=worker, last=True, at=at) if worker.id in self._context.leaving:
                self._registry.look_again(worker.id, at)
                self._wake_reap()

    # --- new settings --------------------------------------------------------------------------------

    async def _reload(self) -> None:
        context = self._context
        try:
            wanted = self._load()  # a small file; in a thread, two reloads could overtake each other
        except SettingsError as error:
            context.outdated = tuple(f"the file cannot be used: {problem}" for problem in error.problems)
            self._refused(error)
            return
        broker, needs_restart = _for_a_running(context.settings.broker, wanted.broker)
        settings = wanted.model_copy(update={"broker": broker})
        by_pool = self._providers(settings)
        studied = await self._study(settings, by_pool)
        try:
            await self._remember_places(*(one for providers in by_pool.values() for one in providers))
        except StoreError as error:  # or a restart would forget where machines may be
            context.outdated = (f"not reloaded, ask again: {error.message}",)
            self._refused(SettingsError([error.message]))
            return
        new, reloaded = self._swap(settings, by_pool, studied, needs_restart)
        context.outdated = tuple(f"broker.{key} needs a restart" for key in needs_restart)
        context.loaded_unix = context.clock.wall()
        self._applied(reloaded)
        for one in studied:
            await keep_cores(context, one.cloud)
        # Whoever asks next shall find the workers that are back, and not buy another.
        returned, self._returned = self._returned, []
        with suppress(LimitReached):  # no file descriptors: the probe loop will try them
            await asyncio.gather(*(self._prove(worker) for worker in returned if worker.state in PROVABLE))
        await asyncio.gather(*(self._open(cloud) for cloud in new))
        self._say_what_is_refused()

    async def remember_places(self) -> None:
        """At the start. A full disk does not keep the broker from its work."""
        with suppress(StoreError):
            await self._remember_places()

    async def _remember_places(self, *more: Provider) -> None:
        """Returns when all places where machines may be, these among them, are on disk. Raises StoreError."""
        providers = {id(one): one for one in (*(cloud.provider for cloud in self._context.clouds.all), *more)}
        places = write_places(one.place for one in providers.values())
        if places != self._context.store.kept(PLACES):
            await self._context.store.keep(PLACES, places)

    async def _study(self, settings: Settings, by_pool: Mapping[str, Sequence[Provider]]) -> list[Studied]:
        """What the providers that are there think of it. Their own limits bound how long they take."""
        clouds = self._context.clouds.all
        pools = [
            {
                name: pool
                for name, providers in by_pool.items()
                for provider, pool in zip(providers, settings.pool[name].by_region, strict=True)
                if provider is cloud.provider
            }
            for cloud in clouds
        ]
        changes = await asyncio.gather(
            *(cloud.provider.study(some) for cloud, some in zip(clouds, pools, strict=True))
        )
        return [Studied(cloud, change) for cloud, change in zip(clouds, changes, strict=True)]

    def _swap(
        self,
        settings: Settings,
        by_pool: Mapping[str, Sequence[Provider]],
        studied: list[Studied],
        needs_restart: tuple[str, ...],
    ) -> tuple[list[Cloud], Reloaded]:
        """One step, without an await. Returns the clouds that are new."""
        context, before = self._context, self._context.settings
        for launched in context.expected.values():  # its machine is where its pool was
            cloud = context.cloud_of_order(launched.order)
            if cloud is not None:
                context.home[launched.order.places[0]] = cloud
        for name, pool in before.pool.items():
            for cloud in context.clouds.of(name):
                if cloud.provider not in by_pool.get(name, ()):
                    self._retire(name, pool, cloud)
        new = context.clouds.assign(by_pool, context.now())
        for one in studied:
            one.change.apply()
            one.cloud.mistake = _mistake(one.change)
            one.cloud.study_again = bool(one.change.later)
        context.settings = settings
        for name in settings.pool:
            self._welcome(name)
        reloaded = _difference(before, settings, needs_restart)
        self._tell_clients(reloaded)
        self._apply_to_workers(reloaded)
        return new, reloaded

    def _tell_clients(self, reloaded: Reloaded) -> None:
        context = self._context
        context.removed |= set(reloaded.removed)
        for name in reloaded.removed:
            context.obstacles.clear(name)
            context.waiting.fail(name, context.no_such_pool(name))
        context.scanned.notify()  # whoever waits for a scan looks again, for which one

    def _apply_to_workers(self, reloaded: Reloaded) -> None:
        """Deadlines are looked at by the new settings now, not when the old ones would have come."""
        now = self._context.now()
        for worker in self._registry.in_state(*LIVING):
            if worker.pool in reloaded.changed:
                self._registry.look_again(worker.id, now)
        for name in reloaded.changed:
            old, new = reloaded.before.pool[name], self._context.settings.pool[name]
            if any(getattr(old, key) != getattr(new, key) for key in BOOTS_BY):
                self._context.guard(name).booted()  # a new image: what failed to boot was the old one
            self._renew_stock(name, old, new)

    def _renew_stock(self, name: str, old: PoolSettings, new: PoolSettings) -> None:
        """What was made from another image, or by another script, is not kept stopped any more."""
        for worker in self._registry.in_state(WorkerState.ORDERED, *LIVING, pool=name):
            before, after = old.at(worker.offering.region), new.at(worker.offering.region)
            if all(getattr(before, key) == getattr(after, key) for key in MADE_BY):
                continue
            self._registry.outdate(worker.id)
            if worker.state in IN_STOCK and not worker.protected:
                self._registry.drain(worker.id, Reason.OUTDATED, self._context.now())

    # --- pools that go, and come back ----------------------------------------------------------------

    def left_before(self) -> None:
        """At the start: pools that are in the file do not buy at these places any more, if they ever did."""
        for cloud in self._context.clouds.idle():
            self._former |= {(name, id(cloud)): pool for name, pool in self._context.settings.pool.items()}

    def _retire(self, name: str, pool: PoolSettings, cloud: Cloud) -> None:
        self._former[name, id(cloud)] = pool
        for worker in self._registry:
            here = worker.pool == name and self._context.cloud_of(worker) is cloud
            if here and worker.id not in self._context.leaving:
                self._context.home[worker.id] = cloud
                self._leave(worker, pool)
        self._wake_reap()

    def _leave(self, worker: Worker, pool: PoolSettings) -> None:
        """Nobody new gets the worker. The reaper ends it when nobody holds it."""
        now = self._context.now()
        self._context.leaving[worker.id] = pool
        if worker.state in LIVING and not worker.standing_notice:
            self._registry.suspect(worker.id, POOL_REMOVED, now, standing=True)
        self._registry.look_again(worker.id, now)

    def _welcome(self, name: str) -> None:
        """The pool buys at its clouds: at some of them again, perhaps."""
        context = self._context
        context.removed.discard(name)
        clouds = [
            one for one in context.clouds.of(name) if self._former.pop((name, id(one)), None) is not None
        ]
        for worker in self._registry if clouds else ():
            if worker.pool == name and worker.id in context.leaving and context.cloud_of(worker) in clouds:
                del context.leaving[worker.id]
                self._registry.lift_notice(worker.id, POOL_REMOVED, context.now())
                self._returned.append(worker)

    # --- providers -----------------------------------------------------------------------------------

    async def _open(self, cloud: Cloud) -> None:
        """What fails here is tried again by the next scan."""
        try:
            async with asyncio.timeout(OPEN_SECONDS_MAX):
                await open_provider(self._context, cloud)
        except SettingsError as mistake:
            cloud.mistake = mistake
        except BrokerError as error:
            cloud.scan_failed(error)
        except TimeoutError:
            cloud.scan_failed(CloudUnreachable(f"no answer within {OPEN_SECONDS_MAX:g} s"))
        else:
            cloud.opened = True

    def _say_what_is_refused(self) -> None:
        for cloud in self._context.clouds.all:
            error = cloud.mistake or cloud.error
            if error is not None:
                details: dict[str, object] = {"cloud": cloud.provider.name, "error": error.message}
                self._report("nothing can be bought with some of the new settings", details)

    async def _let_go(self) -> None:
        """Close the providers of which nothing is left."""
        for cloud in self._context.clouds.idle():
            if self._needed(cloud):
                continue
            self._context.clouds.drop(cloud)
            await self._idle()
            await cloud.provider.close()
            with suppress(StoreError):  # then the next start looks there once more
                await self._remember_places()
            self._former = {key: pool for key, pool in self._former.items() if key[1] != id(cloud)}
            self._report("closed: no pool buys there and nothing is left", {"cloud": cloud.provider.name})

    def _needed(self, cloud: Cloud) -> bool:
        """An earlier run may have left machines where nobody has looked yet."""
        unseen = cloud.was_there and not cloud.recovered and self._may_have_machines(cloud)
        held = any(self._context.cloud_of(worker) is cloud for worker in self._registry)
        return unseen or held or self._ledger.follows(cloud)

    def _may_have_machines(self, cloud: Cloud) -> bool:
        """What the store tells of a place that was never listed. It tells in which region a machine was
        ordered: where the AWS configuration says what the region is, that says nothing."""
        context, region = self._context, cloud.provider.place[1]
        if context.store.lost or region is None or self._ledger.has_lost_sight():
            return True
        return any(context.cloud_of_order(one.order) is cloud for one in context.expected.values())


def _for_a_running(old: BrokerSettings, wanted: BrokerSettings) -> tuple[BrokerSettings, tuple[str, ...]]:
    """What of [broker] can be in force now, and the keys that need a restart."""
    differing = tuple(key for key in RESTART if getattr(old, key) != getattr(wanted, key))
    return wanted.model_copy(update={key: getattr(old, key) for key in differing}), differing


def _difference(before: Settings, after: Settings, needs_restart: tuple[str, ...]) -> Reloaded:
    return Reloaded(
        before,
        added=tuple(name for name in after.pool if name not in before.pool),
        changed=tuple(n for n, pool in after.pool.items() if n in before.pool and before.pool[n] != pool),
        removed=tuple(name for name in before.pool if name not in after.pool),
        needs_restart=needs_restart,
    )


def _mistake(change: Change) -> SettingsError | None:
    """What keeps pools from buying: settings to mend, and those that could not be checked yet."""
    mistake = change.mistake()
    problems, pools = (mistake.problems, mistake.pools) if mistake else ((), frozenset[str]())
    later = [f"pool.{name}: could not be checked yet: {one.message}" for name, one in change.later.items()]
    return SettingsError([*problems, *later], [*pools, *change.later]) if problems or later else None
