"""CreateFleet: what is sent, what becomes of its answer, the same over the wire and on the simulated EC2."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.core.errors import OfferingRefused, PermanentRefusal, QuotaReached, Throttled
from broker.core.model import Bought, InstanceState, Market, Order
from broker.core.tags import BROKER, ORDER
from broker.providers.ec2 import Ec2Provider
from broker.providers.ec2_api import LAUNCHING
from broker.providers.ec2_errors import client_error
from broker.providers.ec2_fleet import MACHINES_MAX
from broker.providers.ec2_wire import OVERRIDES_MAX
from broker.providers.sim_weather import Fault
from tests.providers.ec2_support import NOW_UNIX, ScriptedClient, forget_aws, opened, pool, shape
from tests.providers.simulated_support import Lab, play
from tests.support.cloud import MotoServer
from tests.support.fault_proxy import FaultProxy

TYPES = ["c7i.large", "c6i.large"]
CORES = {
    "InstanceTypes": [{"InstanceType": one, "VCpuInfo": {"DefaultVCpus": 2}} for one in (*TYPES, "m7i.large")]
}
SCRIPT = "#!/bin/sh\necho grüezi\n"


def scripted(*answers: dict[str, Any] | Exception, **more: Any) -> ScriptedClient:
    return ScriptedClient(**{"DescribeInstanceTypes": CORES, "CreateFleet": list(answers), **more})


def bought(kind: str, *ids: str, lifecycle: str = "spot", zone: str = "us-east-1a") -> dict[str, Any]:
    """One entry of an answer's Instances."""
    return {
        "Lifecycle": lifecycle,
        "InstanceIds": list(ids),
        "InstanceType": kind,
        "AvailabilityZone": zone,
        "LaunchTemplateAndOverrides": {"Overrides": {"InstanceType": kind}},
    }


def failed(kind: str, code: str, words: str = "") -> dict[str, Any]:
    overrides = {"LaunchTemplateAndOverrides": {"Overrides": {"InstanceType": kind}}}
    return {**overrides, "Lifecycle": "spot", "ErrorCode": code, "ErrorMessage": words}


def fleet_order(provider: Ec2Provider, count: int = 2, order_id: str = "order-1") -> Order:
    return provider.prepare("default", order_id, provider.offerings("default"), NOW_UNIX, "", count)


async def answered(answer: dict[str, Any] | Exception, count: int = 2, **settings: Any) -> Bought:
    pools = {"default": pool(instance_types=TYPES, **settings)}
    async with opened(scripted(answer), pools) as provider:
        return await provider.launch(fleet_order(provider, count))


# --- what is sent ------------------------------------------------------------------------------------


async def test_an_order_of_several_offerings_is_a_fleet_and_of_one_is_not() -> None:
    client = scripted({"Instances": [bought("c7i.large", "i-1")]}, RunInstances={"Instances": [shape()]})
    async with opened(client, {"default": pool(instance_types=TYPES)}) as provider:
        assert (provider.offerings_max, provider.machines_max) == (OVERRIDES_MAX, MACHINES_MAX)
        first, second = provider.offerings("default")
        await provider.launch(provider.prepare("default", "one", [first], NOW_UNIX))
        await provider.launch(provider.prepare("default", "two", [first, second], NOW_UNIX))
    assert [call["ClientToken"] for call in client.sent("RunInstances")] == ["one"]
    assert [call["ClientToken"] for call in client.sent("CreateFleet")] == ["two"]


async def test_a_spot_fleet_leaves_the_choice_to_ec2_and_tags_its_machines_in_the_call() -> None:
    client = scripted({"Instances": [bought("c7i.large", "i-1", "i-2")]})
    async with opened(client, {"default": pool(instance_types=TYPES, user_data=SCRIPT)}) as provider:
        order = fleet_order(provider)
        await provider.launch(order)
    (sent,) = client.sent("CreateFleet")
    (template,) = client.sent("CreateLaunchTemplate")
    assert sent["Type"] == "instant"
    assert sent["SpotOptions"]["AllocationStrategy"] == "price-capacity-optimized"
    assert sent["TargetCapacitySpecification"] == {
        "TotalTargetCapacity": 2,
        "DefaultTargetCapacityType": "spot",
    }
    (config,) = sent["LaunchTemplateConfigs"]
    assert config["LaunchTemplateSpecification"]["LaunchTemplateName"] == template["LaunchTemplateName"]
    assert [one["InstanceType"] for one in config["Overrides"]] == TYPES
    assert {one["ResourceType"] for one in sent["TagSpecifications"]} == {"instance", "volume"}
    for one in sent["TagSpecifications"]:
        assert {tag["Key"]: tag["Value"] for tag in one["Tags"]}[ORDER] == order.id
    data = template["LaunchTemplateData"]
    assert b64decode(data["UserData"]).decode() == SCRIPT
    assert data["InstanceInitiatedShutdownBehavior"] == "terminate"
    assert "InstanceMarketOptions" not in data, "a fleet says it itself, and EC2 refuses both"
    assert template["TagSpecifications"][0]["Tags"] == [{"Key": BROKER, "Value": "lab"}]


async def test_an_on_demand_fleet_goes_by_the_order_of_the_pools_types() -> None:
    client = scripted({"Instances": [bought("c7i.large", "i-1", lifecycle="on-demand")]})
    async with opened(client, {"default": pool(instance_types=TYPES, market="on-demand")}) as provider:
        found = await provider.launch(fleet_order(provider))
    (sent,) = client.sent("CreateFleet")
    assert sent["OnDemandOptions"] == {"AllocationStrategy": "prioritized"}
    assert [one["Priority"] for one in sent["LaunchTemplateConfigs"][0]["Overrides"]] == [0.0, 1.0]
    assert found.instances[0].market is Market.ON_DEMAND


async def test_a_subnet_is_named_by_every_override_and_public_addresses_by_the_template() -> None:
    client = scripted({"Instances": [bought("c7i.large", "i-1")]})
    subnet = {"SubnetId": "subnet-1", "VpcId": "vpc-1", "AvailabilityZone": "us-east-1b"}
    client.scripts["DescribeSubnets"] = {"Subnets": [subnet]}
    settings = pool(instance_types=TYPES, subnet="subnet-1", security_group_ids=["sg-1"])
    async with opened(client, {"default": settings}) as provider:
        await provider.launch(fleet_order(provider))
    (sent,), (template,) = client.sent("CreateFleet"), client.sent("CreateLaunchTemplate")
    assert [one["SubnetId"] for one in sent["LaunchTemplateConfigs"][0]["Overrides"]] == ["subnet-1"] * 2
    (interface,) = template["LaunchTemplateData"]["NetworkInterfaces"]
    assert interface["Groups"] == ["sg-1"]
    assert interface["AssociatePublicIpAddress"] is True
    assert "SubnetId" not in interface


# --- templates ---------------------------------------------------------------------------------------


async def test_a_template_is_made_once_and_named_by_its_content() -> None:
    client = scripted({"Instances": [bought("c7i.large", "i-1")]})
    pools = {"default": pool(instance_types=TYPES), "other": pool(instance_types=TYPES, key_name="lab")}
    async with opened(client, pools) as provider:
        for number in range(3):
            await provider.launch(fleet_order(provider, order_id=f"order-{number}"))
        other = provider.prepare("other", "other", provider.offerings("other"), NOW_UNIX)
        await provider.launch(other)
    names = [one["LaunchTemplateName"] for one in client.sent("CreateLaunchTemplate")]
    assert len(names) == len(set(names)) == 2


async def test_a_template_that_an_earlier_broker_has_made_will_do() -> None:
    taken = client_error("CreateLaunchTemplate", "InvalidLaunchTemplateName.AlreadyExistsException")
    client = scripted({"Instances": [bought("c7i.large", "i-1")]}, CreateLaunchTemplate=taken)
    async with opened(client, {"default": pool(instance_types=TYPES)}) as provider:
        assert len((await provider.launch(fleet_order(provider))).instances) == 1


async def test_a_template_that_somebody_has_deleted_is_made_again_and_the_same_order_sent() -> None:
    missing = client_error("CreateFleet", "InvalidLaunchTemplateName.NotFoundException")
    client = scripted(missing, {"Instances": [bought("c7i.large", "i-1")]})
    async with opened(client, {"default": pool(instance_types=TYPES)}) as provider:
        order = fleet_order(provider)
        with pytest.raises(Throttled, match="made anew"):
            await provider.launch(order)
        await provider.launch(order)
    assert len(client.sent("CreateLaunchTemplate")) == 2
    first, second = client.sent("CreateFleet")
    assert first == second


# --- what becomes of the answer ------------------------------------------------------------------------


async def test_machines_are_known_by_type_zone_market_and_tags() -> None:
    found = await answered({"Instances": [bought("c7i.large", "i-1"), bought("c6i.large", "i-2", "i-3")]})
    assert [one.id for one in found.instances] == ["i-1", "i-2", "i-3"]
    last = found.instances[-1]
    assert (last.state, last.instance_type, last.zone) == (
        InstanceState.PENDING,
        "c6i.large",
        "us-east-1a",
    )
    assert (last.market, last.cores, last.tags[ORDER]) == (Market.SPOT, 2, "order-1")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("InsufficientInstanceCapacity", OfferingRefused),
        ("UnfulfillableCapacity", OfferingRefused),
        ("InvalidFleetConfiguration", OfferingRefused),
        ("MaxSpotInstanceCountExceeded", QuotaReached),
        ("VcpuLimitExceeded", QuotaReached),
        ("UnauthorizedOperation", PermanentRefusal),
        ("RequestLimitExceeded", Throttled),
    ],
)
async def test_an_error_beside_the_machines_is_told_of_the_offering_that_it_is_about(
    code: str, kind: type[Exception]
) -> None:
    found = await answered({"Instances": [bought("c7i.large", "i-1")], "Errors": [failed("c6i.large", code)]})
    assert [one.id for one in found.instances] == ["i-1"]
    ((offering, error),) = found.refusals
    assert offering.instance_type == "c6i.large"
    assert type(error) is kind


async def test_an_error_that_names_no_offering_is_told_of_all() -> None:
    nowhere = {"ErrorCode": "InsufficientInstanceCapacity", "ErrorMessage": "none"}
    found = await answered({"Instances": [], "Errors": [nowhere]})
    assert [one.instance_type for one, _ in found.refusals] == TYPES


async def test_a_machine_sold_on_demand_for_a_spot_order_is_told_as_what_it_is() -> None:
    found = await answered({"Instances": [bought("c7i.large", "i-1", lifecycle="on-demand")]})
    assert found.instances[0].market is Market.ON_DEMAND


async def test_run_instances_tells_how_many_machines_it_could_not_get() -> None:
    client = ScriptedClient(RunInstances={"Instances": [shape("i-1"), shape("i-2")]})
    async with opened(client) as provider:
        order = provider.prepare("default", "o-1", provider.offerings("default"), NOW_UNIX, "", 5)
        found = await provider.launch(order)
    (sent,) = client.sent("RunInstances")
    assert (sent["MinCount"], sent["MaxCount"]) == (1, 5)
    assert len(found.instances) == 2
    ((_, error),) = found.refusals
    assert "only 2 of 5" in str(error)


# --- on the simulated EC2, and over the wire -----------------------------------------------------------


def test_the_simulated_ec2_launches_a_fleet_once_however_often_it_is_sent() -> None:
    async def story(lab: Lab) -> None:
        await lab.provider.open()
        order = lab.provider.prepare("default", "order-1", lab.provider.offerings("default"), 0.0, "", 3)
        lab.sim.befall("CreateFleet", Fault.ANSWER_LOST)
        with pytest.raises(Exception, match="does not answer"):
            await lab.provider.launch(order)
        again = await lab.provider.launch(order)
        assert {one.id for one in again.instances} == {one.id for one in lab.sim.truth()}
        assert len(again.instances) == 3
        assert all(machine.image == "ami-12c6146b" for machine in lab.sim.truth())

    play(story, pools={"default": pool(instance_types=TYPES)})


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FaultProxy]:
    forget_aws(monkeypatch, tmp_path)
    with MotoServer(images=False) as server, FaultProxy(server) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint_url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        yield running


@pytest.mark.parametrize("market", ["spot", "on-demand"])
async def test_a_fleet_over_the_wire(proxy: FaultProxy, market: str) -> None:
    """The SDK checks every parameter against AWS's own model before it sends one."""
    settings = pool(instance_types=TYPES, market=market, user_data=SCRIPT, tags={"cost-centre": "17"})
    provider = Ec2Provider(
        "lab", {"default": settings}, region="us-east-1", profile=None, clock_wall=lambda: NOW_UNIX
    )
    try:
        await provider.open()
        order = provider.prepare("default", "order-1", provider.offerings("default"), NOW_UNIX, "", 2)
        found = await provider.launch(order)
        listed = {one.id: one for one in await provider.listing()}
        await provider.terminate(listed)
    finally:
        await provider.close()
    assert {one.id for one in found.instances} == set(listed)
    assert len(found.instances) == 2
    for one in found.instances:
        assert (one.market, listed[one.id].market) == (Market(market), Market(market))
        assert listed[one.id].tags[ORDER] == "order-1"
        assert listed[one.id].tags["cost-centre"] == "17"
    (call,) = proxy.calls_of("CreateFleet")
    assert call.params["ClientToken"] == "order-1"
    assert json.loads(order.parameters)["fleet"]["Type"] == "instant"
    assert LAUNCHING.attempts_max == 1
