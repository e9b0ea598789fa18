"""Keeps the spot prices of those pools known that buy or have bought: the others cost no call.

A refresh that fails changes nothing: the old prices stand until they are too old (core/quotes.py), and then
they count as unknown, which forbids nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from broker.clouds import Cloud
from broker.context import Context
from broker.core.errors import BrokerError, CloudUnreachable, PermanentRefusal
from broker.core.life import BOOKED
from broker.core.model import Market
from broker.loops.reap import Report

REFRESH_SECONDS = 600.0  # prices move over hours, and a decision about cents needs no fresher one
RETRY_SECONDS = 60.0  # after a failure; six refreshes have then failed before a price is forgotten
Key = tuple[str, int]  # pool, cloud
CALL_SECONDS_MAX = 45.0  # two attempts of a call and a page more: a price is not worth a longer wait


class PricesLoop:
    """See the module. `heard` is called when a question has its answer, or has failed."""

    name = "prices"

    def __init__(self, context: Context, report: Report, *, heard: Callable[[], None]) -> None:
        self._context = context
        self._report = report
        self._heard = heard
        self._due_at: dict[Key, float] = {}  # when the prices are to be asked for again

    async def tick(self) -> float | None:
        """Asks for what is due: nothing without demand and machines. Clients and scans wake this loop."""
        context = self._context
        asked = {
            (name, id(cloud)): cloud for name in context.settings.pool for cloud in context.clouds.of(name)
        }
        self._due_at = {key: at for key, at in self._due_at.items() if key in asked}
        needed = {key: cloud for key, cloud in asked.items() if self._is_needed(key[0], cloud)}
        for key, cloud in needed.items():
            due = self._due_at.get(key, context.now()) <= context.now()
            if due and self._is_needed(key[0], cloud):  # a reload may have taken the pool meanwhile
                self._due_at[key] = context.now() + await self._refresh(cloud, key[0])
                cloud.quotes.heard(key[0], context.now())
                self._heard()
        return min((self._due_at[key] for key in needed if key in self._due_at), default=None)

    def _is_needed(self, name: str, cloud: Cloud) -> bool:
        """Whether the pool has clients waiting, machines or spare ones to buy, and this cloud of its can be
        asked and sells on spot."""
        context = self._context
        if name not in context.settings.pool or cloud not in context.clouds.of(name):
            return False
        if not cloud.recovered or cloud.rival is not None or cloud.refusal() is not None:
            return False
        if all(offering.market is not Market.SPOT for offering in cloud.provider.offerings(name)):
            return False
        demand = context.waiting.of(name) or context.registry.count(name, *BOOKED)
        return bool(demand) or context.pool(name).keeps_warm

    async def _refresh(self, cloud: Cloud, name: str) -> float:
        """In how many seconds to ask again."""
        try:
            async with asyncio.timeout(CALL_SECONDS_MAX):
                prices = await cloud.provider.spot_prices(name)
        except TimeoutError:
            return self._failed(name, CloudUnreachable(f"no spot prices within {CALL_SECONDS_MAX:.0f} s"))
        except BrokerError as error:
            return self._failed(name, error)
        cloud.quotes.told(prices, self._context.now())
        return REFRESH_SECONDS

    def _failed(self, name: str, error: BrokerError) -> float:
        """A missing permission is a person's to mend: it is not asked for every minute."""
        self._report("spot prices not refreshed", {"pool": name, "error": error.message})
        return REFRESH_SECONDS if isinstance(error, PermanentRefusal) else RETRY_SECONDS
