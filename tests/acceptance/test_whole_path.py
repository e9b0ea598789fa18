"""From GET_WORKER to a terminated machine, once, and everything that must be true on the way."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest

from broker.core import tags
from tests.acceptance.lab import BROKER_ID, TYPES, Lab, laboratory, tag_of
from tests.support import ec2_wire
from tests.support.broker_process import BrokerProcess
from tests.support.cloud import CloudInstance, MotoServer
from tests.support.fault_proxy import CallRecord

KEPT_BY_US = {tags.NAME, tags.BROKER, tags.POOL, tags.ORDER, tags.EXPIRES}


@dataclass(frozen=True)
class Journey:
    """What one client met, and what the cloud had meanwhile."""

    address: str
    works: bool
    ping: str
    release: str
    ping_afterwards: str
    launch: CallRecord
    machine: CloudInstance  # while it was in use
    volume_tags: dict[str, str]
    state_afterwards: str
    lab: Lab
    broker: BrokerProcess


@pytest.fixture(scope="module")
def journey(moto_server: MotoServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journey]:
    with laboratory(moto_server, tmp_path_factory.mktemp("journey")) as lab:
        broker = lab.broker(tags={"Project": "vision"}, price_usd_per_hour=0.6)
        address = broker.ask("GET_WORKER")
        works = lab.works(address)
        machine, volume_tags = lab.only(), volume_tags_of(lab, lab.only().instance_id)
        ping, release = broker.ask(f"PING {address}"), broker.ask(f"RELEASE {address}")
        ping_afterwards = broker.ask(f"PING {address}")
        lab.wait_until_terminated()
        yield Journey(
            address,
            works,
            ping,
            release,
            ping_afterwards,
            lab.launch_calls()[0],
            machine,
            volume_tags,
            lab.only().state,
            lab,
            broker,
        )


def volume_tags_of(lab: Lab, instance_id: str) -> dict[str, str]:
    attached = {"Filter.1.Name": "attachment.instance-id", "Filter.1.Value.1": instance_id}
    answer = lab.moto.call("DescribeVolumes", attached)
    pairs = answer.iterfind(ec2_wire.path("volumeSet", "item", "tagSet", "item"))
    return {ec2_wire.text_of(pair, "key"): ec2_wire.text_of(pair, "value") for pair in pairs}


def test_the_client_gets_the_bare_address_of_a_machine_that_was_launched_for_it(journey: Journey) -> None:
    assert journey.address == journey.lab.address(journey.machine)


def test_the_worker_port_of_that_address_evaluates_what_it_is_sent(journey: Journey) -> None:
    assert journey.works


def test_ping_and_release_are_answered_ok_and_a_released_worker_is_unknown(journey: Journey) -> None:
    assert (journey.ping, journey.release) == ("OK", "OK")
    assert journey.ping_afterwards == "ERROR: Worker not found"


def test_a_release_ends_the_machine_in_the_cloud(journey: Journey) -> None:
    assert journey.machine.state == "running"
    assert journey.state_afterwards == "terminated"


def test_exactly_one_launch_was_asked_for(journey: Journey) -> None:
    assert len(journey.lab.launch_calls()) == 1


def test_the_launch_buys_one_spot_machine_that_is_gone_for_good_when_it_goes(journey: Journey) -> None:
    asked = journey.launch.params
    assert (asked["MinCount"], asked["MaxCount"]) == ("1", "1")
    assert (asked["ImageId"], asked["InstanceType"]) == ("ami-12c6146b", TYPES[0])
    assert asked["InstanceMarketOptions.MarketType"] == "spot"
    assert asked["InstanceMarketOptions.SpotOptions.SpotInstanceType"] == "one-time"
    assert asked["InstanceMarketOptions.SpotOptions.InstanceInterruptionBehavior"] == "terminate"
    assert asked["InstanceInitiatedShutdownBehavior"] == "terminate"
    assert journey.machine.lifecycle == "spot"


def test_the_machine_answers_metadata_requests_with_a_session_token_only(journey: Journey) -> None:
    assert journey.launch.params["MetadataOptions.HttpTokens"] == "required"


def test_the_launch_carries_a_token_of_the_brokers_own_which_is_the_orders_name(journey: Journey) -> None:
    token = journey.launch.params["ClientToken"]
    assert re.fullmatch(r"cb-[0-9a-f]{24}", token)
    assert journey.machine.client_token == journey.machine.tags[tags.ORDER] == token


def test_the_machine_is_tagged_with_whose_it_is_from_its_first_moment(journey: Journey) -> None:
    kept = journey.machine.tags
    assert kept.keys() >= KEPT_BY_US
    assert (kept[tags.NAME], kept[tags.BROKER], kept[tags.POOL]) == ("dserv-worker", BROKER_ID, "default")
    assert kept["Project"] == "vision"


def test_its_tags_say_when_it_must_be_gone(journey: Journey) -> None:
    expires_unix = tags.unix(journey.machine.tags[tags.EXPIRES])
    assert expires_unix is not None
    left = datetime.fromtimestamp(expires_unix, UTC) - datetime.now(UTC)
    assert timedelta(hours=7, minutes=30) < left <= timedelta(hours=8)  # max_lifetime is 8 h by default


def test_volume_and_spot_request_carry_the_same_tags(journey: Journey) -> None:
    kinds = {journey.launch.params[f"TagSpecification.{n}.ResourceType"]: n for n in (1, 2, 3)}
    assert kinds.keys() == {"instance", "volume", "spot-instances-request"}
    assert journey.volume_tags.keys() == journey.machine.tags.keys()
    for key, value in journey.volume_tags.items():
        on_machine, on_request = (
            tag_of(journey.launch, key, kinds[kind]) for kind in ("instance", "spot-instances-request")
        )
        assert value == on_machine == on_request
        if key != tags.EPOCH:  # the machine's own is written anew with every beat, perhaps by now
            assert value == journey.machine.tags[key]


def test_the_metrics_tell_the_same_story(journey: Journey) -> None:
    metric = journey.broker.metric
    assert metric("compute_broker_launches_total", pool="default", outcome="launched") == 1
    assert metric("compute_broker_launch_seconds_count", pool="default") == 1
    assert metric("compute_broker_terminations_total", pool="default", reason="released") == 1
    assert metric("compute_broker_commands_total", command="GET_WORKER", outcome="ok") == 1
    assert metric("compute_broker_commands_total", command="PING", outcome="error") == 1
    assert metric("compute_broker_cloud_calls_total", api="RunInstances", outcome="ok") == 1
    assert metric("compute_broker_workers", pool="default", state="ready") == 0
    assert metric("compute_broker_leases", pool="default") == 0
    assert metric("compute_broker_cost_usd_total", pool="default") == pytest.approx(0.01)  # 60 s at least
    assert metric("compute_broker_last_scan_timestamp_seconds") > 0


def test_the_log_names_the_machine_and_the_reason_of_every_step(journey: Journey) -> None:
    journey.broker.wait_for_event("worker gone")
    steps = [entry for entry in journey.broker.log if str(entry["event"]).startswith("worker ")]
    assert [entry["event"] for entry in steps] == [
        "worker ordered",
        "worker booting",
        "worker ready",
        "worker draining",
        "worker terminating",
        "worker gone",
    ]
    assert all(entry["instance"] == journey.machine.instance_id for entry in steps[1:])
    assert steps[3]["reason"] == "released"


def test_healthz_is_green_all_the_while(journey: Journey) -> None:
    assert journey.broker.http("/healthz") == (200, "ok\n")
