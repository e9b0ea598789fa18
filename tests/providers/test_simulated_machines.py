"""What becomes of machines in the simulated EC2: boots, addresses, ports, reclaims, strangers, ends."""

from __future__ import annotations

import asyncio
from math import inf
from typing import Any

import pytest

from broker.core.model import InstanceState, Market
from broker.core.tags import BROKER, NAME, POOL
from broker.providers.ec2_api import OTHERWISE
from broker.providers.simulated import BROKER as OURSELVES
from broker.providers.simulated import Fault
from tests.providers.ec2_support import pool
from tests.providers.simulated_support import KIND, Lab, launch_of, play, steady
from tests.support.buying import launch_one

INTERRUPTION = "EC2 Spot Instance Interruption Warning"
REBALANCE = "EC2 Instance Rebalance Recommendation"


# --- booting -------------------------------------------------------------------------------------------


def test_a_boot_may_fail_and_costs_nothing_then() -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()
        shown = await lab.one()
        assert shown["State"]["Name"] == "terminated"
        assert shown["StateReason"]["Code"] == "Server.InternalError"
        assert (machine.ended_by, lab.sim.billed_seconds(machine.id)) == ("aws", 0)

    play(story, steady(boot_failed=1.0))


def test_a_machine_may_stay_pending_for_hours_and_can_be_ended_meanwhile() -> None:
    async def story(lab: Lab) -> None:
        first, second = [await lab.machine(f"t-{n}") for n in range(2)]
        await lab.sleep(3000)
        assert [one["State"]["Name"] for one in await lab.shown()] == ["pending", "pending"]
        await lab.client.terminate_instances(InstanceIds=[first.id])
        await lab.sleep(1000)
        assert [one.state for one in (first, second)] == [InstanceState.TERMINATED, InstanceState.RUNNING]
        assert lab.sim.billed_seconds(first.id) == 0
        assert lab.sim.faults[str(Fault.STUCK_PENDING)] == 2

    play(story, steady(stuck_pending=1.0, stuck_pending_seconds=(3600, 3600)))


@pytest.mark.parametrize(
    ("knobs", "fault", "opens"),
    [
        ({"port_late": 1.0, "port_late_seconds": (300, 300)}, Fault.PORT_LATE, True),
        ({"port_never": 1.0}, Fault.PORT_NEVER, False),
    ],
)
def test_a_worker_port_may_open_late_or_never(knobs: dict[str, Any], fault: Fault, opens: bool) -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()
        assert not lab.sim.accepts(machine.public_address, 2560)
        assert lab.sim.faults[str(fault)] == 1
        await lab.sleep(300)
        assert lab.sim.accepts(machine.public_address, 2560) is opens
        assert machine.state is InstanceState.RUNNING

    play(story, steady(**knobs))


@pytest.mark.parametrize(
    ("knobs", "fault", "comes_back"),
    [
        ({"port_dies": 1.0, "port_dies_after_seconds": (600, 600)}, Fault.PORT_DIED, False),
        (
            {"port_pauses": 1.0, "port_pauses_after_seconds": (600, 600), "port_pause_seconds": (60, 60)},
            Fault.PORT_PAUSED,
            True,
        ),
    ],
)
def test_a_worker_port_may_fall_silent_while_the_machine_runs(
    knobs: dict[str, Any], fault: Fault, comes_back: bool
) -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()
        assert lab.sim.accepts(machine.public_address, 2560)
        await lab.sleep(600)
        assert not lab.sim.accepts(machine.public_address, 2560)
        assert (await lab.one())["State"]["Name"] == "running"
        await lab.sleep(60)
        assert lab.sim.accepts(machine.public_address, 2560) is comes_back
        assert lab.sim.faults == {str(fault): 1}

    play(story, steady(**knobs))


def test_a_connection_may_be_lost_although_somebody_listens() -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()
        results = [await lab.sim.connect(machine.public_address, 2560) for _ in range(100)]
        assert 10 < results.count(False) < 50
        assert results.count(False) == lab.sim.faults[str(Fault.CONNECTION_LOST)]

    play(story, steady(connection_lost=0.3))


def test_a_machine_refuses_at_once_and_an_empty_address_keeps_one_waiting() -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()
        lab.sim.shut_port(machine.id)
        began_at = lab.now
        assert not await lab.sim.connect(machine.public_address, 2560)
        assert lab.now - began_at < 0.1
        assert not await lab.sim.connect("198.18.9.9", 2560)
        assert lab.now - began_at > 3

    play(story)


# --- addresses -----------------------------------------------------------------------------------------


def test_an_address_may_show_late() -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()
        shown = await lab.one()
        assert (shown["State"]["Name"], shown.get("PublicIpAddress")) == ("running", None)
        assert lab.sim.faults[str(Fault.ADDRESS_LATE)] == 1
        await lab.sleep(100)
        assert (await lab.one())["PublicIpAddress"] == machine.public_address == "198.18.0.1"

    play(story, steady(address_late=1.0, address_late_seconds=(120, 120)))


def test_an_address_may_never_come() -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()
        await lab.sleep(86_400)
        assert "PublicIpAddress" not in await lab.one()
        assert machine.public_address == ""
        assert lab.sim.accepts(machine.private_address, 2560)
        assert lab.sim.faults == {str(Fault.ADDRESS_NEVER): 1}

    play(story, steady(address_never=1.0))


def test_a_launch_can_do_without_a_public_address() -> None:
    async def story(lab: Lab) -> None:
        await lab.machine(NetworkInterfaces=[{"DeviceIndex": 0, "AssociatePublicIpAddress": False}])
        assert "PublicIpAddress" not in await lab.one()
        assert not lab.sim.faults

    play(story)


def test_a_returned_address_is_given_to_the_next_machine() -> None:
    async def story(lab: Lab) -> None:
        old = await lab.machine()
        await lab.client.terminate_instances(InstanceIds=[old.id])
        young = await lab.machine("t-2")
        address = old.public_address
        assert young.public_address == address
        assert lab.sim.holder(address) is young
        assert [(one.machine.id, one.since_at < one.until_at) for one in lab.sim.tenures(address)] == [
            (old.id, True),
            (young.id, True),
        ]
        assert lab.sim.tenures(address)[0].until_at == old.ended_at
        assert lab.sim.tenures(address)[1].until_at == inf
        lab.sim.lag(60)
        outdated = {one["InstanceId"]: one.get("PublicIpAddress") for one in await lab.shown()}
        assert outdated[old.id] == address  # who believes an old listing asks the wrong machine
        assert lab.sim.faults[str(Fault.ADDRESS_REUSED)] == 1

    play(story, steady(address_reused=1.0))


def test_an_address_may_rest_between_two_owners() -> None:
    async def story(lab: Lab) -> None:
        old = await lab.machine()
        lab.sim.end_by_operator(old.id)
        assert (await lab.machine("t-2")).public_address != old.public_address
        await lab.sleep(600)
        assert (await lab.machine("t-3")).public_address == old.public_address

    play(story, steady(address_reused=1.0, address_rest_seconds=600.0))


def test_a_stopped_machines_address_is_its_own_no_longer() -> None:
    async def story(lab: Lab) -> None:
        old = await lab.machine(spot=False)
        lab.sim.stop_by_operator(old.id)
        young = await lab.machine("t-2")
        assert young.public_address == old.public_address
        lab.sim.end_by_operator(old.id)
        assert lab.sim.accepts(young.public_address, 2560)

    play(story, steady(address_reused=1.0))


def test_a_strangers_machine_may_get_a_dead_workers_address_and_answer_on_its_port() -> None:
    async def story(lab: Lab) -> None:
        old = await lab.machine()
        lab.sim.end_by_operator(old.id)
        stranger = lab.sim.launch_stranger()
        await lab.sleep(60)
        assert stranger.public_address == old.public_address
        assert await lab.sim.connect(old.public_address, 2560)
        assert lab.sim.faults[str(Fault.ADDRESS_REUSED_BY_STRANGER)] == 1

    play(story, steady(address_reused=1.0))


# --- ending --------------------------------------------------------------------------------------------


def test_a_machine_may_be_shutting_down_for_hours_without_being_billed() -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()
        await lab.client.terminate_instances(InstanceIds=[machine.id])
        billed = lab.sim.billed_seconds(machine.id)
        await lab.sleep(7200)
        assert (await lab.one())["State"]["Name"] == "shutting-down"
        assert lab.sim.billed_seconds(machine.id) == billed
        await lab.sleep(100)
        assert (await lab.one())["State"]["Name"] == "terminated"
        assert lab.sim.faults == {str(Fault.STUCK_SHUTTING_DOWN): 1}

    play(story, steady(stuck_shutting_down=1.0, stuck_shutting_down_seconds=(7200, 7200)))


def test_a_terminate_may_be_answered_and_not_obeyed() -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()
        answer = await lab.client.terminate_instances(InstanceIds=[machine.id])
        assert answer["TerminatingInstances"][0]["CurrentState"]["Name"] == "shutting-down"
        assert (await lab.one())["State"]["Name"] == "running"
        lab.sim.weather = steady()
        await lab.client.terminate_instances(InstanceIds=[machine.id])
        assert (await lab.one())["State"]["Name"] == "shutting-down"
        assert lab.sim.faults == {str(Fault.TERMINATE_IGNORED): 1}

    play(story, steady(terminate_ignored=1.0))


def test_machines_shut_themselves_down_by_chance() -> None:
    async def story(lab: Lab) -> None:
        for n in range(20):
            await lab.machine(f"t-{n}")
        await lab.sleep(3600)
        ended = [one for one in lab.sim.truth() if one.ended_by == "itself"]
        assert 8 <= len(ended) == lab.sim.faults[str(Fault.SHUT_ITSELF_DOWN)] < 20

    play(story, steady(shutdowns_per_hour=1.0))


# --- spot ----------------------------------------------------------------------------------------------


def test_a_reclaim_is_announced_two_minutes_ahead() -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()
        lab.sim.reclaim(machine.id)
        await lab.sleep(2)
        (notice,) = lab.sim.notices
        assert notice == {
            "version": "0",
            "id": "00000000-0000-4000-8000-000000000001",
            "detail-type": INTERRUPTION,
            "source": "aws.ec2",
            "account": "123456789012",
            "time": "2027-01-15T08:01:00Z",
            "region": "us-east-1",
            "resources": [f"arn:aws:ec2:{machine.zone}:instance/{machine.id}"],
            "detail": {"instance-id": machine.id, "instance-action": "terminate"},
        }
        assert lab.sim.accepts(machine.public_address, 2560)
        await lab.sleep(117)
        assert machine.alive
        await lab.sleep(2)
        shown = await lab.one()
        assert shown["State"]["Name"] == "shutting-down"
        assert shown["StateReason"] == {
            "Code": "Server.SpotInstanceTermination",
            "Message": "Server.SpotInstanceTermination: Spot instance termination",
        }
        assert (machine.ended_by, machine.reclaimed) == ("aws", True)

    play(story)


def test_a_reclaim_may_come_unannounced() -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()
        lab.sim.reclaim(machine.id, notice_seconds=None)
        assert not machine.alive
        await lab.sleep(600)
        assert not lab.sim.notices
        assert lab.sim.faults[str(Fault.RECLAIMED_UNANNOUNCED)] == 1

    play(story)


def test_a_rebalance_recommendation_may_come_first_or_alone() -> None:
    async def story(lab: Lab) -> None:
        machine, spared = [await lab.machine(f"t-{n}") for n in range(2)]
        lab.sim.recommend_rebalance(spared.id)
        lab.sim.reclaim(machine.id, rebalance_seconds=600)
        await lab.sleep(800)
        kinds = [(one["detail-type"], one["detail"]["instance-id"]) for one in lab.sim.notices]
        assert kinds == [(REBALANCE, spared.id), (REBALANCE, machine.id), (INTERRUPTION, machine.id)]
        assert (spared.alive, machine.alive) == (True, False)
        assert machine.ended_at is not None
        assert machine.ended_at == pytest.approx(lab.now - 800 + 600 + 120)

    play(story)


def test_a_machine_that_is_gone_already_is_not_taken_back() -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()
        lab.sim.reclaim(machine.id)
        await lab.client.terminate_instances(InstanceIds=[machine.id])
        await lab.sleep(600)
        assert (machine.ended_by, lab.sim.faults[str(Fault.RECLAIMED)]) == (OURSELVES, 0)

    play(story)


@pytest.mark.parametrize(
    ("knobs", "count", "fault"),
    [
        ({"notice_lost": 1.0}, 0, Fault.NOTICE_LOST),
        ({"notice_duplicated": 1.0}, 2, Fault.NOTICE_DUPLICATED),
    ],
)
def test_notices_are_lost_and_doubled(knobs: dict[str, Any], count: int, fault: Fault) -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()
        lab.sim.reclaim(machine.id)
        await lab.sleep(200)
        assert len(lab.sim.notices) == count
        assert len({one["id"] for one in lab.sim.notices}) == min(count, 1)
        assert lab.sim.faults[str(fault)] == 1

    play(story, steady(**knobs))


def test_notices_overtake_each_other() -> None:
    async def story(lab: Lab) -> None:
        for n in range(10):
            machine = await lab.machine(f"t-{n}")
            lab.sim.reclaim(machine.id, rebalance_seconds=1)
            await lab.sleep(600)
        kinds = [one["detail-type"] for one in lab.sim.notices]
        assert kinds != [REBALANCE, INTERRUPTION] * 10
        assert sorted(kinds) == [REBALANCE] * 10 + [INTERRUPTION] * 10

    play(story, steady(notice_late=0.5))


def test_spot_machines_are_taken_back_by_chance_and_others_are_not() -> None:
    async def story(lab: Lab) -> None:
        for n in range(40):
            await lab.machine(f"t-{n}", spot=n % 2 == 0)
        await lab.sleep(4 * 3600)
        taken = [one for one in lab.sim.truth() if one.reclaimed]
        assert len(taken) > 15
        assert all(one.spot for one in taken)
        for fault in (Fault.RECLAIMED_UNANNOUNCED, Fault.REBALANCE, Fault.REBALANCE_ONLY):
            assert 0 < lab.sim.faults[str(fault)] < 20

    knobs = {"reclaim_unannounced": 0.3, "reclaim_rebalance": 0.5, "reclaim_called_off": 0.3}
    play(story, steady(reclaims_per_hour=1.0, **knobs))


# --- others --------------------------------------------------------------------------------------------


def test_whoever_touches_a_strangers_machine_is_written_down() -> None:
    async def story(lab: Lab) -> None:
        strangers = [lab.sim.launch_stranger(its) for its in ({}, {NAME: "dserv-worker"}, {BROKER: "theirs"})]
        ours = await lab.machine()
        await lab.client.create_tags(Resources=[ours.id], Tags=[{"Key": "a", "Value": "b"}])
        assert not lab.sim.violations
        await lab.client.create_tags(Resources=[strangers[1].id], Tags=[{"Key": BROKER, "Value": "lab"}])
        ids = [ours.id, strangers[0].id, strangers[2].id]
        await lab.client.terminate_instances(InstanceIds=ids)
        assert [(one.caller, one.api, one.instance_id) for one in lab.sim.violations] == [
            (OURSELVES, "CreateTags", strangers[1].id),
            (OURSELVES, "TerminateInstances", strangers[0].id),
            (OURSELVES, "TerminateInstances", strangers[2].id),
        ]

    play(story)


def test_an_attempt_that_fails_is_written_down_too() -> None:
    async def story(lab: Lab) -> None:
        stranger = lab.sim.launch_stranger()
        lab.sim.befall("TerminateInstances", Fault.THROTTLED, times=2)
        call = lab.client.terminate_instances(InstanceIds=[stranger.id])
        await asyncio.gather(call, return_exceptions=True)
        assert stranger.alive
        assert len(lab.sim.violations) == 2

    play(story)


def test_a_second_broker_has_machines_of_its_own() -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()
        async with lab.sim.factory_of("other")(OTHERWISE) as other:
            answer = await other.run_instances(**launch_of(), ClientToken="t-2")
            theirs = answer["Instances"][0]["InstanceId"]
            await other.terminate_instances(InstanceIds=[machine.id, theirs])
        (violation,) = lab.sim.violations
        assert (violation.caller, violation.instance_id) == ("other", machine.id)
        assert [(one.owner, one.ended_by) for one in lab.sim.truth()] == [
            (OURSELVES, "other"),
            ("other", "other"),
        ]
        assert lab.sim.alive(None) == []

    play(story)


def test_a_machine_with_an_adopting_pools_name_may_be_claimed() -> None:
    async def story(lab: Lab) -> None:
        lab.sim.allow_adoption("dserv-worker")
        stranger = lab.sim.launch_stranger({NAME: "dserv-worker"})
        theirs = lab.sim.launch_stranger({NAME: "dserv-worker", BROKER: "theirs"})
        await lab.provider.open()
        await lab.sleep(60)
        listed = await lab.provider.listing()
        assert [one.id for one in listed] == [stranger.id]
        await lab.provider.tag(stranger.id, {BROKER: "lab", POOL: "default"})
        await lab.provider.terminate([stranger.id])
        assert not lab.sim.violations
        assert (stranger.owner, stranger.ended_by, theirs.alive) == (OURSELVES, OURSELVES, True)

    adopting = pool(instance_types=[KIND], adopt_name_tag=True)
    play(story, pools={"default": adopting})


def test_strangers_come_and_go_by_chance() -> None:
    async def story(lab: Lab) -> None:
        await lab.provider.open()
        await lab.sleep(24 * 3600)
        strangers = lab.sim.truth()
        assert len(strangers) > 20
        assert not any(one.owner for one in strangers)
        assert any(one.alive for one in strangers)
        assert any(one.ended_by == "operator" for one in strangers)
        assert await lab.provider.listing() == []
        assert lab.sim.alive() == []

    play(story, steady(strangers_per_hour=2.0))


# --- through the provider ------------------------------------------------------------------------------


def test_a_whole_life_through_the_provider() -> None:
    async def story(lab: Lab) -> None:
        await lab.provider.open()
        launched = await launch_one(lab.provider, lab.order())
        assert (launched.state, launched.market, launched.cores) == (InstanceState.PENDING, Market.SPOT, 2)
        await lab.sleep(60)
        (running,) = await lab.provider.listing()
        assert (running.state, running.address) == (InstanceState.RUNNING, "198.18.0.1")
        assert running.zone == lab.sim.machine(running.id).zone
        await lab.provider.tag(running.id, {"a": "b"})
        await lab.provider.terminate([running.id, "i-0unknown".replace("unknown", "a")])
        await lab.sleep(60)
        (dead,) = await lab.provider.listing()
        assert (dead.state, dead.address, dead.tags["a"]) == (InstanceState.TERMINATED, None, "b")
        assert dead.reason == "Client.UserInitiatedShutdown: User initiated shutdown"
        await lab.sleep(3600)
        assert await lab.provider.listing() == []

    play(story)


def test_every_pool_of_a_region_can_be_opened() -> None:
    async def story(lab: Lab) -> None:
        await lab.provider.open()
        offering = lab.provider.offerings("named")[0]
        order = lab.provider.prepare("named", "order-1", [offering], 0.0)
        launched = await launch_one(lab.provider, order)
        machine = lab.sim.machine(launched.id)
        assert (machine.vcpus, offering.cores, machine.spot) == (64, 64, False)

    named = pool(
        instance_types=["c7i.16xlarge"],
        market="on-demand",
        security_groups=["workers"],
        subnet="subnet-1",
        key_name="lab",
    )
    in_default_vpc = pool(instance_types=[KIND], security_groups=["workers"])
    play(story, pools={"default": in_default_vpc, "named": named})


def test_healing_lets_what_is_stuck_go_on() -> None:
    async def story(lab: Lab) -> None:
        first, second, third = [await lab.machine(f"t-{n}") for n in range(3)]
        lab.sim.end_by_operator(second.id)
        await lab.sleep(1000)
        lab.sim.reclaim(third.id, notice_seconds=600)
        lab.sim.heal()
        await lab.sleep(1000)
        assert first.state is InstanceState.RUNNING
        assert second.state is InstanceState.TERMINATED
        assert (third.state, third.alive) == (InstanceState.RUNNING, True)
        assert first.address_shown_at < lab.now

    play(
        story,
        steady(
            stuck_pending=1.0,
            stuck_pending_seconds=(inf, inf),
            stuck_shutting_down=1.0,
            stuck_shutting_down_seconds=(inf, inf),
            address_late=1.0,
            address_late_seconds=(inf, inf),
        ),
    )
