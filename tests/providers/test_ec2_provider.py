"""The provider on a scripted client: every answer EC2 can give, also those an emulator never gives."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import pytest

from broker.core.cloudtime import Span
from broker.core.errors import (
    CloudUnreachable,
    CredentialsRefused,
    InstanceNotFound,
    OrderSpent,
    PermanentRefusal,
    SettingsError,
    Throttled,
)
from broker.core.model import Market, Offering, Order
from broker.core.tags import BROKER, POOL
from broker.providers import ec2_api
from broker.providers.base import Provider
from broker.providers.ec2 import Ec2Provider
from broker.providers.ec2_api import LAUNCHING, OTHERWISE
from broker.providers.ec2_errors import client_error
from tests.providers.ec2_support import NOW_UNIX, ScriptedClient, opened, page, pool, shape
from tests.support.buying import launch_one


async def test_the_provider_fits_its_port() -> None:
    async with opened(ScriptedClient()) as provider:
        port: Provider = provider  # what the type checker holds
        assert port.name == "ec2 us-east-1"


OURS = {BROKER: "lab", POOL: "default"}
SPOT = Offering("us-east-1", "c7i.large", Market.SPOT, cores=2)


def order_of(provider: Ec2Provider, order_id: str = "order-1") -> Order:
    return provider.prepare("default", order_id, [provider.offerings("default")[0]], NOW_UNIX)


def unknown(*ids: str) -> Exception:
    return client_error(
        "TerminateInstances",
        "InvalidInstanceID.NotFound",
        f"The instance IDs '{', '.join(ids)}' do not exist",
    )


# --- orders ----------------------------------------------------------------------------------------


async def test_a_launch_sends_what_the_order_holds_and_its_id_as_the_token() -> None:
    client = ScriptedClient(RunInstances={"Instances": [shape(tags=OURS)]})
    async with opened(client) as provider:
        order = order_of(provider)
        assert (await launch_one(provider, order)).id == "i-00000001"
        assert client.sent("RunInstances") == [{**json.loads(order.parameters), "ClientToken": "order-1"}]


async def test_an_order_is_the_same_text_every_time_and_expires_after_the_longest_life() -> None:
    async with opened(ScriptedClient(), {"default": pool(max_lifetime="1h")}) as provider:
        order = order_of(provider)
        assert order == order_of(provider)
        assert order.parameters == json.dumps(
            json.loads(order.parameters), sort_keys=True, separators=(",", ":")
        )
        tags = {
            tag["Key"]: tag["Value"] for tag in json.loads(order.parameters)["TagSpecifications"][0]["Tags"]
        }
        assert tags == {
            "Name": "dserv-worker",
            "compute-broker:broker": "lab",
            "compute-broker:pool": "default",
            "compute-broker:order": "order-1",
            "compute-broker:expires": "2026-01-01T01:00:00Z",
        }


async def test_an_order_written_by_an_earlier_run_is_sent_as_it_was_written() -> None:
    client = ScriptedClient(RunInstances={"Instances": [shape()]})
    async with opened(client) as provider:
        await provider.launch(Order("old", "forgotten", (SPOT,), '{"ImageId":"ami-old"}', NOW_UNIX))
        assert client.sent("RunInstances") == [{"ImageId": "ami-old", "ClientToken": "old"}]


@pytest.mark.parametrize("order_id", ["x" * 65, "ördnung"])
async def test_an_order_id_that_is_no_client_token_is_a_bug(order_id: str) -> None:
    async with opened(ScriptedClient()) as provider:
        with pytest.raises(AssertionError):
            order_of(provider, order_id)


@pytest.mark.parametrize("state", ["terminated", "shutting-down"])
async def test_a_token_that_returns_the_dead_machine_is_spent(state: str) -> None:
    dead = shape(state=state, StateReason={"Code": "Server.SpotInstanceTermination", "Message": "reclaimed"})
    async with opened(ScriptedClient(RunInstances={"Instances": [dead]})) as provider:
        with pytest.raises(OrderSpent, match=r"i-00000001, is .* already \(Server.SpotInstanceTermination"):
            await launch_one(provider, order_of(provider))


@pytest.mark.parametrize(
    "answer", [{}, {"Instances": []}, {"Instances": [{"InstanceId": "i-1"}]}, {"Instances": [None]}]
)
async def test_an_answer_without_a_machine_leaves_open_whether_there_is_one(answer: dict[str, Any]) -> None:
    async with opened(ScriptedClient(RunInstances=answer)) as provider:
        with pytest.raises(CloudUnreachable) as raised:
            await launch_one(provider, order_of(provider))
        assert raised.value.sent


async def test_launches_that_hang_keep_no_terminate_waiting() -> None:
    client = ScriptedClient(RunInstances={"Instances": [shape()]})
    async with opened(client) as provider:
        client.hold = asyncio.Event()
        order = order_of(provider)
        async with asyncio.TaskGroup() as group:
            launches = [group.create_task(launch_one(provider, order)) for _ in range(20)]
            while client.in_flight < LAUNCHING.in_flight_max:
                await asyncio.sleep(0)
            ending = group.create_task(provider.terminate(["i-9"]))
            while not client.sent("TerminateInstances"):
                await asyncio.sleep(0)
            assert client.in_flight == LAUNCHING.in_flight_max + 1
            client.hold.set()
        assert ending.done()
        assert all(one.done() for one in launches)


async def test_calls_in_flight_are_bounded() -> None:
    client = ScriptedClient(DescribeInstances=page())
    async with opened(client) as provider:
        client.hold = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for _ in range(100):
                group.create_task(provider.describe(["i-1"]))
            while client.in_flight < OTHERWISE.in_flight_max:
                await asyncio.sleep(0)
            client.hold.set()
        assert client.in_flight_max == OTHERWISE.in_flight_max
        assert len(client.sent("DescribeInstances")) == 100


# --- listings --------------------------------------------------------------------------------------


async def test_a_listing_goes_on_to_its_last_page() -> None:
    pages: list[Any] = [
        page(shape("i-1", tags=OURS), token="two"),
        page(token="three"),
        page(shape("i-2", "terminated", tags=OURS)),
    ]
    client = ScriptedClient(DescribeInstances=pages)
    async with opened(client) as provider:
        assert [one.id for one in await provider.listing()] == ["i-1", "i-2"]
        asked = client.sent("DescribeInstances")
        assert [one.get("NextToken") for one in asked] == [None, "two", "three"]
        assert all(one["MaxResults"] == 1000 for one in asked)
        assert asked[0]["Filters"] == [{"Name": "tag:compute-broker:broker", "Values": ["lab"]}]


async def test_a_page_that_fails_is_no_listing() -> None:
    broken = client_error("DescribeInstances", "InternalError", status=500)
    client = ScriptedClient(DescribeInstances=[page(shape("i-1", tags=OURS), token="two"), broken])
    async with opened(client) as provider:
        with pytest.raises(CloudUnreachable):
            await provider.listing()


async def test_a_listing_that_does_not_end_is_no_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ec2_api, "PAGES_MAX", 20)  # the broker's own pace would make more of them take long
    client = ScriptedClient(DescribeInstances=page(token="again"))
    async with opened(client) as provider:
        with pytest.raises(CloudUnreachable, match="does not end"):
            await provider.listing()
        assert len(client.sent("DescribeInstances")) == 20


async def test_an_instance_of_an_unknown_shape_is_no_listing() -> None:
    async with opened(
        ScriptedClient(DescribeInstances=page(shape(state="levitating", tags=OURS)))
    ) as provider:
        with pytest.raises(CloudUnreachable, match="cannot be understood"):
            await provider.listing()


async def test_whatever_the_filter_lets_through_only_our_tag_counts() -> None:
    others = [shape("i-2", tags={BROKER: "LAB"}), shape("i-3")]
    client = ScriptedClient(DescribeInstances=page(shape("i-1", tags=OURS), *others))
    async with opened(client) as provider:
        assert [one.id for one in await provider.listing()] == ["i-1"]


async def test_adoption_takes_living_untagged_machines_with_the_pools_name() -> None:
    def describe(Filters: list[dict[str, Any]], **_: Any) -> dict[str, Any]:  # the SDK's spelling
        if Filters[0]["Name"] == "tag:compute-broker:broker":
            return page(shape("i-1", tags={**OURS, "Name": "old"}))
        assert Filters[0] == {"Name": "tag:Name", "Values": ["old"]}
        assert Filters[1]["Name"] == "instance-state-name"
        assert sorted(Filters[1]["Values"]) == ["pending", "running", "stopped", "stopping"]
        return page(
            shape("i-1", tags={**OURS, "Name": "old"}),
            shape(
                "i-2",
                "running",
                tags={"Name": "old"},
                PrivateIpAddress="10.0.0.2",
                PublicIpAddress="203.0.113.2",
            ),
            shape("i-3", "running", tags={"Name": "old", BROKER: "another"}),
        )

    pools = {"default": pool(), "old": pool(adopt_name_tag=True, name_tag="old", address="private")}
    async with opened(ScriptedClient(DescribeInstances=describe), pools) as provider:
        found = {one.id: one for one in await provider.listing()}
        assert set(found) == {"i-1", "i-2"}
        assert found["i-2"].address == "10.0.0.2"  # as the adopting pool hands it out


async def test_without_adoption_nothing_is_asked_by_name() -> None:
    client = ScriptedClient(DescribeInstances=page())
    async with opened(client) as provider:
        assert await provider.listing() == []
        assert len(client.sent("DescribeInstances")) == 1


async def test_machines_of_a_forgotten_pool_are_listed_too() -> None:
    forgotten = shape("i-1", tags={BROKER: "lab", POOL: "forgotten"}, PublicIpAddress="203.0.113.1")
    async with opened(ScriptedClient(DescribeInstances=page(forgotten))) as provider:
        assert [one.address for one in await provider.listing()] == ["203.0.113.1"]


async def test_describe_asks_by_filter_in_batches() -> None:
    client = ScriptedClient(DescribeInstances=page())
    async with opened(client) as provider:
        await provider.describe([f"i-{n}" for n in range(150)])
        asked = client.sent("DescribeInstances")
        assert [len(one["Filters"][0]["Values"]) for one in asked] == [100, 50]
        assert not any("InstanceIds" in one for one in asked)


async def test_describing_nothing_asks_nothing() -> None:
    client = ScriptedClient()
    async with opened(client) as provider:
        assert await provider.describe([]) == []
        assert client.sent("DescribeInstances") == []


# --- terminations ----------------------------------------------------------------------------------


async def test_stale_ids_are_left_out_and_the_rest_die() -> None:
    client = ScriptedClient(TerminateInstances=[unknown("i-2"), unknown("i-4"), {}])
    async with opened(client) as provider:
        await provider.terminate(["i-1", "i-2", "i-3", "i-4"])
        sent = [one["InstanceIds"] for one in client.sent("TerminateInstances")]
        assert sent == [["i-1", "i-2", "i-3", "i-4"], ["i-1", "i-3", "i-4"], ["i-1", "i-3"]]


async def test_a_batch_of_nothing_but_stale_ids_is_done() -> None:
    client = ScriptedClient(TerminateInstances=unknown("i-1", "i-2"))
    async with opened(client) as provider:
        await provider.terminate(["i-1", "i-2"])
        assert len(client.sent("TerminateInstances")) == 1


async def test_when_ec2_does_not_say_which_id_is_stale_each_is_asked_for_alone() -> None:
    def terminate(InstanceIds: list[str]) -> dict[str, Any]:  # the SDK's spelling
        if "junk" in InstanceIds:
            raise client_error("TerminateInstances", "InvalidInstanceID.Malformed", "Invalid id")
        return {}

    client = ScriptedClient(TerminateInstances=terminate)
    async with opened(client) as provider:
        await provider.terminate(["i-1", "junk", "i-2"])
        sent = [one["InstanceIds"] for one in client.sent("TerminateInstances")]
        assert sent == [["i-1", "junk", "i-2"], ["i-1"], ["junk"], ["i-2"]]


async def test_one_that_may_not_be_ended_keeps_no_other_alive_and_is_reported() -> None:
    def terminate(InstanceIds: list[str]) -> dict[str, Any]:  # the SDK's spelling
        if "i-2" in InstanceIds:
            raise client_error(
                "TerminateInstances", "OperationNotPermitted", "The instance 'i-2' may not be terminated"
            )
        return {}

    client = ScriptedClient(TerminateInstances=terminate)
    async with opened(client) as provider:
        with pytest.raises(PermanentRefusal, match="i-2"):
            await provider.terminate(["i-1", "i-2", "i-3"])
        sent = [one["InstanceIds"] for one in client.sent("TerminateInstances")]
        assert ["i-1"] in sent
        assert ["i-3"] in sent


async def test_leaving_out_stale_ids_ends_after_a_few_rounds() -> None:
    def terminate(InstanceIds: list[str]) -> dict[str, Any]:  # the SDK's spelling
        stale = [one for one in InstanceIds if int(one[2:]) % 2]
        if stale:
            raise unknown(stale[0])
        return {}

    client = ScriptedClient(TerminateInstances=terminate)
    async with opened(client) as provider:
        await provider.terminate([f"i-{n}" for n in range(10)])
        assert len(client.sent("TerminateInstances")) == 3 + 7


async def test_many_terminations_go_in_batches() -> None:
    client = ScriptedClient(TerminateInstances={})
    async with opened(client) as provider:
        await provider.terminate([*(f"i-{n}" for n in range(120)), "i-0"])
        assert [len(one["InstanceIds"]) for one in client.sent("TerminateInstances")] == [100, 20]


async def test_a_throttled_terminate_is_the_callers_to_repeat() -> None:
    throttled = client_error("TerminateInstances", "RequestLimitExceeded", status=503)
    client = ScriptedClient(TerminateInstances=throttled)
    async with opened(client) as provider:
        with pytest.raises(Throttled):
            await provider.terminate(["i-1", "i-2"])
        assert len(client.sent("TerminateInstances")) == 1


# --- tags, opening, the metric ---------------------------------------------------------------------


async def test_tags_are_written_onto_one_machine() -> None:
    client = ScriptedClient(CreateTags={})
    async with opened(client) as provider:
        await provider.tag("i-1", {"b": "2", "a": "1"})
        tags = [{"Key": "a", "Value": "1"}, {"Key": "b", "Value": "2"}]
        assert client.sent("CreateTags") == [{"Resources": ["i-1"], "Tags": tags}]


async def test_tagging_an_unknown_machine_says_so() -> None:
    refusal = client_error("CreateTags", "InvalidInstanceID.NotFound", "The instance ID 'i-1' does not exist")
    async with opened(ScriptedClient(CreateTags=refusal)) as provider:
        with pytest.raises(InstanceNotFound):
            await provider.tag("i-1", {"a": "1"})


async def test_offerings_follow_the_pools_order_with_cores_and_price() -> None:
    types = [
        {"InstanceType": kind, "VCpuInfo": {"DefaultVCpus": cores}} for kind, cores in (("b", 4), ("a", 2))
    ]
    settings = pool(instance_types=["b", "a", "b"], market="on-demand", price_usd_per_hour=1.5)
    async with opened(
        ScriptedClient(DescribeInstanceTypes={"InstanceTypes": types}), {"default": settings}
    ) as provider:
        assert list(provider.offerings("default")) == [
            Offering("us-east-1", "b", Market.ON_DEMAND, "", 4, 1_500_000),
            Offering("us-east-1", "a", Market.ON_DEMAND, "", 2, 1_500_000),
        ]


async def test_credentials_that_may_not_ask_about_types_leave_the_cores_open() -> None:
    refused = client_error("DescribeInstanceTypes", "UnauthorizedOperation", status=403)
    async with opened(ScriptedClient(DescribeInstanceTypes=refused)) as provider:
        assert provider.offerings("default")[0].cores is None


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("InternalError", 500, CloudUnreachable),
        ("RequestLimitExceeded", 503, Throttled),
        ("AuthFailure", 401, CredentialsRefused),
    ],
)
async def test_what_passes_by_itself_is_no_problem_of_the_settings(
    code: str, status: int, kind: type[Exception]
) -> None:
    passing = client_error("DescribeInstanceTypes", code, status=status)
    described = {"InstanceTypes": [{"InstanceType": "c7i.large", "VCpuInfo": {"DefaultVCpus": 2}}]}
    client = ScriptedClient(DescribeInstanceTypes=[passing, described])
    provider = Ec2Provider(
        "lab", {"default": pool()}, region="us-east-1", profile=None, clock_wall=lambda: NOW_UNIX,
        client_factory=client.factory,
    )  # fmt: skip
    with pytest.raises(kind):
        await provider.open()
    await provider.open()
    assert provider.offerings("default")[0].cores == 2


async def test_groups_that_may_not_be_looked_up_are_a_problem_of_the_settings() -> None:
    refused = client_error("DescribeVpcs", "UnauthorizedOperation", status=403)
    with pytest.raises(SettingsError, match=r"pool\.default\.security_groups: cannot .* ec2:DescribeVpcs"):
        async with opened(
            ScriptedClient(DescribeVpcs=refused), {"default": pool(security_groups=["workers"])}
        ):
            pass


async def test_every_call_is_counted_with_its_outcome() -> None:
    seen: list[tuple[str, str]] = []
    client = ScriptedClient(
        RunInstances=client_error("RunInstances", "InsufficientInstanceCapacity", status=500),
        DescribeInstances=page(),
    )
    async with opened(client, on_call=lambda api, outcome: seen.append((api, outcome))) as provider:
        await provider.listing()
        with pytest.raises(Exception, match="capacity"):
            await launch_one(provider, order_of(provider))
        client.hold = asyncio.Event()
        waiting = asyncio.create_task(provider.listing())
        while not client.in_flight:
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
    assert seen == [
        ("DescribeInstanceTypes", "ok"),
        ("DescribeInstances", "ok"),
        ("RunInstances", "refused"),
        ("DescribeInstances", "cancelled"),
    ]


# --- tags for many ---------------------------------------------------------------------------------


async def test_many_machines_are_tagged_in_one_call_and_unknown_ones_keep_no_other_from_its_tag() -> None:
    stale = client_error("CreateTags", "InvalidInstanceID.NotFound", "The instance ID 'i-2' does not exist")
    client = ScriptedClient(CreateTags=[stale, {}])
    async with opened(client) as provider:
        await provider.tag_all(["i-1", "i-2", "i-3"], {"compute-broker:epoch": "1.a"})
    assert client.sent("CreateTags") == [
        {"Resources": ids, "Tags": [{"Key": "compute-broker:epoch", "Value": "1.a"}]}
        for ids in (["i-1", "i-2", "i-3"], ["i-1", "i-3"])
    ]


async def test_when_ec2_does_not_say_which_id_is_unknown_each_is_tagged_alone() -> None:
    nameless = client_error("CreateTags", "InvalidInstanceID.NotFound", "some do not exist")
    client = ScriptedClient(CreateTags=[nameless, {}, nameless, {}])
    async with opened(client) as provider:
        await provider.tag_all(["i-1", "i-2", "i-3"], {"k": "v"})
    sent = [one["Resources"] for one in client.sent("CreateTags")]
    assert sent == [["i-1", "i-2", "i-3"], ["i-1"], ["i-2"], ["i-3"]]


async def test_a_missing_permission_to_tag_is_asked_for_once() -> None:
    client = ScriptedClient(CreateTags=client_error("CreateTags", "UnauthorizedOperation", "no"))
    async with opened(client) as provider:
        with pytest.raises(PermanentRefusal):
            await provider.tag_all(["i-1", "i-2"], {"k": "v"})
    assert len(client.sent("CreateTags")) == 1


async def test_a_call_tags_five_hundred_at_most_and_none_is_made_for_nothing() -> None:
    client = ScriptedClient()
    async with opened(client) as provider:
        await provider.tag_all([], {"k": "v"})
        await provider.tag_all([f"i-{n}" for n in range(1001)], {"k": "v"})
    assert [len(one["Resources"]) for one in client.sent("CreateTags")] == [500, 500, 1]


async def test_the_claim_is_in_the_order_and_so_the_same_in_every_resend() -> None:
    client = ScriptedClient(RunInstances={"Instances": [shape()]})
    async with opened(client) as provider:
        offering = provider.offerings("default")[0]
        claimed = provider.prepare("default", "cb-1", [offering], NOW_UNIX, "7.a@2026-01-01T00:00:00Z")
        await launch_one(provider, claimed)
        await launch_one(provider, claimed)
        first, second = client.sent("RunInstances")
        assert first == second
        assert {"Key": "compute-broker:epoch", "Value": "7.a@2026-01-01T00:00:00Z"} in first[
            "TagSpecifications"
        ][0]["Tags"]
        assert "epoch" not in provider.prepare("default", "cb-2", [offering], NOW_UNIX).parameters


# --- time ----------------------------------------------------------------------------------------------


def dated(text: str) -> dict[str, Any]:
    return {"Reservations": [], "ResponseMetadata": {"HTTPHeaders": {"date": text}}}


@pytest.mark.parametrize("text", ["", "yesterday", "Thu, 99 Jan 2026 00:00:00 GMT"])
async def test_until_the_cloud_has_told_the_time_this_machines_clock_stands_in(text: str) -> None:
    async with opened(
        ScriptedClient(DescribeInstances=dated(text)), clock_monotonic=lambda: 50.0
    ) as provider:
        await provider.listing()
        assert provider.clock_unix(40.0) == Span(NOW_UNIX - 10.0, NOW_UNIX - 10.0)


async def test_a_refusal_tells_the_time_too() -> None:
    refusal = client_error("DescribeInstances", "RequestExpired", "", 400)
    cast(Any, refusal).response["ResponseMetadata"] |= dated("Fri, 02 Jan 2026 00:00:00 GMT")[
        "ResponseMetadata"
    ]
    async with opened(ScriptedClient(DescribeInstances=refusal), clock_monotonic=lambda: 50.0) as provider:
        with pytest.raises(CredentialsRefused):
            await provider.listing()
        assert provider.clock_unix(50.0) == Span(NOW_UNIX + 86_400.0, NOW_UNIX + 86_401.0)


async def test_a_pool_that_may_fall_back_offers_every_type_on_spot_and_then_on_demand() -> None:
    mixed = pool(instance_types=["c7i.large", "c7i.large"], market="spot-then-on-demand")
    async with opened(ScriptedClient(), {"default": mixed}) as provider:
        offerings = provider.offerings("default")
    assert [(one.instance_type, one.market, one.cores) for one in offerings] == [
        ("c7i.large", Market.SPOT, 2),
        ("c7i.large", Market.ON_DEMAND, 2),
    ]
