"""DescribeInstances of the simulated EC2: what it shows, which is not always what is true.

A listing looks at the machines as they are, or as they were a while ago. Which machines it consists of is
settled with its first page; what each looks like, page by page.
(AWS: EC2 API reference, "DescribeInstances"; EC2 developer guide, "Eventual consistency".)
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from broker.providers import sim_shapes
from broker.providers.sim_machine import Machine
from broker.providers.sim_sky import Refused
from broker.providers.sim_weather import Fault
from broker.providers.sim_world import World

Answer = dict[str, Any]
Parameters = Mapping[str, Any]

PAGE_ITEMS_MIN, PAGE_ITEMS_MAX = 5, 1000
LISTINGS_KEPT_MAX = 64  # whose later pages can still be asked for


@dataclass(slots=True)
class Listing:
    """One listing under way; nothing changes it."""

    machines: list[Machine]
    items: int  # on a page
    lag_seconds: float  # how old the truth is that it shows; 0 for now


class Lister:
    """See the module. `omit`: machine id → so many more listings miss it, unless they ask for it by id."""

    def __init__(self, world: World) -> None:
        self.omit: dict[str, int] = {}
        self.lags: list[float] = []  # of the next listings
        self._world, self._sky = world, world.sky
        self._listings: OrderedDict[str, Listing] = OrderedDict()
        self._numbers = itertools.count(1)

    def describe_instances(self, parameters: Parameters) -> Answer:
        """Raises Refused."""
        token = parameters.get("NextToken")
        if token:
            return self._next_page(str(token))
        ids = parameters.get("InstanceIds") or ()
        items = self._page_items(parameters, ids)
        lag_seconds = self._lag_seconds()
        view_at = self._sky.at - lag_seconds if lag_seconds else None
        filters = parameters.get("Filters") or ()
        tests = sim_shapes.tests_of(filters)
        machines = self._named(ids, view_at) if ids else self._world.listed.values()
        found = [one for one in machines if all(test(one, view_at) for test in tests)]
        if not ids:
            found = [one for one in found if self._shows(one, view_at)]
            if not any(one["Name"] == "instance-id" for one in filters):
                found = self._shortened(found)
        return self._page(Listing(found, items, lag_seconds), 0)

    def heal(self) -> None:
        self.omit.clear()
        self.lags.clear()

    # --- what is seen ------------------------------------------------------------------------------

    def _lag_seconds(self) -> float:
        sky = self._sky
        if self.lags:
            seconds = self.lags.pop(0)
        elif sky.views.chance(sky.weather.stale):
            seconds = sky.views.within(sky.weather.stale_seconds)
        else:
            return 0.0
        view_at = sky.at - seconds
        if any(one.changed_at > view_at for one in self._world.listed.values()):
            sky.met(Fault.STALE, f"{seconds:.0f} s old")
        return seconds

    def _shows(self, machine: Machine, view_at: float | None) -> bool:
        at = self._sky.at if view_at is None else view_at
        if at >= machine.steady_at:
            return True
        if at < machine.launched_at:  # an outdated view knows nothing of it
            return False
        if at < machine.visible_at:
            self._sky.met(Fault.HIDDEN, machine.id)
            return False
        if self._sky.views.chance(self._sky.weather.flicker):
            self._sky.met(Fault.FLICKER, machine.id)
            return False
        return True

    def _named(self, ids: Sequence[str], view_at: float | None) -> list[Machine]:
        """By InstanceIds: one that is not known, or not yet, and nothing is shown."""
        refuse_malformed(ids)
        listed = self._world.listed
        unknown = [one for one in ids if one not in listed or not self._shows(listed[one], view_at)]
        if unknown:
            raise not_found(unknown)
        return [listed[one] for one in dict.fromkeys(ids)]

    def _shortened(self, found: list[Machine]) -> list[Machine]:
        missed = [one for one in found if self.omit.get(one.id, 0) > 0] if self.omit else []
        for one in missed:
            self.omit[one.id] -= 1
        views = self._sky.views
        if not missed and found and views.chance(self._sky.weather.listing_short):
            missed = [views.pick(found)]
        for one in missed:
            self._sky.met(Fault.LISTING_SHORT, one.id)
        return [one for one in found if one not in missed]

    # --- pages -------------------------------------------------------------------------------------

    def _page_items(self, parameters: Parameters, ids: Sequence[str]) -> int:
        wanted = parameters.get("MaxResults")
        if ids:
            if wanted is not None:
                raise Refused(
                    "InvalidParameterCombination",
                    "The parameter instancesSet cannot be used with the parameter maxResults",
                )
            return max(1, len(ids))
        if wanted is not None and not PAGE_ITEMS_MIN <= int(wanted) <= PAGE_ITEMS_MAX:
            raise Refused(
                "InvalidParameterValue",
                f"Value ( {wanted} ) for parameter maxResults is invalid. Expecting a value from "
                f"{PAGE_ITEMS_MIN} to {PAGE_ITEMS_MAX}.",
            )
        return min(int(wanted or PAGE_ITEMS_MAX), self._sky.weather.page_items_max)

    def _page(self, listing: Listing, offset: int) -> Answer:
        view_at = self._sky.at - listing.lag_seconds if listing.lag_seconds else None
        end = offset + listing.items
        shown = [one for one in listing.machines[offset:end] if one.id in self._world.listed]
        answer: Answer = {
            "Reservations": [
                sim_shapes.reservation(one, [sim_shapes.instance(one, view_at)]) for one in shown
            ]
        }
        if end < len(listing.machines):
            answer["NextToken"] = self._keep(listing, end)
        return answer

    def _keep(self, listing: Listing, offset: int) -> str:
        token = f"listing-{next(self._numbers)}-{offset}"
        self._listings[token] = listing
        while len(self._listings) > LISTINGS_KEPT_MAX:
            self._listings.popitem(last=False)
        return token

    def _next_page(self, token: str) -> Answer:
        listing = self._listings.get(token)
        if listing is None:
            raise Refused("InvalidNextToken", "The token is invalid or has expired.")
        if self._sky.views.chance(self._sky.weather.page_failed):
            raise self.failed_page()
        return self._page(listing, int(token.rpartition("-")[2]))

    def failed_page(self) -> Refused:
        """A fault of EC2's own, or a place in the listing that it has lost."""
        self._sky.met(Fault.PAGE_FAILED)
        if self._sky.views.chance(0.5):
            return Refused("InvalidNextToken", "The token is invalid or has expired.")
        return Refused("InternalError", "An internal error has occurred", 500)


def refuse_malformed(ids: Iterable[str]) -> None:
    """Raises Refused for what cannot be an id."""
    for one in ids:
        if not (one.startswith("i-") and len(one) > 2 and set(one[2:]) <= set("0123456789abcdef")):
            raise Refused("InvalidInstanceID.Malformed", f'Invalid id: "{one}"')


def not_found(ids: Sequence[str]) -> Refused:
    names = ", ".join(ids)
    words = f"IDs '{names}' do not exist" if len(ids) > 1 else f"ID '{names}' does not exist"
    return Refused("InvalidInstanceID.NotFound", f"The instance {words}")
