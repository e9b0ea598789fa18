"""How many calls the simulated EC2 takes: a bucket of tokens for each API, and one for the machines in them.

Sizes are those that Karpenter's simulation of EC2 uses (`kwok/ec2/ratelimiting.go`); AWS publishes the
principle, buckets by account, region and API (AWS: EC2 developer guide, "Request throttling").
"""

from __future__ import annotations

from dataclasses import dataclass

from broker.providers.sim_sky import Refused

Limit = tuple[float, float]  # (tokens when full, tokens a second)

CALLS: dict[str, Limit] = {
    "RunInstances": (5, 2),
    "CreateFleet": (5, 2),  # not in that list: taken to be like RunInstances
    "StartInstances": (5, 2),  # (AWS: EC2 developer guide, "Request token bucket sizes and refill rates")
    "StopInstances": (5, 2),  # not in that list: taken to be like StartInstances
    "TerminateInstances": (100, 5),
    "CreateTags": (100, 10),
}
DESCRIBES: Limit = (100, 20)
OTHER_CHANGES: Limit = (50, 5)
INSTANCES: dict[str, Limit] = {"RunInstances": (1000, 2), "TerminateInstances": (1000, 20)}


@dataclass(slots=True)
class Bucket:
    tokens: float
    tokens_max: float
    per_second: float
    filled_at: float

    def take(self, count: float, at: float) -> bool:
        self.tokens = min(self.tokens_max, self.tokens + (at - self.filled_at) * self.per_second)
        self.filled_at = at
        if self.tokens < count:
            return False
        self.tokens -= count
        return True


class Limits:
    """The account's buckets in one region."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def take(self, api: str, instances: int, at: float) -> None:
        """Raises Refused when a bucket is empty."""
        if not self._bucket("calls", api, _limit(api), at).take(1, at):
            raise throttled()
        limit = INSTANCES.get(api)
        if limit and not self._bucket("instances", api, limit, at).take(instances, at):
            raise throttled()

    def _bucket(self, kind: str, api: str, limit: Limit, at: float) -> Bucket:
        bucket = self._buckets.get((kind, api))
        if bucket is None:
            tokens, per_second = limit
            bucket = self._buckets[kind, api] = Bucket(tokens, tokens, per_second, at)
        return bucket


def _limit(api: str) -> Limit:
    return CALLS.get(api) or (DESCRIBES if api.startswith("Describe") else OTHER_CHANGES)


def throttled() -> Refused:
    return Refused("RequestLimitExceeded", "Request limit exceeded.", 503)
