"""What a worker costs, in integer micro-dollars: sums of cents stay sums of cents.

Linux spot and on-demand machines are billed per second while `running`, at least 60 seconds for each launch
(AWS: EC2 on-demand pricing, "Per second billing").
"""

from __future__ import annotations

BILLED_SECONDS_MIN = 60.0
SECONDS_PER_HOUR = 3600


def billed_seconds(running_seconds: float) -> float:
    """Seconds on the bill for a machine that ran this long; nothing for one that never ran."""
    return max(BILLED_SECONDS_MIN, running_seconds) if running_seconds > 0 else 0.0


def cost_usd_micros(price_usd_micros_per_hour: int, running_seconds: float) -> int:
    """The cost of one machine so far."""
    return round(price_usd_micros_per_hour * billed_seconds(running_seconds) / SECONDS_PER_HOUR)
