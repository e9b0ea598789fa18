"""Opening the provider: what a new user has forgotten is one clear sentence each, and nothing hangs.

The environment is scrubbed: no test reads this machine's AWS files or asks its metadata service.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest

from broker.core.errors import BrokerError, CloudUnreachable, CredentialsRefused, SettingsError
from broker.core.settings import PoolSettings
from broker.providers.ec2 import Ec2Provider
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
        DescribeSubnets={"Subnets": [{"SubnetId": "subnet-1", "VpcId": "vpc-1"}]},
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
        assert client.sent("DescribeSubnets") == [
            {"Filters": [{"Name": "subnet-id", "Values": ["subnet-1"]}]}
        ]


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
