"""What the simulated EC2 keeps of EC2's promises, at the level of the SDK's client."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from botocore.exceptions import ClientError

from broker.core.model import InstanceState
from broker.core.tags import BROKER
from broker.testing import EPOCH_UNIX
from tests.providers.simulated_support import Lab, code_of, launch_of, play, steady, words_of


def tagged(*tags: dict[str, str]) -> dict[str, Any]:
    return {"TagSpecifications": [{"ResourceType": "instance", "Tags": list(tags)}]}


# --- a launch ------------------------------------------------------------------------------------------


def test_a_launch_answers_in_the_shape_of_the_sdk() -> None:
    async def story(lab: Lab) -> None:
        answer = await lab.launcher.run_instances(**launch_of(KeyName="lab"), ClientToken="t-1")
        (instance,) = answer["Instances"]
        assert answer["ReservationId"].startswith("r-")
        assert instance["InstanceId"] == "i-00000000000000001"
        assert instance["State"] == {"Code": 0, "Name": "pending"}
        assert instance["LaunchTime"] == datetime.fromtimestamp(EPOCH_UNIX, UTC)
        assert instance["Placement"]["AvailabilityZone"] in ("us-east-1a", "us-east-1b", "us-east-1c")
        assert instance["InstanceLifecycle"] == "spot"
        assert instance["SpotInstanceRequestId"].startswith("sir-")
        assert instance["CpuOptions"] == {"CoreCount": 1, "ThreadsPerCore": 2}
        assert instance["Tags"] == [{"Key": BROKER, "Value": "lab"}]
        assert instance["ClientToken"] == "t-1"
        assert instance["KeyName"] == "lab"
        assert "PublicIpAddress" not in instance

    play(story)


def test_an_on_demand_machine_has_no_lifecycle() -> None:
    async def story(lab: Lab) -> None:
        assert "InstanceLifecycle" not in await lab.run(spot=False)

    play(story)


def test_a_machine_is_tagged_from_its_first_moment() -> None:
    async def story(lab: Lab) -> None:
        await lab.run()
        assert await lab.ids(**{"tag:" + BROKER: ["lab"]}) == ["i-00000000000000001"]

    play(story)


def test_a_machine_goes_from_pending_to_running_and_its_address_shows_in_between() -> None:
    async def story(lab: Lab) -> None:
        await lab.run()
        await asyncio.sleep(3)
        pending = await lab.one()
        assert (pending["State"]["Name"], pending["PublicIpAddress"]) == ("pending", "198.18.0.1")
        await asyncio.sleep(10)
        running = await lab.one()
        assert running["State"] == {"Code": 16, "Name": "running"}
        assert running["PublicDnsName"] == "ec2-198-18-0-1.compute-1.amazonaws.com"
        assert running["PrivateIpAddress"] == "10.0.0.1"

    play(story)


def test_the_worker_port_opens_some_time_after_running() -> None:
    async def story(lab: Lab) -> None:
        await lab.run()
        await asyncio.sleep(29)
        assert not lab.sim.accepts("198.18.0.1", 2560)
        await asyncio.sleep(2)
        for address in ("198.18.0.1", "10.0.0.1", "ec2-198-18-0-1.compute-1.amazonaws.com"):
            assert lab.sim.accepts(address, 2560)
        assert not lab.sim.accepts("198.18.0.1", 22)

    play(story)


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"ImageId": ""}, "MissingParameter"),
        ({"InstanceType": "c7i.enormous"}, "InvalidParameterValue"),
        ({"MinCount": 2}, "InvalidParameterValue"),
        ({"Placement": {"AvailabilityZone": "us-east-1z"}}, "InvalidParameterValue"),
        (tagged({"Key": "aws:x"}), "InvalidParameterValue"),
        (tagged({"Key": "x"}, {"Key": "x"}), "InvalidParameterValue"),
        (tagged({"Key": "x" * 129}), "InvalidParameterValue"),
        (tagged({"Key": "x", "Value": "y" * 257}), "InvalidParameterValue"),
    ],
)
def test_a_launch_that_makes_no_sense_is_refused(wrong: dict[str, Any], code: str) -> None:
    async def story(lab: Lab) -> None:
        assert await code_of(lab.run(**wrong)) == code
        assert lab.sim.truth() == []

    play(story)


def test_a_machine_carries_fifty_tags_and_no_more() -> None:
    async def story(lab: Lab) -> None:
        fifty = {f"key-{n}": "" for n in range(50)}
        instance = await lab.run(tags=fifty)
        more = lab.client.create_tags(
            Resources=[instance["InstanceId"]], Tags=[{"Key": "one", "Value": "more"}]
        )
        assert await code_of(more) == "TagLimitExceeded"
        same = [{"Key": "key-0", "Value": "changed"}]
        await lab.client.create_tags(Resources=[instance["InstanceId"]], Tags=same)
        assert lab.sim.machine(instance["InstanceId"]).tags["key-0"] == "changed"
        assert await code_of(lab.run("t-2", tags=fifty | {"one": "more"})) == "TagLimitExceeded"

    play(story)


# --- tokens --------------------------------------------------------------------------------------------


def test_the_same_call_again_returns_the_same_machine_as_it_is_now() -> None:
    async def story(lab: Lab) -> None:
        first = await lab.run()
        await asyncio.sleep(15)
        again = await lab.run()
        assert again["InstanceId"] == first["InstanceId"]
        assert (again["State"]["Name"], again["PublicIpAddress"]) == ("running", "198.18.0.1")
        assert len(lab.sim.truth()) == 1

    play(story)


def test_a_token_with_other_parameters_is_a_mismatch() -> None:
    async def story(lab: Lab) -> None:
        await lab.run()
        assert await code_of(lab.run(InstanceType="c7i.xlarge")) == "IdempotentParameterMismatch"
        assert len(lab.sim.truth()) == 1

    play(story)


@pytest.mark.parametrize(
    "place",
    [
        {"Placement": {"AvailabilityZone": "us-east-1b"}},
        {"SubnetId": "subnet-1"},
        {"NetworkInterfaces": [{"DeviceIndex": 0, "SubnetId": "subnet-1"}]},
    ],
)
def test_a_token_is_zonal_once_a_zone_or_subnet_is_named(place: dict[str, Any]) -> None:
    async def story(lab: Lab) -> None:
        anywhere = await lab.run()
        there = await lab.run(**place)
        again = await lab.run(**place)
        assert there["InstanceId"] == again["InstanceId"] != anywhere["InstanceId"]
        zone = place.get("Placement", {}).get("AvailabilityZone")
        assert zone is None or there["Placement"]["AvailabilityZone"] == zone

    play(story)


def test_the_same_token_in_another_zone_launches_a_second_machine() -> None:
    async def story(lab: Lab) -> None:
        for zone in ("us-east-1a", "us-east-1b"):
            await lab.run(Placement={"AvailabilityZone": zone})
        assert [one.zone for one in lab.sim.truth()] == ["us-east-1a", "us-east-1b"]

    play(story)


def test_a_refused_launch_leaves_its_token_fresh() -> None:
    async def story(lab: Lab) -> None:
        lab.sim.run_dry("c7i.large", seconds=60)
        assert await code_of(lab.run()) == "InsufficientInstanceCapacity"
        await asyncio.sleep(61)
        await lab.run(InstanceType="c7i.xlarge")
        assert [one.instance_type for one in lab.sim.truth()] == ["c7i.xlarge"]

    play(story)


def test_a_token_is_looked_at_before_the_stock() -> None:
    async def story(lab: Lab) -> None:
        first = await lab.run()
        lab.sim.run_dry("c7i.large")
        assert (await lab.run())["InstanceId"] == first["InstanceId"]

    play(story)


@pytest.mark.parametrize("returned", [False, True])
def test_the_token_of_a_dead_machine_returns_it_or_says_so(returned: bool) -> None:
    async def story(lab: Lab) -> None:
        first = await lab.run()
        await lab.client.terminate_instances(InstanceIds=[first["InstanceId"]])
        assert (await lab.run())["State"]["Name"] == "shutting-down"
        await asyncio.sleep(60)
        if returned:
            assert (await lab.run())["State"]["Name"] == "terminated"
        else:
            assert await code_of(lab.run()) == "IdempotentInstanceTerminated"
        assert len(lab.sim.truth()) == 1
        assert lab.sim.faults["token of a terminated machine"] == 1

    play(story, steady(dead_token_returned=float(returned)))


def test_a_token_is_forgotten_a_day_after_its_machine_has_terminated() -> None:
    async def story(lab: Lab) -> None:
        first = await lab.run()
        await lab.client.terminate_instances(InstanceIds=[first["InstanceId"]])
        await asyncio.sleep(86_400)
        assert await code_of(lab.run()) == "IdempotentInstanceTerminated"
        await asyncio.sleep(60)
        assert (await lab.run())["InstanceId"] != first["InstanceId"]

    play(story)


def test_a_token_has_at_most_64_ascii_characters() -> None:
    async def story(lab: Lab) -> None:
        assert await code_of(lab.run("t" * 65)) == "InvalidParameterValue"
        assert await code_of(lab.run("grüezi")) == "InvalidParameterValue"

    play(story)


def test_without_a_token_every_call_launches() -> None:
    async def story(lab: Lab) -> None:
        for _ in range(2):
            await lab.launcher.run_instances(**launch_of())
        assert len({one.token for one in lab.sim.truth()}) == 2

    play(story)


# --- terminating ---------------------------------------------------------------------------------------


def test_a_terminated_machine_shuts_down_and_stays_visible_for_an_hour() -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()
        answer = await lab.client.terminate_instances(InstanceIds=[machine.id])
        (change,) = answer["TerminatingInstances"]
        assert change["PreviousState"] == {"Code": 16, "Name": "running"}
        assert change["CurrentState"] == {"Code": 32, "Name": "shutting-down"}
        assert not lab.sim.accepts(machine.public_address, 2560)
        await asyncio.sleep(29)
        assert (await lab.one())["State"]["Name"] == "shutting-down"
        await asyncio.sleep(2)
        dead = await lab.one()
        assert dead["State"] == {"Code": 48, "Name": "terminated"}
        assert dead["StateReason"]["Code"] == "Client.UserInitiatedShutdown"
        assert machine.ended_at is not None
        ended = datetime.fromtimestamp(int(EPOCH_UNIX + machine.ended_at), UTC)
        assert dead["StateTransitionReason"] == f"User initiated ({ended:%Y-%m-%d %H:%M:%S} GMT)"
        assert "PublicIpAddress" not in dead
        await asyncio.sleep(3590)
        assert await lab.ids() == [machine.id]
        await asyncio.sleep(10)
        assert await lab.ids() == []
        assert (machine.ended_by, machine.state) == ("broker", InstanceState.TERMINATED)

    play(story)


def test_terminating_again_succeeds_and_changes_nothing() -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()
        for before in ("running", "shutting-down"):
            answer = await lab.client.terminate_instances(InstanceIds=[machine.id])
            assert answer["TerminatingInstances"][0]["PreviousState"]["Name"] == before
            await asyncio.sleep(10)
        await asyncio.sleep(60)
        answer = await lab.client.terminate_instances(InstanceIds=[machine.id])
        assert answer["TerminatingInstances"][0]["CurrentState"]["Name"] == "terminated"

    play(story)


def test_one_bad_id_and_none_dies_and_the_error_names_the_bad_ones() -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()

        async def words(*ids: str) -> str:
            return await words_of(lab.client.terminate_instances(InstanceIds=[machine.id, *ids]))

        assert await words("i-0bad") == "The instance ID 'i-0bad' does not exist"
        assert await words("i-0bad", "i-0c") == "The instance IDs 'i-0bad, i-0c' do not exist"
        assert await words("nonsense") == 'Invalid id: "nonsense"'
        assert machine.state is InstanceState.RUNNING

    play(story)


def test_a_protected_machine_saves_those_beside_it_in_its_zone() -> None:
    async def story(lab: Lab) -> None:
        a = {"Placement": {"AvailabilityZone": "us-east-1a"}}
        b = {"Placement": {"AvailabilityZone": "us-east-1b"}}
        protected, beside, elsewhere = [
            await lab.machine(f"t-{n}", **place) for n, place in enumerate((a, a, b))
        ]
        lab.sim.protect(protected.id)
        call = lab.client.terminate_instances(InstanceIds=[protected.id, beside.id, elsewhere.id])
        assert await code_of(call) == "OperationNotPermitted"
        assert [one.alive for one in (protected, beside, elsewhere)] == [True, True, False]

    play(story)


def test_a_machine_that_shuts_itself_down_ends_or_stops_as_it_was_told_at_its_launch() -> None:
    async def story(lab: Lab) -> None:
        ends = await lab.machine("t-1", spot=False)
        stops = await lab.machine("t-2", spot=False, InstanceInitiatedShutdownBehavior="stop")
        for one in (ends, stops):
            lab.sim.shut_down(one.id)
        await asyncio.sleep(60)
        shown = {one["InstanceId"]: one for one in await lab.shown()}
        assert shown[ends.id]["State"]["Name"] == "terminated"
        assert shown[ends.id]["StateReason"]["Code"] == "Client.InstanceInitiatedShutdown"
        assert shown[ends.id]["StateTransitionReason"] == ""
        assert shown[stops.id]["State"]["Name"] == "stopped"
        assert "PublicIpAddress" not in shown[stops.id]

    play(story)


# --- describing ----------------------------------------------------------------------------------------


def test_filters_choose_machines() -> None:
    async def story(lab: Lab) -> None:
        first = await lab.run("t-1", tags={BROKER: "lab", "x*y": "a"})
        await asyncio.sleep(20)
        second = await lab.run("t-2", spot=False, tags={BROKER: "lab-2"})
        one, two = first["InstanceId"], second["InstanceId"]
        assert await lab.ids(**{f"tag:{BROKER}": ["lab"]}) == [one]
        assert await lab.ids(**{f"tag:{BROKER}": ["lab*"]}) == [one, two]
        assert await lab.ids(**{f"tag:{BROKER}": ["lab?2"]}) == [two]
        assert await lab.ids(**{f"tag:{BROKER}": ["lab\\*"]}) == []
        assert await lab.ids(**{f"tag:{BROKER}": ["LAB"]}) == []
        assert await lab.ids(tag_key=["x\\*y"]) == [one]
        assert await lab.ids(instance_state_name=["pending"]) == [two]
        assert await lab.ids(instance_id=[two, "i-0unknown"]) == [two]
        assert await lab.ids(instance_lifecycle=["spot"]) == [one]
        assert await lab.ids(client_token=["t-2"]) == [two]
        assert await lab.ids(ip_address=["198.18.0.1"]) == [one]
        assert await lab.ids(instance_state_name=["pending", "running"], client_token=["t-1"]) == [one]

    play(story)


def test_an_unknown_filter_and_too_many_values_are_refused() -> None:
    async def story(lab: Lab) -> None:
        assert await code_of(lab.ids(colour=["blue"])) == "InvalidParameterValue"
        assert await code_of(lab.ids(instance_id=[f"i-{n}" for n in range(201)])) == "FilterLimitExceeded"

    play(story)


def test_one_unknown_id_among_instance_ids_fails_the_whole_describe() -> None:
    async def story(lab: Lab) -> None:
        one = await lab.run()
        known = await lab.client.describe_instances(InstanceIds=[one["InstanceId"]])
        assert len(known["Reservations"]) == 1
        call = lab.client.describe_instances(InstanceIds=[one["InstanceId"], "i-0bad"])
        assert await code_of(call) == "InvalidInstanceID.NotFound"

    play(story)


def test_a_listing_comes_in_pages_of_max_results() -> None:
    async def story(lab: Lab) -> None:
        for n in range(12):
            await lab.run(f"t-{n}")
            await asyncio.sleep(1)
        sizes, ids, token = [], [], ""
        for _ in range(3):
            answer = await lab.client.describe_instances(MaxResults=5, NextToken=token)
            sizes.append(len(answer["Reservations"]))
            ids += [one["Instances"][0]["InstanceId"] for one in answer["Reservations"]]
            token = answer.get("NextToken", "")
        assert (sizes, token) == ([5, 5, 2], "")
        assert ids == [one.id for one in lab.sim.truth()]

    play(story)


def test_a_machine_that_is_launched_between_two_pages_is_not_in_the_listing() -> None:
    async def story(lab: Lab) -> None:
        for n in range(6):
            await lab.run(f"t-{n}")
            await asyncio.sleep(1)
        first = await lab.client.describe_instances(MaxResults=5)
        await lab.run("t-late")
        second = await lab.client.describe_instances(MaxResults=5, NextToken=first["NextToken"])
        assert len(second["Reservations"]) == 1
        assert "NextToken" not in second

    play(story)


def test_a_page_may_be_shorter_than_it_was_asked_to_be() -> None:
    async def story(lab: Lab) -> None:
        for n in range(3):
            await lab.run(f"t-{n}")
        answer = await lab.client.describe_instances(MaxResults=1000)
        assert len(answer["Reservations"]) == 2
        assert "NextToken" in answer

    play(story, steady(page_items_max=2))


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"MaxResults": 4}, "InvalidParameterValue"),
        ({"MaxResults": 1001}, "InvalidParameterValue"),
        ({"MaxResults": 5, "InstanceIds": ["i-0"]}, "InvalidParameterCombination"),
        ({"NextToken": "made-up"}, "InvalidNextToken"),
    ],
)
def test_a_listing_that_makes_no_sense_is_refused(wrong: dict[str, Any], code: str) -> None:
    async def story(lab: Lab) -> None:
        assert await code_of(lab.client.describe_instances(**wrong)) == code

    play(story)


def test_what_a_listing_shows_is_the_callers_to_change() -> None:
    async def story(lab: Lab) -> None:
        await lab.run()
        shown = await lab.one()
        shown["InstanceId"] = "mine"
        assert await lab.ids() == ["i-00000000000000001"]

    play(story)


# --- how often one may ask -----------------------------------------------------------------------------


def test_five_launches_at_once_and_two_more_every_second() -> None:
    async def story(lab: Lab) -> None:
        answers = await asyncio.gather(*(lab.run(f"t-{n}") for n in range(7)), return_exceptions=True)
        refused = [one for one in answers if isinstance(one, ClientError)]
        assert len(refused) == 2
        assert refused[0].response["Error"]["Code"] == "RequestLimitExceeded"
        assert refused[0].response["ResponseMetadata"]["HTTPStatusCode"] == 503
        await asyncio.sleep(1)
        await lab.run("t-5")
        await lab.run("t-6")
        assert len(lab.sim.truth()) == 7
        assert lab.sim.faults["bucket empty"] == 2

    play(story)


def test_machines_are_counted_as_well_as_calls() -> None:
    async def story(lab: Lab) -> None:
        answer = await lab.launcher.run_instances(**launch_of(MaxCount=900))
        assert len(answer["Instances"]) == 900
        assert await code_of(lab.run(MaxCount=200)) == "RequestLimitExceeded"
        ids = [one["InstanceId"] for one in answer["Instances"]]
        await lab.client.terminate_instances(InstanceIds=ids)
        assert lab.sim.alive() == []
        assert await code_of(lab.client.terminate_instances(InstanceIds=[])) == "MissingParameter"

    play(story)


def test_terminates_have_a_bucket_of_their_own() -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()
        await asyncio.gather(*(lab.run(f"t-{n}") for n in range(20)), return_exceptions=True)
        await lab.client.terminate_instances(InstanceIds=[machine.id])
        assert not machine.alive

    play(story)


# --- money ---------------------------------------------------------------------------------------------


def test_running_is_billed_by_the_second_and_nothing_else_is() -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()  # pending until 10.1 s after it was asked for
        await asyncio.sleep(600)
        await lab.client.terminate_instances(InstanceIds=[machine.id])
        await asyncio.sleep(600)
        assert machine.running_at is not None
        assert machine.ended_at is not None
        assert machine.billed_seconds(lab.now) == pytest.approx(machine.ended_at - machine.running_at)
        assert lab.sim.billed_seconds(machine.id) == pytest.approx(660.2 - 10.0)
        hours = lab.sim.billed_seconds(machine.id) / 3600
        assert lab.sim.cost_usd_micros() == round(machine.price_usd_micros_per_hour * hours)

    play(story)


def test_a_machine_that_has_run_at_all_is_billed_a_minute() -> None:
    async def story(lab: Lab) -> None:
        short = await lab.run()
        await asyncio.sleep(12)
        await lab.client.terminate_instances(InstanceIds=[short["InstanceId"]])
        never = await lab.run("t-2")
        await lab.client.terminate_instances(InstanceIds=[never["InstanceId"]])
        await asyncio.sleep(600)
        assert lab.sim.billed_seconds(short["InstanceId"]) == 60
        assert lab.sim.billed_seconds(never["InstanceId"]) == 0

    play(story)


def test_a_stopped_machine_is_billed_until_it_stopped() -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine("t-1", spot=False)
        await asyncio.sleep(100)
        lab.sim.stop_by_operator(machine.id)
        billed = lab.sim.billed_seconds(machine.id)
        await asyncio.sleep(1000)
        lab.sim.end_by_operator(machine.id)
        await asyncio.sleep(1000)
        assert lab.sim.billed_seconds(machine.id) == billed == pytest.approx(150.1)

    play(story)


@pytest.mark.parametrize(("after_seconds", "charged"), [(1800, False), (7200, True)])
def test_a_machine_that_ec2_takes_back_within_its_first_hour_costs_nothing(
    after_seconds: float, charged: bool
) -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()
        await asyncio.sleep(after_seconds)
        lab.sim.reclaim(machine.id, notice_seconds=None)
        assert lab.sim.billed_seconds(machine.id) > after_seconds
        assert (lab.sim.charged_seconds(machine.id) > 0) is charged
        assert (lab.sim.cost_usd_micros() > 0) is charged

    play(story)
