"""What the service and the loops share: the books, the queue, the clouds, the store, the clock.

A bag of references without behaviour of its own, except for the few questions that all of them ask.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from broker.clock import Clock
from broker.clouds import Cloud, Clouds
from broker.core import prices
from broker.core.claim import Claim
from broker.core.errors import BadRequest, BrokerError
from broker.core.latency import nearest_first
from broker.core.life import COUNTED
from broker.core.model import Instance, Offering, Order, Worker, WorkerState
from broker.core.money import Price
from broker.core.policy import LaunchGuard, room_overall
from broker.core.registry import Registry
from broker.core.schedule import target
from broker.core.settings import PoolSettings, Settings
from broker.core.warm import Warmth
from broker.core.wish import Wish
from broker.store import LaunchedOrder, Store, StoredLease
from broker.waiting import Waiter, Waiting

FORGOTTEN_POOL = PoolSettings.model_validate(
    {}
)  # rules for machines whose pool the configuration has dropped

# Without a store nobody knows of the last broker's launch calls. One may arrive for five minutes yet, and its
# machine need not be listed for two more (reconcile.py: ORDER_GRACE_SECONDS, LISTING_GRACE_SECONDS).
UNSEEN_SECONDS = 420.0

FORGOTTEN_EC2_POOL = FORGOTTEN_POOL.model_copy(update={"provider": "ec2"})


class Signal:
    """Something changed; whoever waits looks again."""

    def __init__(self) -> None:
        self._changed: asyncio.Future[None] | None = None

    def notify(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)
        self._changed = None

    async def wait(self) -> None:
        if self._changed is None:
            self._changed = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._changed)


class Obstacles:
    """Why clients wait without a launch, by pool: all of them, or those with a wish."""

    def __init__(self) -> None:
        self._found: dict[str, dict[Wish | None, BrokerError]] = {}

    def note(self, pool: str, error: BrokerError, wish: Wish | None = None) -> None:
        """This is why they wait now."""
        self._found.setdefault(pool, {})[wish] = error

    def clear(self, pool: str) -> None:
        """Nothing is known to stand in their way."""
        self._found.pop(pool, None)

    def of(self, pool: str, wish: Wish) -> BrokerError | None:
        """Why one with this wish waits."""
        found = self._found.get(pool, {})
        return found.get(wish) or found.get(None)

    def any(self, pool: str) -> BrokerError | None:
        """Why somebody waits."""
        return next(iter(self._found.get(pool, {}).values()), None)


OWN_AGAIN_SECONDS = 180.0  # for so long its holder waits for it rather than for another one
FOUND_AGAIN_SECONDS = 60.0  # a worker from before a restart that is well has answered by then


@dataclass(slots=True)
class Context:
    """See the module."""

    settings: Settings
    registry: Registry
    clouds: Clouds
    store: Store
    clock: Clock
    waiting: Waiting = field(default_factory=Waiting)
    scanned: Signal = field(default_factory=Signal)  # a scan of a cloud ended, well or not
    guards: dict[str, LaunchGuard] = field(default_factory=dict)
    warm: dict[str, Warmth] = field(default_factory=dict)  # ask `warmth`, which looks at the clock
    wanted: dict[str, frozenset[str]] = field(
        default_factory=dict
    )  # pool → workers that wait, with clients that ask for several at once, for the others
    obstacles: Obstacles = field(default_factory=Obstacles)
    guard_changed: Callable[[str], None] = lambda pool: None  # told of a pool whose breaker has changed
    stored_leases: dict[str, list[StoredLease]] = field(
        default_factory=dict
    )  # by instance, until found again
    restored: set[str] = field(default_factory=set)  # leases that are on disk already, from before the start
    expected: dict[str, LaunchedOrder] = field(default_factory=dict)  # by instance: launched before the start
    home: dict[str, Cloud] = field(default_factory=dict)  # worker → where it was ordered or found
    ended: set[str] = field(
        default_factory=set
    )  # instances whose end has been decided, also before the start
    reopened: set[str] = field(default_factory=set)  # orders that were open at the start
    known_orders: dict[str, int] = field(
        default_factory=dict
    )  # placed by this broker, in this run or before → for how many machines
    owner: str = ""  # which installation this is; known once the store is open
    epoch: int = 0  # the number of our claim, the same on disk; 0 before we were ever in charge
    unwanted: set[str] = field(default_factory=set)  # places that TERMINATE_ALL met before they had a machine
    leaving: dict[str, PoolSettings] = field(
        default_factory=dict
    )  # workers whose pool a reload has removed → the settings that it had
    removed: set[str] = field(default_factory=set)  # names of pools that a reload has removed
    outdated: tuple[str, ...] = ()  # why the settings in force are not those of the file
    loaded_unix: float = 0.0  # when the settings in force were read
    began_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.began_at = self.now()

    def pool(self, name: str) -> PoolSettings:
        return self.settings.pool.get(name, FORGOTTEN_POOL)

    def pool_of(self, worker: Worker) -> PoolSettings:
        """The rules for this worker: also those of a pool that there is no more."""
        return self.leaving.get(worker.id) or self.pool(worker.pool)

    def no_such_pool(self, name: str) -> BadRequest:
        """What a client hears that names a pool that there is not."""
        more = " any more" if name in self.removed else ""
        return BadRequest(
            f"there is no pool '{name}'{more}; there is {', '.join(sorted(self.settings.pool))}"
        )

    def unseen(self, clouds: Iterable[Cloud]) -> str:
        """Why there may be machines that neither the books nor a listing show: the store was damaged, and the
        last listing was asked for before it had to be whole. Nothing, when there is no such reason."""
        whole_at = self.began_at + UNSEEN_SECONDS
        if not self.store.lost or all((cloud.scanned_at or 0.0) >= whole_at for cloud in clouds):
            return ""
        left_seconds = max(0.0, whole_at - self.now())
        return f"the store was damaged: for {left_seconds:.0f} s more the cloud may not show every machine"

    def price(self, pool: str, machine: Instance) -> Price:
        """What the machine costs. Where EC2 is used, one whose pool is not configured any more is EC2's."""
        settings = self.pool(pool).at(machine.region)
        if pool not in self.settings.pool and any(p.provider == "ec2" for p in self.settings.pool.values()):
            settings = FORGOTTEN_EC2_POOL
        return prices.price(settings, machine.instance_type, machine.cores, machine.market)

    def preferred(self, pool: str) -> Sequence[Cloud]:
        """The clouds in which a configured pool buys, the preferred one first."""
        clouds = self.clouds.of(pool)
        if len(clouds) < 2 or self.pool(pool).region_order == "listed":
            return clouds
        order = nearest_first([cloud.provider.round_trip_seconds() for cloud in clouds])
        return [clouds[number] for number in order]

    def offerings(self, pool: str) -> list[Offering]:
        """What a configured pool can buy, in all its regions."""
        return [one for cloud in self.preferred(pool) for one in cloud.provider.offerings(pool)]

    def cloud_of(self, worker: Worker) -> Cloud | None:
        """The cloud that has this worker, also when its pool is not configured any more, or elsewhere."""
        return self.home.get(worker.id) or self.clouds.having(worker.pool, worker.offering.region)

    def cloud_of_order(self, order: Order) -> Cloud | None:
        """Where the order was placed, wherever its pool buys by now."""
        homes = [home for place in order.places if (home := self.home.get(place)) is not None]
        return homes[0] if homes else self.clouds.having(order.pool, order.offerings[0].region)

    def cloud_of_held(self, held: StoredLease) -> Cloud | None:
        """Where the machine of a lease from before the start is; None while that cannot be told."""
        launched = self.expected.get(held.instance_id)
        if launched is not None:
            return self.cloud_of_order(launched.order)
        clouds = self.clouds.of(held.pool)
        unseen = [cloud for cloud in clouds if not cloud.recovered]
        return clouds[0] if len(clouds) == 1 else unseen[0] if len(unseen) == 1 else None

    def require_charge(self, cloud: Cloud | None) -> None:
        """Raises ReadOnly while another broker is in charge of that cloud."""
        error = cloud.read_only() if cloud is not None else None
        if error is not None:
            raise error

    def require_charge_somewhere(self, pool: str) -> None:
        """Raises ReadOnly while other brokers are in charge of all the pool's clouds."""
        clouds = self.clouds.of(pool)
        if clouds and all(cloud.rival is not None for cloud in clouds):
            self.require_charge(clouds[0])

    def guard(self, pool: str) -> LaunchGuard:
        if pool not in self.guards:
            self.guards[pool] = LaunchGuard(changed=lambda: self.guard_changed(pool))
        return self.guards[pool]

    def booting(self, pool: str) -> list[Worker]:
        """The workers that will be ready for somebody who waits. One that a restart has found held is ready
        in a moment, and has perhaps a free seat; if it keeps silent it is for its holders."""
        booting = self.registry.in_state(WorkerState.BOOTING, pool=pool)
        return [
            worker
            for worker in booting
            if worker.id not in self.leaving and (not self.registry.busy(worker.id) or self._has_seat(worker))
        ]

    def _has_seat(self, worker: Worker) -> bool:
        """Whether a worker that a restart has found held will soon be there for one more client."""
        soon = self.now() - worker.since_at <= FOUND_AGAIN_SECONDS
        alone = any(lease.exclusive for lease in self.registry.leases(worker.id))
        return soon and not alone and not self.registry.full(worker.id)

    def own_booting(self, waiter: Waiter) -> Worker | None:
        """The worker that the client holds already, as a restart has found it, and that may soon be ready."""
        if waiter.terms is not None:
            return None
        now = self.now()
        for worker in self.registry.workers_held(waiter.pool, waiter.client):
            soon = worker.state is WorkerState.BOOTING and now - worker.since_at <= OWN_AGAIN_SECONDS
            by_name = self.registry.lease_of(worker.id, waiter.client) is not None
            alone = not waiter.exclusive or len(self.registry.leases(worker.id)) == 1
            fits = waiter.wish.fits(worker.offering)
            if soon and by_name and alone and fits and worker.id not in self.leaving:
                return worker
        return None

    def warmth(self, pool: str) -> Warmth:
        """The pool's warm target now, by the cloud's clock; its fall is remembered as of now.

        A client that waits although a cap is reached, the pool's or that of all pools, wants something that
        no spare is: the spares, which nobody wants, keep the place no longer than their idle timeout.
        """
        warmth, now = self.warm.setdefault(pool, Warmth()), self.now()
        warmth.seen(self._warm_target(pool, now), now)
        return warmth

    def _warm_target(self, name: str, now: float) -> int:
        pool, now_unix = self.pool(name), self.pool_unix(name, now)
        full = self.registry.count(name, *COUNTED) >= pool.max_workers
        if not pool.keeps_warm or now_unix is None or (full and self.waiting.of(name)):
            return 0
        if room_overall(self.registry, self.settings.broker.max_workers) == 0 and len(self.waiting):
            return 0
        return target(pool.warm_targets, now_unix)

    def pool_unix(self, name: str, now: float) -> float | None:
        """The time in the clouds of a configured pool, by one that has told it."""
        clouds = self.clouds.of(name)
        told = next((cloud for cloud in clouds if cloud.recovered), clouds[0] if clouds else None)
        return None if told is None else told.provider.clock_unix(now).earliest_unix

    def claim(self, cloud: Cloud) -> Claim:
        """What we write onto the machines of a cloud now: by its clock, which all who look share."""
        beat_unix = cloud.provider.clock_unix(self.now()).earliest_unix
        return Claim(self.epoch, self.owner, beat_unix)

    def now(self) -> float:
        return self.clock.monotonic()
