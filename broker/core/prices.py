"""What a machine is taken to cost when nobody has said: the on-demand list price, marked as assumed.

Spot machines cost less than that, usually a third to two thirds of it, so a budget that counts with it stops
too early rather than too late. The figures are us-east-1, Linux, shared tenancy, in micro-dollars per vCPU
and hour, from the size `large` (2 vCPUs) of AWS's list (aws.amazon.com/ec2/pricing/on-demand, as it stood in
2025). Within a family the price grows with the vCPUs, the size `metal` included; of the burstable ones the
sizes below `large` cost less than that says. Other regions may cost half as much again: configure the price.
"""

from __future__ import annotations

import re

from broker.core.model import Market
from broker.core.money import Price
from broker.core.settings import PoolSettings

USD_MICROS_PER_VCPU_HOUR = {
    "c5": 42_500,
    "c5a": 38_500,
    "c6a": 38_250,
    "c6g": 34_000,
    "c6i": 42_500,
    "c7a": 51_320,
    "c7g": 36_250,
    "c7i": 44_625,
    "c8g": 39_880,
    "m5": 48_000,
    "m5a": 43_000,
    "m6a": 43_200,
    "m6g": 38_500,
    "m6i": 48_000,
    "m7a": 57_960,
    "m7g": 40_800,
    "m7i": 50_400,
    "m8g": 44_880,
    "r5": 63_000,
    "r6a": 56_700,
    "r6g": 50_400,
    "r6i": 63_000,
    "r7g": 53_550,
    "r7i": 66_150,
    "t3": 41_600,
}
# Families that are not in the list: figures of ours on the safe side, no list prices. The first is more than
# any current machine of the families c, m, r and t costs; the second is for all others, as dear as the
# dearest accelerators.
UNLISTED_USD_MICROS_PER_VCPU_HOUR = 100_000
DEAREST_USD_MICROS_PER_VCPU_HOUR = 500_000

KIND = re.compile(r"(?P<family>(?P<letters>[a-z]+)[^.]*)\.(?P<size>[a-z0-9-]+)")
XLARGE = re.compile(r"(?P<times>\d*)xlarge|metal-(?P<metal>\d+)xl")
NAMED_VCPUS = {"nano": 2, "micro": 2, "small": 2, "medium": 2, "large": 2}  # at most: Graviton's medium has 1
METAL_VCPUS = {"c5": 96, "m5": 96, "r5": 96, "c6i": 128, "m6i": 128, "r6i": 128} | dict.fromkeys(
    ("c6g", "m6g", "r6g", "c7g", "m7g", "r7g"), 64
)  # the size called just `metal` (AWS: EC2 instance types guide, "Specifications")
VCPUS_UNKNOWN = 192  # a size that says nothing: as large as the largest of the ordinary ones


def price(pool: PoolSettings, instance_type: str, cores: int | None, market: Market) -> Price:
    """What such a machine of the pool is taken to cost: as configured, or the list price, marked.

    A configured price is that of the market which the pool prefers: EC2 has sold on-demand what was asked for
    as spot, and a pool may fall back on it.
    Local workers are free, and that is true and not assumed.
    """
    configured = pool.price_usd_micros_per_hour
    if pool.provider == "local" or (configured and pool.markets[0] == market):
        return Price(configured)
    return Price(max(configured, on_demand_usd_micros_per_hour(instance_type, cores)), assumed=True)


def on_demand_usd_micros_per_hour(instance_type: str, cores: int | None) -> int:
    """The list price, or a figure on the safe side of it. `cores` (vCPUs) when the cloud has told them."""
    match = KIND.fullmatch(instance_type)
    if match is None:
        return DEAREST_USD_MICROS_PER_VCPU_HOUR * (cores or VCPUS_UNKNOWN)
    ordinary = match["letters"] in ("c", "m", "r", "t")
    unlisted = UNLISTED_USD_MICROS_PER_VCPU_HOUR if ordinary else DEAREST_USD_MICROS_PER_VCPU_HOUR
    per_vcpu = USD_MICROS_PER_VCPU_HOUR.get(match["family"], unlisted)
    return per_vcpu * (cores or _vcpus(match["family"], match["size"]))


def _vcpus(family: str, size: str) -> int:
    """By the name: `large` is 2, `xlarge` 4, `16xlarge` 64."""
    match = XLARGE.fullmatch(size)
    if match is not None:
        return 4 * int(match["times"] or match["metal"] or 1)
    return METAL_VCPUS.get(family, VCPUS_UNKNOWN) if size == "metal" else NAMED_VCPUS.get(size, VCPUS_UNKNOWN)
