"""What launch calls have met lately that is not about what can be bought (core/cooling.py has that).

A call that was *held up* (throttled, refused before it was looked at, a disk that is full) makes the pool
pause in that cloud, longer each time, when clients go on waiting. A cloud whose calls fail is *passed over*
where the pool has other regions. A *drought* is how long a wish has waited while spot was refused for it.
"""

from __future__ import annotations

from collections.abc import Collection

from broker.clouds import Cloud
from broker.context import Context
from broker.core.backoff import doubled
from broker.core.errors import BrokerError
from broker.core.model import Offering
from broker.core.wish import Wish

PAUSE_SECONDS_MIN = 10.0  # after the first call that was held up, doubling
PAUSE_SECONDS_MAX = 300.0
PASSED_OVER_SECONDS = 60.0  # for so long a region whose launch calls failed is passed over

Key = tuple[str, int]  # pool, cloud
Standing = dict[Key, tuple[float, BrokerError]]  # until when, and why


class Setbacks:
    """See the module."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._pauses: Standing = {}
        self._held_up: dict[Key, int] = {}  # so many times in a row
        self._passed_over: Standing = {}
        self._droughts: dict[tuple[str, Wish], float] = {}  # since when

    def reloaded(self, pools: Collection[str]) -> None:
        """Settings were read in again: what was held up or passed over is tried again."""
        self._passed_over = {key: one for key, one in self._passed_over.items() if key[0] not in pools}
        self._pauses = {key: pause for key, pause in self._pauses.items() if key[0] not in pools}
        self._held_up = {key: times for key, times in self._held_up.items() if key[0] not in pools}

    def answered(self, pool: str, cloud: Cloud) -> None:
        """A launch call was looked at, and something was sold or refused."""
        self._held_up.pop((pool, id(cloud)), None)

    def times(self, pool: str, cloud: Cloud) -> int:
        """How often in a row launch calls were not looked at."""
        return self._held_up.get((pool, id(cloud)), 0)

    def held_up(self, pool: str, cloud: Cloud, error: BrokerError) -> None:
        """A launch call was not looked at."""
        key, now = (pool, id(cloud)), self._context.now()
        times = self._held_up[key] = self._held_up.get(key, 0) + 1
        self._pauses[key] = now + doubled(PAUSE_SECONDS_MIN, times, PAUSE_SECONDS_MAX), error

    def goes_elsewhere(self, pool: str, cloud: Cloud | None, error: BrokerError) -> bool:
        """Whether the pool has other regions: then this one is passed over for a while."""
        if cloud is None or len(self._context.clouds.of(pool)) < 2:
            return False
        self._passed_over[pool, id(cloud)] = self._context.now() + PASSED_OVER_SECONDS, error
        return True

    def pause(self, pool: str, cloud: Cloud) -> BrokerError | None:
        """Why the pool asks nothing of the cloud for a moment, if it does not."""
        return self._standing(self._pauses, pool, cloud)

    def passed_over(self, pool: str, cloud: Cloud) -> BrokerError | None:
        """Why the pool buys elsewhere, if it does."""
        return self._standing(self._passed_over, pool, cloud)

    def spot_refused(self, pool: str, wish: Wish) -> None:
        """Somebody waits for this, and spot cannot be had."""
        self._droughts.setdefault((pool, wish), self._context.now())

    def spot_bought(self, pool: str, offerings: Collection[Offering]) -> None:
        """One of these was bought on spot."""
        self._droughts = {
            (name, wish): since_at
            for (name, wish), since_at in self._droughts.items()
            if name != pool or not any(wish.fits(one) for one in offerings)
        }

    def waits_for(self, pool: str, wishes: Collection[Wish]) -> None:
        """Nobody in the pool waits for anything else."""
        self._droughts = {
            key: since_at for key, since_at in self._droughts.items() if key[0] != pool or key[1] in wishes
        }

    def drought_since_at(self, pool: str, wish: Wish) -> float | None:
        """Since when somebody has always waited for this while spot was refused."""
        refused_at, waits_at = self._droughts.get((pool, wish)), self._context.waiting.since_at(pool)
        return None if refused_at is None or waits_at is None else max(refused_at, waits_at)

    def _standing(self, reasons: Standing, pool: str, cloud: Cloud) -> BrokerError | None:
        until_at, error = reasons.get((pool, id(cloud)), (0.0, None))
        return error if self._context.now() < until_at else None
