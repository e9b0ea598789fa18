"""/metrics: cool-downs and spot prices."""

from __future__ import annotations

import asyncio
from pathlib import Path

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from broker.core.errors import OfferingRefused
from broker.core.quotes import QUOTE_SECONDS_MAX
from broker.testing import RunningBroker
from tests.support.brokers import live

ROUND_TRIP = "compute_broker_cloud_round_trip_seconds"
COOL_DOWN, PRICE = "compute_broker_offering_cool_down_seconds", "compute_broker_spot_price_usd_per_hour"


def samples(broker: RunningBroker, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    families = text_string_to_metric_families(generate_latest(broker.daemon.metrics.registry).decode())
    found = [sample for family in families for sample in family.samples if sample.name == name]
    return {tuple(sorted(sample.labels.items())): sample.value for sample in found}


def test_an_offering_shows_how_long_it_is_not_asked_for_and_then_nothing(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await asyncio.sleep(1.0)
        assert samples(broker, COOL_DOWN) == {}
        offering = broker.cloud.catalogue["default"][0]
        cooling = broker.daemon.context.clouds.all[0].cooling
        cooling.refused(offering, OfferingRefused(), broker.clock.monotonic())
        await asyncio.sleep(60.0)
        (labels,) = samples(broker, COOL_DOWN)
        assert dict(labels) == {
            "pool": "default",
            "region": "moon",
            "zone": "",
            "instance_type": "big",
            "market": "spot",
        }
        assert samples(broker, COOL_DOWN)[labels] == 120.0
        await asyncio.sleep(120.0)
        assert samples(broker, COOL_DOWN) == {}

    live(tmp_path, story)


def test_a_spot_price_is_shown_as_long_as_it_is_known(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        assert samples(broker, PRICE) == {}
        broker.cloud.prices = {("moon-a", "big"): 1_234_000}
        address = await broker.ask("GET_WORKER")
        shown = samples(broker, PRICE)
        assert list(shown.values()) == [1.234]
        assert dict(next(iter(shown))) == {"cloud": "fake", "zone": "moon-a", "instance_type": "big"}
        await broker.ask(f"RELEASE {address}")
        await asyncio.sleep(QUOTE_SECONDS_MAX)
        assert samples(broker, PRICE) == {}

    live(tmp_path, story)


def test_the_round_trip_to_a_cloud_is_shown_once_it_is_known(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        assert samples(broker, ROUND_TRIP) == {}
        broker.cloud.round_trip = 0.09
        assert samples(broker, ROUND_TRIP) == {(("cloud", "fake"),): 0.09}

    live(tmp_path, story)
