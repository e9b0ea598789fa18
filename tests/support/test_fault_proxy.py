"""Every fault of the proxy, met by the real client libraries over a real connection.

The clients make one attempt: what the proxy does is what they see. No test sleeps; those about seconds
use delays long enough never to pass meanwhile, and none at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from aiobotocore.session import get_session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    EndpointConnectionError,
    ReadTimeoutError,
)

from tests.support import ec2_wire
from tests.support.cloud import BROKER_TAG, CloudError, CloudInstance, MotoServer
from tests.support.fault_proxy import EVERY_ACTION, FOREVER, FaultProxy, Seconds, loopback_address
from tests.support.loop_thread import LoopThread
from tests.support.worker_stand_in import FRAME_BYTES_MAX, WorkerFleet, WorkerStandIn, evaluate, frame

Client = Any  # botocore builds its clients' methods at run time
MakeClient = Callable[..., Client]

NEVER_MEANWHILE = Seconds(3600.0)
UNKNOWN_ID = "i-0123456789abcdef0"


def client_parameters(
    proxy: FaultProxy, region: str = "us-east-1", read_timeout_seconds: float = 20.0
) -> dict[str, Any]:
    return {
        "region_name": region,
        "endpoint_url": proxy.endpoint_url,
        "aws_access_key_id": "testing",
        "aws_secret_access_key": "testing",
        "config": Config(retries={"total_max_attempts": 1}, read_timeout=read_timeout_seconds),
    }


@pytest.fixture(scope="module")
def server() -> Iterator[MotoServer]:
    with MotoServer(images=False) as running:
        yield running


@pytest.fixture
def proxy(server: MotoServer) -> Iterator[FaultProxy]:
    server.reset()
    with FaultProxy(server) as running:
        yield running


@pytest.fixture(scope="module")
def botocore_session() -> botocore.session.Session:
    return botocore.session.Session()  # one for all: it reads EC2's large model once


@pytest.fixture
def make_client(proxy: FaultProxy, botocore_session: botocore.session.Session) -> Iterator[MakeClient]:
    made: list[Client] = []

    def make(service: str = "ec2", **changes: Any) -> Client:
        made.append(botocore_session.create_client(service, **client_parameters(proxy, **changes)))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def ec2(make_client: MakeClient) -> Client:
    return make_client()


def launch_parameters(token: str = "order-1", **changes: Any) -> dict[str, Any]:
    tags = [{"Key": "Name", "Value": "dserv-worker"}, {"Key": BROKER_TAG, "Value": "lab"}]
    parameters = {
        "ImageId": "ami-12c6146b",
        "InstanceType": "c7i.large",
        "MinCount": 1,
        "MaxCount": 1,
        "ClientToken": token,
        "TagSpecifications": [{"ResourceType": "instance", "Tags": tags}],
    }
    return {k: v for k, v in (parameters | changes).items() if v is not None}


def launch(client: Client, token: str = "order-1", **changes: Any) -> str:
    answer = client.run_instances(**launch_parameters(token, **changes))
    return str(answer["Instances"][0]["InstanceId"])


def listed(client: Client, **request: Any) -> list[dict[str, Any]]:
    answer = client.describe_instances(**request)
    return [one for reservation in answer["Reservations"] for one in reservation["Instances"]]


def only(client: Client, **request: Any) -> dict[str, Any]:
    (instance,) = listed(client, **request)
    return instance


def state(client: Client, instance_id: str) -> str:
    return str(only(client, InstanceIds=[instance_id])["State"]["Name"])


def refusal(call: Callable[..., Any], **request: Any) -> tuple[str, int]:
    """(EC2's code, HTTP status) of the error that the call must meet."""
    with pytest.raises(ClientError) as caught:
        call(**request)
    answer: Any = caught.value.response
    return answer["Error"]["Code"], answer["ResponseMetadata"]["HTTPStatusCode"]


def filters(**wanted: str) -> list[dict[str, Any]]:
    return [{"Name": name.replace("_", "-"), "Values": [value]} for name, value in wanted.items()]


SPOT = {"MarketType": "spot", "SpotOptions": {"SpotInstanceType": "one-time"}}

# ---------------------------------------------------------------- the server


OWNER_OF_A_MOTO = """
from tests.support.cloud import MotoServer
server = MotoServer()
server.start()
print(server.pid, flush=True)
input()
"""


def test_moto_ends_with_its_owner_even_when_that_is_killed() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER_OF_A_MOTO],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with owner:
        assert owner.stdout is not None
        moto = os.pidfd_open(int(owner.stdout.readline()))
        owner.kill()
        # A pidfd reads as soon as its process has ended, whoever is left to collect it.
        ended, _, _ = select.select([moto], [], [], 20.0)
        os.close(moto)
    assert ended


def test_a_reset_forgets_every_instance(server: MotoServer, proxy: FaultProxy, ec2: Client) -> None:
    launch(ec2)
    server.reset()
    assert proxy.truth() == []


def test_a_direct_call_that_moto_refuses_names_the_code(server: MotoServer) -> None:
    with pytest.raises(CloudError) as caught:
        server.call("TerminateInstances", {"InstanceId.1": UNKNOWN_ID})
    assert caught.value.code == "InvalidInstanceID.NotFound"


# ---------------------------------------------------------------- plain passage


def test_a_launch_is_pending_without_a_public_address_and_then_runs_with_one(ec2: Client) -> None:
    answer = ec2.run_instances(**launch_parameters())["Instances"][0]
    assert answer["State"]["Name"] == "pending"
    assert "PublicIpAddress" not in answer
    described = only(ec2, InstanceIds=[answer["InstanceId"]])
    assert described["State"] == {"Code": 16, "Name": "running"}
    assert described["PublicIpAddress"] == loopback_address(answer["InstanceId"])


def test_every_address_in_every_answer_is_loopback(ec2: Client) -> None:
    instance_id = launch(ec2)
    described = only(ec2, InstanceIds=[instance_id])
    interface = described["NetworkInterfaces"][0]
    assert described["PrivateIpAddress"] == loopback_address(instance_id, "private")
    assert described["PublicDnsName"] == loopback_address(instance_id, "dns")
    assert interface["Association"]["PublicIp"] == loopback_address(instance_id)
    answers = [
        described,
        ec2.run_instances(**launch_parameters("order-2")),
        ec2.describe_network_interfaces()["NetworkInterfaces"],
    ]
    found = [ip for one in answers for ip in re.findall(r"\b\d+\.\d+\.\d+\.\d+\b(?!/)", str(one))]
    assert len(found) > 6
    assert all(ip.startswith("127.") for ip in found)


def test_addresses_are_stable_differ_by_kind_and_leave_localhost_alone() -> None:
    kinds = [loopback_address(UNKNOWN_ID, kind) for kind in ("public", "private", "dns")]
    assert kinds[0] == loopback_address(UNKNOWN_ID)
    assert len(set(kinds)) == 3
    many = {loopback_address(f"i-{n:017x}") for n in range(200)}
    assert len(many) == 200
    assert all(re.fullmatch(r"127\.[1-9]\d*\.\d+\.[1-9]\d*", one) for one in many)


def test_the_truth_is_motos_with_state_tags_token_and_market(proxy: FaultProxy, ec2: Client) -> None:
    instance_id = launch(ec2, "order-7", InstanceMarketOptions=SPOT)
    assert proxy.truth() == [
        CloudInstance(
            instance_id=instance_id,
            state="running",
            tags={"Name": "dserv-worker", BROKER_TAG: "lab"},
            client_token="order-7",
            instance_type="c7i.large",
            lifecycle="spot",
            zone="us-east-1a",
            region="us-east-1",
        )
    ]


def test_running_ours_counts_neither_the_dead_nor_another_brokers(proxy: FaultProxy, ec2: Client) -> None:
    ours, dead = launch(ec2, "a"), launch(ec2, "b")
    launch(ec2, "c", TagSpecifications=None)
    ec2.terminate_instances(InstanceIds=[dead])
    assert [one.instance_id for one in proxy.running_ours("lab")] == [ours]
    assert proxy.running_ours("other") == []


def test_the_truth_spans_every_region_a_client_spoke_to(proxy: FaultProxy, make_client: MakeClient) -> None:
    launch(make_client(region="us-east-1"))
    launch(make_client(region="eu-west-1"))
    assert [one.region for one in proxy.truth()] == ["eu-west-1", "us-east-1"]


def test_the_journal_holds_every_call_with_its_parameters_and_outcome(proxy: FaultProxy, ec2: Client) -> None:
    launch(ec2)
    listed(ec2)
    refusal(ec2.terminate_instances, InstanceIds=[UNKNOWN_ID])
    assert [(one.action, one.outcome) for one in proxy.calls] == [
        ("RunInstances", "ok"),
        ("DescribeInstances", "ok"),
        ("TerminateInstances", "error InvalidInstanceID.NotFound"),
    ]
    assert proxy.calls[0].params["ClientToken"] == "order-1"
    assert proxy.calls[0].at <= proxy.calls[1].at <= proxy.calls[2].at


def test_another_service_passes_through_untouched(proxy: FaultProxy, make_client: MakeClient) -> None:
    parameter = "/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-x86_64"
    answer = make_client("ssm").get_parameter(Name=parameter)
    assert answer["Parameter"]["Value"].startswith("ami-")
    with pytest.raises(ClientError) as caught:  # JSON protocols say what went wrong in body and header
        make_client("ssm").get_parameter(Name="/no/such")
    assert caught.value.response["Error"]["Code"] == "ParameterNotFound"
    assert [one.action for one in proxy.calls] == ["GetParameter", "GetParameter"]
    assert answer["ResponseMetadata"]["HTTPHeaders"]["x-amzn-requestid"]


def test_other_services_meet_faults_too(proxy: FaultProxy, make_client: MakeClient) -> None:
    proxy.refuse("GetParameter", "Unavailable")
    with pytest.raises((BotoCoreError, ClientError)):
        make_client("ssm").get_parameter(Name="/no/such")
    assert proxy.calls[-1].outcome == "refused Unavailable"


def test_a_spot_launch_shows_its_market_and_request_and_an_on_demand_one_neither(ec2: Client) -> None:
    spot = only(ec2, InstanceIds=[launch(ec2, "a", InstanceMarketOptions=SPOT)])
    on_demand = only(ec2, InstanceIds=[launch(ec2, "b")])
    assert spot["InstanceLifecycle"] == "spot"
    assert re.fullmatch(r"sir-[0-9a-f]{8}", spot["SpotInstanceRequestId"])
    assert "InstanceLifecycle" not in on_demand
    assert "SpotInstanceRequestId" not in on_demand


def test_max_count_instances_are_launched_as_one_reservation(proxy: FaultProxy, ec2: Client) -> None:
    answer = ec2.run_instances(**launch_parameters(MinCount=1, MaxCount=3))
    assert len(answer["Instances"]) == 3
    assert len(proxy.truth()) == 3


# ---------------------------------------------------------------- client tokens


def test_the_same_token_and_parameters_give_the_same_instance(proxy: FaultProxy, ec2: Client) -> None:
    assert launch(ec2) == launch(ec2)
    assert len(proxy.truth()) == 1
    assert [one.outcome for one in proxy.calls_of("RunInstances")] == ["ok", "replayed"]


def test_the_same_token_with_other_parameters_is_a_mismatch(proxy: FaultProxy, ec2: Client) -> None:
    launch(ec2)
    changed = launch_parameters(InstanceType="c6i.large")
    assert refusal(ec2.run_instances, **changed) == ("IdempotentParameterMismatch", 400)
    assert len(proxy.truth()) == 1


def test_the_token_of_a_terminated_instance_is_refused(proxy: FaultProxy, ec2: Client) -> None:
    ec2.terminate_instances(InstanceIds=[launch(ec2)])
    assert refusal(ec2.run_instances, **launch_parameters()) == ("IdempotentInstanceTerminated", 400)
    assert len(proxy.truth()) == 1


def test_the_token_of_a_terminated_instance_may_give_the_dead_one(proxy: FaultProxy, ec2: Client) -> None:
    dead = launch(ec2)
    ec2.terminate_instances(InstanceIds=[dead])
    proxy.answer_dead_tokens_with_the_dead()
    assert launch(ec2) == dead
    assert len(proxy.truth()) == 1


def test_simultaneous_requests_with_one_token_launch_once(proxy: FaultProxy, ec2: Client) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda _: launch(ec2), range(8)))
    assert len(set(ids)) == 1
    assert len(proxy.truth()) == 1


def test_the_same_token_in_another_zone_launches_a_second_machine(proxy: FaultProxy, ec2: Client) -> None:
    zones = ["us-east-1a", "us-east-1b", "us-east-1a"]
    ids = [launch(ec2, Placement={"AvailabilityZone": zone}) for zone in zones]
    assert ids[0] == ids[2] != ids[1]
    assert len(proxy.truth()) == 2


def test_a_subnet_stands_for_its_zone_in_a_tokens_scope(proxy: FaultProxy, ec2: Client) -> None:
    zone_of = {s["SubnetId"]: s["AvailabilityZone"] for s in ec2.describe_subnets()["Subnets"]}
    first, second = list(zone_of)[:2]
    ids = [launch(ec2, SubnetId=subnet) for subnet in (first, second, first)]
    assert ids[0] == ids[2] != ids[1]
    assert {one.zone for one in proxy.truth()} == {zone_of[first], zone_of[second]}


def test_a_token_is_regional(proxy: FaultProxy, make_client: MakeClient) -> None:
    assert launch(make_client(region="us-east-1")) != launch(make_client(region="eu-west-1"))
    assert len(proxy.truth()) == 2


def test_a_launch_that_failed_leaves_its_token_as_good_as_new(proxy: FaultProxy, ec2: Client) -> None:
    wrong = launch_parameters(SubnetId="subnet-0123456789abcdef0")
    assert refusal(ec2.run_instances, **wrong)[0] == "InvalidSubnetID.NotFound"
    launch(ec2)
    assert len(proxy.truth()) == 1


def test_a_token_of_more_than_64_characters_is_refused(proxy: FaultProxy, ec2: Client) -> None:
    assert refusal(ec2.run_instances, **launch_parameters("x" * 65))[0] == "InvalidParameterValue"
    assert proxy.truth() == []


def test_a_dry_run_launches_nothing_and_spends_no_token(proxy: FaultProxy, ec2: Client) -> None:
    assert refusal(ec2.run_instances, **launch_parameters(DryRun=True))[0] == "DryRunOperation"
    launch(ec2)
    assert len(proxy.truth()) == 1


# ---------------------------------------------------------------- what goes wrong on the way


def test_a_lost_answer_has_launched_and_the_same_token_finds_it(proxy: FaultProxy, ec2: Client) -> None:
    proxy.lose_answer("RunInstances")
    with pytest.raises(ConnectionClosedError):
        launch(ec2)
    (launched,) = proxy.truth()
    assert launch(ec2) == launched.instance_id
    assert len(proxy.truth()) == 1
    outcomes = [one.outcome for one in proxy.calls_of("RunInstances")]
    assert outcomes == ["answer lost (ok)", "replayed"]


def test_a_reset_carries_nothing_out(proxy: FaultProxy, ec2: Client) -> None:
    proxy.reset("RunInstances")
    with pytest.raises((ConnectionClosedError, EndpointConnectionError)):
        launch(ec2)
    assert proxy.truth() == []
    launch(ec2)
    assert len(proxy.truth()) == 1


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("RequestLimitExceeded", 503),
        ("InsufficientInstanceCapacity", 500),
        ("UnauthorizedOperation", 403),
        ("AuthFailure", 401),
        ("RequestExpired", 400),
        ("MaxSpotInstanceCountExceeded", 400),
    ],
)
def test_a_refusal_carries_ec2s_code_and_status(
    proxy: FaultProxy, ec2: Client, code: str, status: int
) -> None:
    proxy.refuse("RunInstances", code)
    assert refusal(ec2.run_instances, **launch_parameters()) == (code, status)
    assert proxy.truth() == []
    assert proxy.calls[-1].outcome == f"refused {code}"
    launch(ec2)


def test_a_refusals_message_and_status_can_be_chosen(proxy: FaultProxy, ec2: Client) -> None:
    proxy.refuse("DescribeInstances", "Odd", message="quite <odd> & so", status=418)
    with pytest.raises(ClientError, match="quite <odd> & so") as caught:
        listed(ec2)
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 418


def test_faults_are_met_in_the_order_they_were_programmed_and_counted(proxy: FaultProxy, ec2: Client) -> None:
    first = proxy.refuse("RunInstances", "RequestLimitExceeded", times=2)
    proxy.refuse("RunInstances", "InsufficientInstanceCapacity")
    codes = [refusal(ec2.run_instances, **launch_parameters())[0] for _ in range(3)]
    assert codes == ["RequestLimitExceeded", "RequestLimitExceeded", "InsufficientInstanceCapacity"]
    assert first.hits == 2
    launch(ec2)


def test_a_fault_can_be_narrowed_to_matching_calls_and_skip_the_first(proxy: FaultProxy, ec2: Client) -> None:
    fault = proxy.refuse("RunInstances", "Unsupported", times=9, match={"InstanceType": "c7i.large"}, skip=1)
    launch(ec2, "a")
    launch(ec2, "b", InstanceType="c6i.large")
    assert refusal(ec2.run_instances, **launch_parameters("c"))[0] == "Unsupported"
    launch(ec2, "d", InstanceType="c6i.large")
    fault.cancel()
    launch(ec2, "e")
    assert fault.hits == 1


def test_an_outage_refuses_every_action_until_it_is_healed(proxy: FaultProxy, ec2: Client) -> None:
    proxy.refuse(EVERY_ACTION, "Unavailable", times=FOREVER)
    assert refusal(ec2.describe_instances) == ("Unavailable", 503)
    assert refusal(ec2.run_instances, **launch_parameters()) == ("Unavailable", 503)
    proxy.heal()
    launch(ec2)


def test_a_stalled_launch_waits_until_it_is_released(proxy: FaultProxy, ec2: Client) -> None:
    stall = proxy.stall("RunInstances")
    with ThreadPoolExecutor(1) as pool:
        launching = pool.submit(launch, ec2)
        stall.wait_hit()
        assert proxy.truth() == []
        assert proxy.calls[-1].outcome == "under way"
        assert not launching.done()
        stall.release()
        assert launching.result(10) == proxy.truth()[0].instance_id


def test_a_launch_whose_client_gave_up_is_carried_out_all_the_same(
    proxy: FaultProxy, make_client: MakeClient
) -> None:
    stall = proxy.stall("RunInstances")
    with pytest.raises(ReadTimeoutError):
        launch(make_client(read_timeout_seconds=0.2))
    assert proxy.truth() == []
    stall.release()
    assert proxy.wait_for_calls("RunInstances")[0].outcome == "ok"
    assert len(proxy.truth()) == 1


def test_a_stalled_answer_has_launched_already(proxy: FaultProxy, ec2: Client) -> None:
    stall = proxy.stall("RunInstances", after_carrying_out=True)
    with ThreadPoolExecutor(1) as pool:
        launching = pool.submit(launch, ec2)
        stall.wait_hit()
        assert len(proxy.truth()) == 1
        assert not launching.done()
        stall.release()
        launching.result(10)


def test_a_stall_of_some_seconds_ends_by_itself(proxy: FaultProxy, ec2: Client) -> None:
    stall = proxy.stall("DescribeInstances", seconds=0.05)
    assert listed(ec2) == []
    assert stall.hits == 1


def test_a_stall_delays_and_a_second_fault_decides(proxy: FaultProxy, ec2: Client) -> None:
    proxy.stall("RunInstances", seconds=0.01)
    proxy.refuse("RunInstances", "RequestLimitExceeded")
    assert refusal(ec2.run_instances, **launch_parameters())[0] == "RequestLimitExceeded"


def test_waiting_for_a_fault_that_nobody_meets_ends(proxy: FaultProxy) -> None:
    with pytest.raises(TimeoutError, match="met 0 of 1"):
        proxy.reset("RunInstances").wait_hit(timeout_seconds=0.01)
    with pytest.raises(TimeoutError):
        proxy.wait_for_calls("RunInstances", timeout_seconds=0.01)


def test_stopping_the_proxy_ends_a_stalled_call_without_carrying_it_out(
    server: MotoServer, botocore_session: botocore.session.Session
) -> None:
    server.reset()
    with FaultProxy(server) as proxy, ThreadPoolExecutor(1) as pool:
        client: Client = botocore_session.create_client("ec2", **client_parameters(proxy))
        stall = proxy.stall("RunInstances")
        launching = pool.submit(launch, client)
        stall.wait_hit()
        proxy.stop()
        with pytest.raises(ConnectionClosedError):
            launching.result(10)
        client.close()
    assert server.instances() == ()
    stall.release()
    assert proxy.calls[-1].outcome == "broken"


# ---------------------------------------------------------------- eventual consistency


def test_a_new_instance_is_not_found_for_so_many_describes(proxy: FaultProxy, ec2: Client) -> None:
    proxy.after_launch(hidden=2)
    instance_id = launch(ec2)
    assert refusal(ec2.describe_instances, InstanceIds=[instance_id])[0] == "InvalidInstanceID.NotFound"
    assert listed(ec2) == []
    assert state(ec2, instance_id) == "running"
    assert len(proxy.truth()) == 1


def test_describes_that_would_not_have_listed_it_do_not_count(proxy: FaultProxy, ec2: Client) -> None:
    proxy.after_launch(hidden=1)
    instance_id = launch(ec2)
    assert listed(ec2, Filters=[{"Name": "tag:Name", "Values": ["another"]}]) == []
    assert listed(ec2, Filters=[{"Name": "tag:Name", "Values": ["dserv-worker"]}]) == []
    assert state(ec2, instance_id) == "running"


def test_a_hidden_instance_can_be_terminated_unless_that_is_hidden_too(
    proxy: FaultProxy, ec2: Client
) -> None:
    proxy.after_launch(hidden=FOREVER, hidden_from_terminate=True)
    first = launch(ec2, "a")
    assert refusal(ec2.terminate_instances, InstanceIds=[first])[0] == "InvalidInstanceID.NotFound"
    proxy.after_launch(hidden=FOREVER)
    second = launch(ec2, "b")
    ec2.terminate_instances(InstanceIds=[second])
    assert {one.instance_id: one.state for one in proxy.truth()} == {first: "running", second: "terminated"}


def test_delays_in_seconds_hold_until_they_are_settled(proxy: FaultProxy, ec2: Client) -> None:
    proxy.after_launch(hidden=NEVER_MEANWHILE)
    hidden = launch(ec2, "a")
    proxy.after_launch(pending=NEVER_MEANWHILE)
    pending = launch(ec2, "b")
    assert [one["InstanceId"] for one in listed(ec2)] == [pending]
    assert state(ec2, pending) == "pending"
    proxy.settle(hidden)
    assert state(ec2, hidden) == "running"
    assert state(ec2, pending) == "pending"
    proxy.settle()
    assert state(ec2, pending) == "running"


def test_a_delay_of_no_seconds_is_over_at_once(proxy: FaultProxy, ec2: Client) -> None:
    proxy.after_launch(hidden=Seconds(0.0), pending=Seconds(0.0))
    assert state(ec2, launch(ec2)) == "running"


def test_an_instance_is_pending_then_running_without_an_address_then_with_one(
    proxy: FaultProxy, ec2: Client
) -> None:
    proxy.after_launch(pending=1, unaddressed=2)
    instance_id = launch(ec2)
    seen = [only(ec2, InstanceIds=[instance_id]) for _ in range(3)]
    assert [one["State"]["Name"] for one in seen] == ["pending", "running", "running"]
    addresses = [one.get("PublicIpAddress") for one in seen]
    assert addresses == [None, None, loopback_address(instance_id)]
    assert [one["PublicDnsName"] for one in seen[:2]] == ["", ""]
    assert "Association" not in seen[0]["NetworkInterfaces"][0]
    assert seen[0]["PrivateIpAddress"] == loopback_address(instance_id, "private")


def test_healing_ends_every_delay_and_those_to_come(proxy: FaultProxy, ec2: Client) -> None:
    proxy.after_launch(hidden=FOREVER)
    proxy.after_terminate(shutting_down=FOREVER)
    first = launch(ec2, "a")
    proxy.heal()
    assert state(ec2, first) == "running"
    ec2.terminate_instances(InstanceIds=[first])
    assert state(ec2, first) == "terminated"
    assert state(ec2, launch(ec2, "b")) == "running"


def test_a_terminated_instance_shuts_down_first(proxy: FaultProxy, ec2: Client) -> None:
    instance_id = launch(ec2)
    proxy.after_terminate(shutting_down=2)
    (change,) = ec2.terminate_instances(InstanceIds=[instance_id])["TerminatingInstances"]
    assert change["CurrentState"] == {"Code": 32, "Name": "shutting-down"}
    assert [state(ec2, instance_id) for _ in range(3)] == ["shutting-down", "shutting-down", "terminated"]


def test_terminating_twice_is_no_error_and_says_what_was(proxy: FaultProxy, ec2: Client) -> None:
    proxy.after_launch(pending=FOREVER)
    proxy.after_terminate(shutting_down=FOREVER)
    instance_id = launch(ec2)
    changes = []
    for _ in range(2):
        (change,) = ec2.terminate_instances(InstanceIds=[instance_id, instance_id])["TerminatingInstances"]
        changes.append((change["PreviousState"]["Name"], change["CurrentState"]["Name"]))
    proxy.settle(instance_id)
    (change,) = ec2.terminate_instances(InstanceIds=[instance_id])["TerminatingInstances"]
    changes.append((change["PreviousState"]["Name"], change["CurrentState"]["Name"]))
    assert changes == [
        ("pending", "shutting-down"),
        ("shutting-down", "shutting-down"),
        ("terminated", "terminated"),
    ]


def test_a_terminated_instance_has_no_address_left(ec2: Client) -> None:
    instance_id = launch(ec2)
    ec2.terminate_instances(InstanceIds=[instance_id])
    described = only(ec2, InstanceIds=[instance_id])
    assert {"PublicIpAddress", "PrivateIpAddress", "SubnetId"}.isdisjoint(described)
    assert (described["PublicDnsName"], described["PrivateDnsName"]) == ("", "")


def test_one_stale_id_keeps_the_whole_batch_alive_and_is_named(proxy: FaultProxy, ec2: Client) -> None:
    alive, forgotten = launch(ec2, "a"), launch(ec2, "b")
    proxy.forget(forgotten)
    for stale in (UNKNOWN_ID, forgotten):
        with pytest.raises(ClientError, match=stale) as caught:
            ec2.terminate_instances(InstanceIds=[alive, stale])
        assert caught.value.response["Error"]["Code"] == "InvalidInstanceID.NotFound"
    assert [one.state for one in proxy.truth()] == ["running", "running"]
    ec2.terminate_instances(InstanceIds=[alive])
    assert refusal(ec2.describe_instances, InstanceIds=[forgotten])[0] == "InvalidInstanceID.NotFound"


def test_a_reclaimed_instance_is_gone_and_says_why(proxy: FaultProxy, ec2: Client) -> None:
    proxy.after_terminate(shutting_down=1)
    instance_id = launch(ec2, InstanceMarketOptions=SPOT)
    proxy.reclaim(instance_id)
    assert proxy.running_ours("lab") == []
    seen = [only(ec2, InstanceIds=[instance_id]) for _ in range(2)]
    assert [one["State"]["Name"] for one in seen] == ["shutting-down", "terminated"]
    assert {one["StateReason"]["Code"] for one in seen} == {"Server.SpotInstanceTermination"}


def test_an_instance_the_user_terminated_gives_the_users_reason(ec2: Client) -> None:
    instance_id = launch(ec2)
    ec2.terminate_instances(InstanceIds=[instance_id])
    reason = only(ec2, InstanceIds=[instance_id])["StateReason"]["Code"]
    assert reason == "Client.UserInitiatedShutdown"


# ---------------------------------------------------------------- listings


def test_a_listing_can_miss_a_running_instance_so_many_times(proxy: FaultProxy, ec2: Client) -> None:
    kept, omitted = launch(ec2, "a"), launch(ec2, "b")
    proxy.omit(omitted, times=2)
    assert [[one["InstanceId"] for one in listed(ec2)] for _ in range(2)] == [[kept], [kept]]
    assert {one["InstanceId"] for one in listed(ec2)} == {kept, omitted}
    proxy.omit(omitted)
    assert state(ec2, omitted) == "running"


def test_a_listing_comes_in_pages_and_is_complete(proxy: FaultProxy, ec2: Client) -> None:
    ids = [launch(ec2, f"order-{n}") for n in range(5)]
    proxy.limit_page_size(2)
    pages = list(ec2.get_paginator("describe_instances").paginate(MaxResults=100))
    sizes = [len(page["Reservations"]) for page in pages]
    assert sizes == [2, 2, 1]
    found = [r["Instances"][0]["InstanceId"] for page in pages for r in page["Reservations"]]
    assert found == ids
    assert [one.page for one in proxy.calls_of("DescribeInstances")] == [1, 2, 3]


def test_a_delay_counts_a_listing_once_however_many_pages_it_has(proxy: FaultProxy, ec2: Client) -> None:
    proxy.after_launch(pending=1)
    for n in range(4):
        launch(ec2, f"order-{n}")
    proxy.limit_page_size(1)
    pages = list(ec2.get_paginator("describe_instances").paginate())
    assert [page["Reservations"][0]["Instances"][0]["State"]["Name"] for page in pages] == ["pending"] * 4
    assert listed(ec2)[0]["State"]["Name"] == "running"


def test_page_two_of_a_listing_can_fail(proxy: FaultProxy, ec2: Client) -> None:
    for n in range(3):
        launch(ec2, f"order-{n}")
    proxy.limit_page_size(2)
    proxy.fail_page(2, "InternalError")
    first = ec2.describe_instances()
    assert len(first["Reservations"]) == 2
    assert refusal(ec2.describe_instances, NextToken=first["NextToken"]) == ("InternalError", 500)
    assert len(ec2.describe_instances(NextToken=first["NextToken"])["Reservations"]) == 1


def test_more_instances_than_motos_own_page_are_all_listed(ec2: Client, server: MotoServer) -> None:
    launch(ec2, MaxCount=2)
    for _ in range(101):
        server.call("RunInstances", {"ImageId": "ami-12c6146b", "MinCount": "1", "MaxCount": "1"})
    assert len(listed(ec2)) == 103
    assert len(server.instances()) == 103


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({"NextToken": "of-no-listing.2"}, "InvalidNextToken"),
        ({"NextToken": "nonsense"}, "InvalidNextToken"),
        ({"MaxResults": 4}, "InvalidParameterValue"),
        ({"MaxResults": 5, "InstanceIds": [UNKNOWN_ID]}, "InvalidParameterCombination"),
        ({"InstanceIds": [UNKNOWN_ID]}, "InvalidInstanceID.NotFound"),
    ],
)
def test_a_describe_that_ec2_would_refuse_is_refused(
    ec2: Client, request_: dict[str, Any], code: str
) -> None:
    assert refusal(ec2.describe_instances, **request_) == (code, 400)


def test_a_filter_by_state_sees_what_is_shown_not_what_is_so(proxy: FaultProxy, ec2: Client) -> None:
    proxy.after_launch(pending=FOREVER)
    launch(ec2)
    assert listed(ec2, Filters=filters(instance_state_name="running")) == []
    assert len(listed(ec2, Filters=filters(instance_state_name="pending"))) == 1
    assert len(listed(ec2, Filters=filters(instance_state_code="0"))) == 1


def test_filters_that_moto_lacks_are_answered(ec2: Client) -> None:
    spot = launch(ec2, "order-spot", InstanceMarketOptions=SPOT)
    launch(ec2, "order-[od]")
    request_id = only(ec2, InstanceIds=[spot])["SpotInstanceRequestId"]
    for wanted in (
        filters(client_token="order-sp*"),
        filters(instance_lifecycle="spot"),
        filters(spot_instance_request_id=request_id),
        filters(ip_address=loopback_address(spot)),
        filters(private_ip_address=loopback_address(spot, "private"), client_token="*"),
    ):
        assert [one["InstanceId"] for one in listed(ec2, Filters=wanted)] == [spot]
    assert len(listed(ec2, Filters=filters(client_token="order-[od]"))) == 1


def test_filters_on_tags_and_on_what_is_shown_work_together(ec2: Client) -> None:
    ours = launch(ec2, "a")
    launch(ec2, "b", TagSpecifications=None)
    wanted = [
        {"Name": f"tag:{BROKER_TAG}", "Values": ["lab"]},
        {"Name": "instance-state-name", "Values": ["pending", "running"]},
    ]
    assert [one["InstanceId"] for one in listed(ec2, Filters=wanted)] == [ours]


# ---------------------------------------------------------------- the asynchronous client


def asynchronous_client(proxy: FaultProxy) -> Any:
    return get_session().create_client("ec2", **client_parameters(proxy))


def test_the_asynchronous_client_meets_the_same_faults(proxy: FaultProxy) -> None:
    proxy.refuse("RunInstances", "RequestLimitExceeded")
    proxy.reset("RunInstances")
    proxy.lose_answer("RunInstances")
    proxy.after_launch(hidden=1)

    async def scenario() -> tuple[list[str], str]:
        met: list[str] = []
        async with asynchronous_client(proxy) as client:
            for _ in range(3):
                try:
                    await client.run_instances(**launch_parameters())
                except ClientError as e:
                    met.append(e.response["Error"]["Code"])
                except BotoCoreError as e:
                    met.append(type(e).__name__)
            answer = await client.run_instances(**launch_parameters())
            try:
                await client.describe_instances(InstanceIds=[answer["Instances"][0]["InstanceId"]])
            except ClientError as e:
                met.append(e.response["Error"]["Code"])
        return met, answer["Instances"][0]["InstanceId"]

    met, instance_id = asyncio.run(scenario())
    assert met[0] == "RequestLimitExceeded"
    assert met[1:3] == ["EndpointConnectionError", "ConnectionClosedError"]
    assert met[3] == "InvalidInstanceID.NotFound"
    assert [one.instance_id for one in proxy.truth()] == [instance_id]


def test_a_lost_answer_may_look_as_if_the_call_was_never_sent(proxy: FaultProxy) -> None:
    proxy.lose_answer("RunInstances", by_reset=True)

    async def scenario() -> None:
        async with asynchronous_client(proxy) as client:
            with pytest.raises(EndpointConnectionError, match="Could not connect"):
                await client.run_instances(**launch_parameters())

    asyncio.run(scenario())
    assert len(proxy.truth()) == 1


def test_moto_keeps_its_canned_images_unless_told_otherwise() -> None:
    with MotoServer() as own:
        root = own.call("DescribeImages", {"ImageId.1": "ami-12c6146b"})
    assert len(root.findall(ec2_wire.path("imagesSet", "item"))) == 1


def test_the_proxy_answers_while_the_tests_own_loop_is_blocked(proxy: FaultProxy, ec2: Client) -> None:
    async def blocking() -> str:
        return launch(ec2)  # a blocking call on this loop: only a server elsewhere can answer it

    assert asyncio.run(blocking()) == proxy.truth()[0].instance_id


# ---------------------------------------------------------------- worker stand-ins


def refuses(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), 5.0).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_fleet_opens_a_worker_port_when_its_instance_runs_and_closes_it_when_it_goes(
    proxy: FaultProxy, ec2: Client
) -> None:
    proxy.after_launch(pending=1)
    with WorkerFleet(proxy, automatic=True) as fleet:
        instance_id = launch(ec2)
        address = loopback_address(instance_id)
        assert state(ec2, instance_id) == "pending"
        assert refuses(address, fleet.port)
        assert state(ec2, instance_id) == "running"
        assert evaluate(address, fleet.port, "set naïve 1") == "ok:set naïve 1"
        ec2.terminate_instances(InstanceIds=[instance_id])
        assert refuses(address, fleet.port)


def test_a_fleet_takes_in_instances_that_ran_before_it_and_closes_the_reclaimed(
    proxy: FaultProxy, ec2: Client
) -> None:
    instance_id = launch(ec2)
    assert state(ec2, instance_id) == "running"
    with WorkerFleet(proxy, automatic=True) as fleet:
        assert evaluate(loopback_address(instance_id), fleet.port, "x") == "ok:x"
        proxy.reclaim(instance_id)
        assert refuses(loopback_address(instance_id), fleet.port)


def test_a_test_decides_when_readiness_shows_if_the_fleet_is_not_automatic(
    proxy: FaultProxy, ec2: Client
) -> None:
    instance_id = launch(ec2)
    address = loopback_address(instance_id)
    with WorkerFleet(proxy, automatic=False) as fleet:
        assert state(ec2, instance_id) == "running"
        assert refuses(address, fleet.port)
        fleet.open(instance_id)
        assert evaluate(address, fleet.port, "expr 1") == "ok:expr 1"
        assert fleet.stand_in(instance_id).scripts == [b"expr 1"]
        fleet.close(instance_id)
        assert refuses(address, fleet.port)
        fleet.open(instance_id)
        assert not refuses(address, fleet.port)


def test_a_fleet_can_listen_on_the_private_address_too(proxy: FaultProxy, ec2: Client) -> None:
    with WorkerFleet(proxy, automatic=True, kinds=("public", "private")) as fleet:
        instance_id = launch(ec2)
        described = only(ec2, InstanceIds=[instance_id])
        for address in (described["PublicIpAddress"], described["PrivateIpAddress"]):
            assert evaluate(address, fleet.port, "x") == "ok:x"


def test_after_a_fleet_has_ended_the_proxy_goes_on_without_it(proxy: FaultProxy, ec2: Client) -> None:
    with WorkerFleet(proxy, automatic=True) as fleet:
        first = launch(ec2, "a")
        assert state(ec2, first) == "running"
    assert refuses(loopback_address(first), fleet.port)
    assert state(ec2, launch(ec2, "b")) == "running"
    ec2.terminate_instances(InstanceIds=[first])


@pytest.fixture
def stand_in() -> Iterator[WorkerStandIn]:
    loop = LoopThread("stand-in")
    loop.start()
    one = WorkerStandIn(loopback_address(UNKNOWN_ID), 0, loop)
    one.start()
    yield one
    one.stop()
    loop.stop()


def test_a_stand_in_answers_frame_after_frame_on_one_connection(stand_in: WorkerStandIn) -> None:
    with socket.create_connection((stand_in.address, stand_in.port), 5.0) as connection:
        connection.sendall(frame(b"one") + frame(b"") + frame(b"three"))
        expected = frame(b"ok:one") + frame(b"ok:") + frame(b"ok:three")
        assert connection.makefile("rb").read(len(expected)) == expected
    assert stand_in.connections_accepted == 1


def test_a_stand_in_that_stops_cuts_its_connections(stand_in: WorkerStandIn) -> None:
    with socket.create_connection((stand_in.address, stand_in.port), 5.0) as connection:
        connection.sendall(frame(b"x"))
        connection.recv(4)
        stand_in.stop()
        assert not stand_in.is_open
        with contextlib.suppress(ConnectionResetError):
            assert len(connection.recv(64)) <= len(b"ok:x")  # what was on its way already
            assert connection.recv(64) == b""


def test_a_frame_that_is_too_long_ends_the_connection(stand_in: WorkerStandIn) -> None:
    with socket.create_connection((stand_in.address, stand_in.port), 5.0) as connection:
        connection.sendall((FRAME_BYTES_MAX + 1).to_bytes(4, "big"))
        assert connection.recv(1) == b""


# ---------------------------------------------------------------- the wire, where moto cannot show it


def test_an_answer_that_is_no_xml_is_passed_on_as_it_is() -> None:
    page = b"<!doctype html>\n<p>Internal Server Error"
    assert ec2_wire.scrub_addresses(page) == page
    assert ec2_wire.error_code_of(page) == "unreadable"


def test_an_unsigned_request_belongs_to_no_service() -> None:
    assert ec2_wire.scope_of("") == ("us-east-1", "")
    assert ec2_wire.scope_of(ec2_wire.signed_for("eu-west-1", "ssm")) == ("eu-west-1", "ssm")


def test_no_thread_and_no_process_is_left_behind(server: MotoServer) -> None:
    before = set(threading.enumerate())
    own = MotoServer()
    with own, FaultProxy(own):
        pid = own.pid
    assert set(threading.enumerate()) <= before
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
