"""The provider over the wire: the real SDK against moto, behind the proxy that misbehaves as EC2 does."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker.core.errors import (
    CloudError,
    CloudUnreachable,
    CredentialsRefused,
    InstanceNotFound,
    OfferingRefused,
    OrderMismatch,
    OrderSpent,
    PermanentRefusal,
    QuotaReached,
    SettingsError,
    Throttled,
)
from broker.core.model import InstanceState, Market, Order
from broker.core.settings import PoolSettings
from broker.core.tags import BROKER, EPOCH, LAST_USED, ORDER
from broker.providers import ec2_api
from broker.providers.ec2 import Ec2Provider
from tests.providers.ec2_support import NOW_UNIX, ONE_TYPE, endpoint, forget_aws, pool
from tests.support import ec2_wire
from tests.support.buying import launch_one
from tests.support.cloud import MotoServer
from tests.support.fault_proxy import FaultProxy, loopback_address

UNKNOWN_ID = "i-0123456789abcdef0"


@pytest.fixture(scope="module")
def server() -> Iterator[MotoServer]:
    with MotoServer(images=False) as running:
        yield running


@pytest.fixture
def proxy(server: MotoServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FaultProxy]:
    """An empty cloud, and an environment that leads nowhere else."""
    forget_aws(monkeypatch, tmp_path)
    server.reset()
    with FaultProxy(server) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint_url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "10")  # the broker's own bound is meant to win
        yield running


@asynccontextmanager
async def opened(broker_id: str = "lab", /, **more: Any) -> AsyncIterator[Ec2Provider]:
    """A provider with one pool `default` of these settings, or with `pools`."""
    options = {key: more.pop(key) for key in ("page_size", "on_call") if key in more}
    pools: dict[str, PoolSettings] = more.pop("pools", None) or {"default": pool(**more)}
    provider = Ec2Provider(
        broker_id, pools, region="us-east-1", profile=None, clock_wall=lambda: NOW_UNIX, **options
    )
    try:
        await provider.open()
        yield provider
    finally:
        await provider.close()


def an_order(provider: Ec2Provider, order_id: str = "order-1", of: str = "default") -> Order:
    return provider.prepare(of, order_id, [provider.offerings(of)[0]], NOW_UNIX)


async def ids_listed(provider: Ec2Provider) -> set[str]:
    return {one.id for one in await provider.listing()}


def tags_of(server: MotoServer, resource_id: str) -> dict[str, str]:
    root = server.call("DescribeTags", {"Filter.1.Name": "resource-id", "Filter.1.Value.1": resource_id})
    items = root.iterfind(ec2_wire.path("tagSet", "item"))
    return {ec2_wire.text_of(one, "key"): ec2_wire.text_of(one, "value") for one in items}


# --- launching -------------------------------------------------------------------------------------


async def test_a_launched_machine_is_what_the_pool_ordered(proxy: FaultProxy) -> None:
    async with opened(tags={"cost-centre": "17"}) as provider:
        launched = await launch_one(provider, an_order(provider))
        assert (launched.state, launched.address, launched.market) == (
            InstanceState.PENDING,
            None,
            Market.SPOT,
        )
        (seen,) = await provider.listing()
    assert (seen.id, seen.state, seen.instance_type) == (launched.id, InstanceState.RUNNING, "c7i.large")
    assert seen.address == loopback_address(seen.id, "public")
    assert seen.region == "us-east-1"
    assert seen.zone.startswith("us-east-1")
    assert seen.launched_unix > NOW_UNIX
    assert seen.tags == {
        "Name": "dserv-worker",
        "cost-centre": "17",
        "compute-broker:broker": "lab",
        "compute-broker:pool": "default",
        "compute-broker:order": "order-1",
        "compute-broker:expires": "2026-01-01T08:00:00Z",
    }


async def test_the_volume_carries_the_same_tags_as_its_machine(proxy: FaultProxy, server: MotoServer) -> None:
    async with opened() as provider:
        launched = await launch_one(provider, an_order(provider))
    (volume,) = server.call("DescribeVolumes", {}).iterfind(ec2_wire.path("volumeSet", "item"))
    assert tags_of(server, ec2_wire.text_of(volume, "volumeId")) == dict(launched.tags)


async def test_the_launch_call_on_the_wire(proxy: FaultProxy) -> None:
    script = "#!/bin/sh\necho grüezi\n"
    async with opened(user_data=script, key_name="lab") as provider:
        await launch_one(provider, an_order(provider))
    (call,) = proxy.calls_of("RunInstances")
    tags = {key: value for key, value in call.params.items() if key.startswith("TagSpecification.")}
    rest = {key: value for key, value in call.params.items() if key not in tags}
    assert rest == {
        "Action": "RunInstances",
        "Version": "2016-11-15",
        "ClientToken": "order-1",
        "MinCount": "1",
        "MaxCount": "1",
        "ImageId": "ami-12c6146b",
        "InstanceType": "c7i.large",
        "KeyName": "lab",
        "InstanceInitiatedShutdownBehavior": "terminate",
        "InstanceMarketOptions.MarketType": "spot",
        "InstanceMarketOptions.SpotOptions.SpotInstanceType": "one-time",
        "InstanceMarketOptions.SpotOptions.InstanceInterruptionBehavior": "terminate",
        "MetadataOptions.HttpEndpoint": "enabled",
        "MetadataOptions.HttpTokens": "required",
        "UserData": base64.b64encode(script.encode()).decode(),  # once
    }
    kinds = [value for key, value in sorted(tags.items()) if key.endswith("ResourceType")]
    assert kinds == ["instance", "volume", "spot-instances-request"]


async def test_an_on_demand_machine_is_listed_as_one(proxy: FaultProxy) -> None:
    async with opened(market="on-demand") as provider:
        await launch_one(provider, an_order(provider))
        assert [one.market for one in await provider.listing()] == [Market.ON_DEMAND]


async def test_a_named_group_and_a_subnet_of_ones_own_reach_the_machine(
    proxy: FaultProxy, server: MotoServer
) -> None:
    vpc = server.call("CreateVpc", {"CidrBlock": "10.7.0.0/16"}).findtext(ec2_wire.path("vpc", "vpcId")) or ""
    subnet = server.call("CreateSubnet", {"VpcId": vpc, "CidrBlock": "10.7.1.0/24"}).findtext(
        ec2_wire.path("subnet", "subnetId")
    )
    group = server.call(
        "CreateSecurityGroup", {"GroupName": "workers", "GroupDescription": "w", "VpcId": vpc}
    ).findtext(ec2_wire.path("groupId"))
    async with opened(subnet=subnet, security_groups=["workers"]) as provider:
        launched = await launch_one(provider, an_order(provider))
        (seen,) = await provider.describe([launched.id])
        assert seen.address == loopback_address(seen.id, "public")
    (call,) = proxy.calls_of("RunInstances")
    assert call.params["NetworkInterface.1.SubnetId"] == subnet
    assert call.params["NetworkInterface.1.AssociatePublicIpAddress"] == "true"
    assert call.params["NetworkInterface.1.SecurityGroupId.1"] == group


async def test_a_group_name_of_another_vpc_is_unknown(proxy: FaultProxy, server: MotoServer) -> None:
    vpc = server.call("CreateVpc", {"CidrBlock": "10.7.0.0/16"}).findtext(ec2_wire.path("vpc", "vpcId")) or ""
    server.call("CreateSecurityGroup", {"GroupName": "workers", "GroupDescription": "w", "VpcId": vpc})
    with pytest.raises(SettingsError, match='no security group named "workers"'):
        async with opened(security_groups=["workers"]):
            pass


async def test_machine_types_are_known_with_their_cores_and_unknown_ones_are_a_problem(
    proxy: FaultProxy,
) -> None:
    async with opened(instance_types=["c7i.16xlarge", "c6i.16xlarge"]) as provider:
        assert {one.instance_type: one.cores for one in provider.offerings("default")} == {
            "c7i.16xlarge": 64,
            "c6i.16xlarge": 64,
        }
    with pytest.raises(SettingsError, match=r'us-east-1 has no machine type "c99i\.large"'):
        async with opened(instance_types=["c7i.large", "c99i.large"]):
            pass


@pytest.mark.parametrize("address", ["private", "dns"])
async def test_the_pools_address_is_the_one_that_is_seen(proxy: FaultProxy, address: Any) -> None:
    async with opened(address=address) as provider:
        await launch_one(provider, an_order(provider))
        (seen,) = await provider.listing()
        assert seen.address == loopback_address(seen.id, address)


async def test_while_the_public_address_is_missing_there_is_none(proxy: FaultProxy) -> None:
    proxy.after_launch(pending=1, unaddressed=2)
    async with opened() as provider:
        await launch_one(provider, an_order(provider))
        seen = [(await provider.listing())[0] for _ in range(3)]
    assert [one.state.value for one in seen] == ["pending", "running", "running"]
    assert [one.address is None for one in seen] == [True, True, False]


# --- one order, one machine ------------------------------------------------------------------------


@pytest.mark.parametrize("by_reset", [False, True])
async def test_an_order_whose_answer_was_lost_is_sent_once_more_and_is_still_one_machine(
    proxy: FaultProxy, by_reset: bool
) -> None:
    proxy.lose_answer("RunInstances", by_reset=by_reset)
    async with opened() as provider:
        order = an_order(provider)
        with pytest.raises(CloudUnreachable) as lost:
            await launch_one(provider, order)
        assert lost.value.sent
        assert len(proxy.calls_of("RunInstances")) == 1  # the SDK has not tried again on its own
        instance = await launch_one(provider, order)
    assert [one.instance_id for one in proxy.truth()] == [instance.id]


async def test_an_order_survives_its_broker(proxy: FaultProxy) -> None:
    async with opened() as provider:
        order = an_order(provider)
        first = await launch_one(provider, order)
    async with opened(instance_types=["c6i.large"]) as another:
        assert (await launch_one(another, order)).id == first.id


async def test_a_token_used_with_other_parameters_is_told(proxy: FaultProxy) -> None:
    async with opened() as provider:
        order = an_order(provider)
        await launch_one(provider, order)
        changed = replace(order, parameters=order.parameters.replace("c7i.large", "c6i.large"))
        with pytest.raises(OrderMismatch):
            await launch_one(provider, changed)


async def test_the_order_of_a_dead_machine_is_spent(proxy: FaultProxy) -> None:
    async with opened() as provider:
        order = an_order(provider)
        await provider.terminate([(await launch_one(provider, order)).id])
        with pytest.raises(OrderSpent):
            await launch_one(provider, order)
    assert len(proxy.truth()) == 1


async def test_every_refused_launch_is_one_call_and_one_of_our_errors(proxy: FaultProxy) -> None:
    refusals: dict[str, type[CloudError]] = {
        "InsufficientInstanceCapacity": OfferingRefused,
        "MaxSpotInstanceCountExceeded": QuotaReached,
        "RequestLimitExceeded": Throttled,
        "UnauthorizedOperation": PermanentRefusal,
        "InvalidAMIID.NotFound": PermanentRefusal,
        "AuthFailure": CredentialsRefused,
        "RequestExpired": CredentialsRefused,
        "IdempotentParameterMismatch": OrderMismatch,
        "IdempotentInstanceTerminated": OrderSpent,
        "InternalError": CloudUnreachable,
        "Unavailable": CloudUnreachable,
    }
    outcomes: list[tuple[str, str]] = []
    async with opened(on_call=lambda api, outcome: outcomes.append((api, outcome))) as provider:
        for count, (code, kind) in enumerate(refusals.items(), 1):
            refused = proxy.refuse("RunInstances", code, times=9)
            with pytest.raises(CloudError) as raised:
                await launch_one(provider, an_order(provider, f"order-{count}"))
            refused.cancel()
            assert type(raised.value) is kind
            assert code in raised.value.message
            assert len(proxy.calls_of("RunInstances")) == count  # the SDK has not tried again on its own
    assert [api for api, _ in outcomes] == ["DescribeInstanceTypes", *["RunInstances"] * len(refusals)]
    assert proxy.truth() == []


async def test_a_reset_launch_may_be_sent_again(proxy: FaultProxy) -> None:
    proxy.reset("RunInstances")
    async with opened() as provider:
        with pytest.raises(CloudUnreachable):
            await launch_one(provider, an_order(provider))
        await launch_one(provider, an_order(provider))
    assert len(proxy.truth()) == 1


async def test_a_launch_that_stalls_ends_at_its_time_limit_and_is_found_by_its_token(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ec2_api, "LAUNCHING", replace(ec2_api.LAUNCHING, answer_seconds_max=0.2))
    stall = proxy.stall("RunInstances", after_carrying_out=True)
    async with opened() as provider:
        order = an_order(provider)
        with pytest.raises(CloudUnreachable, match="time limit"):
            await launch_one(provider, order)
        stall.release()
    (machine,) = proxy.truth()
    assert machine.client_token == "order-1"


# --- listing, describing ---------------------------------------------------------------------------


async def test_a_listing_of_several_pages_is_complete(proxy: FaultProxy) -> None:
    async with opened(page_size=5) as provider:
        orders = [an_order(provider, f"order-{n}") for n in range(12)]
        launched = {(await launch_one(provider, order)).id for order in orders}
        assert await ids_listed(provider) == launched
        assert [call.page for call in proxy.calls_of("DescribeInstances")] == [1, 2, 3]
        assert [call.params["MaxResults"] for call in proxy.calls_of("DescribeInstances")] == ["5"] * 3


async def test_a_page_that_keeps_failing_is_no_listing(proxy: FaultProxy) -> None:
    proxy.limit_page_size(1)
    async with opened() as provider:
        for n in range(2):
            await launch_one(provider, an_order(provider, f"order-{n}"))
        proxy.fail_page(2, times=ec2_api.OTHERWISE.attempts_max)
        with pytest.raises(CloudUnreachable):
            await provider.listing()
        assert len(await provider.listing()) == 2
        proxy.fail_page(2)  # a single bad moment is what the SDK's own retry is for
        assert len(await provider.listing()) == 2


async def test_dead_machines_stay_in_the_listing_with_the_reason_of_their_end(proxy: FaultProxy) -> None:
    async with opened() as provider:
        launched = await launch_one(provider, an_order(provider))
        proxy.reclaim(launched.id)
        (seen,) = await provider.listing()
    assert seen.state is InstanceState.TERMINATED
    assert seen.address is None
    assert seen.reason == "Server.SpotInstanceTermination: Spot instance termination"


async def test_a_listing_holds_no_other_brokers_machines(proxy: FaultProxy) -> None:
    async with opened() as ours, opened("other") as theirs:
        mine = await launch_one(ours, an_order(ours))
        await launch_one(theirs, an_order(theirs, "order-2"))
        assert await ids_listed(ours) == {mine.id}


async def test_only_an_adopting_pool_sees_untagged_machines_of_its_name(
    proxy: FaultProxy, server: MotoServer
) -> None:
    def launch_by_hand(**tags: str) -> str:
        parameters = {"ImageId": "ami-1", "InstanceType": "c7i.large", "MinCount": "1", "MaxCount": "1"}
        parameters["TagSpecification.1.ResourceType"] = "instance"
        for n, (key, value) in enumerate(tags.items(), 1):
            parameters |= {f"TagSpecification.1.Tag.{n}.Key": key, f"TagSpecification.1.Tag.{n}.Value": value}
        root = server.call("RunInstances", parameters)
        return root.findtext(ec2_wire.path("instancesSet", "item", "instanceId")) or ""

    older = launch_by_hand(Name="dserv-worker")
    gone = launch_by_hand(Name="dserv-worker")
    server.call("TerminateInstances", {"InstanceId.1": gone})
    launch_by_hand(Name="dserv-worker", **{BROKER: "other"})
    launch_by_hand(Name="dserv-worker-2")
    async with opened() as provider:
        assert await ids_listed(provider) == set()
    async with opened(adopt_name_tag=True) as provider:
        ours = await launch_one(provider, an_order(provider))
        assert await ids_listed(provider) == {older, ours.id}


async def test_describe_leaves_out_what_the_cloud_does_not_know(proxy: FaultProxy) -> None:
    async with opened() as provider:
        launched = await launch_one(provider, an_order(provider))
        found = await provider.describe([UNKNOWN_ID, launched.id, "junk"])
        assert [one.id for one in found] == [launched.id]
        proxy.after_launch(hidden=1)
        hidden = await launch_one(provider, an_order(provider, "order-2"))
        assert await provider.describe([hidden.id]) == []
        assert [one.id for one in await provider.describe([hidden.id])] == [hidden.id]


async def test_a_read_is_tried_once_more_and_then_told(proxy: FaultProxy) -> None:
    async with opened() as provider:
        proxy.refuse("DescribeInstances", "RequestLimitExceeded", times=9)
        with pytest.raises(Throttled):
            await provider.listing()
    assert len(proxy.calls_of("DescribeInstances")) == ec2_api.OTHERWISE.attempts_max


# --- terminating, tagging --------------------------------------------------------------------------


async def test_a_stale_id_keeps_no_machine_alive(proxy: FaultProxy) -> None:
    async with opened() as provider:
        alive = [(await launch_one(provider, an_order(provider, f"order-{n}"))).id for n in range(3)]
        await provider.terminate([alive[0], UNKNOWN_ID, alive[1], "junk", alive[2]])
        await provider.terminate(alive)  # once more is fine
    assert proxy.running_ours("lab") == []


async def test_a_machine_that_terminate_does_not_find_yet_keeps_no_other_alive(proxy: FaultProxy) -> None:
    async with opened() as provider:
        old = await launch_one(provider, an_order(provider))
        proxy.after_launch(hidden=9, hidden_from_terminate=True)
        new = await launch_one(provider, an_order(provider, "order-2"))
        await provider.terminate([new.id, old.id])
    assert [one.instance_id for one in proxy.running_ours("lab")] == [new.id]


async def test_a_terminated_machine_is_seen_shutting_down_first(proxy: FaultProxy) -> None:
    proxy.after_terminate(shutting_down=1)
    async with opened() as provider:
        launched = await launch_one(provider, an_order(provider))
        await provider.terminate([launched.id])
        states = [(await provider.listing())[0].state.value for _ in range(2)]
    assert states == ["shutting-down", "terminated"]


async def test_the_claim_arrives_with_the_launch_and_is_renewed_on_all_machines(proxy: FaultProxy) -> None:
    async with opened() as provider:
        offering = provider.offerings("default")[0]
        orders = [
            provider.prepare("default", f"order-{n}", [offering], NOW_UNIX, "1.a@2026-01-01T00:00:00Z")
            for n in range(2)
        ]
        ids = [(await launch_one(provider, order)).id for order in orders]
        assert {one.tags[EPOCH] for one in await provider.listing()} == {"1.a@2026-01-01T00:00:00Z"}
        await provider.tag_all([ids[0], UNKNOWN_ID, ids[1]], {EPOCH: "2.b@2026-01-01T00:05:00Z"})
        assert [one.tags[EPOCH] for one in await provider.listing()] == ["2.b@2026-01-01T00:05:00Z"] * 2


async def test_a_tag_is_written_and_read_back(proxy: FaultProxy) -> None:
    async with opened() as provider:
        launched = await launch_one(provider, an_order(provider))
        await provider.tag(launched.id, {LAST_USED: "2026-01-01T00:10:00Z"})
        (seen,) = await provider.listing()
        assert seen.tags[LAST_USED] == "2026-01-01T00:10:00Z"
        assert seen.tags[ORDER] == "order-1"
        proxy.refuse("CreateTags", "InvalidInstanceID.NotFound")
        with pytest.raises(InstanceNotFound):
            await provider.tag(UNKNOWN_ID, {LAST_USED: ""})


# --- the cloud as a whole --------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["200 OK", "302 Found", "403 Forbidden", "502 Bad Gateway"])
async def test_an_answer_that_is_not_awss_leaves_open_whether_the_launch_happened(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    def portal(request: bytes) -> tuple[str, bytes]:
        """A captive portal that closes just before the launch."""
        launches = b"Action=RunInstances" in request
        return (status, b"<!DOCTYPE html><p>Log in, please<br>") if launches else ("200 OK", ONE_TYPE)

    async with endpoint(portal) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        async with opened() as provider:
            with pytest.raises(CloudUnreachable) as raised:
                await launch_one(provider, an_order(provider))
            assert raised.value.sent


async def test_a_clock_that_is_off_is_told_with_the_refused_credentials(proxy: FaultProxy) -> None:
    proxy.refuse("DescribeInstances", "AuthFailure")
    async with opened() as provider:
        with pytest.raises(
            CredentialsRefused, match=r"\(AuthFailure; this machine's clock is \d+ s behind AWS's\)"
        ):
            await provider.listing()  # the test's clock says New Year 2026


# --- time ------------------------------------------------------------------------------------------------


async def test_the_clouds_clock_is_told_by_its_answers_and_not_by_this_machines_wall_clock(
    proxy: FaultProxy,
) -> None:
    async with opened() as provider:  # whose wall clock stands at NOW_UNIX
        await provider.listing()
        before_unix = time.time()
        span = provider.clock_unix(time.monotonic())
        assert span.earliest_unix <= time.time()
        assert before_unix <= span.latest_unix
        assert span.latest_unix - span.earliest_unix < 30.0


async def test_a_terminated_machine_has_the_second_of_its_end(proxy: FaultProxy) -> None:
    async with opened() as provider:
        instance = await launch_one(provider, an_order(provider))
        await provider.terminate([instance.id])
        (dead,) = await provider.listing()
        assert dead.ended_unix is not None
        assert abs(dead.ended_unix - time.time()) < 60.0
