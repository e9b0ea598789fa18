"""What the simulated EC2 sells and when it does not: machine types, zones, prices, stock, quotas, refusals.

Every refusal has a memory, because EC2's has: a zone that is out of stock is so for a while, a missing
permission until somebody grants it. What is refused `early` is looked at before the client token (who you
are, what you name), everything else after it: a refusal of capacity therefore says for certain that no
earlier call with this token has launched anything.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from broker.providers.sim_machine import Machine
from broker.providers.sim_price_walk import PriceWalk
from broker.providers.sim_sky import Refused, Sky
from broker.providers.sim_weather import Fault

KIND = re.compile(
    r"[a-z][a-z0-9-]*\.(?P<size>nano|micro|small|medium|large|(?P<x>\d*)xlarge|metal(-(?P<m>\d+)xl)?)"
)
NAMED_VCPUS = {"nano": 2, "micro": 2, "small": 2, "medium": 1, "large": 2, "xlarge": 4, "metal": 96}
USD_MICROS_PER_VCPU_HOUR = 45_000  # about what c7i costs in us-east-1; the exact figure does not matter
SPOT_SHARE = (0.25, 0.6)  # of the on-demand price

NO_CAPACITY = "InsufficientInstanceCapacity"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One of EC2's reasons not to launch (AWS: EC2 API reference, "Error codes")."""

    message: str
    status: int = 400
    early: bool = False  # looked at before the client token
    offering: bool = False  # about this type and market, not about the account


REFUSALS: dict[str, Refusal] = {
    "UnauthorizedOperation": Refusal(
        "You are not authorized to perform this operation. User: arn:aws:iam::123456789012:user/broker is "
        "not authorized to perform: ec2:RunInstances on resource: arn:aws:ec2:*:123456789012:instance/* "
        "because no identity-based policy allows the ec2:RunInstances action.",
        403,
        early=True,
    ),
    "AuthFailure.ServiceLinkedRoleCreationNotPermitted": Refusal(
        "The provided credentials do not have permission to create the service-linked role for EC2 Spot "
        "Instances.",
        403,
        early=True,
    ),
    "InvalidAMIID.NotFound": Refusal("The image id does not exist", early=True),
    "InvalidKeyPair.NotFound": Refusal("The key pair does not exist", early=True),
    "InvalidSubnetID.NotFound": Refusal("The subnet ID does not exist", early=True),
    "InvalidGroup.NotFound": Refusal("The security group does not exist", early=True),
    NO_CAPACITY: Refusal(
        "We currently do not have sufficient capacity in the Availability Zone you requested.",
        500,
        offering=True,
    ),
    "UnfulfillableCapacity": Refusal(
        "Unable to fulfill capacity due to your request configuration.", offering=True
    ),
    "Unsupported": Refusal(
        "Your requested instance type is not supported in your requested Availability Zone.", offering=True
    ),
    "InsufficientFreeAddressesInSubnet": Refusal(
        "There are not enough free addresses in the subnet to satisfy the requested number of instances."
    ),
    "SpotMaxPriceTooLow": Refusal(
        "Your Spot request price is lower than the minimum required Spot request fulfillment price.",
        offering=True,
    ),
    "MaxSpotInstanceCountExceeded": Refusal("Max spot instance count exceeded"),
    "VcpuLimitExceeded": Refusal(
        "You have requested more vCPU capacity than your current vCPU limit allows for the instance bucket "
        "that the specified instance type belongs to."
    ),
}
SPOT_ONLY = frozenset(
    {
        "SpotMaxPriceTooLow",
        "MaxSpotInstanceCountExceeded",
        "AuthFailure.ServiceLinkedRoleCreationNotPermitted",
    }
)
ON_DEMAND_ONLY = frozenset({"VcpuLimitExceeded"})


@dataclass(frozen=True, slots=True)
class Wish:
    """What somebody wants to buy. `zone` is empty when EC2 may choose."""

    instance_type: str
    spot: bool
    zone: str = ""
    count_min: int = 1
    count_max: int = 1
    price_usd_micros_max: float | None = None


class Market:
    """See the module. `machines` are those that count against the quotas."""

    def __init__(self, sky: Sky, zones: Sequence[str], machines: Callable[[], Iterable[Machine]]) -> None:
        self.zones = tuple(zones)
        self._sky, self._machines = sky, machines
        self._prices = sky.goods.fork()
        self._standing: dict[tuple[str, ...], float] = {}  # a refusal → until when
        self._dry: dict[tuple[str, bool, str], float] = {}  # an offering without stock → until when
        self._supported: dict[tuple[str, bool, str], bool] = {}
        self._spot_share: dict[tuple[str, str], float] = {}
        self._walks: dict[tuple[str, str], PriceWalk] = {}

    def price_usd_micros_per_hour(self, kind: str, spot: bool, zone: str) -> int:
        """What a machine costs that is bought now."""
        price = (vcpus_of(kind) or 0) * USD_MICROS_PER_VCPU_HOUR
        if not spot:
            return price
        if (kind, zone) not in self._spot_share:
            self._spot_share[kind, zone] = self._prices.within(SPOT_SHARE)
        return round(price * self._share_now(kind, zone))

    def _share_now(self, kind: str, zone: str) -> float:
        weather, share = self._sky.weather, self._spot_share[kind, zone]
        if not weather.spot_price_step_max:
            return share
        if (kind, zone) not in self._walks:
            self._walks[kind, zone] = PriceWalk(self._prices.fork(), share, SPOT_SHARE[0])
        return self._walks[kind, zone].share(
            self._sky.at, weather.spot_price_step_max, weather.spot_share_max
        )

    # --- refusing ----------------------------------------------------------------------------------

    def refuse(self, code: str, seconds: float, wish: Wish | None = None) -> None:
        """For so long launches are refused with this code; with a wish, only such launches."""
        self._standing[self._key(code, wish)] = self._sky.at + seconds

    def run_dry(self, kind: str, spot: bool, zone: str, seconds: float) -> None:
        self._dry[kind, spot, zone] = self._sky.at + seconds

    def heal(self) -> None:
        self._standing.clear()
        self._dry.clear()
        self._supported.clear()

    def look_early(self, wish: Wish) -> None:
        """Raises Refused for what EC2 looks at before the client token."""
        self._look(wish, early=True)

    def sell(self, wish: Wish) -> list[str]:
        """The zones of the machines that can be had: at least count_min of them. Raises Refused."""
        self._look(wish, early=False)
        count = self._within_quota(wish)
        candidates = [wish.zone] if wish.zone else self._shuffled()
        refusals: list[str] = []
        for zone in candidates:
            code = self._missing(wish, zone)
            if not code:
                return [zone] * count
            refusals.append(code)
        code = NO_CAPACITY if NO_CAPACITY in refusals else refusals[0]
        raise self._refused(code)

    def _look(self, wish: Wish, *, early: bool) -> None:
        at, weather = self._sky.at, self._sky.weather
        for key, until in list(self._standing.items()):
            if until <= at:
                del self._standing[key]
            elif REFUSALS[key[0]].early is early and key in (self._key(key[0], wish), (key[0],)):
                raise self._refused(key[0])
        for code, probability in weather.refusals:
            if REFUSALS[code].early is not early or not _applies(code, wish):
                continue
            if self._sky.goods.chance(probability):
                self.refuse(code, self._sky.goods.within(weather.refusal_seconds), wish)
                raise self._refused(code)

    def _within_quota(self, wish: Wish) -> int:
        """How many of the machines the account may still have."""
        weather = self._sky.weather
        vcpus_max = weather.spot_vcpus_max if wish.spot else weather.on_demand_vcpus_max
        vcpus = vcpus_of(wish.instance_type) or 1
        used = sum(one.vcpus for one in self._machines() if one.runs and one.spot is wish.spot)
        count = min(wish.count_max, max(0.0, vcpus_max - used) // vcpus)
        if count < wish.count_min:
            raise self._refused("MaxSpotInstanceCountExceeded" if wish.spot else "VcpuLimitExceeded")
        return int(count)

    def _missing(self, wish: Wish, zone: str) -> str:
        """Why the zone does not have it; empty when it does."""
        offering = (wish.instance_type, wish.spot, zone)
        if not self._is_supported(offering):
            return "Unsupported"
        if wish.price_usd_micros_max is not None and wish.spot:
            price = self.price_usd_micros_per_hour(wish.instance_type, True, zone)
            if wish.price_usd_micros_max < price:
                return "SpotMaxPriceTooLow"
        return NO_CAPACITY if self._is_dry(offering) else ""

    def _is_supported(self, offering: tuple[str, bool, str]) -> bool:
        if offering not in self._supported:
            self._supported[offering] = not self._sky.goods.chance(self._sky.weather.unsupported)
        return self._supported[offering]

    def _is_dry(self, offering: tuple[str, bool, str]) -> bool:
        at, weather, dice = self._sky.at, self._sky.weather, self._sky.goods
        if self._dry.get(offering, at) > at:
            return True
        if dice.chance(weather.stockout_everywhere):
            kind, spot, _ = offering
            seconds = dice.within(weather.stockout_seconds)
            for zone in self.zones:
                self.run_dry(kind, spot, zone, seconds)
            return True
        if dice.chance(weather.stockout):
            self.run_dry(*offering, dice.within(weather.stockout_seconds))
            return True
        return False

    def _shuffled(self) -> list[str]:
        rest, mixed = list(self.zones), []
        while rest:
            mixed.append(self._sky.goods.pick(rest))
            rest.remove(mixed[-1])
        return mixed

    def _refused(self, code: str) -> Refused:
        self._sky.met(Fault.REFUSED, code)
        self._sky.faults[f"{Fault.REFUSED} {code}"] += 1
        return Refused(code, REFUSALS[code].message, REFUSALS[code].status)

    def _key(self, code: str, wish: Wish | None) -> tuple[str, ...]:
        if wish is None or not REFUSALS[code].offering:
            return (code,)
        return (code, wish.instance_type, "spot" if wish.spot else "on-demand")


def _applies(code: str, wish: Wish) -> bool:
    return code not in (ON_DEMAND_ONLY if wish.spot else SPOT_ONLY)


def vcpus_of(kind: str) -> int | None:
    """How many a machine type has, by its name; None when EC2 has no such type."""
    match = KIND.fullmatch(kind)
    if match is None:
        return None
    times = match["x"] or match["m"]
    return 4 * int(times) if times else NAMED_VCPUS[match["size"]]


def zone_of_subnet(subnet_id: str, zones: Sequence[str]) -> str:
    """Every subnet exists, and lies where its name puts it."""
    return zones[zlib.crc32(subnet_id.encode()) % len(zones)]
