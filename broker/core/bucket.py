"""A token bucket: how many calls of one sort may leave, so that we slow down before the cloud makes us.

A full bucket lets a burst through, then so many calls a second. Each call takes one token at once and is told
from when on it may leave, so that calls leave in the order in which they came and none is overtaken. The
bucket then holds less than nothing: what it owes to those who wait. When the cloud throttles all the same,
its own bucket is empty, whoever else has drawn from it: ours is emptied too and refills at half its pace for
a while.
"""

from __future__ import annotations

from dataclasses import dataclass

SLOW_SECONDS = 60.0  # after the last throttle: long enough for the cloud's bucket to gain on ours
SLOW_SHARE = 0.5  # of the ordinary refill, and never less: two throttles of one burst are one piece of news


@dataclass(frozen=True, slots=True)
class Limit:
    """The size of a bucket, and what it gains."""

    tokens_max: float
    tokens_per_second: float


class Bucket:
    """See the module. All moments are monotonic seconds and never go back."""

    def __init__(self, limit: Limit, now: float) -> None:
        self._limit = limit
        self._tokens = limit.tokens_max  # below zero: owed to calls that wait
        self._filled_at = now
        self._slow_until_at = now

    def take(self, now: float, wait_seconds_max: float) -> float | None:
        """From when on the call may leave, its token taken; None when that is too far away."""
        self._fill(now)
        leaves_at = self._filled_by(max(0.0, 1.0 - self._tokens), now)
        if leaves_at - now > wait_seconds_max:
            return None
        self._tokens -= 1.0
        return leaves_at

    def give_back(self, now: float) -> None:
        """A call that has taken its token will not be made."""
        self._fill(now)
        self._tokens = min(self._tokens + 1.0, self._limit.tokens_max)

    def throttled(self, now: float) -> None:
        """The cloud has refused a call because there were too many."""
        self._fill(now)
        self._tokens = min(self._tokens, 0.0)
        self._slow_until_at = now + SLOW_SECONDS

    def _fill(self, now: float) -> None:
        self._tokens = min(self._tokens + self._gained(now), self._limit.tokens_max)
        self._filled_at = now

    def _gained(self, now: float) -> float:
        """What the bucket has gained since it was last filled."""
        slow_seconds = max(0.0, min(now, self._slow_until_at) - self._filled_at)
        full_seconds = now - self._filled_at - slow_seconds
        return (slow_seconds * SLOW_SHARE + full_seconds) * self._limit.tokens_per_second

    def _filled_by(self, tokens: float, now: float) -> float:
        """When it will have gained so many more."""
        full_seconds = tokens / self._limit.tokens_per_second
        slow_seconds = max(0.0, self._slow_until_at - now)
        if full_seconds <= slow_seconds * SLOW_SHARE:
            return now + full_seconds / SLOW_SHARE
        return now + slow_seconds + full_seconds - slow_seconds * SLOW_SHARE
