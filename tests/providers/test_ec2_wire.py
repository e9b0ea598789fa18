"""What a launch asks for, and how an instance is read."""

from __future__ import annotations

import pytest

from broker.core.model import InstanceState, Market, Offering
from broker.providers.ec2_wire import (
    Recipe,
    batches,
    filter_of,
    filters,
    image_id,
    instance_from,
    launch_parameters,
    named_in,
)
from tests.providers.ec2_support import NOW_UNIX, pool, shape

SPOT = Offering("us-east-1", "c7i.large", Market.SPOT)
ON_DEMAND = Offering("us-east-1", "c7i.large", Market.ON_DEMAND)


def test_a_spot_machine_is_bought_once_and_ends_when_it_is_reclaimed_or_shuts_down() -> None:
    parameters = launch_parameters(pool(), Recipe(), SPOT, {"Name": "dserv-worker"})
    assert parameters == {
        "MinCount": 1,
        "MaxCount": 1,
        "ImageId": "ami-12c6146b",
        "InstanceType": "c7i.large",
        "InstanceInitiatedShutdownBehavior": "terminate",
        "InstanceMarketOptions": {
            "MarketType": "spot",
            "SpotOptions": {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"},
        },
        "MetadataOptions": {"HttpEndpoint": "enabled", "HttpTokens": "required"},
        "TagSpecifications": [
            {"ResourceType": kind, "Tags": [{"Key": "Name", "Value": "dserv-worker"}]}
            for kind in ("instance", "volume", "spot-instances-request")
        ],
    }


def test_an_on_demand_machine_has_no_spot_request_to_tag() -> None:
    parameters = launch_parameters(pool(), Recipe(), ON_DEMAND, {})
    assert "InstanceMarketOptions" not in parameters
    assert [one["ResourceType"] for one in parameters["TagSpecifications"]] == ["instance", "volume"]


def test_key_groups_profile_script_and_zone_go_into_the_launch() -> None:
    settings = pool(key_name="lab", instance_profile="worker")
    zoned = Offering("us-east-1", "c7i.large", Market.SPOT, zone="us-east-1b")
    parameters = launch_parameters(settings, Recipe(("sg-1", "sg-2"), "#!/bin/sh\n"), zoned, {})
    assert parameters["KeyName"] == "lab"
    assert parameters["IamInstanceProfile"] == {"Name": "worker"}
    assert parameters["SecurityGroupIds"] == ["sg-1", "sg-2"]
    assert parameters["UserData"] == "#!/bin/sh\n"
    assert parameters["Placement"] == {"AvailabilityZone": "us-east-1b"}


def test_an_instance_profile_may_be_given_by_its_arn() -> None:
    arn = "arn:aws:iam::123456789012:instance-profile/worker"
    assert launch_parameters(pool(instance_profile=arn), Recipe(), SPOT, {})["IamInstanceProfile"] == {
        "Arn": arn
    }


def test_a_pool_that_hands_out_private_addresses_leaves_the_subnet_as_it_is() -> None:
    parameters = launch_parameters(pool(subnet="subnet-1", address="private"), Recipe(("sg-1",)), SPOT, {})
    assert parameters["SubnetId"] == "subnet-1"
    assert parameters["SecurityGroupIds"] == ["sg-1"]
    assert "NetworkInterfaces" not in parameters


@pytest.mark.parametrize("address", ["public", "dns"])
def test_a_pool_that_hands_out_public_addresses_asks_its_subnet_for_one(address: str) -> None:
    parameters = launch_parameters(pool(subnet="subnet-1", address=address), Recipe(("sg-1",)), SPOT, {})
    assert parameters["NetworkInterfaces"] == [
        {
            "DeviceIndex": 0,
            "SubnetId": "subnet-1",
            "AssociatePublicIpAddress": True,
            "DeleteOnTermination": True,
            "Groups": ["sg-1"],
        }
    ]
    assert not {"SubnetId", "SecurityGroupIds", "Placement"} & set(
        parameters
    )  # EC2 refuses both places at once


@pytest.mark.parametrize(
    ("image", "sent"),
    [
        ("ami-12c6146b", "ami-12c6146b"),
        (
            "/aws/service/canonical/ubuntu/amd64/ami-id",
            "resolve:ssm:/aws/service/canonical/ubuntu/amd64/ami-id",
        ),
        ("resolve:ssm:golden:3", "resolve:ssm:golden:3"),
    ],
)
def test_an_image_is_an_ami_or_the_parameter_that_names_one(image: str, sent: str) -> None:
    assert image_id(image) == sent


def test_an_instance_is_read_with_all_that_the_broker_asks_about() -> None:
    instance = instance_from(
        shape(
            state="running",
            InstanceType="c7i.16xlarge",
            InstanceLifecycle="spot",
            PublicIpAddress="203.0.113.7",
            Placement={"AvailabilityZone": "us-east-1a"},
            CpuOptions={"CoreCount": 32, "ThreadsPerCore": 2},
        ),
        "us-east-1",
        "public",
        {"Name": "w"},
    )
    assert (instance.id, instance.state, instance.address) == (
        "i-00000001",
        InstanceState.RUNNING,
        "203.0.113.7",
    )
    assert (instance.market, instance.cores, instance.zone) == (Market.SPOT, 64, "us-east-1a")
    assert (instance.instance_type, instance.region, instance.launched_unix) == (
        "c7i.16xlarge",
        "us-east-1",
        NOW_UNIX,
    )
    assert instance.tags == {"Name": "w"}
    assert instance.reason == ""


@pytest.mark.parametrize(
    ("setting", "address"),
    [("public", "203.0.113.7"), ("private", "10.0.0.7"), ("dns", "ec2-203-0-113-7.compute-1.amazonaws.com")],
)
def test_the_pool_decides_which_address_is_handed_out(setting: str, address: str) -> None:
    addresses = {
        "PublicIpAddress": "203.0.113.7",
        "PrivateIpAddress": "10.0.0.7",
        "PublicDnsName": "ec2-203-0-113-7.compute-1.amazonaws.com",
    }
    assert instance_from(shape(**addresses), "us-east-1", setting, {}).address == address


def test_an_address_that_is_not_there_yet_is_none_and_not_another_one() -> None:
    just_launched = shape(PublicDnsName="", PrivateIpAddress="10.0.0.7")
    assert instance_from(just_launched, "us-east-1", "public", {}).address is None
    assert instance_from(just_launched, "us-east-1", "dns", {}).address is None


@pytest.mark.parametrize(
    ("state_reason", "reason"),
    [
        ({"Code": "Server.SpotInstanceTermination", "Message": "Server.SpotInstanceTermination: reclaimed"},
         "Server.SpotInstanceTermination: reclaimed"),
        ({"Code": "Client.InstanceInitiatedShutdown", "Message": "Instance initiated shutdown"},
         "Client.InstanceInitiatedShutdown: Instance initiated shutdown"),
        ({"Code": "Server.InternalError"}, "Server.InternalError"),
        ({"Code": "", "Message": ""}, ""),
        (None, ""),
    ],
)  # fmt: skip
def test_the_reason_of_an_end_is_told_in_the_clouds_words(
    state_reason: dict[str, str] | None, reason: str
) -> None:
    instance = instance_from(shape(state="terminated", StateReason=state_reason), "us-east-1", "public", {})
    assert instance.reason == reason


@pytest.mark.parametrize(
    ("state", "words", "unix"),
    [
        ("terminated", "User initiated (2026-01-01 00:00:07 GMT)", 1_767_225_607.0),
        ("shutting-down", "User initiated (2026-01-01 00:00:07 GMT)", 1_767_225_607.0),
        ("stopped", "User initiated (2026-01-01 00:00:07 UTC)", 1_767_225_607.0),  # moto's way
        ("running", "User initiated (2026-01-01 00:00:07 GMT)", None),  # it was stopped, and runs again
        ("terminated", "User initiated", None),
        ("terminated", "User initiated (2026-13-41 00:00:07 GMT)", None),
        ("terminated", "Server.SpotInstanceTermination: Spot instance termination", None),
        ("terminated", "", None),
        ("terminated", None, None),
    ],
)
def test_the_second_of_an_end_is_known_where_ec2_names_it(
    state: str, words: str | None, unix: float | None
) -> None:
    instance = instance_from(shape(state=state, StateTransitionReason=words), "us-east-1", "public", {})
    assert instance.ended_unix == unix


def test_a_filter_takes_its_values_literally() -> None:
    assert filter_of("tag:Name", ["a*b?\\"]) == {"Name": "tag:Name", "Values": ["a\\*b\\?\\\\"]}
    assert filters(instance_id=("i-1",)) == [{"Name": "instance-id", "Values": ["i-1"]}]


def test_batches_hold_every_value_once() -> None:
    assert list(batches(["a", "b", "a", "c"], 2)) == [("a", "b"), ("c",)]
    assert list(batches([], 2)) == []


def test_an_id_is_not_mistaken_for_one_that_begins_with_it() -> None:
    assert named_in("The instance IDs 'i-12, i-3' do not exist", ["i-1", "i-12", "i-3", "i-4"]) == {
        "i-12",
        "i-3",
    }
