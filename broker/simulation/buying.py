"""Is bought what may be bought? On-demand only where and when the pool allows it, spot never above on-demand.

An order is judged by what its broker could know when the order was placed: the answers that had reached it.
The list prices are the facts of core/prices.py; what spot costs is what the cloud has told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

from broker.core import prices
from broker.core.money import USD_MICROS
from broker.core.quotes import QUOTE_SECONDS_MAX
from broker.core.settings import PoolSettings
from broker.providers.sim_machine import Machine
from broker.providers.sim_market import REFUSALS
from broker.simulation.rules import Rules

LAUNCHES = ("run_instances", "create_fleet")
SAME_MOMENT_SECONDS = 1.0  # between an answer's arrival and what the broker makes of it
REASON_SECONDS = 3600.0  # for so long the last refusal, reclaim or price may stand in the way of spot
AGAIN_SECONDS = 180.0  # a refusal so long after another one is one more in a row: the cool-down was over
ENDED = ("shutting-down", "terminated")

ALLOWED = "on-demand is bought only when the pool allows it"
DEAR = "spot dearer than on-demand is never bought"

Place = tuple[str, str]  # zone, machine type; an empty zone stands for all


@dataclass(frozen=True, slots=True)
class Quote:
    """The price that the cloud has told, in micro-dollars an hour, and the one that counted until then."""

    usd_micros: int
    told_at: float
    before: int | None

    def least(self, at: float) -> int | None:
        """What the broker may believe that it costs; None when it need not know any price."""
        if at - self.told_at >= QUOTE_SECONDS_MAX - SAME_MOMENT_SECONDS:
            return None
        if at - self.told_at <= SAME_MOMENT_SECONDS:
            return None if self.before is None else min(self.usd_micros, self.before)
        return self.usd_micros


@dataclass(frozen=True, slots=True)
class Placing:
    """What stood when an order was placed."""

    at: float
    asking_since_at: float | None
    reasons_at: tuple[float, ...]  # why spot could not be had
    sold_at: Mapping[str, float]  # when the broker last heard of a spot machine of its own, by type
    least: Mapping[Place, int]
    particular: bool  # somebody asked for a machine type of its own


@dataclass(slots=True)
class Buying:
    """See the module. `broken` takes the moment, the promise, the facts; `saw` a scene."""

    rules: Rules
    broken: Callable[[float, str, str], None]
    saw: Callable[[str], None]
    _number: int = 0  # of the broker process that knows what follows
    _quotes: dict[Place, Quote] = field(default_factory=dict)
    _pages: list[Any] = field(default_factory=list)
    _reasons_at: deque[float] = field(default_factory=deque)
    _sold_at: dict[str, float] = field(default_factory=dict)
    _placings: dict[str, Placing] = field(default_factory=dict)
    _on_demand: dict[str, None] = field(default_factory=dict)  # tokens of orders on that market
    _refused_at: dict[tuple[str, str, bool], float] = field(default_factory=dict)

    # --- what the broker hears -----------------------------------------------------------------------

    def answered(self, at: float, number: int, method: str, parameters: Any, answer: Any) -> None:
        """The answer to a call of the process of that number has arrived: a mapping, or the error."""
        self._of_process(number)
        if method == "describe_spot_price_history":
            self._told(at, parameters, answer)
        elif method in LAUNCHES:
            self._learned(at, parameters, answer)

    def reclaimed(self, at: float) -> None:
        """The cloud takes a spot machine back."""
        self._reason(at)

    def _of_process(self, number: int) -> None:
        if number != self._number:
            self._number = number
            self._quotes.clear()
            self._pages.clear()
            self._refused_at.clear()

    def _told(self, at: float, parameters: Any, answer: Any) -> None:
        """Prices count when the last page is here: one that fails makes the whole answer fail."""
        if not parameters.get("NextToken"):
            self._pages.clear()
        if isinstance(answer, Exception):
            return
        self._pages += answer["SpotPriceHistory"]
        if answer.get("NextToken"):
            return
        for item in self._pages:
            place = item["AvailabilityZone"], item["InstanceType"]
            before = self._quotes.get(place)
            micros = round(float(item["SpotPrice"]) * USD_MICROS)
            known = None if before is None else before.least(at)
            self._quotes[place] = Quote(micros, at, known)
            if micros > _most(place[1], self.rules.since(at)):
                self._reason(at)
                self.saw("spot was dearer than on-demand")
        self._pages.clear()

    def _learned(self, at: float, parameters: Any, answer: Any) -> None:
        spot, bought = _is_spot(parameters), _machines(answer)
        if isinstance(answer, Exception) and not bought.refused_all:
            return  # nobody has said that it cannot be had
        for place in bought.sold:
            self._refused_at.pop((*place, spot), None)
            self._refused_at.pop(("", place[1], spot), None)
        for place in bought.refused or (_places(parameters) if bought.refused_all else ()):
            self._refused(at, place, spot)
        if not spot:
            return
        if bought.refused or bought.refused_all or bought.on_demand or not bought.sold:
            self._reason(at)
        self._sold_at |= dict.fromkeys(bought.spot, at)

    def _refused(self, at: float, place: Place, spot: bool) -> None:
        last_at = self._refused_at.get((*place, spot))
        if last_at is not None and at - last_at < AGAIN_SECONDS:
            return
        self._refused_at[(*place, spot)] = at
        if last_at is not None and at - last_at < REASON_SECONDS:
            self.saw("cool-down doubled")

    def _reason(self, at: float) -> None:
        self._reasons_at.append(at)
        while self._reasons_at[0] < at - 2 * REASON_SECONDS:
            self._reasons_at.popleft()

    # --- what it does --------------------------------------------------------------------------------

    def placed(
        self, at: float, number: int, token: str, asking_since_at: float | None, *, particular: bool
    ) -> None:
        """An order has entered the books. `particular`: somebody asks for a machine type of its own."""
        self._of_process(number)
        if token not in self._placings:
            told = {place: quote.least(at) for place, quote in self._quotes.items()}
            least = {place: micros for place, micros in told.items() if micros is not None}
            reasons_at, sold_at = tuple(self._reasons_at), dict(self._sold_at)
            self._placings[token] = Placing(at, asking_since_at, reasons_at, sold_at, least, particular)

    def asked(self, at: float, token: str, parameters: Any) -> None:
        """A launch call leaves the broker."""
        placing = self._placings.get(token)
        if placing is None or token in self._on_demand:
            return
        if _is_spot(parameters):
            self._judge_spot(at, token, parameters, placing)
            return
        self._on_demand[token] = None
        why = self._why_not_on_demand(placing, {kind for _, kind in _places(parameters)})
        if why:
            self.broken(at, ALLOWED, f"{token}: {why}")
        elif self.rules.pool.market == "spot-then-on-demand":
            self.saw("fell back to on-demand")

    def _judge_spot(self, at: float, token: str, parameters: Any, placing: Placing) -> None:
        pools = self.rules.since(placing.at)
        for zone, kind in _places(parameters):
            most = _most(kind, [] if placing.particular else pools)
            here = [micros for place, micros in placing.least.items() if place[1] == kind]
            known = here if not zone else [placing.least.get((zone, kind), 0)]
            if max(known, default=0) > most:
                facts = f"{token}: {kind} in {zone or 'any zone'} for {max(known)} micro-dollars, not {most}"
                self.broken(at, DEAR, facts)

    def _why_not_on_demand(self, placing: Placing, kinds: Collection[str]) -> str:
        pools = self.rules.since(placing.at)
        if any(pool.market == "on-demand" for pool in pools):
            return ""
        if all(pool.market == "spot" for pool in pools):
            return "the pool buys on spot only"
        after_seconds = min(pool.on_demand_after for pool in pools)
        reasons_at = [one for one in placing.reasons_at if placing.at - one <= REASON_SECONDS + after_seconds]
        if not any(placing.at - one <= REASON_SECONDS for one in reasons_at):
            return "nothing has stood in the way of spot"
        if not after_seconds:
            return ""
        if placing.asking_since_at is None:
            return "no client waits"
        sold_at = max((at for kind, at in placing.sold_at.items() if kind in kinds), default=-inf)
        since_at = max(placing.asking_since_at, sold_at, min(reasons_at))
        seconds = placing.at - since_at
        if seconds < after_seconds - SAME_MOMENT_SECONDS:
            return f"spot was refused for {seconds:.0f} s, and on_demand_after = {after_seconds:g}"
        return ""

    def counted(self, at: float, machines: Iterable[Machine], given_more: Iterable[str]) -> None:
        """These machines of ours exist after a launch. What the cloud gave beyond an order is not counted."""
        tokens = [machine.token for machine in machines if machine.token in self._on_demand]
        caps = [pool.on_demand_max for pool in self.rules.since(at) if pool.market == "spot-then-on-demand"]
        if not tokens or not caps or None in caps:
            return
        count = len(tokens) - len(set(tokens).intersection(given_more))
        if count > max(cap for cap in caps if cap is not None):
            self.broken(at, ALLOWED, f"{count} on-demand machines, on_demand_max = {caps[-1]}")


# --- EC2's words -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Answer:
    """What a launch call has brought."""

    sold: list[Place] = field(default_factory=list)
    spot: list[str] = field(default_factory=list)  # the types of what is on spot
    on_demand: bool = False
    refused: list[Place] = field(default_factory=list)
    refused_all: bool = False


def _machines(answer: Any) -> _Answer:
    found = _Answer()
    if isinstance(answer, Exception):
        response: Any = getattr(answer, "response", {})
        found.refused_all = response.get("Error", {}).get("Code") in REFUSALS
        return found
    for shape in answer.get("Instances") or ():
        if shape.get("State", {}).get("Name") in ENDED:
            continue
        lifecycle = shape.get("Lifecycle") or shape.get("InstanceLifecycle")
        found.spot += [shape["InstanceType"]] if lifecycle == "spot" else []
        found.on_demand |= lifecycle != "spot"
        zone = shape.get("AvailabilityZone") or shape.get("Placement", {}).get("AvailabilityZone") or ""
        found.sold.append((zone, shape["InstanceType"]))
    for error in answer.get("Errors") or ():
        found.refused.append(_place(error["LaunchTemplateAndOverrides"]["Overrides"]))
    return found


def _is_spot(parameters: Any) -> bool:
    target = parameters.get("TargetCapacitySpecification")
    if target is not None:
        return bool(target["DefaultTargetCapacityType"] == "spot")
    return bool((parameters.get("InstanceMarketOptions") or {}).get("MarketType") == "spot")


def _places(parameters: Any) -> list[Place]:
    """What a launch call would take. Where a subnet decides the zone, any may be meant."""
    if "InstanceType" in parameters:
        return [_place(parameters)]
    configs = parameters["LaunchTemplateConfigs"]
    return [_place(override) for config in configs for override in config["Overrides"]]


def _place(named: Any) -> Place:
    zone = named.get("AvailabilityZone") or (named.get("Placement") or {}).get("AvailabilityZone")
    return zone or "", named["InstanceType"]


def _most(kind: str, pools: Iterable[PoolSettings]) -> int:
    """What spot of this type may cost: as much as the cheapest of the pool's types does on-demand; without a
    pool, as much as it does itself. All types in here are of one size."""
    own = prices.on_demand_usd_micros_per_hour(kind, None)
    others = [[prices.on_demand_usd_micros_per_hour(one, None) for one in p.instance_types] for p in pools]
    return max((min([*some, own]) for some in others), default=own)
