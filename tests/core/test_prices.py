"""A price that nobody has set: the on-demand list price, or more, and marked."""

from __future__ import annotations

import pytest

from broker.core.model import Market
from broker.core.money import Price
from broker.core.prices import on_demand_usd_micros_per_hour, price
from tests.core.make import pool

EC2 = {"provider": "ec2", "image": "ami-1", "instance_types": ["c7i.large"]}


@pytest.mark.parametrize(
    ("kind", "usd"),  # AWS's list, us-east-1, Linux
    [
        ("c7i.large", 0.08925),
        ("c7i.16xlarge", 2.856),
        ("c7i.metal-48xl", 8.568),
        ("c6i.metal", 5.44),
        ("c5.metal", 4.08),
        ("c6g.metal", 2.176),
        ("c6a.4xlarge", 0.612),
        ("c7a.16xlarge", 3.28448),
        ("m5.xlarge", 0.192),
        ("m7g.16xlarge", 2.6112),
        ("r6i.8xlarge", 2.016),
        ("t3.xlarge", 0.1664),
    ],
)
def test_the_list_price_grows_with_the_vcpus(kind: str, usd: float) -> None:
    assert on_demand_usd_micros_per_hour(kind, None) == round(usd * 1_000_000)


@pytest.mark.parametrize(
    ("kind", "usd"),  # what they cost according to the same list
    [
        ("t3.micro", 0.0104),
        ("c7g.medium", 0.0363),
        ("r7iz.large", 0.186),
        ("c6in.32xlarge", 7.2576),
        ("p4d.24xlarge", 32.7726),
        ("x1e.xlarge", 0.834),
        ("g5.xlarge", 1.006),
    ],
)
def test_what_is_not_in_the_list_is_never_taken_for_cheaper_than_it_is(kind: str, usd: float) -> None:
    assert on_demand_usd_micros_per_hour(kind, None) >= round(usd * 1_000_000)


@pytest.mark.parametrize("kind", ["", "big", "c7i.", "c7i.gigantic", ".large", "c9x.metal"])
def test_even_a_name_that_says_nothing_has_a_price(kind: str) -> None:
    assert on_demand_usd_micros_per_hour(kind, None) >= 8_000_000
    assert on_demand_usd_micros_per_hour(kind, 2) >= 80_000


def test_vcpus_that_the_cloud_has_told_count_more_than_the_name() -> None:
    assert on_demand_usd_micros_per_hour("c7i.16xlarge", 2) == 89_250


def test_a_price_that_is_set_is_not_assumed() -> None:
    settings = pool(**EC2, price_usd_per_hour=1.2)
    assert price(settings, "c7i.16xlarge", 64, Market.SPOT) == Price(1_200_000)


def test_a_machine_of_another_market_than_the_pools_costs_the_list_price_at_least() -> None:
    cheap, dear = (pool(**EC2, price_usd_per_hour=usd) for usd in (1.2, 9.0))
    assert price(cheap, "c7i.16xlarge", 64, Market.ON_DEMAND) == Price(2_856_000, assumed=True)
    assert price(dear, "c7i.16xlarge", 64, Market.ON_DEMAND) == Price(9_000_000, assumed=True)


def test_without_a_price_the_list_price_is_assumed_and_local_workers_are_free() -> None:
    assert price(pool(**EC2), "c7i.large", 2, Market.SPOT) == Price(89_250, assumed=True)
    assert price(pool(), "process", 8, Market.ON_DEMAND) == Price(0)


def test_a_pool_that_falls_back_on_on_demand_has_its_price_for_spot_only() -> None:
    mixed = pool(**EC2, market="spot-then-on-demand", price_usd_per_hour=0.02)
    assert price(mixed, "c7i.large", 2, Market.SPOT) == Price(20_000)
    assert price(mixed, "c7i.large", 2, Market.ON_DEMAND) == Price(89_250, assumed=True)
