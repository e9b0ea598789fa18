"""What spot costs at EC2 at the moment, by zone and machine type."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from math import isfinite

from broker.core.money import USD_MICROS
from broker.providers.ec2_api import Ec2Api
from broker.providers.ec2_wire import Shape

API = "DescribeSpotPriceHistory"
PRODUCT = "Linux/UNIX"  # Windows and the commercial Linuxes cost more (AWS: EC2 API reference, SpotPrice)


async def history(api: Ec2Api, instance_types: Iterable[str], now_unix: float) -> Sequence[Shape]:
    """EC2's answer: the last change before `now_unix` (EC2's clock) of each price, and any after it.

    "It also returns the last price change before the start time, which is the effective price as of the start
    time." (AWS: EC2 API reference, DescribeSpotPriceHistory.) Raises what base.Provider names for a read.
    """
    return await api.every(
        API,
        "SpotPriceHistory",
        InstanceTypes=list(dict.fromkeys(instance_types)),
        ProductDescriptions=[PRODUCT],
        StartTime=datetime.fromtimestamp(now_unix, UTC),
    )


def current(found: Sequence[Shape]) -> dict[tuple[str, str], int]:
    """(zone, instance type) → micro-dollars an hour, by the latest change that is told.

    Raises KeyError, TypeError, ValueError for what is no price.
    """
    by_age = sorted(found, key=lambda shape: _unix(shape["Timestamp"]))
    return {
        (shape["AvailabilityZone"], shape["InstanceType"]): _usd_micros(shape["SpotPrice"])
        for shape in by_age
    }


def _unix(moment: datetime) -> float:
    return moment.timestamp()


def _usd_micros(price: str) -> int:
    usd = float(price)
    if not isfinite(usd) or usd <= 0:
        raise ValueError(f"{price} is no price")
    return round(usd * USD_MICROS)
