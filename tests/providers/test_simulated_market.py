"""What the simulated EC2 refuses to sell, for how long, and what a fleet gets."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from botocore.exceptions import ClientError

from broker.core.errors import CloudError, OfferingRefused, PermanentRefusal, QuotaReached
from broker.providers.sim_market import REFUSALS
from broker.providers.simulated import Fault
from tests.providers.simulated_support import Lab, code_of, play, steady
from tests.support.buying import launch_one


async def codes(lab: Lab, count: int, pause_seconds: float, **more: Any) -> list[str]:
    """What so many launches are answered with; "" for a machine."""
    found = []
    for n in range(count):
        try:
            await lab.run(f"t-{lab.now}-{n}", **more)
        except ClientError as error:
            found.append(str(error.response["Error"]["Code"]))
        else:
            found.append("")
        await asyncio.sleep(pause_seconds)
    return found


# --- capacity ------------------------------------------------------------------------------------------


def test_a_zone_is_out_of_stock_for_a_while_and_another_one_is_not() -> None:
    async def story(lab: Lab) -> None:
        lab.sim.run_dry("c7i.large", zone="us-east-1a", seconds=600)
        here, there = ({"Placement": {"AvailabilityZone": f"us-east-1{zone}"}} for zone in "ab")
        assert await codes(lab, 3, 10, **here) == ["InsufficientInstanceCapacity"] * 3
        assert await codes(lab, 3, 10, **there) == [""] * 3
        assert await codes(lab, 2, 10, spot=False, **here) == ["", ""]
        assert await codes(lab, 2, 10, InstanceType="c7i.xlarge", **here) == ["", ""]
        await asyncio.sleep(600)
        assert await codes(lab, 1, 0, **here) == [""]

    play(story)


def test_a_launch_that_names_no_zone_takes_one_that_has_stock() -> None:
    async def story(lab: Lab) -> None:
        for zone in ("us-east-1a", "us-east-1c"):
            lab.sim.run_dry("c7i.large", zone=zone)
        assert await codes(lab, 5, 10) == [""] * 5
        assert {one.zone for one in lab.sim.truth()} == {"us-east-1b"}
        lab.sim.run_dry("c7i.large")
        assert await codes(lab, 1, 0) == ["InsufficientInstanceCapacity"]

    play(story)


@pytest.mark.parametrize("knob", ["stockout", "stockout_everywhere"])
def test_stock_runs_out_by_chance_and_is_remembered(knob: str) -> None:
    async def story(lab: Lab) -> None:
        found = await codes(lab, 400, 20, Placement={"AvailabilityZone": "us-east-1a"})
        changes = sum(before != after for before, after in itertools.pairwise(found))
        assert 40 < found.count("InsufficientInstanceCapacity") < 360
        assert changes < 60  # in spells, not one by one

    play(story, steady(**{knob: 0.1}, stockout_seconds=(300, 300)))


def test_an_offering_may_not_exist_at_all() -> None:
    async def story(lab: Lab) -> None:
        assert await codes(lab, 3, 1) == ["Unsupported"] * 3

    play(story, steady(unsupported=1.0))


# --- quotas and prices -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spot", "knob", "code"),
    [
        (True, "spot_vcpus_max", "MaxSpotInstanceCountExceeded"),
        (False, "on_demand_vcpus_max", "VcpuLimitExceeded"),
    ],
)
def test_the_quota_counts_what_runs(spot: bool, knob: str, code: str) -> None:
    async def story(lab: Lab) -> None:
        assert await codes(lab, 3, 1, spot=spot) == ["", "", code]
        lab.sim.end_by_operator("i-00000000000000001")
        assert await codes(lab, 2, 1, spot=spot) == ["", code]
        assert await codes(lab, 1, 1, spot=not spot) == [""]

    play(story, steady(**{knob: 4.0}))


def test_a_maximum_price_below_the_spot_price_is_too_low() -> None:
    async def story(lab: Lab) -> None:
        def options(price: str) -> dict[str, Any]:
            return {"MarketType": "spot", "SpotOptions": {"MaxPrice": price}}

        assert await codes(lab, 1, 1, InstanceMarketOptions=options("0.002")) == ["SpotMaxPriceTooLow"]
        assert await codes(lab, 1, 1, InstanceMarketOptions=options("0.09")) == [""]
        (machine,) = lab.sim.truth()
        assert 0.25 * 90_000 <= machine.price_usd_micros_per_hour <= 0.6 * 90_000

    play(story)


def test_spot_may_be_bought_on_demand() -> None:
    async def story(lab: Lab) -> None:
        assert "InstanceLifecycle" not in await lab.run()
        assert lab.sim.faults[str(Fault.BOUGHT_ON_DEMAND)] == 1

    play(story, steady(bought_on_demand=1.0))


# --- every refusal -----------------------------------------------------------------------------------------


def test_every_refusal_reaches_the_broker_as_what_it_is() -> None:
    async def story(lab: Lab) -> None:
        await lab.provider.open()
        kinds: dict[str, type[CloudError]] = {}
        for code in REFUSALS:
            lab.sim.refuse("RunInstances", code)
            with pytest.raises(CloudError) as raised:
                await launch_one(lab.provider, lab.order())
            assert not raised.value.sent
            kinds[code] = type(raised.value)
            assert lab.sim.faults[f"refused {code}"] == 1
            await asyncio.sleep(1)
        permanent = {code for code, kind in kinds.items() if kind is PermanentRefusal}
        assert permanent == {code for code, refusal in REFUSALS.items() if refusal.early}
        quotas = {code for code, kind in kinds.items() if kind is QuotaReached}
        assert quotas == {"MaxSpotInstanceCountExceeded", "VcpuLimitExceeded"}
        assert all(issubclass(kinds[code], OfferingRefused) for code in REFUSALS.keys() - permanent)
        assert lab.sim.truth() == []

    play(story)


@pytest.mark.parametrize("code", REFUSALS)
def test_a_refusal_that_comes_by_chance_stays_for_a_while(code: str) -> None:
    async def story(lab: Lab) -> None:
        found = await codes(lab, 200, 30, spot=code != "VcpuLimitExceeded")
        assert set(found) == {"", code}
        changes = sum(before != after for before, after in itertools.pairwise(found))
        assert changes < found.count(code)

    play(story, steady(refusals=((code, 0.1),), refusal_seconds=(300, 300)))


def test_what_you_may_not_do_is_looked_at_before_the_token_and_the_stock_after_it() -> None:
    async def story(lab: Lab) -> None:
        await lab.run()
        lab.sim.refuse_launches("UnauthorizedOperation", 60)
        assert await code_of(lab.run()) == "UnauthorizedOperation"
        await asyncio.sleep(60)
        lab.sim.refuse_launches("MaxSpotInstanceCountExceeded", 60)
        assert (await lab.run())["InstanceId"] == "i-00000000000000001"
        assert await code_of(lab.run("t-2")) == "MaxSpotInstanceCountExceeded"

    play(story)


def test_a_missing_permission_names_the_call() -> None:
    async def story(lab: Lab) -> None:
        await lab.provider.open()
        lab.sim.refuse("TerminateInstances", "UnauthorizedOperation", times=9)
        with pytest.raises(PermanentRefusal, match="ec2:TerminateInstances"):
            await lab.provider.terminate(["i-0a"])

    play(story)


# --- fleets ------------------------------------------------------------------------------------------------


def fleet(count: int, *overrides: dict[str, Any], token: str = "f-1", **more: Any) -> dict[str, Any]:
    """The parameters of a CreateFleet."""
    template = {"LaunchTemplateId": "lt-1", "Version": "1"}
    return {
        "Type": "instant",
        "ClientToken": token,
        "LaunchTemplateConfigs": [{"LaunchTemplateSpecification": template, "Overrides": list(overrides)}],
        "TargetCapacitySpecification": {
            "TotalTargetCapacity": count,
            "DefaultTargetCapacityType": "spot",
        },
        "TagSpecifications": [{"ResourceType": "instance", "Tags": [{"Key": "a", "Value": "b"}]}],
        **more,
    }


A, B = ({"InstanceType": "c7i.large", "AvailabilityZone": f"us-east-1{zone}"} for zone in "ab")


def ids_of(answer: dict[str, Any]) -> list[str]:
    return [one for some in answer["Instances"] for one in some["InstanceIds"]]


def test_a_fleet_lists_its_machines_by_what_was_bought() -> None:
    async def story(lab: Lab) -> None:
        answer = await lab.launcher.create_fleet(**fleet(2, A, B))
        (bought,) = answer["Instances"]
        assert answer["Errors"] == []
        assert answer["FleetId"].startswith("fleet-")
        assert (bought["Lifecycle"], bought["InstanceType"]) == ("spot", "c7i.large")
        assert bought["LaunchTemplateAndOverrides"]["Overrides"] == A
        assert bought["InstanceIds"] == [one.id for one in lab.sim.truth()]
        assert [one.tags for one in lab.sim.truth()] == [{"a": "b"}] * 2

    play(story)


def test_a_fleet_goes_round_what_cannot_be_had_and_says_so() -> None:
    async def story(lab: Lab) -> None:
        lab.sim.run_dry("c7i.large", zone="us-east-1a")
        answer = await lab.launcher.create_fleet(**fleet(2, A, B))
        (error,) = answer["Errors"]
        assert error["ErrorCode"] == "InsufficientInstanceCapacity"
        assert error["LaunchTemplateAndOverrides"]["Overrides"] == A
        assert [one.zone for one in lab.sim.truth()] == ["us-east-1b"] * 2

    play(story)


def test_a_fleet_without_a_machine_is_answered_and_not_refused() -> None:
    async def story(lab: Lab) -> None:
        lab.sim.run_dry("c7i.large")
        answer = await lab.launcher.create_fleet(**fleet(1, A, B))
        assert answer["Instances"] == []
        assert len(answer["Errors"]) == 2

    play(story)


@pytest.mark.parametrize(("knob", "count"), [("fleet_partial", 2), ("fleet_surplus", 4)])
def test_a_fleet_may_hold_fewer_machines_or_more(knob: str, count: int) -> None:
    async def story(lab: Lab) -> None:
        assert len(ids_of(await lab.launcher.create_fleet(**fleet(3, A)))) == count

    play(story, steady(**{knob: 1.0}))


def test_a_fleets_token_is_good_for_one_fleet() -> None:
    async def story(lab: Lab) -> None:
        first = await lab.launcher.create_fleet(**fleet(2, A))
        assert ids_of(await lab.launcher.create_fleet(**fleet(2, A))) == ids_of(first)
        assert await code_of(lab.launcher.create_fleet(**fleet(3, A))) == "IdempotentParameterMismatch"
        assert len(lab.sim.truth()) == 2

    play(story)


def test_a_fleet_is_an_answer_that_can_be_lost() -> None:
    async def story(lab: Lab) -> None:
        lab.sim.befall("CreateFleet", Fault.ANSWER_LOST)
        await asyncio.gather(lab.launcher.create_fleet(**fleet(2, A)), return_exceptions=True)
        assert len(lab.sim.truth()) == 2

    play(story)


def test_only_instant_fleets_are_offered() -> None:
    async def story(lab: Lab) -> None:
        assert (
            await code_of(lab.launcher.create_fleet(**fleet(1, A, Type="maintain")))
            == "InvalidParameterValue"
        )

    play(story)
