"""The simulated EC2's DescribeSpotPriceHistory: the prices at the start time, as the broker asks for them.

Asked for with a start time, EC2 tells the last change before it; here that is the price of now, so there is
one item for each zone and type, in the order in which the types are named. (AWS: EC2 API reference,
DescribeSpotPriceHistory.)
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from broker.core.money import USD_MICROS
from broker.providers.sim_calls import Answer, Call
from broker.providers.sim_listing import PAGE_ITEMS_MAX, Lister
from broker.providers.sim_market import vcpus_of
from broker.providers.sim_sky import Refused
from broker.providers.sim_world import World

TOKEN = "prices-"  # noqa: S105


class PriceHistory:
    """See the module. Pages fail as often as the lister's."""

    def __init__(self, world: World, lister: Lister) -> None:
        self._market, self._sky, self._lister = world.market, world.sky, lister

    def describe(self, call: Call) -> Answer:
        """Raises Refused."""
        items = [
            self._item(kind, zone)
            for kind in call.parameters.get("InstanceTypes") or ()
            if vcpus_of(kind) is not None
            for zone in self._market.zones
        ]
        offset = self._offset(call)
        end = offset + min(
            int(call.parameters.get("MaxResults") or PAGE_ITEMS_MAX), self._sky.weather.page_items_max
        )
        return {
            "SpotPriceHistory": items[offset:end],
            "NextToken": f"{TOKEN}{end}" if end < len(items) else "",
        }

    def _offset(self, call: Call) -> int:
        token = str(call.parameters.get("NextToken") or "")
        if not token:
            return 0
        if not token.startswith(TOKEN):
            raise Refused("InvalidNextToken", "The token is invalid or has expired.")
        if self._sky.views.chance(self._sky.weather.page_failed):
            raise self._lister.failed_page()
        return int(token.removeprefix(TOKEN))

    def _item(self, kind: str, zone: str) -> dict[str, Any]:
        price_usd_micros = self._market.price_usd_micros_per_hour(kind, True, zone)
        return {
            "AvailabilityZone": zone,
            "InstanceType": kind,
            "ProductDescription": "Linux/UNIX",
            "SpotPrice": f"{price_usd_micros / USD_MICROS:.6f}",
            "Timestamp": datetime.fromtimestamp(self._sky.unix(0.0), UTC),
        }
