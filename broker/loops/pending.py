"""Tells those who wait, and want to hear it, how it stands: once at first, then what is new.

One look over a queue serves everybody in it, so that the cost of a second grows with the number of those who
wait and no faster.
"""

from __future__ import annotations

from collections.abc import Callable

from broker.context import Context
from broker.core.replies import Pending
from broker.prospects import Prospects
from broker.waiting import Waiter

LOOK_SECONDS = 1.0  # between two looks, and so between two lines to one client
LOOK_SECONDS_MIN = 0.1  # when somebody new comes: a line at once, but not a look for each of thousands
NEW_SECONDS = 0.04  # after somebody has come: launches are gathered for 35 ms, and then there is more to say
REPEAT_SECONDS = 10.0  # a line although nothing but the time has changed


class PendingLoop:
    """See the module. `serve` is called for each pool: a turn in its queue may be over. `wake` has this loop
    tick again."""

    name = "pending"

    def __init__(
        self,
        context: Context,
        prospects: Prospects,
        *,
        serve: Callable[[str], None],
        wake: Callable[[], None],
    ) -> None:
        self._context = context
        self._prospects = prospects
        self._serve = serve
        self._wake = wake
        self._looked_at = float("-inf")
        self._came_at: float | None = None  # the first of those who have not been told anything yet

    def came(self) -> None:
        """Somebody new waits, and wants to hear how it stands."""
        self._came_at = self._context.now() if self._came_at is None else self._came_at
        self._wake()

    async def tick(self) -> float | None:
        now = self._context.now()
        look_at = max((self._came_at or 0.0) + NEW_SECONDS, self._looked_at + LOOK_SECONDS_MIN)
        if now < look_at:
            return look_at
        self._came_at, somebody = None, False
        for pool in self._context.settings.pool:
            if any(waiter.terms is not None for waiter in self._context.waiting.of(pool)):
                somebody = True
                self._serve(pool)
                self._tell_all(pool, now)
        self._looked_at = now if somebody else self._looked_at
        return now + LOOK_SECONDS if somebody else None

    def _tell_all(self, pool: str, now: float) -> None:
        for waiter, pending in self._prospects.of(pool):
            if waiter.say is not None and _is_news(waiter, pending, now):
                waiter.told, waiter.told_at = pending, now
                waiter.say(pending.line())


def _is_news(waiter: Waiter, pending: Pending, now: float) -> bool:
    told, ago_seconds = waiter.told, now - waiter.told_at
    if told is None or ago_seconds >= REPEAT_SECONDS - LOOK_SECONDS / 2:  # the look that is nearest
        return True
    changed = (told.position, told.code) != (pending.position, pending.code)
    return changed and ago_seconds >= LOOK_SECONDS
