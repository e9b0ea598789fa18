"""Waiting clients → orders → machines.

Every order is on disk, with the exact parameters of its call, before the call is made. A launch call is made
by a task of its own that nobody cancels while the answer is under way: a lost answer is a lost machine. When
an answer is lost all the same, the same order is sent again, which yields the same machine; while nobody
waits for it, reconcile watches for it instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from broker.clouds import Cloud, is_known
from broker.context import Context
from broker.core.buying import Choice, Shortfall, choose
from broker.core.errors import (
    BrokerError,
    CloudError,
    NoCapacity,
    OfferingRefused,
    OrderMismatch,
    OrderSpent,
    PermanentRefusal,
    StoreError,
    Throttled,
)
from broker.core.life import BOOKED
from broker.core.model import Bought, Market, Offering, Order, Worker
from broker.core.planning import SEATS_MAX, Need, Purchase, plan
from broker.core.policy import Room, launch_room
from broker.core.regional import first_good, sum_up
from broker.core.wish import Wish
from broker.ledger import Ledger
from broker.loops.setbacks import Setbacks
from broker.loops.top_up import TopUp
from broker.orders import OUTCOMES, WITHDRAWN, YIELDED, OpenOrder, Orders, sold_as_ordered
from broker.supply import Supply

CALLS_MAX = 5  # for one order in a row; then the waiting clients hear why
HELD_UP_MAX = 3  # answers in a row in which nothing was looked at; then they hear it too
PAUSE_SECONDS_MIN = 1.0  # between them, doubling: 1 + 2 + 4 + 8 s
RESEND_SECONDS = (
    10.0  # an order without an answer is sent again no sooner, however many clients come and wait
)
LOOKED_AT = (OfferingRefused, PermanentRefusal)  # answers to an order that was looked at
NEVER_SECONDS = float("inf")
QUIET_SECONDS = 0.035  # after the last who asked: a burst is over (Karpenter waits 35 ms for its CreateFleet)
BATCH_SECONDS_MAX = 1.0  # and no longer than that after the first
PRICES_SECONDS_MAX = 10.0  # to wait for spot prices before the first purchase; it then goes by list prices
RETRY_SECONDS = 5.0  # how soon to look again while clients wait behind an obstacle


@dataclass(slots=True)
class Outlook:
    """Which of a pool's clouds can be bought from now, the preferred one first, and why the others cannot.
    Those that are `blind` soon can, probably: their clients wait."""

    sellers: list[Cloud] = field(default_factory=list)
    refusing: list[tuple[Cloud, BrokerError]] = field(default_factory=list)
    blind: list[tuple[Cloud, BrokerError]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Offer:
    """What can be bought for a wish, and where; without a cloud: nothing, and why."""

    cloud: Cloud | None
    choice: Choice


class LaunchLoop:
    """See the module. `wake` has this loop tick again; `startable`: a pool's stopped workers in these clouds
    that may be started."""

    name = "launch"

    def __init__(
        self,
        context: Context,
        orders: Orders,
        ledger: Ledger,
        *,
        new_order_id: Callable[[], str],
        wake: Callable[[], None],
        startable: Callable[[str, Collection[Cloud]], list[Worker]] = lambda pool, clouds: [],
    ) -> None:
        self._context = context
        self._startable = startable
        self._orders = orders
        self._ledger = ledger
        self._new_order_id = new_order_id
        self._wake = wake
        self._in_flight: dict[str, asyncio.Task[None]] = {}  # order id → the task that makes its calls
        self._quiet_at = 0.0
        self._batch_ends_at: float | None = None
        self._hurry_at: float | None = None  # then somebody of the burst might give up before a purchase
        self._unpriced_since_at: dict[str, float] = {}  # by pool: it would have bought, and knew no prices
        self._supply = Supply(context, orders)
        self._setbacks = Setbacks(context)
        self.top_up = TopUp(context)

    def reloaded(self, pools: Collection[str]) -> None:
        """Settings were read in again: the operator may have mended in the cloud what these pools met."""
        self._setbacks.reloaded(pools)
        for name in pools:
            for cloud in self._context.clouds.of(name):
                cloud.cooling.mended(name)

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    async def settle(self, timeout_seconds: float) -> None:
        """At shutdown: collect the answers that are under way. Orders without one stay open on disk.

        An order whose machine a listing has shown needs no answer any more.
        """
        self.top_up.closed = True
        awaited = [task for order_id, task in self._in_flight.items() if self._orders.get(order_id)]
        if awaited:
            await asyncio.wait(awaited, timeout=timeout_seconds)

    def demanded(self, patience_seconds: float) -> None:
        """Somebody waits, at most so long. Others may come in the same moment: one order is for them all."""
        now = self._context.now()
        self._quiet_at = now + QUIET_SECONDS
        hurry_at = now + patience_seconds / 2  # before he has gone
        ends_at = min(now + BATCH_SECONDS_MAX, hurry_at)
        self._batch_ends_at = min(self._batch_ends_at or ends_at, ends_at)
        self._hurry_at = min(self._hurry_at or hurry_at, hurry_at)
        self._wake()

    async def tick(self) -> float | None:
        if self._batch_ends_at is not None:
            order_at = min(self._quiet_at, self._batch_ends_at)
            if self._context.now() < order_at:
                return order_at
            self._batch_ends_at = None
        priced_at = [self._plan(name) for name in self._context.settings.pool]
        retry_at = self._context.now() + RETRY_SECONDS if len(self._context.waiting) else None
        if not any(priced_at):
            self._hurry_at = None
        moments = (*priced_at, retry_at, self.top_up.next_look_at())
        return min((moment for moment in moments if moment is not None), default=None)

    # --- deciding ----------------------------------------------------------------------------------

    def _plan(self, name: str) -> float | None:
        """Order what the pool lacks; or the moment until which it waits to know what that costs."""
        context = self._context
        clouds, needs = context.preferred(name), self._supply.needs(name)
        context.obstacles.clear(name)
        self._setbacks.waits_for(name, {need.wish for need in needs})
        shortage = self.top_up.shortage(name)
        if not clouds or not is_known(clouds) or not (needs or shortage):
            return None
        outlook = self._outlook(name, clouds)
        sellers = outlook.sellers
        if not sellers:
            self._nowhere(name, outlook)
            return None
        self._orders.strand(name, sellers)
        if needs:
            self._send_again(name, sellers)
            self._start_stopped(name, sellers, needs)
        return self._order_all(name, outlook, needs, shortage)

    def _start_stopped(self, name: str, sellers: Sequence[Cloud], needs: Sequence[Need]) -> None:
        """Machines that are kept stopped come before new ones, within the same caps."""
        context, stopped = self._context, self._startable(name, sellers)
        if not stopped:
            return
        sold = [one for cloud in sellers for one in cloud.provider.offerings(name)]
        offerings = [*sold, *(worker.offering for worker in stopped)]
        wanted = plan(
            needs,
            self._supply.coming(name),
            offerings,
            self._room(name, offerings).machines,
            seats=context.pool(name).seats or SEATS_MAX,
            queue=self._supply.one_by_one(name),
        )
        for purchase in wanted.purchases:
            fitting = [worker for worker in stopped if purchase.wish.fits(worker.offering)]
            for worker in fitting[: purchase.machines]:
                stopped.remove(worker)
                context.guard(name).attempted(context.now())
                context.registry.start(worker.id, context.now())

    def _order_all(self, name: str, outlook: Outlook, needs: Sequence[Need], shortage: int) -> float | None:
        """Order what can be had; or the moment until which it waits to know what that costs. A place under
        the caps is not kept for what cannot be had."""
        context, supply = self._context, self._supply
        offerings = [one for cloud in outlook.sellers for one in cloud.provider.offerings(name)]
        room, coming = self._room(name, offerings), supply.coming(name)
        seats = context.pool(name).seats or SEATS_MAX
        offers: dict[Wish, Offer] = {}
        unsold: set[Wish] = set()
        while True:
            wanted = plan(
                needs,
                coming,
                offerings,
                room.machines,
                seats=seats,
                spare=shortage,
                queue=supply.one_by_one(name),
                unsold=unsold,
            )
            new = [wish for wish in wanted.lacking if wish not in offers] if room.machines else []
            priced_at = self._priced_at(name, outlook.sellers) if new or wanted.purchases else None
            if priced_at is not None:
                return priced_at
            offers |= {wish: self._offer(name, outlook, wish, 1) for wish in new}
            refused = {wish for wish in new if offers[wish].cloud is None}
            unsold |= refused
            if not refused:
                break
        for wish in unsold:
            self._not_sold(name, wish, offers[wish], unsold)
        for purchase in wanted.purchases:
            self._buy(name, outlook, purchase)
        if wanted.missing and room.why is not None:
            if context.registry.count(name, *BOOKED):
                context.obstacles.note(name, room.why)
            else:
                supply.tell(name, room.why)
        return None

    def _priced_at(self, name: str, sellers: Sequence[Cloud]) -> float | None:
        """Until when to wait for spot prices that nobody has asked for of late; None: buy now."""
        now = self._context.now()
        if not any(cloud.quotes.awaited(name, now) and _sells_spot(cloud, name) for cloud in sellers):
            self._unpriced_since_at.pop(name, None)
            return None
        until_at = self._unpriced_since_at.setdefault(name, now) + PRICES_SECONDS_MAX
        if self._hurry_at is not None:
            until_at = min(until_at, self._hurry_at)
        return until_at if now < until_at else None

    def _outlook(self, name: str, clouds: Sequence[Cloud]) -> Outlook:
        """Which of the pool's clouds can be bought from now, and why not from the others."""
        outlook = Outlook()
        for cloud in clouds:
            refusal = cloud.read_only() or cloud.refusal(name) or self._setbacks.passed_over(name, cloud)
            blindness = self._blindness(cloud) or self._setbacks.pause(name, cloud)
            if refusal is not None:
                outlook.refusing.append((cloud, refusal))
            elif blindness is not None:
                outlook.blind.append((cloud, blindness))
            else:
                outlook.sellers.append(cloud)
        return outlook

    def _nowhere(self, name: str, outlook: Outlook) -> None:
        """There is no cloud to buy from: clients wait if that helps, or hear why."""
        if outlook.blind:
            self._context.obstacles.note(name, outlook.blind[0][1])
        elif outlook.refusing:
            self._supply.tell(name, sum_up(_named(outlook.refusing)))

    def _blindness(self, cloud: Cloud) -> CloudError | None:
        """Why it is not known well enough what runs there, or None."""
        context = self._context
        if not cloud.acts(context.now()):
            return CloudError(f"{cloud.provider.name} has not been listed for a while")
        unseen = context.unseen([cloud])
        return CloudError(unseen) if unseen else None

    def _room(self, name: str, offerings: Sequence[Offering]) -> Room:
        context, budgets = self._context, self._ledger.budgets(name)
        prices = [one.price_usd_micros_per_hour for one in offerings] if budgets else []
        return launch_room(
            context.registry,
            name,
            context.pool(name),
            context.guard(name),
            context.now(),
            budgets=budgets,
            price_usd_micros_per_hour=max(prices, default=0),
            max_workers=context.settings.broker.max_workers,
        )

    def _offer(self, name: str, outlook: Outlook, wish: Wish, machines: int) -> Offer:
        """Where so many machines for a wish can be bought now, or why nowhere."""
        suitable = [(cloud, some) for cloud in outlook.sellers if (some := _suiting(cloud, name, wish))]
        blind = [one for one in outlook.blind if _suiting(one[0], name, wish)]
        refusing = [one for one in outlook.refusing if _suiting(one[0], name, wish)]
        passed_over = _named(blind + refusing)
        if not suitable and not passed_over:
            return Offer(None, Choice(refusal=NoCapacity(f"pool '{name}' has nothing with {wish}")))
        choices = (
            (cloud.provider.name, self._choose(name, cloud, some, wish, machines)) for cloud, some in suitable
        )
        number, choice = first_good(choices, passed_over, worth_waiting=bool(blind))
        return Offer(None if number is None else suitable[number][0], choice)

    def _not_sold(self, name: str, wish: Wish, offer: Offer, unsold: Collection[Wish]) -> None:
        """Nothing can be bought for these clients now: they hear why, at once or while they wait."""
        choice = offer.choice
        if choice.spot_refused:
            self._setbacks.spot_refused(name, wish)
        if choice.obstacle:
            self._context.obstacles.note(name, NoCapacity(choice.obstacle), wish)
        if choice.refusal is not None:
            self._supply.tell(name, choice.refusal, wish, unsold=unsold)

    def _buy(self, name: str, outlook: Outlook, purchase: Purchase) -> None:
        """Place the orders of one purchase, as few as the providers allow."""
        left, wish = purchase.machines, purchase.wish
        while left > 0:
            offer = self._offer(name, outlook, wish, left)
            if offer.cloud is None and purchase.spare:
                self.top_up.refused(name)
                return
            if offer.cloud is None:
                self._not_sold(name, wish, offer, ())
                return
            if offer.choice.spot_refused and not purchase.spare:
                self._setbacks.spot_refused(name, wish)
            count = min(offer.choice.machines, offer.cloud.provider.machines_max)
            self._order(name, offer.cloud, offer.choice.offerings, count, spare=purchase.spare)
            left -= count

    def _choose(
        self, name: str, cloud: Cloud, suitable: Sequence[Offering], wish: Wish, machines: int
    ) -> Choice:
        """What to ask the cloud for."""
        pool, now = self._context.pool(name), self._context.now()
        booked = self._context.registry.in_state(*BOOKED, pool=name) if len(pool.markets) > 1 else []
        on_demand = sum(worker.offering.market is Market.ON_DEMAND for worker in booked)
        shortfall = Shortfall(machines, on_demand, self._setbacks.drought_since_at(name, wish))
        return choose(
            suitable,
            name,
            pool,
            shortfall,
            cooling=cloud.cooling,
            spot_prices=cloud.quotes.known(now),
            offerings_max=cloud.provider.offerings_max,
            now=now,
        )

    def _order(
        self, name: str, cloud: Cloud, offerings: tuple[Offering, ...], count: int, *, spare: bool
    ) -> None:
        context, guard = self._context, self._context.guard(name)
        for _ in range(count):
            guard.attempted(context.now())
        epoch = str(context.claim(cloud)) if cloud.provider.contested else ""
        now_unix, order_id = context.clock.wall(), self._new_order_id()
        order = cloud.provider.prepare(name, order_id, offerings, now_unix, epoch, count)
        context.home.update(dict.fromkeys(order.places, cloud))
        if spare:
            self.top_up.ordered(order_id)
        self._start(order, self._place(self._orders.enter(order)))

    def _held_up(self, order: Order, error: BrokerError, without: OpenOrder | None = None) -> None:
        """The call was not looked at: clients hear it; for those that wait on it is made again later."""
        cloud = self._context.cloud_of_order(order)
        if isinstance(error, CloudError) and self._setbacks.goes_elsewhere(order.pool, cloud, error):
            return
        if self._supply.tell(order.pool, error, without=without) and cloud is not None:
            self._setbacks.held_up(order.pool, cloud, error)

    def _send_again(self, name: str, sellers: Sequence[Cloud]) -> None:
        """Somebody waits, and an order has lost its answer: ask with the same order, not with a new one."""
        for entry in self._orders.unresolved():
            due = entry.resend_at <= self._context.now() and entry.order.id not in self._in_flight
            due = due and not self._orders.withdrawn(entry)
            due = due and self._context.cloud_of_order(entry.order) in sellers
            if due and entry.order.pool == name:
                self._start(entry.order, self._call(entry))

    # --- doing -------------------------------------------------------------------------------------

    def _start(self, order: Order, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=f"launch {order.id}")
        self._in_flight[order.id] = task
        task.add_done_callback(lambda done: self._finished(order, done))

    def _finished(self, order: Order, task: asyncio.Task[None]) -> None:
        self._in_flight.pop(order.id, None)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._held_up(order, CloudError(f"the broker met a fault of its own: {error!r}"))
        self._wake()

    async def _place(self, entry: OpenOrder) -> None:
        try:
            await self._orders.place(entry)
        except StoreError as error:
            self._held_up(entry.order, error)
        else:
            await self._call(entry)

    async def _call(self, entry: OpenOrder) -> None:
        """Make the launch call until it has an answer, CALLS_MAX times at most."""
        for call in range(1, CALLS_MAX + 1):
            if self._yielded(entry):
                return
            entry.sent_at, entry.absences = self._context.now(), 0
            try:
                await self._launch(entry.order)
            except BrokerError as error:
                entry.perhaps_launched |= _perhaps_launched(error)
                again = call < CALLS_MAX and (isinstance(error, Throttled) or _perhaps_launched(error))
                if not again or isinstance(error, OrderMismatch):
                    self._failed(entry, error)
                    return
                await asyncio.sleep(PAUSE_SECONDS_MIN * 2 ** (call - 1))
                if self._orders.get(entry.order.id) is None:
                    return  # a listing has shown its machine meanwhile
            else:
                return

    def _yielded(self, entry: OpenOrder) -> bool:
        """Whether another broker came into charge meanwhile, whose clients decide what is launched, or the
        pool was removed."""
        cloud, withdrawn = self._context.cloud_of_order(entry.order), self._orders.withdrawn(entry)
        if not withdrawn and (cloud is None or cloud.rival is None):
            return False
        if not entry.perhaps_launched:  # otherwise reconcile watches for its machine
            self._orders.close(entry.order, WITHDRAWN if withdrawn else YIELDED)
        return True

    async def _launch(self, order: Order) -> None:
        cloud = self._context.cloud_of_order(order)
        if cloud is None:
            raise PermanentRefusal(f"pool '{order.pool}' is not configured any more")
        asked_at = self._context.now()
        bought = await cloud.provider.launch(order)
        described = [one for one in bought.instances if one.launched_unix]  # the others are only named
        self._ledger.saw(cloud, described, asked_at)
        self._learn(order, cloud, bought)
        if not bought.instances and not bought.refusals:
            raise OfferingRefused(f"{cloud.provider.name} gave none of {order.count} machines, and no reason")
        self._orders.answered(order, bought, _outcome(bought))
        held_up = [error for _, error in bought.refusals if not isinstance(error, LOOKED_AT)]
        if bought.instances or len(held_up) < len(bought.refusals):
            self._setbacks.answered(order.pool, cloud)
        elif held_up:
            self._held_up_within(order, cloud, CloudError(held_up[0].message))

    def _held_up_within(self, order: Order, cloud: Cloud, error: CloudError) -> None:
        """The call was answered, and nothing that it asked for was looked at. As with calls that fail,
        clients hear it when that happens again and again."""
        if self._setbacks.times(order.pool, cloud) + 1 >= HELD_UP_MAX:
            self._held_up(order, error)
        else:
            self._setbacks.held_up(order.pool, cloud, error)

    def _failed(self, entry: OpenOrder, error: BrokerError) -> None:
        """The calls are over and brought no machine. Only a certain refusal closes the order.

        The cloud looks at the token before it looks for capacity, so when a refused offering answers an order
        sent again, no machine exists *yet*: the call before may still be on its way. Then the order stays
        open until a listing has shown its machine or can be trusted to show none, while others are tried.
        Throttles and permissions are looked at before the token and prove nothing.
        """
        order, now = entry.order, self._context.now()
        cloud = self._context.cloud_of_order(order)  # as long as its places are in the books
        if isinstance(error, OrderSpent) and order.count > 1:  # one of its machines ends; of the others it
            entry.perhaps_launched, entry.resend_at = True, NEVER_SECONDS  # says nothing: a listing will
            return
        if entry.perhaps_launched and not isinstance(error, OfferingRefused | OrderSpent):
            entry.resend_at = now + (NEVER_SECONDS if isinstance(error, OrderMismatch) else RESEND_SECONDS)
            self._held_up(order, error, entry)
            return
        if entry.perhaps_launched and isinstance(error, OfferingRefused):
            entry.doubtful, entry.resend_at = True, NEVER_SECONDS
        else:
            self._orders.close(order, OUTCOMES.get(type(error), "failed"))
        if isinstance(error, OfferingRefused | PermanentRefusal):
            for offering in order.offerings:
                if cloud is not None:
                    self._cool(order.pool, cloud, offering, error)
        elif isinstance(error, OrderSpent):
            self._context.guard(order.pool).boot_failed(self._context.pool(order.pool), now)
        else:
            self._held_up(order, error)

    def _learn(self, order: Order, cloud: Cloud, bought: Bought) -> None:
        """What can be had, and what cannot; in this order, or a sale would undo the refusal of more."""
        for one in bought.instances:
            sold = Offering(one.region, one.instance_type, one.market, one.zone, cores=one.cores)
            cloud.cooling.bought(sold, self._context.now(), pool=order.pool)
            if one.market is Market.SPOT:
                kinds = [other for other in order.offerings if other.instance_type == one.instance_type]
                self._setbacks.spot_bought(order.pool, kinds)
        for offering, error in (*bought.refusals, *_sold_otherwise(order, bought)):
            self._cool(order.pool, cloud, offering, error)

    def _cool(self, pool: str, cloud: Cloud, offering: Offering, error: BrokerError) -> None:
        if isinstance(error, OfferingRefused | PermanentRefusal):
            cloud.cooling.refused(offering, error, self._context.now(), pool=pool)


def _sells_spot(cloud: Cloud, pool: str) -> bool:
    return any(offering.market is Market.SPOT for offering in cloud.provider.offerings(pool))


def _suiting(cloud: Cloud, pool: str, wish: Wish) -> list[Offering]:
    """What suits of the pool's offerings there."""
    return [offering for offering in cloud.provider.offerings(pool) if wish.fits(offering)]


def _named(reasons: Sequence[tuple[Cloud, BrokerError]]) -> list[tuple[str, BrokerError]]:
    return [(cloud.provider.name, error) for cloud, error in reasons]


def _sold_otherwise(order: Order, bought: Bought) -> list[tuple[Offering, BrokerError]]:
    """The offerings of machines that were sold on another market: not to be asked for again at once."""
    kinds = {one.instance_type for one in bought.instances if not sold_as_ordered(order, one)}
    error = OfferingRefused("the cloud sold it on another market than was asked for")
    return [(one, error) for one in order.offerings if one.instance_type in kinds]


def _outcome(bought: Bought) -> str:
    """Why an order has not all of its machines."""
    return next((OUTCOMES.get(type(error), "failed") for _, error in bought.refusals), "no-capacity")


def _perhaps_launched(error: BrokerError) -> bool:
    return isinstance(error, CloudError) and error.sent
