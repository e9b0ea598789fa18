"""How fast the broker calls EC2: one token bucket for each family of calls.

AWS throttles by account, region and API, and what it throttles costs everybody in the account. So the broker
keeps to the same pace by itself. A Terminate has a bucket of its own, which no launch, listing or tag can
empty: however many machines are wanted, those that are done for end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from broker.core.bucket import Bucket, Limit
from broker.core.errors import Throttled
from broker.providers.ec2_errors import LAUNCHES

WAIT_SECONDS_MAX = 30.0  # who would wait longer hears so at once, and may come back or tell its client

# Sizes as Karpenter's simulation of EC2 has them (`kwok/ec2/ratelimiting.go`); AWS publishes the principle,
# and figures for some calls (AWS: EC2 developer guide, "Request throttling for the Amazon EC2 API").
LIMITS = {
    "launches": Limit(tokens_max=5, tokens_per_second=2),
    "TerminateInstances": Limit(tokens_max=100, tokens_per_second=5),
    "StartInstances": Limit(tokens_max=5, tokens_per_second=2),
    "StopInstances": Limit(tokens_max=5, tokens_per_second=2),
    "CreateTags": Limit(tokens_max=100, tokens_per_second=10),
    "describes": Limit(tokens_max=100, tokens_per_second=20),
    "others": Limit(tokens_max=50, tokens_per_second=5),
}


class Pace:
    """See the module. One for each account and region; `clock_monotonic` runs with the event loop's clock."""

    def __init__(self, clock_monotonic: Callable[[], float]) -> None:
        self._now = clock_monotonic
        self._buckets: dict[str, Bucket] = {}

    async def wait(self, api: str) -> None:
        """Returns when a call of this API may be sent. Raises Throttled at once when that takes too long."""
        bucket = self._bucket(api)
        leaves_at = bucket.take(self._now(), WAIT_SECONDS_MAX)
        if leaves_at is None:
            raise Throttled(
                f"too many {api} calls wait already, and this one was not sent: "
                "the broker keeps to AWS's request limits; ask again in a minute"
            )
        wait_seconds = leaves_at - self._now()
        if wait_seconds <= 0:
            return
        try:
            await asyncio.sleep(wait_seconds)
        except asyncio.CancelledError:
            bucket.give_back(self._now())
            raise

    def throttled(self, api: str) -> None:
        """AWS has refused a call of this API because there were too many."""
        self._bucket(api).throttled(self._now())

    def _bucket(self, api: str) -> Bucket:
        family = family_of(api)
        if family not in self._buckets:
            self._buckets[family] = Bucket(LIMITS[family], self._now())
        return self._buckets[family]


def family_of(api: str) -> str:
    """The key of LIMITS: calls of one family draw from one bucket."""
    if api in LAUNCHES:
        return "launches"
    if api.startswith("Describe"):
        return "describes"
    return api if api in LIMITS else "others"
