"""What to ask the cloud for now: which offerings of a pool, on which market, for how many machines.

The rules. A pool's market decides where it buys. Spot that costs more than an on-demand machine which would
do in its place is never bought; where its price is not known it may be, because EC2 charges no more for spot
than for the same type on-demand. With `spot-then-on-demand`, on-demand is bought when spot has been refused
for `on_demand_after` while clients waited, for what is short only, never for more than `on_demand_max`
machines at a time, and no longer than spot cannot be had. Such a machine is a *fallback*; once nobody uses it
and spot can be had again, it is replaced.

Everything is handed in and nothing is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

from broker.core import prices
from broker.core.cooling import Cooling
from broker.core.errors import BrokerError, NoCapacity, OfferingRefused, PermanentRefusal, QuotaReached
from broker.core.model import Market, Offering, Worker, WorkerState
from broker.core.money import dollars
from broker.core.registry import Registry
from broker.core.settings import PoolSettings

REASONS_MAX = 3  # in one error: what a client reads stays a line
FALLBACK_IDLE_SECONDS = 60.0  # a client that has only paused between two leases keeps its machine

# The list prices are those of us-east-1, other regions cost up to half as much again (core/prices.py). There
# the higher figure forbids too little, rather than keep a pool from buying at all.
LISTED_REGION, ELSEWHERE_SHARE = "us-east-1", 1.5

SpotPrices = Mapping[tuple[str, str], int]  # (zone, instance type) → micro-dollars an hour


@dataclass(frozen=True, slots=True)
class Shortfall:
    """What a pool lacks: so many machines beyond those on order and booting. What it has already (on order
    included) of on-demand ones, and since when spot has been refused for it (monotonic)."""

    machines: int
    on_demand_machines: int = 0
    spot_refused_since_at: float | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """What to ask for now: `machines` of any of the `offerings`, which are all of one market; or nothing.

    Then either `obstacle` says why it is worth to wait, or `refusal` is what those who wait shall hear.
    `look_at` (monotonic) is when the answer may be another one, None when no moment is known.
    """

    offerings: tuple[Offering, ...] = ()
    machines: int = 0
    obstacle: str = ""
    refusal: BrokerError | None = None
    look_at: float | None = None
    spot_refused: bool = False  # the pool prefers spot, and there is none to ask for: a drought


def choose(
    offerings: Sequence[Offering],
    name: str,
    pool: PoolSettings,
    shortfall: Shortfall,
    *,
    cooling: Cooling,
    spot_prices: SpotPrices,
    offerings_max: int,
    now: float,
) -> Choice:
    """See the module. `offerings`: those of the pool `name` that suit whoever waits, in its order;
    `offerings_max`: so many may stand in one order, as the provider says."""
    assert shortfall.machines > 0, "who lacks no machine does not ask what to buy"
    affordable, dear = _affordable(offerings, spot_prices)
    free, cool_downs = cooling.usable(affordable, now, pool=name)
    spot, on_demand = _of(Market.SPOT, free), _of(Market.ON_DEMAND, free)
    why = _sum_up([*(one.error for one in cool_downs), *dear])
    look_at = min((now + one.seconds_left for one in cool_downs), default=None)
    sells_spot = any(
        one.market is Market.SPOT for one in offerings
    )  # workers of one's own are not on a market
    if pool.markets[0] == "spot" and sells_spot and not spot:
        return _without_spot(pool, shortfall, on_demand[:offerings_max], why, look_at, now)
    ask = spot or on_demand
    if not ask:
        return Choice(refusal=why, look_at=look_at)
    return Choice(ask[:offerings_max], shortfall.machines, look_at=look_at)


def _without_spot(
    pool: PoolSettings,
    shortfall: Shortfall,
    on_demand: tuple[Offering, ...],
    why: BrokerError,
    look_at: float | None,
    now: float,
) -> Choice:
    """Spot is preferred and cannot be had: on-demand, if the pool may buy it, when it may."""
    if not on_demand:
        return Choice(refusal=why, look_at=look_at, spot_refused=True)
    room = shortfall.machines
    if pool.on_demand_max is not None:
        room = min(room, pool.on_demand_max - shortfall.on_demand_machines)
    if room <= 0:
        refusal = NoCapacity(f"{why.message}; the pool's on_demand_max = {pool.on_demand_max} is reached")
        return Choice(refusal=refusal, look_at=look_at, spot_refused=True)
    since_at = shortfall.spot_refused_since_at
    falls_back_at = (now if since_at is None else since_at) + pool.on_demand_after
    if now >= falls_back_at:
        return Choice(on_demand, room, look_at=look_at, spot_refused=True)
    return Choice(
        obstacle=f"{why.message}; on-demand is bought in {falls_back_at - now:.0f} s if that lasts",
        look_at=falls_back_at if look_at is None else min(look_at, falls_back_at),
        spot_refused=True,
    )


# --- fallback ----------------------------------------------------------------------------------------------


def is_fallback(offering: Offering, pool: PoolSettings) -> bool:
    """Whether such a machine runs in the pool only because spot could not be had."""
    return pool.market == "spot-then-on-demand" and offering.market is Market.ON_DEMAND


def to_replace(
    registry: Registry,
    name: str,
    pool: PoolSettings,
    offerings: Sequence[Offering],
    *,
    cooling: Cooling,
    spot_prices: SpotPrices,
    now: float,
    is_here: Callable[[Worker], bool] = lambda worker: True,
    known_at: float = -inf,
) -> tuple[str, ...]:
    """The pool's fallback workers (by id, the longest unused first) that may end now: nobody has used them
    for FALLBACK_IDLE_SECONDS, and spot at least as large is back. That its cool-down is over is no reason:
    whoever asks next would only wait for spot once more. `is_here` tells whether the worker was bought where
    the offerings are: only there spot is known to have been refused; what was before `known_at`, a start of
    the broker, nobody knows."""
    affordable, _ = _affordable(offerings, spot_prices)
    spot = _of(Market.SPOT, cooling.usable(affordable, now, pool=name)[0])
    unused = [
        worker
        for worker in registry.in_state(WorkerState.READY)
        if worker.pool == name
        and is_fallback(worker.offering, pool)
        and not registry.busy(worker.id)
        and not worker.protected
        and now - registry.used_at(worker.id) >= FALLBACK_IDLE_SECONDS
        and any(
            _does_for(one, worker.offering)
            and cooling.is_back(one, worker.born_at, now, refused=is_here(worker), known_at=known_at)
            for one in spot
        )
    ]
    return tuple(worker.id for worker in sorted(unused, key=lambda one: (registry.used_at(one.id), one.id)))


# --- prices ------------------------------------------------------------------------------------------------


def on_demand_usd_micros_per_hour(offering: Offering) -> int:
    """What a machine of this type costs on-demand in this region, or more."""
    listed = prices.on_demand_usd_micros_per_hour(offering.instance_type, offering.cores)
    return listed if offering.region == LISTED_REGION else round(listed * ELSEWHERE_SHARE)


def _affordable(
    offerings: Sequence[Offering], spot_prices: SpotPrices
) -> tuple[list[Offering], list[OfferingRefused]]:
    """Without the spot offerings for which an on-demand machine would do for less; an error for each of them.

    Where the cloud may choose the zone and some zones are too dear, the others are named.
    """
    one_of_each = {(one.instance_type, one.cores): one for one in offerings}.values()
    listed = [(one, on_demand_usd_micros_per_hour(one)) for one in one_of_each]
    kept: list[Offering] = []
    dear: list[OfferingRefused] = []
    for offering in offerings:
        if offering.market is not Market.SPOT:
            kept.append(offering)
            continue
        most = min(price for one, price in listed if _does_for(one, offering))
        known = known_prices(offering, spot_prices)
        good = [zone for zone, price in known.items() if price <= most]
        if len(good) == len(known):
            kept.append(offering)
        elif good:
            kept += [replace(offering, zone=zone) for zone in good]
        else:
            dear.append(_too_dear(offering, min(known.values()), most))
    return kept, dear


def known_prices(offering: Offering, spot_prices: SpotPrices) -> dict[str, int]:
    """By zone, in the order of their names; only the offering's own zone where it has one."""
    return {
        zone: price
        for (zone, kind), price in sorted(spot_prices.items())
        if kind == offering.instance_type and offering.zone in ("", zone)
    }


def _does_for(one: Offering, other: Offering) -> bool:
    """Whether a machine of the one type is as large as one of the other. Unknown cores only equal themselves.

    A smaller machine is no substitute, although it may suit the client: the pool's order prefers the larger.
    """
    if one.instance_type == other.instance_type:
        return True
    return one.cores is not None and other.cores is not None and one.cores >= other.cores


def _too_dear(offering: Offering, price_usd_micros: int, most_usd_micros: int) -> OfferingRefused:
    return OfferingRefused(
        f"{offering.instance_type} costs {dollars(price_usd_micros)} an hour on spot, more than the "
        f"{dollars(most_usd_micros)} of an on-demand machine that would do"
    )


# --- small things ------------------------------------------------------------------------------------------


def _of(market: Market, offerings: Iterable[Offering]) -> tuple[Offering, ...]:
    return tuple(one for one in offerings if one.market is market)


def _sum_up(errors: Sequence[BrokerError]) -> BrokerError:
    """One error for all that stands in the way: a person's mistake, a quota, or want of capacity."""
    for error in errors:
        if isinstance(error, PermanentRefusal):
            return error
    reasons = list(dict.fromkeys(error.message for error in errors))
    words = "; ".join(reasons[:REASONS_MAX]) or None
    quotas_only = bool(errors) and all(isinstance(error, QuotaReached) for error in errors)
    return QuotaReached(words) if quotas_only else NoCapacity(words)
