"""Writes our claim onto the machines we are in charge of, so that no other broker with our id touches them.

Woken by a complete scan that finds a claim due, because a claim is only written on the word of a listing that
has just shown that nobody else is in charge: then two brokers that start at once cannot overwrite each other
for ever. All machines get it every BEAT_SECONDS, and one that carries another claim, or none, at once.
Failing costs nothing until STALE_SECONDS have gone by; then another broker may take over, and is seen in the
next scan.
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

    def due(self) -> bool:
        """Whether a tick would write anything: mostly a scan has shown that all is as it should be."""
        return any(self._unclaimed(cloud) for cloud in self._context.clouds.all)

    async def tick(self) -> float | None:
        await asyncio.gather(*(self._beat(cloud) for cloud in self._context.clouds.all))
        return None

    def _unclaimed(self, cloud: Cloud) -> list[str]:
        """The machines that need our claim now."""
        now = self._context.now()
        if not cloud.provider.contested or not cloud.claims or not cloud.acts(now):
            return []
        if self._not_before.get(id(cloud), now) > now:
            return []
        rank, all_of_them = (self._context.epoch, self._context.owner), self._round_due(cloud)
        return [
            one for one, on_it in cloud.claims.items() if all_of_them or on_it is None or on_it.rank != rank
        ]

    def _round_due(self, cloud: Cloud) -> bool:
        """Whether all machines need a new beat: with the last scan before it is due, not the first after."""
        return self._context.now() + self._interval > self._beaten_at.get(id(cloud), -inf) + BEAT_SECONDS

    async def _beat(self, cloud: Cloud) -> None:
        ids, claims = self._unclaimed(cloud), cloud.claims
        if not ids:
            return
        now, claim, due = self._context.now(), self._context.claim(cloud), self._round_due(cloud)
        try:
            await cloud.provider.tag_all(ids, {tags.EPOCH: str(claim)})
        except BrokerError as error:
            self._not_before[id(cloud)] = self._context.now() + PAUSE_SECONDS
            self._report(
                "claim not written; may the broker write the tag " + tags.EPOCH + "?",
                {"cloud": cloud.provider.name, "machines": len(ids), "error": error.message},
            )
            return
        claims.update(dict.fromkeys(ids, claim))  # a newer scan has claims of its own
        if due:
            self._beaten_at[id(cloud)] = now

    @property
    def _interval(self) -> float:
        return self._context.settings.broker.reconcile_interval
