"""What the simulated EC2 shows although it is not so, and does not show although it is."""

from __future__ import annotations

import asyncio

import pytest

from broker.core.errors import CloudUnreachable, InstanceNotFound
from broker.core.model import InstanceState
from broker.core.tags import BROKER
from broker.providers.ec2_api import Manners
from broker.providers.simulated import Fault
from tests.providers.simulated_support import Lab, code_of, play, steady
from tests.support.buying import launch_one

ONE_TRY = Manners(attempts_max=1, answer_seconds_max=20.0, in_flight_max=16)


# --- after a launch ------------------------------------------------------------------------------------


def test_a_machine_may_be_missing_from_listings_after_its_launch() -> None:
    async def story(lab: Lab) -> None:
        one = (await lab.run())["InstanceId"]
        assert await lab.ids() == []
        assert await lab.ids(instance_id=[one]) == []
        call = lab.client.describe_instances(InstanceIds=[one])
        assert await code_of(call) == "InvalidInstanceID.NotFound"
        assert lab.sim.faults[str(Fault.HIDDEN)] == 3
        await asyncio.sleep(60)
        assert await lab.ids() == [one]

    play(story, steady(hidden=1.0, hidden_seconds=(30, 50)))


@pytest.mark.parametrize("unknown", [True, False])
def test_a_hidden_machine_may_be_unknown_to_terminate_and_create_tags_too(unknown: bool) -> None:
    async def story(lab: Lab) -> None:
        one = (await lab.run())["InstanceId"]
        tags = [{"Key": "a", "Value": "b"}]
        if unknown:
            tagging = lab.client.create_tags(Resources=[one], Tags=tags)
            assert await code_of(tagging) == "InvalidInstanceID.NotFound"
            ending = lab.client.terminate_instances(InstanceIds=[one])
            assert await code_of(ending) == "InvalidInstanceID.NotFound"
            assert lab.sim.faults[str(Fault.NOT_FOUND)] == 2
            await asyncio.sleep(60)
        await lab.client.create_tags(Resources=[one], Tags=tags)
        await lab.client.terminate_instances(InstanceIds=[one])
        assert not lab.sim.machine(one).alive

    play(story, steady(hidden=1.0, hidden_seconds=(30, 50), hidden_from_writes=float(unknown)))


def test_a_young_machine_flickers_before_it_shows_for_good() -> None:
    async def story(lab: Lab) -> None:
        await lab.run()
        seen = []
        for _ in range(25):
            seen.append(bool(await lab.ids()))
            await asyncio.sleep(1)
        assert 3 < sum(seen) < 22
        await asyncio.sleep(10)
        assert all([bool(await lab.ids()) for _ in range(20)])

    play(story, steady(flicker=0.5, flicker_seconds=(35, 35)))


def test_a_script_can_hide_a_machine_again() -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()
        lab.sim.hide(machine.id, 100)
        assert await lab.ids() == []
        await asyncio.sleep(100)
        assert await lab.ids() == [machine.id]

    play(story)


# --- outdated ------------------------------------------------------------------------------------------


def test_a_listing_may_show_what_was() -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()
        await lab.client.create_tags(Resources=[machine.id], Tags=[{"Key": "a", "Value": "b"}])
        await lab.client.terminate_instances(InstanceIds=[machine.id])
        await asyncio.sleep(40)
        lab.sim.lag(41)
        old = await lab.one()
        assert (old["State"]["Name"], old["PublicIpAddress"]) == ("running", machine.public_address)
        assert old["Tags"] == [{"Key": BROKER, "Value": "lab"}]
        assert "StateReason" not in old
        assert (await lab.one())["State"]["Name"] == "terminated"
        assert lab.sim.faults[str(Fault.STALE)] == 1

    play(story)


def test_an_outdated_listing_filters_by_what_was() -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()
        await lab.client.terminate_instances(InstanceIds=[machine.id])
        await asyncio.sleep(40)
        lab.sim.lag(60)
        assert await lab.ids(instance_state_name=["running"]) == [machine.id]

    play(story)


def test_an_outdated_listing_does_not_know_the_youngest() -> None:
    async def story(lab: Lab) -> None:
        await lab.machine("t-old")
        await lab.run("t-young")
        lab.sim.lag(10, listings=2)
        assert await lab.ids() == ["i-00000000000000001"]
        assert len(await lab.ids()) == 1
        assert len(await lab.ids()) == 2

    play(story)


def test_outdated_listings_come_by_chance() -> None:
    async def story(lab: Lab) -> None:
        for n in range(200):
            await lab.run(f"t-{n}")
            await asyncio.sleep(1)
            await lab.ids()
        assert 40 < lab.sim.faults[str(Fault.STALE)] < 100

    play(story, steady(stale=0.3, stale_seconds=(20, 60)))


# --- incomplete ----------------------------------------------------------------------------------------


def test_one_listing_misses_a_machine() -> None:
    async def story(lab: Lab) -> None:
        machine = await lab.machine()
        lab.sim.omit(machine.id)
        assert await lab.ids(instance_id=[machine.id]) == [machine.id]
        assert await lab.ids() == []
        assert await lab.ids() == [machine.id]
        assert lab.sim.faults[str(Fault.LISTING_SHORT)] == 1

    play(story)


def test_listings_miss_a_machine_by_chance() -> None:
    async def story(lab: Lab) -> None:
        for n in range(3):
            await lab.machine(f"t-{n}")
        counts = [len(await lab.ids()) for _ in range(200)]
        assert set(counts) == {2, 3}
        assert counts.count(2) == lab.sim.faults[str(Fault.LISTING_SHORT)]

    play(story, steady(listing_short=0.2))


def test_a_failed_second_page_is_no_listing() -> None:
    async def story(lab: Lab) -> None:
        await lab.provider.open()
        for n in range(6):
            await launch_one(lab.provider, lab.order(f"order-{n}"))
            await asyncio.sleep(1)
        failed = 0
        for _ in range(10):  # a fault of EC2's own is tried again, a lost place in the listing is not
            lab.sim.befall("DescribeInstances", Fault.PAGE_FAILED)
            try:
                assert len(await lab.provider.listing()) == 6
            except CloudUnreachable:
                failed += 1
        assert 0 < failed < 10
        assert lab.sim.faults[str(Fault.PAGE_FAILED)] == 10

    play(story, steady(page_items_max=5))


def test_pages_fail_by_chance_but_never_the_first() -> None:
    async def story(lab: Lab) -> None:
        for n in range(6):
            await lab.machine(f"t-{n}")
        client = lab.sim.client(ONE_TRY)
        for _ in range(100):
            answer = await client.describe_instances(MaxResults=5)
            await asyncio.gather(
                client.describe_instances(MaxResults=5, NextToken=answer["NextToken"]), return_exceptions=True
            )
        assert 20 < lab.sim.faults[str(Fault.PAGE_FAILED)] < 60

    play(story, steady(page_failed=0.4))


# --- through the provider ------------------------------------------------------------------------------


def test_the_provider_describes_what_is_visible_and_leaves_out_the_rest() -> None:
    async def story(lab: Lab) -> None:
        await lab.provider.open()
        launched = await launch_one(lab.provider, lab.order())
        lab.sim.hide(launched.id, 30, from_writes=True)
        assert await lab.provider.describe([launched.id]) == []
        assert await lab.provider.listing() == []
        with pytest.raises(InstanceNotFound):
            await lab.provider.tag(launched.id, {"a": "b"})
        await lab.provider.terminate([launched.id])  # an unknown id is fine: it is sent again later
        assert lab.sim.machine(launched.id).alive
        await asyncio.sleep(30)
        (seen,) = await lab.provider.describe([launched.id])
        assert (seen.state, seen.address) == (InstanceState.RUNNING, "198.18.0.1")

    play(story)


def test_healing_shows_what_was_hidden() -> None:
    async def story(lab: Lab) -> None:
        one = (await lab.run())["InstanceId"]
        lab.sim.omit(one, listings=5)
        lab.sim.lag(60, listings=5)
        assert await lab.ids() == []
        lab.sim.heal()
        assert await lab.ids() == [one]

    play(story, steady(hidden=1.0, hidden_seconds=(1000, 1000), flicker=1.0, stale=1.0, listing_short=1.0))
