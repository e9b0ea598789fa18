"""What every request for a worker must pass: a pool that exists, a wish that can be met, and a broker that
has seen its clouds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from broker.clouds import is_known
from broker.context import Context
from broker.core.errors import BadRequest, BrokerError, CloudError, Draining, WaitTimedOut
from broker.core.model import Offering
from broker.core.settings import PoolSettings
from broker.core.wish import ANYTHING, Wish

HAND_OUT_ATTEMPTS_MAX = 20  # a worker may be lost between choice and answer; so often in a row is no accident


class Admission:
    """See the module. `closing`: the broker is going down, nobody else starts to wait."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._now = context.clock.monotonic
        self.closing = False

    def pool(self, name: str | None) -> tuple[str, PoolSettings]:
        """The pool of that name, `default` without one. Raises BadRequest."""
        pool = self._context.settings.pool.get(name or "default")
        if pool is None:
            raise self._context.no_such_pool(name or "default")
        return name or "default", pool

    async def admit(self, named: str | None, wish: Wish, deadline_at: float) -> tuple[str, PoolSettings]:
        """The pool for a wish: the one named; otherwise `default` if it suits, or the first that does. Its
        clouds have been looked at by then.

        Raises BadRequest when none could ever meet the wish; CloudError or WaitTimedOut when that is not
        known of all of them.
        """
        default, pool = self.pool(named)
        others = [] if named or wish == ANYTHING else [n for n in self._context.settings.pool if n != default]
        unknown: BrokerError | None = None
        try:
            await self.recovered(default, deadline_at)
        except (CloudError, WaitTimedOut) as error:
            if not others:
                raise
            unknown = error
        else:
            if self._has(default, wish):
                return default, pool
        for other in sorted(others, key=lambda one: not self._is_known(one)):  # what is known costs no time
            try:
                await self.recovered(other, deadline_at)
            except (CloudError, WaitTimedOut) as error:
                unknown = unknown or error
            else:
                if other in self._context.settings.pool and self._has(other, wish):
                    return self.pool(other)
        raise unknown or self._impossible(wish, [default, *others])

    def _has(self, pool: str, wish: Wish) -> bool:
        """Whether something in the pool could meet the wish."""
        if wish == ANYTHING or not self._context.clouds.of(pool):
            return True
        return any(wish.fits(offering) for offering in self._context.offerings(pool))

    def _impossible(self, wish: Wish, pools: Sequence[str]) -> BadRequest:
        has = {one: _catalogue(self._context.offerings(one)) for one in pools}
        if len(has) == 1:
            return BadRequest(f"pool '{pools[0]}' has nothing with {wish}; it has {has[pools[0]]}")
        there = "; ".join(f"pool '{one}' has {catalogue}" for one, catalogue in has.items())
        return BadRequest(f"no pool has anything with {wish}; {there}")

    async def recovered(self, pool: str | None = None, deadline_at: float | None = None) -> None:
        """Wait for the first complete scan, of one cloud or of all. Raises CloudError, WaitTimedOut."""
        try:
            async with asyncio.timeout(None if deadline_at is None else max(0.0, deadline_at - self._now())):
                while not self._is_known(pool):
                    if self.closing:
                        raise Draining("the broker is restarting; ask again in a moment")
                    self._require_hope(pool)
                    await self._context.scanned.wait()
        except TimeoutError:
            raise WaitTimedOut("the broker has just started and is still looking for its workers") from None

    def _is_known(self, pool: str | None) -> bool:
        """A reload may change which clouds those are; a pool that there is no more has none."""
        clouds = self._context.clouds
        return all(cloud.recovered for cloud in clouds.all) if pool is None else is_known(clouds.of(pool))

    def _require_hope(self, pool: str | None) -> None:
        """Raises CloudError when waiting is in vain: for any cloud that has to be known; for a pool with
        several, when none of them can be had."""
        clouds = self._context.clouds.all if pool is None else self._context.clouds.of(pool)
        refusals = [refusal for cloud in clouds if (refusal := cloud.refusal(pool)) is not None]
        if refusals and (pool is None or len(refusals) == len(clouds)):
            raise refusals[0]


def _catalogue(offerings: Sequence[Offering]) -> str:
    return ", ".join(
        dict.fromkeys(  # the same in each zone
            f"{o.instance_type} in {o.region} ({o.cores if o.cores else 'an unknown number of'} cores)"
            for o in offerings
        )
    )
