"""Which providers serve which pool, one for each of its regions: pools that buy at one place share one.

The places are remembered in the store, as long as there may be machines: a broker that is started again with
a file that names them no more would not look there otherwise, and they would be orphans.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from broker.clock import Clock
from broker.context import FORGOTTEN_POOL
from broker.core.settings import PoolSettings, Settings
from broker.providers.base import Place, Provider
from broker.providers.ec2 import Ec2Provider
from broker.providers.local import LocalProvider

PLACES = "left places"  # the key in the store
LEFT_NAME = "(left {})"
LOCAL: Place = LocalProvider.place

# settings, state directory, clock, who hears of calls, the providers there are → pool name → providers
MakeProviders = Callable[
    [Settings, Path, Clock, Callable[[str, str], None], Sequence[Provider]], Mapping[str, Sequence[Provider]]
]


def make_providers(
    settings: Settings,
    state_dir: Path,
    clock: Clock,
    on_call: Callable[[str, str], None],
    current: Sequence[Provider] = (),
) -> Mapping[str, Sequence[Provider]]:
    """Pool name → its providers, in the order of its regions. A place that one of the `current` providers
    serves keeps it."""
    pools_at: dict[Place, dict[str, PoolSettings]] = {}
    for name, pool in settings.pool.items():
        for one in pool.by_region:
            pools_at.setdefault(place_of(one), {})[name] = one
    providers = {provider.place: provider for provider in current}
    for place, pools in pools_at.items():
        if place not in providers:
            providers[place] = _make(place, settings.broker.id, pools, state_dir, clock, on_call)
    return {
        name: [providers[place_of(one)] for one in pool.by_region] for name, pool in settings.pool.items()
    }


def read_places(text: str | None) -> list[Place]:
    """What `write_places` wrote; nothing from anything else."""
    try:
        found = json.loads(text or "[]")
    except ValueError:
        return []
    shaped = [tuple(one) for one in found if isinstance(one, list) and len(one) == len(LOCAL)]
    return [(str(kind), region, profile) for kind, region, profile in shaped]


def write_places(places: Iterable[Place]) -> str:
    """Places that the next start shall look at, whatever its settings name: for the store."""
    return json.dumps([list(place) for place in places])


def with_places(settings: Settings, places: Iterable[Place]) -> Settings:
    """The settings, and for each place a pool under a name that no pool can have."""
    more = {
        LEFT_NAME.format(number): FORGOTTEN_POOL.model_copy(
            update={"provider": kind, "region": region, "profile": profile}
        )
        for number, (kind, region, profile) in enumerate(places)
    }
    return settings.model_copy(update={"pool": {**settings.pool, **more}})


def place_of(pool: PoolSettings) -> Place:
    """Where the pool buys (as it is in one of its regions), as the settings say it."""
    if pool.provider == "local":
        return LocalProvider.place
    return pool.provider, pool.region, pool.profile


def _make(
    place: Place,
    broker_id: str,
    pools: Mapping[str, PoolSettings],
    state_dir: Path,
    clock: Clock,
    on_call: Callable[[str, str], None],
) -> Provider:
    kind, region, profile = place
    if kind != "ec2":
        return LocalProvider(broker_id, pools, state_dir, clock.wall, on_call)
    return Ec2Provider(
        broker_id,
        pools,
        region=region,
        profile=profile,
        clock_wall=clock.wall,
        clock_monotonic=clock.monotonic,
        on_call=on_call,
    )
