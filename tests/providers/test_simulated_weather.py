"""The weather of the simulated EC2: knobs, chance, and that the same seed gives the same history."""

from __future__ import annotations

import asyncio
import random
from dataclasses import fields
from typing import Any

import pytest

from broker.core.errors import CloudError
from broker.providers.sim_sky import Agenda
from broker.providers.sim_weather import STORM, Road, swarm
from broker.providers.simulated import CLEAR, Fault, Weather
from broker.testing import ManualClock
from tests.providers.ec2_support import pool
from tests.providers.simulated_support import KIND, Lab, play, steady
from tests.support.buying import launch_one

PACE = ("_seconds",)


async def a_day(lab: Lab, hours: int = 24) -> None:
    """A client that knows nothing of faults: launches, looks, tags and ends, whatever is answered."""
    for hour in range(hours):
        for step in range(6):
            await asyncio.sleep(600)
            try:
                if not lab.provider.offerings("default")[0].cores:
                    await lab.provider.open()
                order = lab.order(f"order-{hour}-{step}")
                launched = await launch_one(lab.provider, order)
                await lab.provider.tag(launched.id, {"look": "first"})
                await launch_one(lab.provider, order)
            except CloudError:
                pass
            for look in range(4):
                await asyncio.sleep(20)
                await asyncio.gather(look_after(lab, look), return_exceptions=True)


async def look_after(lab: Lab, look: int) -> None:
    listed = await lab.provider.listing()
    for one in listed[:3]:
        await lab.sim.connect(one.address or "198.18.99.99", 2560)
        await lab.provider.tag(one.id, {"look": str(look)})
    if look == 3:
        await lab.provider.terminate([one.id for one in listed[::2]])


# --- knobs ---------------------------------------------------------------------------------------------


def test_clear_weather_is_a_perfect_cloud() -> None:
    lab = play(a_day, CLEAR)
    assert lab.sim.faults == {}
    assert lab.sim.violations == []
    assert len(lab.sim.truth()) == 24 * 6


def test_a_storm_brings_every_fault() -> None:
    elsewhere = {
        str(one)
        for one in (Fault.FLEET_PARTIAL, Fault.FLEET_SURPLUS, Fault.BUCKET_EMPTY, Fault.STUCK_STOPPING)
    }
    missing = {str(fault) for fault in Fault}
    for seed in range(20):
        if missing > elsewhere:
            missing -= play(a_day, STORM, seed=seed).sim.faults.keys()
    assert missing == elsewhere


@pytest.mark.parametrize(
    "wrong",
    [{"hidden": 1.5}, {"stale": -0.1}, {"stale_seconds": (5.0, 1.0)}, {"pending_seconds": (-1.0, 1.0)}],
)
def test_a_knob_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        Weather(**wrong)
    with pytest.raises(AssertionError):
        Road(answer_lost=2.0)


def test_a_storm_turns_every_knob() -> None:
    calm = {
        field.name
        for field in fields(Weather)
        if getattr(STORM, field.name) == getattr(CLEAR, field.name) and not field.name.endswith(PACE)
    }
    drawn = {"spot_price_step_max", "spot_share_max", "stuck_stopping"}  # by each history: drawing_markets.py
    assert calm == {"spot_vcpus_max", "on_demand_vcpus_max"} | drawn


def test_a_swarm_leaves_out_half_of_the_faults_and_keeps_the_pace() -> None:
    some = [swarm(random.Random(seed)) for seed in range(100)]
    for name in ("hidden", "stale", "reclaims_per_hour"):
        assert {getattr(one, name) for one in some} == {0.0, getattr(STORM, name)}
    assert 30 < sum(one.launches.answer_lost > 0 for one in some) < 70
    assert all(one.pending_seconds == STORM.pending_seconds for one in some)
    assert len({one.refusals for one in some}) > 10


# --- determinism ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weather", [CLEAR, STORM])
def test_the_same_seed_gives_the_same_history(weather: Weather) -> None:
    first, second = (play(a_day, weather, seed=7) for _ in range(2))
    assert first.lines == second.lines
    assert first.sim.faults == second.sim.faults
    assert len(first.lines) > 500
    assert play(a_day, weather, seed=8).lines != first.lines


def test_a_mishap_on_the_way_does_not_change_what_becomes_of_machines() -> None:
    def running_at(reads: Road) -> list[float | None]:
        async def story(lab: Lab) -> None:
            for n in range(10):
                await lab.run(f"t-{n}")
                await asyncio.gather(lab.ids(), return_exceptions=True)
                await lab.sleep(150 - lab.now % 100)

        lab = play(story, steady(pending_seconds=(5, 50), reads=reads))
        return [one.running_at and round(one.running_at - one.launched_at, 6) for one in lab.sim.truth()]

    assert running_at(Road()) == running_at(Road(request_lost=0.5, answer_late=0.3))


# --- time ----------------------------------------------------------------------------------------------


def test_what_is_planned_happens_in_its_order_when_somebody_looks() -> None:
    clock = ManualClock()
    agenda = Agenda(clock.monotonic)
    seen: list[tuple[str, float]] = []
    agenda.plan(20, lambda: seen.append(("b", agenda.at)))
    agenda.plan(10, lambda: agenda.plan(15, lambda: seen.append(("a", agenda.at))))
    agenda.plan(float("inf"), lambda: seen.append(("never", agenda.at)))
    clock.advance(17)
    assert (agenda.catch_up(), seen) == (17, [("a", 15)])
    clock.advance(100)
    agenda.catch_up()
    assert seen == [("a", 15), ("b", 20)]


def test_somebody_who_is_told_of_a_step_may_look_without_disturbing_it() -> None:
    async def story(lab: Lab) -> None:
        states: list[str] = []

        def report(at: float, what: str, details: str) -> None:
            states.append(",".join(str(one.state) for one in lab.sim.truth()))

        lab.sim.listen(report)
        await lab.run()
        await asyncio.sleep(3600)
        lab.sim.truth()
        assert "running" in states

    play(story)


def test_the_weather_can_change() -> None:
    async def story(lab: Lab) -> None:
        await lab.run("t-1")
        lab.sim.weather = steady(strangers_per_hour=10.0)
        await asyncio.sleep(3600)
        assert len(lab.sim.truth()) > 4
        lab.sim.heal()
        count = len(lab.sim.truth())
        await asyncio.sleep(36_000)
        assert len(lab.sim.truth()) == count

    play(story, pools={"default": pool(instance_types=[KIND])})
