"""EC2 in one region under one account: the Provider of every pool that buys there.

A launch sends what the order holds, to the byte, with the order's id as its token: sent again it returns the
same machine. A listing is complete or an error. Nothing is touched that does not carry this broker's tag,
and a Terminate that EC2 refuses as a whole, because of one id, still ends all the others.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from broker.core import prices, tags
from broker.core.cloudtime import Span
from broker.core.errors import (
    CloudError,
    CloudUnreachable,
    InstanceNotFound,
    OfferingRefused,
    OrderSpent,
    PermanentRefusal,
    SettingsError,
)
from broker.core.model import Bought, Instance, InstanceState, Market, Offering, Order
from broker.core.settings import PoolSettings
from broker.providers import ec2_check, ec2_prices
from broker.providers.base import Change
from broker.providers.ec2_api import Account, ClientFactory, Ec2Api, OnCall
from broker.providers.ec2_fleet import MACHINES_MAX, Fleets, fleet_parameters
from broker.providers.ec2_wire import (
    OVERRIDES_MAX,
    Recipe,
    Shape,
    batches,
    filter_of,
    filters,
    instance_from,
    launch_parameters,
    named_in,
    tag_list,
    tags_from,
)

PAGE_SIZE = 1000  # the largest that DescribeInstances allows
DESCRIBED_MAX = 100  # ids in one filter; 200 are allowed (AWS: EC2 user guide, "Filtering considerations")
TERMINATED_MAX = 100  # ids in one call; 1,000 are allowed, smaller batches recommended
TAGGED_MAX = 500  # ids in one call; 1,000 are allowed (AWS: EC2 API reference, CreateTags)
ROUNDS_MAX = 3  # calls that leave out the ids EC2 named; after that it is asked for one at a time
TOKEN_CHARS_MAX = 64  # (AWS: EC2 developer guide, "Ensuring idempotency in Amazon EC2 API requests")

UNKNOWN_REGION = "(default region)"  # until the AWS configuration has been asked

ENDED = (InstanceState.SHUTTING_DOWN, InstanceState.TERMINATED)
LIVING = sorted(set(InstanceState) - set(ENDED))


class Ec2Provider:
    """See the module and base.Provider. Its pools share `region` and `profile`; None: AWS's own say."""

    name: str
    contested = True
    offerings_max = OVERRIDES_MAX
    machines_max = MACHINES_MAX

    def __init__(
        self,
        broker_id: str,
        pools: Mapping[str, PoolSettings],
        *,
        region: str | None,
        profile: str | None,
        clock_wall: Callable[[], float],
        clock_monotonic: Callable[[], float] = lambda: asyncio.get_running_loop().time(),
        client_factory: ClientFactory | None = None,
        on_call: OnCall = lambda api, outcome: None,
        page_size: int = PAGE_SIZE,
    ) -> None:
        account = Account(region, profile)
        self._check_account = None if client_factory else account.check
        self._client_factory = client_factory or account.client
        self._broker_id, self._pools, self._page_size = broker_id, dict(pools), page_size
        self._clock_wall, self._clock_monotonic = clock_wall, clock_monotonic
        self._api = Ec2Api(on_call, clock_wall, clock_monotonic)
        self._fleets = Fleets(self._api)
        self._region = region or ""
        self._recipes: dict[str, Recipe] = {}
        self._former: dict[str, PoolSettings] = {}  # pools of before, whose machines may still run
        self._offered: dict[str, tuple[Offering, ...]] = {}  # as long as nothing changes
        self.cores: dict[str, int] = {}
        self.place = ("ec2", region, profile)
        self.name = " ".join(filter(None, ("ec2", region or UNKNOWN_REGION, profile and f"({profile})")))

    async def open(self) -> None:
        await self._reach_account()
        await self._api.connect(self._client_factory)
        change = await self.study(self._pools)
        for error in change.later.values():
            raise error
        change.apply()
        mistake = change.mistake()
        if mistake is not None:
            raise mistake

    async def study(self, pools: Mapping[str, PoolSettings]) -> Change:
        """A script is read again each time; the cloud is only asked about what it has not been asked yet."""
        problems, later = ec2_check.Problems(list), dict[str, CloudError]()
        scripts = await ec2_check.user_data(pools, problems)
        known = {n for n, pool in pools.items() if n in self._recipes and self._recipes[n].suits(pool)}
        recipes = {name: replace(self._recipes[name], user_data=scripts[name]) for name in known}
        asked = {name: pool for name, pool in pools.items() if name not in known}
        try:
            recipes |= await self._ask(asked, scripts, problems) if asked else {}
        except CloudError as error:
            later = dict.fromkeys(asked, error)
        recipes = {name: recipe for name, recipe in recipes.items() if not problems[name]}
        return Change(lambda: self._swap(pools, recipes), problems, later)

    async def _ask(
        self, pools: Mapping[str, PoolSettings], scripts: Mapping[str, str], problems: ec2_check.Problems
    ) -> dict[str, Recipe]:
        groups = await ec2_check.group_ids(self._api, self._region, pools, problems)
        places = await ec2_check.places(self._api, self._region, pools, problems)
        zones = await ec2_check.default_zones(self._api, pools)
        kinds = await ec2_check.kinds_of_types(self._api, self._region, pools, problems)
        self.cores, self._offered = self.cores | {name: kind.cores for name, kind in kinds.items()}, {}
        arm = frozenset(name for name, kind in kinds.items() if kind.arm)
        return {
            name: Recipe(
                groups[name],
                scripts[name],
                places.get(name, ()),
                zones.get(name, ()),
                arm,
                asked=pool,
            )
            for name, pool in pools.items()
        }

    def _swap(self, pools: Mapping[str, PoolSettings], recipes: Mapping[str, Recipe]) -> None:
        gone = {name: pool for name, pool in self._pools.items() if name not in pools}
        self._former = {n: pool for n, pool in (self._former | gone).items() if n not in pools}
        self._pools, self._recipes, self._offered = dict(pools), dict(recipes), {}

    def recall_cores(self, cores: Mapping[str, int]) -> None:
        self.cores, self._offered = {**cores, **self.cores}, {}

    async def _reach_account(self) -> None:
        """Without a region and credentials nothing can be asked, not even what is running."""
        if self._check_account:
            key = f"pool.{next(iter(self._pools | self._former))}"  # one stands for all that share the place
            found: list[str] = []
            self._region, self._offered = await self._check_account(key, self._clock_wall(), found), {}
            if found:
                problems = ec2_check.Problems(list)
                await ec2_check.user_data(self._pools, problems)
                raise SettingsError([*(one for some in problems.values() for one in some), *found])
        self.name = self.name.replace(UNKNOWN_REGION, self._region)

    async def close(self) -> None:
        await self._api.close()

    def offerings(self, pool: str) -> Sequence[Offering]:
        if pool not in self._offered:
            self._offered[pool] = self._offerings(pool)
        return self._offered[pool]

    def _offerings(self, pool: str) -> tuple[Offering, ...]:
        settings, recipe = self._pools[pool], self._recipes.get(pool, Recipe())
        zones = [zone for zone, _ in recipe.places] or settings.zones or recipe.zones or ("",)
        kinds = dict.fromkeys(settings.instance_types)
        return tuple(
            self._offering(settings, kind, Market(market), zone)
            for market in settings.markets
            for kind in kinds
            for zone in zones
        )

    def _offering(self, settings: PoolSettings, kind: str, market: Market, zone: str) -> Offering:
        cores = self.cores.get(kind)
        cost = prices.price(settings, kind, cores, market)
        return Offering(
            self._region,
            kind,
            market,
            zone,
            cores=cores,
            price_usd_micros_per_hour=cost.usd_micros_per_hour,
            price_assumed=cost.assumed,
        )

    def prepare(
        self,
        pool: str,
        order_id: str,
        offerings: Sequence[Offering],
        created_unix: float,
        epoch: str = "",
        count: int = 1,
    ) -> Order:
        assert order_id.isascii(), "an order's id is its client token"
        assert len(order_id) <= TOKEN_CHARS_MAX, "an order's id is its client token"
        settings = self._pools[pool]
        launch_tags = tags.launch_tags(
            tags.Identity(self._broker_id, pool, order_id, epoch=epoch),
            settings.name_tag,
            settings.tags,
            expires_unix=created_unix + settings.max_lifetime,
        )
        recipe = self._recipes[pool]
        if len(offerings) > 1:
            parameters = fleet_parameters(self._broker_id, settings, recipe, offerings, launch_tags, count)
        else:
            parameters = launch_parameters(settings, recipe, offerings[0], launch_tags, count)
        exact = json.dumps(parameters, sort_keys=True, separators=(",", ":"))
        return Order(order_id, pool, tuple(offerings), exact, created_unix, count)

    async def launch(self, order: Order) -> Bought:
        parameters = json.loads(order.parameters)
        if "fleet" in parameters:
            with _understood("CreateFleet"):
                return await self._fleets.launch(order, parameters, self._region)
        answer = await self._api.call("RunInstances", **parameters, ClientToken=order.id)
        with _understood("RunInstances"):
            instances = tuple(self._instance(shape) for shape in answer["Instances"])
            first = instances[0]
        if all(one.state in ENDED for one in instances):  # a token may return its dead machines
            why = f" ({first.reason})" if first.reason else ""
            raise OrderSpent(f"the machine of this order, {first.id}, is {first.state} already{why}")
        return Bought(
            tuple(one for one in instances if one.state not in ENDED), self._short(order, instances)
        )

    def _short(self, order: Order, instances: Sequence[Instance]) -> tuple[tuple[Offering, CloudError], ...]:
        """RunInstances gives what there is, without a word about the rest."""
        if len(instances) >= order.count:
            return ()
        words = f"EC2 had only {len(instances)} of {order.count} {order.offerings[0].instance_type}"
        return ((order.offerings[0], OfferingRefused(words)),)

    async def listing(self) -> list[Instance]:
        tagged = await self._instances([filter_of(f"tag:{tags.BROKER}", [self._broker_id])])
        found = {one.id: one for one in tagged if one.tags.get(tags.BROKER) == self._broker_id}
        for one in await self._adoptable():
            found.setdefault(one.id, one)
        return list(found.values())

    async def describe(self, instance_ids: Iterable[str]) -> list[Instance]:
        found: list[Instance] = []
        for batch in batches(instance_ids, DESCRIBED_MAX):
            # By filter, because one unknown id among InstanceIds makes the whole call fail.
            found += await self._instances(filters(instance_id=batch))
        return found

    async def terminate(self, instance_ids: Iterable[str]) -> None:
        refusals: list[PermanentRefusal] = []
        for batch in batches(instance_ids, TERMINATED_MAX):
            refusals += await self._for_all("TerminateInstances", "InstanceIds", batch)
        if refusals:
            raise refusals[0]

    async def stop(self, instance_id: str) -> None:
        await self._api.call("StopInstances", InstanceIds=[instance_id])

    async def start(self, instance_id: str) -> None:
        await self._api.call("StartInstances", InstanceIds=[instance_id])

    async def tag(self, instance_id: str, tags: Mapping[str, str]) -> None:
        await self._api.call("CreateTags", Resources=[instance_id], Tags=tag_list(tags))

    async def tag_all(self, instance_ids: Iterable[str], tags: Mapping[str, str]) -> None:
        for batch in batches(instance_ids, TAGGED_MAX):
            # A refusal is a missing permission: asking for each alone would be hundreds of the same.
            refusals = await self._for_all("CreateTags", "Resources", batch, Tags=tag_list(tags), alone=False)
            if refusals:
                raise refusals[0]

    async def spot_prices(self, pool: str) -> Mapping[tuple[str, str], int]:
        now_unix = self._api.clock_unix(self._clock_monotonic()).latest_unix
        found = await ec2_prices.history(self._api, self._pools[pool].instance_types, now_unix)
        with _understood(ec2_prices.API):
            return ec2_prices.current(found)

    def round_trip_seconds(self) -> float | None:
        return self._api.round_trip.seconds

    def clock_unix(self, at: float) -> Span:
        return self._api.clock_unix(at)

    async def _adoptable(self) -> list[Instance]:
        """Living machines with an adopting pool's name that belong to no broker."""
        names = {pool.name_tag for pool in self._pools.values() if pool.adopt_name_tag}
        if not names:
            return []
        named = await self._instances(
            [filter_of(f"tag:{tags.NAME}", sorted(names)), *filters(instance_state_name=LIVING)]
        )
        return [one for one in named if one.tags.get(tags.NAME) in names and tags.BROKER not in one.tags]

    async def _instances(self, chosen: list[dict[str, Any]]) -> list[Instance]:
        reservations = await self._api.every(
            "DescribeInstances", "Reservations", Filters=chosen, MaxResults=self._page_size
        )
        with _understood("DescribeInstances"):
            return [self._instance(shape) for some in reservations for shape in some.get("Instances") or ()]

    def _instance(self, shape: Shape) -> Instance:
        its_tags = tags_from(shape)
        return instance_from(shape, self._region, self._address_setting(its_tags), its_tags)

    def _address_setting(self, its_tags: Mapping[str, str]) -> str:
        """Which address the machine's pool hands out; an adopted one's pool is known by its name tag."""
        name = its_tags.get(tags.POOL, "")
        pool = self._pools.get(name) or self._former.get(name)
        if pool is None:
            adopters = (one for one in self._pools.values() if one.adopt_name_tag)
            pool = next((one for one in adopters if one.name_tag == its_tags.get(tags.NAME)), None)
        return pool.address if pool else "public"

    async def _for_all(
        self, api: str, named: str, ids: Sequence[str], *, alone: bool = True, **parameters: Any
    ) -> list[PermanentRefusal]:
        """All or none is EC2's rule: leave out what it names; when that does not help, ask for each alone,
        with `alone` after a refusal too. Returns the refusals."""
        for _ in range(ROUNDS_MAX):
            if not ids:
                return []
            try:
                await self._api.call(api, **{named: list(ids)}, **parameters)
            except InstanceNotFound as error:
                unknown = named_in(error.message, ids)
                if not unknown:
                    break
                ids = [one for one in ids if one not in unknown]
            except PermanentRefusal as error:
                if not alone:
                    return [error]
                break
            else:
                return []
        return await self._for_each(api, named, ids, **parameters)

    async def _for_each(
        self, api: str, named: str, ids: Sequence[str], **parameters: Any
    ) -> list[PermanentRefusal]:
        refusals: list[PermanentRefusal] = []
        for one in ids:
            try:
                await self._api.call(api, **{named: [one]}, **parameters)
            except InstanceNotFound:
                continue
            except PermanentRefusal as error:
                refusals.append(error)
        return refusals


@contextmanager
def _understood(api: str) -> Iterator[None]:
    """An answer of another shape than EC2's leaves open what was done."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CloudUnreachable(f"EC2's answer to {api} cannot be understood ({error!r})") from error
