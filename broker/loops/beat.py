"""Writes our claim onto the machines we are in charge of, so that no other broker with our id touches them.

Woken by every complete scan, because a claim is only written on the word of a listing that has just shown
that nobody else is in charge: then two brokers that start at once cannot overwrite each other for ever. All
machines get it every BEAT_SECONDS, and one that carries another claim, or none, at once. Failing costs
nothing until STALE_SECONDS have gone by; then another broker may take over, and is seen in the next scan.
"""

from __future__ import annotations

import asyncio
from math import inf

from broker.clouds import Cloud
from broker.context import Context
from broker.core import tags
from broker.core.claim import BEAT_SECONDS
from broker.core.errors import BrokerError
from broker.loops.reap import Report

PAUSE_SECONDS = (
    60.0  # after a beat that could not be written: a missing permission is not asked for each scan
)


class BeatLoop:
    """See the module."""

    name = "beat"

    def __init__(self, context: Context, report: Report) -> None:
        self._context = context
        self._report = report
        self._beaten_at: dict[int, float] = {}  # by cloud: when all its machines got our claim
        self._not_before: dict[int, float] = {}

    async def tick(self) -> float | None:
        clouds = [cloud for cloud in self._context.clouds.all if cloud.provider.contested]
        await asyncio.gather(*(self._beat(cloud) for cloud in clouds))
        return None

    async def _beat(self, cloud: Cloud) -> None:
        now, key, claims = self._context.now(), id(cloud), cloud.claims
        if not cloud.acts(now) or self._not_before.get(key, now) > now:
            return
        claim = self._context.claim()
        # The last scan before the beat is due, not the first one after it.
        due = now + self._interval > self._beaten_at.get(key, -inf) + BEAT_SECONDS
        ids = [one for one, on_it in claims.items() if due or on_it is None or on_it.rank != claim.rank]
        if not ids:
            return
        try:
            await cloud.provider.tag_all(ids, {tags.EPOCH: str(claim)})
        except BrokerError as error:
            self._not_before[key] = self._context.now() + PAUSE_SECONDS
            self._report(
                "claim not written; may the broker write the tag " + tags.EPOCH + "?",
                {"cloud": cloud.provider.name, "machines": len(ids), "error": error.message},
            )
            return
        claims.update(dict.fromkeys(ids, claim))
        if due:
            self._beaten_at[key] = now

    @property
    def _interval(self) -> float:
        return self._context.settings.broker.reconcile_interval
