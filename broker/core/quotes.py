"""The spot prices that are known: what was told, and how long it can be believed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Prices follow long-term trends in supply and demand (AWS: EC2 user guide, "Spot Instances"): one of an hour
# ago still tells cheap from dear; after a longer silence nobody knows.
QUOTE_SECONDS_MAX = 3600.0


@dataclass(frozen=True, slots=True)
class Quote:
    """A price, and when it was told (monotonic)."""

    usd_micros_per_hour: int
    told_at: float


@dataclass(slots=True)
class Quotes:
    """See the module. Keys are (zone, instance type), as in Provider.spot_prices."""

    _told: dict[tuple[str, str], Quote] = field(default_factory=dict)
    _heard_at: dict[str, float] = field(default_factory=dict)  # by pool: when an answer came, or none would

    def heard(self, pool: str, now: float) -> None:
        """The cloud was asked what the pool's offerings cost, and has answered, or failed to."""
        self._heard_at[pool] = now

    def awaited(self, pool: str, now: float) -> bool:
        """Whether what the pool's offerings cost has not been asked of late."""
        return now - self._heard_at.get(pool, -QUOTE_SECONDS_MAX) >= QUOTE_SECONDS_MAX

    def told(self, prices: Mapping[tuple[str, str], int], now: float) -> None:
        """The cloud has told these prices. What it leaves out stands until it is too old."""
        self._told = {key: quote for key, quote in self._told.items() if _is_fresh(quote, now)}
        self._told |= {key: Quote(price, now) for key, price in prices.items()}

    def known(self, now: float) -> dict[tuple[str, str], int]:
        """Micro-dollars an hour, in the order of zones and types."""
        return {
            key: quote.usd_micros_per_hour
            for key, quote in sorted(self._told.items())
            if _is_fresh(quote, now)
        }


def _is_fresh(quote: Quote, now: float) -> bool:
    return now - quote.told_at < QUOTE_SECONDS_MAX
