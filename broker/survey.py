"""What the pools of a file can buy, as the cloud says now: a look before a broker is started with it.

Asks and changes nothing. Every mistake that the cloud can tell of (a region, a machine type, a subnet, a
security group that there is not, a missing permission to look) is found as a broker would find it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from broker.core.buying import known_prices
from broker.core.errors import BrokerError, CloudUnreachable, SettingsError
from broker.core.model import Market, Offering
from broker.core.money import USD_MICROS
from broker.providers.base import Provider

ASK_SECONDS_MAX = 60.0  # for one place: a few calls, some of them sent again


@dataclass(frozen=True, slots=True)
class Offer:
    """One line: an offering of a pool, and what it costs an hour in US dollars, as far as it is known."""

    pool: str
    region: str
    zone: str  # empty: the cloud may choose
    instance_type: str
    cores: int | None
    market: str
    counted_usd_per_hour: float  # what budgets and metrics go by
    assumed: bool  # because nobody has set a price
    spot_usd_per_hour: float | None  # now; the cheapest zone, where the cloud may choose


@dataclass(slots=True)
class Survey:
    """What was found: offers in the order of the pools, mistakes in the file, and what could not be asked."""

    offers: list[Offer] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


async def survey(providers: Mapping[str, Sequence[Provider]]) -> Survey:
    """Ask the providers of these pools. They are closed afterwards."""
    found, each = Survey(), {id(one): one for some in providers.values() for one in some}
    usable = {key for key, one in each.items() if await _opened(one, found)}
    for name, some in providers.items():
        for provider in some:
            if id(provider) in usable:
                found.offers += await _offers(name, provider, found)
    for provider in each.values():
        await provider.close()
    return found


async def _opened(provider: Provider, found: Survey) -> bool:
    """Whether anything can be asked there."""
    try:
        async with asyncio.timeout(ASK_SECONDS_MAX):
            await provider.open()
    except SettingsError as error:
        found.problems += error.problems
        return bool(error.pools)  # of some pools: the others' offerings are known
    except TimeoutError:
        found.unknown.append(f"{provider.name}: no answer within {ASK_SECONDS_MAX:.0f} s")
        return False
    except BrokerError as error:
        found.unknown.append(f"{provider.name}: {error.message}")
        return False
    return True


async def _offers(name: str, provider: Provider, found: Survey) -> list[Offer]:
    offerings = provider.offerings(name)
    prices: Mapping[tuple[str, str], int] = {}
    if any(one.market is Market.SPOT for one in offerings):
        try:
            async with asyncio.timeout(ASK_SECONDS_MAX):
                prices = await provider.spot_prices(name)
        except (TimeoutError, BrokerError) as error:
            why = error if isinstance(error, BrokerError) else CloudUnreachable()
            found.unknown.append(f"{provider.name}: spot prices: {why.message}")
    return [_offer(name, one, prices) for one in offerings]


def _offer(pool: str, one: Offering, prices: Mapping[tuple[str, str], int]) -> Offer:
    here = known_prices(one, prices).values() if one.market is Market.SPOT else ()
    return Offer(
        pool,
        one.region,
        one.zone,
        one.instance_type,
        one.cores,
        str(one.market),
        one.price_usd_micros_per_hour / USD_MICROS,
        one.price_assumed,
        min(here) / USD_MICROS if here else None,
    )
