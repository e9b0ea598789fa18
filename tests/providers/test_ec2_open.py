"""Opening the provider: what a new user has forgotten is one clear sentence each, and nothing hangs.

The environment is scrubbed: no test reads this machine's AWS files or asks its metadata service.
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from broker.core.errors import BrokerError, CloudUnreachable, CredentialsRefused, SettingsError
from broker.core.settings import PoolSettings
from broker.providers.ec2 import Ec2Provider
from broker.providers.ec2_errors import client_error
from tests.providers.ec2_support import (
    NOW_UNIX,
    ONE_TYPE,
    ScriptedClient,
    endpoint,
    forget_aws,
    opened,
    pool,
)

OPEN_SECONDS_MAX = 20.0  # a silent metadata service costs about two seconds, a loaded machine adds to it
GROUP = {"GroupId": "sg-1", "GroupName": "workers"}


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An AWS configuration of nothing at all; returns where its two files would be."""
    forget_aws(monkeypatch, tmp_path)
    return tmp_path


@pytest.fixture
def signed(aws: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    return aws


async def failure_of_opening(
    region: str | None = None, profile: str | None = None, **settings: Any
) -> BrokerError:
    provider = Ec2Provider(
        "lab", {"default": pool(**settings)}, region=region, profile=profile, clock_wall=lambda: NOW_UNIX
    )
    try:
        with pytest.raises(BrokerError) as raised:
            await provider.open()
    finally:
        await provider.close()
    return raised.value


async def problems(region: str | None = None, profile: str | None = None, **settings: Any) -> list[str]:
    error = await failure_of_opening(region, profile, **settings)
    assert isinstance(error, SettingsError)
    return list(error.problems)


async def name_once_opened(monkeypatch: pytest.MonkeyPatch, profile: str | None = None) -> str:
    """The name of a provider that has found its region and a cloud there."""
    async with endpoint(lambda request: ("200 OK", ONE_TYPE)) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        provider = Ec2Provider(
            "lab", {"default": pool()}, region=None, profile=profile, clock_wall=lambda: NOW_UNIX
        )
        await provider.open()
        await provider.close()
    return provider.name


# --- who and where ---------------------------------------------------------------------------------


async def test_a_missing_region_is_one_clear_sentence(signed: Path) -> None:
    assert await problems() == [
        'pool.default.region: no AWS region is set; write region = "us-east-1" there, or set '
        "AWS_DEFAULT_REGION or a region in the AWS profile"
    ]


async def test_missing_credentials_are_one_clear_sentence(aws: Path) -> None:
    assert await problems("us-east-1") == [
        "pool.default.profile: no AWS credentials were found; run `aws configure`, or set "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine an instance role"
    ]


async def test_region_credentials_and_script_are_missed_at_once(aws: Path) -> None:
    found = await problems(user_data_file="/nowhere/boot.sh")
    assert [one.split(":")[0] for one in found] == [
        "pool.default.user_data_file", "pool.default.region", "pool.default.profile",
    ]  # fmt: skip


async def test_an_unknown_profile_is_named_with_those_there_are(aws: Path) -> None:
    (aws / "config").write_text("[profile lab]\nregion = us-east-1\n")
    assert await problems("us-east-1", "labs") == [
        'pool.default.profile: there is no AWS profile "labs" (profiles there are: lab)'
    ]


async def test_an_unknown_profile_from_the_environment_is_not_blamed_on_the_settings(
    aws: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "labs")
    assert await problems("us-east-1") == [
        'AWS_PROFILE: there is no AWS profile "labs" (profiles there are: none)'
    ]


@pytest.mark.parametrize("region", ["us-east1", "virginia"])
async def test_a_region_that_cannot_be_one_is_told_before_anything_is_asked(
    signed: Path, region: str
) -> None:
    assert await problems(region) == [
        f'pool.default.region: "{region}" is no AWS region; write one such as "us-east-1"'
    ]


async def test_half_a_key_is_told_apart_from_none(aws: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    assert await problems("us-east-1") == [
        "pool.default.profile: the AWS credentials lack AWS_SECRET_ACCESS_KEY"
    ]


async def test_a_configuration_file_that_cannot_be_read_is_named(aws: Path) -> None:
    (aws / "config").write_text("region = us-east-1\n")
    assert (await problems())[0].startswith(f"pool.default.profile: the AWS configuration file {aws}/config")


async def test_an_endpoint_that_is_no_url_is_a_problem_of_the_settings(
    signed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:5000")
    assert "localhost:5000" in (await problems("us-east-1"))[0]


@pytest.mark.parametrize("variable", ["AWS_DEFAULT_REGION", "AWS_REGION"])
async def test_the_environments_region_is_used(
    signed: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "eu-central-1")
    assert await name_once_opened(monkeypatch) == "ec2 eu-central-1"


async def test_a_profile_brings_its_region_and_its_keys(aws: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (aws / "config").write_text("[profile lab]\nregion = eu-west-1\n")
    (aws / "credentials").write_text("[lab]\naws_access_key_id = testing\naws_secret_access_key = testing\n")
    assert await name_once_opened(monkeypatch, profile="lab") == "ec2 eu-west-1 (lab)"


async def test_a_profile_that_leads_nowhere_is_a_problem_of_the_settings(aws: Path) -> None:
    (aws / "config").write_text(
        "[default]\nrole_arn = arn:aws:iam::123456789012:role/w\nsource_profile = nobody\n"
    )
    (problem,) = await problems("us-east-1")
    assert problem.startswith("pool.default.profile: the AWS configuration cannot be used: ")
    assert "nobody" in problem


async def test_a_cloud_that_cannot_be_reached_is_no_problem_of_the_settings(
    signed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")  # nobody listens there
    error = await failure_of_opening("us-east-1")
    assert type(error) is CloudUnreachable
    assert error.message.startswith("AWS does not answer DescribeInstanceTypes: no connection")


async def test_a_metadata_service_that_never_answers_delays_the_start_by_seconds_only(
    aws: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert "no AWS credentials were found" in (await problems("us-east-1"))[0]
        assert time.monotonic() - started < OPEN_SECONDS_MAX


async def test_a_credential_helper_that_fails_is_tried_again_and_not_quoted(aws: Path) -> None:
    (aws / "config").write_text('[default]\ncredential_process = sh -c "echo SECRET >&2; exit 1"\n')
    error = await failure_of_opening("us-east-1")
    assert isinstance(error, CredentialsRefused)
    assert "custom-process" in error.message
    assert "SECRET" not in error.message


# --- what the pools name ---------------------------------------------------------------------------


def network(**more: Any) -> ScriptedClient:
    return ScriptedClient(
        DescribeVpcs={"Vpcs": [{"VpcId": "vpc-default"}]},
        DescribeSubnets={
            "Subnets": [{"SubnetId": "subnet-1", "VpcId": "vpc-1", "AvailabilityZone": "us-east-1b"}]
        },
        DescribeSecurityGroups={"SecurityGroups": [GROUP]},
        **more,
    )


async def problems_of(client: ScriptedClient, **pools: PoolSettings) -> list[str]:
    with pytest.raises(SettingsError) as raised:
        async with opened(client, pools):
            pass
    return list(raised.value.problems)


async def test_a_group_is_looked_up_by_its_name_in_the_default_vpc() -> None:
    client = network()
    async with opened(
        client, {"default": pool(security_groups=["workers"], security_group_ids=["sg-0"])}
    ) as provider:
        order = provider.prepare("default", "order-1", [provider.offerings("default")[0]], NOW_UNIX)
        assert '"SecurityGroupIds":["sg-0","sg-1"]' in order.parameters
        assert client.sent("DescribeSecurityGroups")[0]["Filters"] == [
            {"Name": "vpc-id", "Values": ["vpc-default"]},
            {"Name": "group-name", "Values": ["workers"]},
        ]


async def test_a_group_is_looked_up_in_the_vpc_of_the_pools_subnet() -> None:
    client = network()
    async with opened(client, {"default": pool(security_groups=["workers"], subnet="subnet-1")}):
        assert client.sent("DescribeSecurityGroups")[0]["Filters"][0]["Values"] == ["vpc-1"]
        asked = {"Filters": [{"Name": "subnet-id", "Values": ["subnet-1"]}]}
        assert all(sent == asked for sent in client.sent("DescribeSubnets"))


MIXED = [
    {
        "InstanceType": name,
        "VCpuInfo": {"DefaultVCpus": 2},
        "ProcessorInfo": {"SupportedArchitectures": [architecture]},
    }
    for name, architecture in (("c7i.large", "x86_64"), ("c7g.large", "arm64"))
]


async def test_a_machine_with_an_arm_processor_gets_the_image_that_is_made_for_it() -> None:
    client = network(DescribeInstanceTypes={"InstanceTypes": MIXED})
    chosen = pool(instance_types=["c7i.large", "c7g.large"], image="ami-1", image_arm64="/lab/arm")
    async with opened(client, {"default": chosen}) as provider:
        offerings = provider.offerings("default")
        sent = json.loads(provider.prepare("default", "order-1", offerings, NOW_UNIX).parameters)
        (config,) = sent["fleet"]["LaunchTemplateConfigs"]
        assert [one.get("ImageId") for one in config["Overrides"]] == [None, "resolve:ssm:/lab/arm"]
        assert sent["template"]["LaunchTemplateData"]["ImageId"] == "ami-1"


async def test_a_pool_of_arm_machines_only_needs_no_second_image() -> None:
    client = network(DescribeInstanceTypes={"InstanceTypes": MIXED})
    async with opened(client, {"default": pool(instance_types=["c7g.large"], image="ami-2")}) as provider:
        order = provider.prepare("default", "order-1", provider.offerings("default"), NOW_UNIX)
        assert '"ImageId":"ami-2"' in order.parameters
    chosen = pool(instance_types=["c7g.large"], image="ami-1", image_arm64="ami-3")
    async with opened(client, {"default": chosen}) as provider:
        order = provider.prepare("default", "order-1", provider.offerings("default"), NOW_UNIX)
        assert '"ImageId":"ami-3"' in order.parameters


async def test_one_image_for_both_sorts_of_processors_is_a_problem() -> None:
    client = network(DescribeInstanceTypes={"InstanceTypes": MIXED})
    assert await problems_of(client, default=pool(instance_types=["c7i.large", "c7g.large"])) == [
        "pool.default.image_arm64: c7g.large has Arm processors, c7i.large has not: name an image for it"
    ]


async def test_the_zone_of_a_pools_only_subnet_is_known_before_anything_is_bought() -> None:
    types = ["c7i.large", "c6i.large"]
    shapes = [{"InstanceType": kind, "VCpuInfo": {"DefaultVCpus": 2}} for kind in types]
    client = network(DescribeInstanceTypes={"InstanceTypes": shapes})
    async with opened(client, {"default": pool(subnet="subnet-1", instance_types=types)}) as provider:
        offerings = provider.offerings("default")
        assert {(one.instance_type, one.zone) for one in offerings} == {
            (kind, "us-east-1b") for kind in types
        }
        sent = json.loads(provider.prepare("default", "order-1", offerings, NOW_UNIX).parameters)
        overrides = sent["fleet"]["LaunchTemplateConfigs"][0]["Overrides"]
        assert [(one["SubnetId"], one["AvailabilityZone"]) for one in overrides] == [
            ("subnet-1", "us-east-1b")
        ] * 2


async def test_groups_given_by_id_ask_nothing() -> None:
    client = network()
    async with opened(client, {"default": pool(security_group_ids=["sg-0"])}):
        assert [api for api, _ in client.calls] == ["DescribeInstanceTypes"]


async def test_every_pools_problems_are_told_at_once() -> None:
    twins = [GROUP, {"GroupId": "sg-2", "GroupName": "workers"}]
    client = network()
    client.scripts["DescribeSecurityGroups"] = {"SecurityGroups": twins}
    found = await problems_of(
        client,
        default=pool(security_groups=["workers", "nobody"]),
        big=pool(instance_types=["c7i.large", "c7i.96xlarge"]),
    )
    assert found == [
        'pool.default.security_groups: "workers" is several groups (sg-1, sg-2); use security_group_ids',
        'pool.default.security_groups: vpc-default in us-east-1 has no security group named "nobody"',
        'pool.big.instance_types: us-east-1 has no machine type "c7i.96xlarge"',
    ]


async def test_a_subnet_that_is_not_there_is_a_problem() -> None:
    client = network()
    client.scripts["DescribeSubnets"] = {"Subnets": []}
    assert await problems_of(client, default=pool(security_groups=["workers"], subnet="subnet-9")) == [
        'pool.default.subnet: us-east-1 has no subnet "subnet-9"'
    ]


async def test_a_region_without_a_default_vpc_needs_a_subnet() -> None:
    client = network()
    client.scripts["DescribeVpcs"] = {"Vpcs": []}
    assert await problems_of(client, default=pool(security_groups=["workers"])) == [
        "pool.default.subnet: us-east-1 has no default VPC; name a subnet"
    ]


# --- zones and subnets -----------------------------------------------------------------------------


def subnets(*zones: str, vpc: str = "vpc-1") -> ScriptedClient:
    """Subnets subnet-1, subnet-2, … in these zones."""
    shapes = [
        {"SubnetId": f"subnet-{number}", "AvailabilityZone": f"us-east-1{zone}", "VpcId": vpc}
        for number, zone in enumerate(zones, 1)
    ]
    types = [{"InstanceType": kind, "VCpuInfo": {"DefaultVCpus": 2}} for kind in ("c7i.large", "c6i.large")]
    return ScriptedClient(DescribeSubnets={"Subnets": shapes}, DescribeInstanceTypes={"InstanceTypes": types})


async def test_every_type_is_offered_in_every_zone_types_first() -> None:
    here = pool(instance_types=["c7i.large", "c6i.large"], zones=["us-east-1b", "us-east-1a"])
    async with opened(subnets(), {"default": here}) as provider:
        offered = [(one.instance_type, one.zone) for one in provider.offerings("default")]
        order = provider.prepare("default", "order-1", provider.offerings("default")[1:2], NOW_UNIX)
    assert offered == [
        ("c7i.large", "us-east-1b"), ("c7i.large", "us-east-1a"),
        ("c6i.large", "us-east-1b"), ("c6i.large", "us-east-1a"),
    ]  # fmt: skip
    assert '"Placement":{"AvailabilityZone":"us-east-1a"}' in order.parameters


async def test_a_pool_that_has_a_choice_and_names_no_zone_is_offered_those_of_the_default_vpc() -> None:
    client = subnets("b", "a")
    async with opened(client, {"default": pool(instance_types=["c7i.large", "c6i.large"])}) as provider:
        offered = [(one.instance_type, one.zone) for one in provider.offerings("default")]
        order = provider.prepare("default", "order-1", provider.offerings("default"), NOW_UNIX)
    assert offered == [
        ("c7i.large", "us-east-1a"), ("c7i.large", "us-east-1b"),
        ("c6i.large", "us-east-1a"), ("c6i.large", "us-east-1b"),
    ]  # fmt: skip
    (config,) = json.loads(order.parameters)["fleet"]["LaunchTemplateConfigs"]
    assert [one["AvailabilityZone"] for one in config["Overrides"]] == [zone for _, zone in offered]
    assert "SubnetId" not in str(config["Overrides"])
    assert client.sent("DescribeSubnets")[0]["Filters"] == [{"Name": "default-for-az", "Values": ["true"]}]


async def test_a_pool_of_one_type_is_one_offering_and_ec2_chooses_the_zone() -> None:
    client = subnets("a", "b")
    async with opened(client, {"default": pool(instance_types=["c7i.large"])}) as provider:
        assert [one.zone for one in provider.offerings("default")] == [""]
    assert client.sent("DescribeSubnets") == []


@pytest.mark.parametrize("zones", [(), tuple("abcdef")])
async def test_zones_that_are_none_or_too_many_are_left_to_ec2(zones: tuple[str, ...]) -> None:
    many = [f"c7i.{number}xlarge" for number in range(20)]
    client = subnets(*zones)
    client.scripts["DescribeInstanceTypes"] = {
        "InstanceTypes": [{"InstanceType": kind, "VCpuInfo": {"DefaultVCpus": 2}} for kind in many]
    }
    async with opened(client, {"default": pool(instance_types=many)}) as provider:
        assert {one.zone for one in provider.offerings("default")} == {""}
        assert len(provider.offerings("default")) == len(many)


async def test_who_may_not_look_at_subnets_leaves_the_zone_to_ec2() -> None:
    client = subnets("a", "b")
    client.scripts["DescribeSubnets"] = client_error("DescribeSubnets", "UnauthorizedOperation")
    async with opened(client, {"default": pool(instance_types=["c7i.large", "c6i.large"])}) as provider:
        assert {one.zone for one in provider.offerings("default")} == {""}


async def test_a_launch_uses_the_subnet_of_its_offerings_zone() -> None:
    here = pool(subnets=["subnet-2", "subnet-1"], address="private")
    async with opened(subnets("a", "b"), {"default": here}) as provider:
        first, second = provider.offerings("default")
        assert (first.zone, second.zone) == ("us-east-1b", "us-east-1a")
        order = provider.prepare("default", "order-1", [second], NOW_UNIX)
    assert '"SubnetId":"subnet-1"' in order.parameters
    assert "Placement" not in order.parameters


async def test_a_fleet_names_the_subnet_of_each_offerings_zone() -> None:
    async with opened(subnets("a", "b"), {"default": pool(subnets=["subnet-2", "subnet-1"])}) as provider:
        order = provider.prepare("default", "order-1", provider.offerings("default"), NOW_UNIX, count=2)
    (config,) = json.loads(order.parameters)["fleet"]["LaunchTemplateConfigs"]
    assert [one["SubnetId"] for one in config["Overrides"]] == ["subnet-2", "subnet-1"]
    assert [one["AvailabilityZone"] for one in config["Overrides"]] == ["us-east-1b", "us-east-1a"]


async def test_zones_choose_among_the_subnets_and_their_order() -> None:
    here = pool(subnets=["subnet-1", "subnet-2", "subnet-3"], zones=["us-east-1c", "us-east-1a"])
    async with opened(subnets("a", "b", "c"), {"default": here}) as provider:
        assert [one.zone for one in provider.offerings("default")] == ["us-east-1c", "us-east-1a"]


async def test_subnets_and_zones_that_cannot_work_are_named() -> None:
    wrong = pool(subnets=["subnet-1", "subnet-2", "subnet-9"], zones=["us-east-1c", "eu-west-1a"])
    assert await problems_of(subnets("a", "a"), default=wrong) == [
        'pool.default.zones: "eu-west-1a" is no zone of us-east-1',
        'pool.default.subnets: us-east-1 has no subnet "subnet-9"',
        "pool.default.subnets: subnet-1 and subnet-2 lie in us-east-1a both; name one a zone",
        'pool.default.zones: none of the subnets lies in "us-east-1c"',
        'pool.default.zones: none of the subnets lies in "eu-west-1a"',
    ]


async def test_subnets_of_two_vpcs_are_no_pool() -> None:
    client = subnets("a", "b")
    client.scripts["DescribeSubnets"]["Subnets"][1]["VpcId"] = "vpc-2"  # type: ignore[index,call-overload]
    assert await problems_of(client, default=pool(subnets=["subnet-1", "subnet-2"])) == [
        "pool.default.subnets: lie in several VPCs (vpc-1, vpc-2); a pool has one"
    ]


async def test_groups_by_name_are_looked_up_in_the_vpc_of_the_subnets() -> None:
    client = subnets("a", "b")
    client.scripts["DescribeSecurityGroups"] = {"SecurityGroups": [GROUP]}
    here = pool(subnets=["subnet-1", "subnet-2"], security_groups=["workers"])
    async with opened(client, {"default": here}):
        assert client.sent("DescribeSecurityGroups")[0]["Filters"][0]["Values"] == ["vpc-1"]


# --- new settings ----------------------------------------------------------------------------------


async def test_new_settings_ask_the_cloud_only_about_what_it_has_not_been_asked() -> None:
    client = network()
    async with opened(client, {"default": pool(security_groups=["workers"])}) as provider:
        before = len(client.calls)
        same = pool(security_groups=["workers"], image="ami-2", idle_timeout="1m", user_data="#!/bin/sh")
        change = await provider.study({"default": same})
        assert (
            "ami-2"
            not in provider.prepare("default", "order-1", provider.offerings("default"), NOW_UNIX).parameters
        )
        change.apply()
        order = provider.prepare("default", "order-2", provider.offerings("default"), NOW_UNIX)
        assert '"ImageId":"ami-2"' in order.parameters
        assert '"UserData":"#!/bin/sh"' in order.parameters
        assert '"SecurityGroupIds":["sg-1"]' in order.parameters
        assert len(client.calls) == before


async def test_a_new_pool_with_a_mistake_leaves_the_others_as_they_are() -> None:
    client = network()
    async with opened(client, {"default": pool()}) as provider:
        change = await provider.study({"default": pool(), "big": pool(instance_types=["c7i.96xlarge"])})
        mistake = change.mistake()
        assert mistake is not None
        assert mistake.pools == {"big"}
        assert mistake.problems == ('pool.big.instance_types: us-east-1 has no machine type "c7i.96xlarge"',)
        change.apply()
        assert provider.prepare("default", "order-1", provider.offerings("default"), NOW_UNIX)


async def test_while_the_cloud_is_away_only_what_it_must_be_asked_about_has_to_wait() -> None:
    client = network()
    async with opened(client, {"default": pool()}) as provider:
        client.scripts["DescribeInstanceTypes"] = CloudUnreachable("away")
        change = await provider.study(
            {"default": pool(idle_timeout="1m"), "big": pool(instance_types=["c7i.xlarge"])}
        )
        assert (change.mistake(), list(change.later)) == (None, ["big"])


async def test_cores_of_an_earlier_run_are_known_until_the_cloud_tells_them() -> None:
    client = ScriptedClient()
    provider = Ec2Provider(
        "lab", {"default": pool()}, region="us-east-1", profile=None, clock_wall=lambda: NOW_UNIX,
        client_factory=client.factory,
    )  # fmt: skip
    provider.recall_cores({"c7i.large": 64})
    assert [one.cores for one in provider.offerings("default")] == [64]
    await provider.open()
    provider.recall_cores({"c7i.large": 64})
    assert [one.cores for one in provider.offerings("default")] == [2]
    await provider.close()


# --- user data -------------------------------------------------------------------------------------


async def test_a_script_is_read_from_its_file_as_it_is(tmp_path: Path) -> None:
    script = tmp_path / "boot.sh"
    script.write_text("#!/bin/sh\necho grüezi\n", encoding="utf-8")
    async with opened(ScriptedClient(), {"default": pool(user_data_file=str(script))}) as provider:
        order = provider.prepare("default", "order-1", [provider.offerings("default")[0]], NOW_UNIX)
    assert '"UserData":"#!/bin/sh\\necho gr\\u00fcezi\\n"' in order.parameters


async def test_a_script_of_exactly_the_allowed_size_is_taken_and_one_byte_more_is_not(tmp_path: Path) -> None:
    async with opened(ScriptedClient(), {"default": pool(user_data="x" * 16_384)}):
        pass
    script = tmp_path / "boot.sh"
    script.write_bytes(b"x" * 16_385)
    found = await problems_of(
        ScriptedClient(), default=pool(user_data="x" * 16_385), big=pool(user_data_file=str(script))
    )
    assert found == [
        "pool.default.user_data: is larger than 16384 bytes, which is all that EC2 takes",
        "pool.big.user_data_file: is larger than 16384 bytes, which is all that EC2 takes",
    ]


async def test_a_script_that_is_no_text_is_a_problem(tmp_path: Path) -> None:
    script = tmp_path / "boot.gz"
    script.write_bytes(b"\x1f\x8b\x08\xff")
    assert await problems_of(ScriptedClient(), default=pool(user_data_file=str(script))) == [
        "pool.default.user_data_file: is no UTF-8 text; put what is binary into the image"
    ]


async def test_a_script_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    assert await problems_of(ScriptedClient(), default=pool(user_data_file=str(tmp_path))) == [
        f"pool.default.user_data_file: {tmp_path} cannot be read: Is a directory"
    ]
