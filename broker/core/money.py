"""What a worker costs, in integer micro-dollars: sums of cents stay sums of cents.

Linux spot and on-demand machines are billed per second while `running`, at least 60 seconds for each launch
(AWS: EC2 on-demand pricing, "Per second billing").
"""

from __future__ import annotations

from dataclasses import dataclass

BILLED_SECONDS_MIN = 60.0
SECONDS_PER_HOUR = 3600
USD_MICROS = 1_000_000


@dataclass(frozen=True, slots=True)
class Price:
    """What a running machine costs an hour; `assumed` when nobody has said so and a list price stands in."""

    usd_micros_per_hour: int = 0
    assumed: bool = False


def dollars(usd_micros: int) -> str:
    """For people: `$12.34`, and for small sums as many digits as it takes."""
    usd = usd_micros / USD_MICROS
    return f"${usd:.2f}" if usd >= 1 or usd_micros % 10_000 == 0 else f"${usd:.4f}"


def billed_seconds(running_seconds: float) -> float:
    """Seconds on the bill for a machine that ran this long; nothing for one that never ran."""
    return max(BILLED_SECONDS_MIN, running_seconds) if running_seconds > 0 else 0.0


def cost_usd_micros(price_usd_micros_per_hour: int, running_seconds: float) -> int:
    """The cost of one machine so far."""
    return round(price_usd_micros_per_hour * billed_seconds(running_seconds) / SECONDS_PER_HOUR)
