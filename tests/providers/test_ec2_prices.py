"""Spot prices from EC2: what is asked, and what is made of the answer."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from broker.core.errors import CloudUnreachable, PermanentRefusal
from broker.providers.ec2_errors import client_error
from broker.providers.sim_weather import Fault
from tests.providers.ec2_support import NOW_UNIX, ScriptedClient, opened, pool
from tests.providers.simulated_support import Lab, play, steady

API = "DescribeSpotPriceHistory"


def told(price: Any, zone: str = "us-east-1a", kind: str = "c7i.large", hour: int = 8) -> dict[str, Any]:
    return {
        "AvailabilityZone": zone,
        "InstanceType": kind,
        "ProductDescription": "Linux/UNIX",
        "SpotPrice": price,
        "Timestamp": datetime(2026, 1, 1, hour, tzinfo=UTC),
    }


def answer(*items: dict[str, Any], token: str = "") -> dict[str, Any]:
    return {"SpotPriceHistory": list(items), "NextToken": token}


async def test_the_prices_of_now_are_asked_for_the_pools_types_and_linux_only() -> None:
    client = ScriptedClient(**{API: answer(told("0.0380"))})
    pools = {
        "default": pool(instance_types=["c7i.large", "c7i.large"]),
        "other": pool(instance_types=["a.large"]),
    }
    client.scripts["DescribeInstanceTypes"] = {
        "InstanceTypes": [
            {"InstanceType": kind, "VCpuInfo": {"DefaultVCpus": 2}} for kind in ("c7i.large", "a.large")
        ]
    }
    async with opened(client, pools) as provider:
        assert await provider.spot_prices("default") == {("us-east-1a", "c7i.large"): 38_000}
    (asked,) = client.sent(API)
    assert asked.pop("StartTime").timestamp() == pytest.approx(NOW_UNIX, abs=60.0)
    assert asked == {"InstanceTypes": ["c7i.large"], "ProductDescriptions": ["Linux/UNIX"]}


async def test_all_pages_are_read_and_the_latest_change_counts() -> None:
    pages = [
        answer(told("0.05", hour=9), told("0.04", zone="us-east-1b"), token="more"),
        answer(told("0.03", hour=8), told("0.000001", kind="c6i.large")),
    ]
    client = ScriptedClient(DescribeSpotPriceHistory=[*pages])
    async with opened(client) as provider:
        assert await provider.spot_prices("default") == {
            ("us-east-1a", "c7i.large"): 50_000,
            ("us-east-1b", "c7i.large"): 40_000,
            ("us-east-1a", "c6i.large"): 1,
        }
    assert [asked.get("NextToken") for asked in client.sent(API)] == [None, "more"]


@pytest.mark.parametrize("price", ["", "cheap", "0", "-1", "nan", "inf", None])
async def test_what_is_no_price_is_no_answer(price: Any) -> None:
    async with opened(ScriptedClient(**{API: answer(told(price))})) as provider:
        with pytest.raises(CloudUnreachable, match=API):
            await provider.spot_prices("default")


async def test_a_missing_permission_is_named() -> None:
    refused = client_error(API, "UnauthorizedOperation", status=403)
    async with opened(ScriptedClient(**{API: refused})) as provider:
        with pytest.raises(PermanentRefusal, match="ec2:DescribeSpotPriceHistory"):
            await provider.spot_prices("default")


def test_the_simulated_ec2_tells_the_price_at_which_it_sells_page_by_page() -> None:
    async def story(lab: Lab) -> None:
        await lab.provider.open()
        prices = await lab.provider.spot_prices("default")
        assert [zone for zone, _ in prices] == ["us-east-1a", "us-east-1b", "us-east-1c"]
        assert lab.sim.calls[API] == 2
        machine = await lab.machine(Placement={"AvailabilityZone": "us-east-1b"})
        assert prices["us-east-1b", "c7i.large"] == machine.price_usd_micros_per_hour

    play(story, steady(page_items_max=2))


def test_a_page_that_fails_is_no_price_list() -> None:
    async def story(lab: Lab) -> None:
        await lab.provider.open()
        lab.sim.befall(API, Fault.PAGE_FAILED, times=10)
        with pytest.raises(CloudUnreachable):
            await lab.provider.spot_prices("default")

    play(story, steady(page_items_max=2))
