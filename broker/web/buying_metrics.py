"""What keeps offerings from being bought, and what spot costs, as gauges read at scrape time."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from broker.context import Context
from broker.core.money import USD_MICROS


def buying_gauges(context: Context) -> Iterator[Metric]:
    """An offering that may be bought has no sample, nor has a price that is not known."""
    yield _cool_downs(context)
    yield _spot_prices(context)
    yield _round_trips(context)


def _cool_downs(context: Context) -> Metric:
    family = GaugeMetricFamily(
        "compute_broker_offering_cool_down_seconds",
        "For how long an offering that was refused or reclaimed is not asked for.",
        labels=["pool", "region", "zone", "instance_type", "market"],
    )
    now = context.now()
    for name in context.settings.pool:
        for cloud in context.clouds.of(name):
            for one in cloud.cooling.usable(cloud.provider.offerings(name), now, pool=name)[1]:
                place = one.offering
                labels = [name, place.region, place.zone, place.instance_type, str(place.market)]
                family.add_metric(labels, one.seconds_left)
    return family


def _spot_prices(context: Context) -> Metric:
    family = GaugeMetricFamily(
        "compute_broker_spot_price_usd_per_hour",
        "What a spot machine costs an hour, as far as it is known.",
        labels=["cloud", "zone", "instance_type"],
    )
    for cloud in context.clouds.all:
        for (zone, instance_type), price in cloud.quotes.known(context.now()).items():
            family.add_metric([cloud.provider.name, zone, instance_type], price / USD_MICROS)
    return family


def _round_trips(context: Context) -> Metric:
    family = GaugeMetricFamily(
        "compute_broker_cloud_round_trip_seconds",
        "The way to the cloud's API and back, by what was called; region_order = latency goes by it.",
        labels=["cloud"],
    )
    for cloud in context.clouds.all:
        seconds = cloud.provider.round_trip_seconds()
        if seconds is not None:
            family.add_metric([cloud.provider.name], seconds)
    return family
