"""Nouns for tests of the core, with everything a test does not speak of filled in."""

from __future__ import annotations

from typing import Any

from broker.core.model import Instance, InstanceState, Lease, Market, Offering, Order
from broker.core.settings import PoolSettings

PORT = 2560
MOON = Offering("moon", "big", Market.SPOT, cores=64, price_usd_micros_per_hour=1_000_000)


def order(
    order_id: str = "o-1", pool: str = "default", offering: Offering = MOON, *, count: int = 1
) -> Order:
    return Order(order_id, pool, (offering,), "{}", created_unix=0.0, count=count)


def instance(instance_id: str = "i-1", address: str | None = "10.0.0.1", **changes: Any) -> Instance:
    """A running spot machine on the moon."""
    said: dict[str, Any] = {"state": InstanceState.RUNNING, "market": Market.SPOT, "region": "moon"}
    return Instance(instance_id, address=address, **{**said, **changes})


def lease(worker_id: str, client: str = "ann", ttl_seconds: float = 900.0, **changes: Any) -> Lease:
    return Lease(changes.pop("id", f"lease-{worker_id}-{client}"), worker_id, client, ttl_seconds, **changes)


def pool(**changes: Any) -> PoolSettings:
    return PoolSettings.model_validate(changes)
