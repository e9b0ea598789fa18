"""Which provider serves which pool: pools that buy at one place share one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from broker.clock import Clock
from broker.core.settings import PoolSettings, Settings
from broker.providers.base import Place, Provider
from broker.providers.ec2 import Ec2Provider
from broker.providers.local import LocalProvider

# settings, state directory, clock, who hears of calls, the providers there are → pool name → provider
MakeProviders = Callable[
    [Settings, Path, Clock, Callable[[str, str], None], Sequence[Provider]], Mapping[str, Provider]
]


def make_providers(
    settings: Settings,
    state_dir: Path,
    clock: Clock,
    on_call: Callable[[str, str], None],
    current: Sequence[Provider] = (),
) -> Mapping[str, Provider]:
    """Pool name → provider. A place that one of the `current` providers serves keeps it."""
    pools_at: dict[Place, dict[str, PoolSettings]] = {}
    for name, pool in settings.pool.items():
        pools_at.setdefault(place_of(pool), {})[name] = pool
    known = {provider.place: provider for provider in current}
    providers: dict[str, Provider] = {}
    for place, pools in pools_at.items():
        provider = known.get(place) or _make(place, settings.broker.id, pools, state_dir, clock, on_call)
        providers.update(dict.fromkeys(pools, provider))
    return providers


def place_of(pool: PoolSettings) -> Place:
    """Where the pool buys, as the settings say it."""
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
