"""What passes a region over, how long, what clients hear of it, and that nothing is lost or doubled by it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker.core import tags
from broker.core.claim import Claim
from broker.core.errors import (
    CloudUnreachable,
    OfferingRefused,
    PermanentRefusal,
    QuotaReached,
    SettingsError,
    Throttled,
)
from broker.core.model import Market, WorkerState
from broker.testing import (
    EPOCH_UNIX,
    RunningBroker,
    lost_answer,
    run_virtual,
)
from tests.support.regions import DOWN, Regions, down, offerings, pool, up
from tests.support.regions import live_in_two_regions as live

HOURS = 4 * 3600.0


async def row(broker: RunningBroker) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(await broker.ask("POOLS"))[0]
    return found


# --- which region ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [OfferingRefused("sold out"), QuotaReached("quota"), PermanentRefusal("no such image")]
)
def test_what_the_first_region_refuses_is_bought_in_the_second_at_once(
    tmp_path: Path, error: OfferingRefused | PermanentRefusal
) -> None:
    async def story(regions: Regions, broker: RunningBroker) -> None:
        regions.earth.fail["launch"].append(error)
        began_at = broker.clock.monotonic()
        assert regions.mars.has(await broker.ask("GET_WORKER client=a wait=60"))
        assert broker.clock.monotonic() - began_at < 1
        assert regions.running() == (0, 1)

    live(tmp_path, story)


@pytest.mark.parametrize("error", [CloudUnreachable("connection refused"), Throttled("slow down")])
def test_a_region_that_does_not_take_the_call_is_passed_over(tmp_path: Path, error: Exception) -> None:
    async def story(regions: Regions, broker: RunningBroker) -> None:
        regions.earth.fail["launch"].extend([error] * 10)
        assert regions.mars.has(await broker.ask("GET_WORKER client=a wait=60"))
        assert regions.running() == (0, 1)

    live(tmp_path, story)


def test_quotas_of_all_regions_are_a_limit(tmp_path: Path) -> None:
    async def story(regions: Regions, broker: RunningBroker) -> None:
        for cloud in (regions.earth, regions.mars):
            cloud.fail["launch"].append(QuotaReached("quota"))
        assert (await broker.ask("GET_WORKER client=a wait=60")).endswith("[LIMIT]")

    live(tmp_path, story)


def test_the_first_region_is_bought_in_again_once_its_cool_down_is_over(tmp_path: Path) -> None:
    async def story(regions: Regions, broker: RunningBroker) -> None:
        regions.earth.fail["launch"].append(OfferingRefused("sold out"))
        await broker.ask("GET_WORKER client=a")
        await broker.ask("GET_WORKER client=b")
        assert regions.running() == (0, 2)
        await asyncio.sleep(200)
        await broker.ask("GET_WORKER client=c")
        assert regions.running() == (1, 2)

    live(tmp_path, story, pool(sharing="exclusive"))


def test_a_client_may_wish_for_the_second_region(tmp_path: Path) -> None:
    async def story(regions: Regions, broker: RunningBroker) -> None:
        assert regions.mars.has(await broker.ask("GET_WORKER client=a region=mars"))
        assert regions.running() == (0, 1)
        answer = await broker.ask("GET_WORKER client=b region=venus")
        assert "big in earth (64 cores), big in mars (64 cores)" in answer
        regions.mars.fail["launch"].append(OfferingRefused("sold out"))
        answer = await broker.ask("GET_WORKER client=c region=mars wait=60")
        assert answer == "ERROR: no worker became ready within 60 s: sold out [TIMEOUT]", (
            "a's might come free"
        )
        assert regions.running() == (0, 1)

    live(tmp_path, story, pool(sharing="exclusive"))


def test_on_demand_max_is_the_pools_wherever_the_machines_are(tmp_path: Path) -> None:
    async def story(regions: Regions, broker: RunningBroker) -> None:
        for cloud, name in ((regions.earth, "earth"), (regions.mars, "mars")):
            cloud.catalogue["default"] = offerings(name, Market.SPOT, Market.ON_DEMAND)
            cloud.dry.add(Market.SPOT)
        await broker.ask("GET_WORKER client=a")
        regions.earth.refuses["big"] = OfferingRefused("sold out")
        assert "on_demand_max = 1 is reached" in await broker.ask("GET_WORKER client=b wait=60")
        assert regions.running() == (1, 0)

    rules = {"sharing": "exclusive", "market": "spot-then-on-demand", "on_demand_after": "0s"}
    live(tmp_path, story, pool(**rules, on_demand_max=1))


def test_a_fallback_ends_when_another_region_has_spot_again(tmp_path: Path) -> None:
    async def story(regions: Regions, broker: RunningBroker) -> None:
        for cloud, name in ((regions.earth, "earth"), (regions.mars, "mars")):
            cloud.catalogue["default"] = offerings(name, Market.SPOT, Market.ON_DEMAND)
            cloud.dry.add(Market.SPOT)
        address = await broker.ask("GET_WORKER client=a")
        await broker.ask(f"RELEASE {address} client=a")
        await asyncio.sleep(300)  # cool-downs are over: spot may be asked for again
        assert regions.running() == (0, 0)

    rules = {"market": "spot-then-on-demand", "on_demand_after": "0s", "idle_timeout": "1h"}
    live(tmp_path, story, pool(**rules))


# --- a region that cannot be asked -------------------------------------------------------------------------


def test_while_the_first_region_is_down_for_hours_the_second_sells(tmp_path: Path) -> None:
    async def story(regions: Regions, broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER client=a")
        down(regions.earth)
        await asyncio.sleep(HOURS)
        assert regions.mars.has(await broker.ask("GET_WORKER client=b wait=60"))
        answer = await broker.ask("GET_WORKER client=c region=earth wait=60")
        assert "ec2 earth cannot be used at the moment: no answer" in answer
        assert (await row(broker))["obstacle"] == ""
        assert "no answer" in (await row(broker))["regions"][0]["obstacle"]
        up(regions.earth)
        await asyncio.sleep(60)
        assert regions.earth.has(await broker.ask("GET_WORKER client=d"))

    live(tmp_path, story, pool(sharing="exclusive"))


def test_a_launch_whose_answer_is_lost_keeps_nobody_from_another_region(tmp_path: Path) -> None:
    async def story(regions: Regions, broker: RunningBroker) -> None:
        regions.earth.lose = True
        regions.earth.fail["launch"].extend([lost_answer()] * 1000)
        down(regions.earth, ("listing", "describe"))
        assert regions.mars.has(await broker.ask("GET_WORKER client=a wait=300"))
        assert regions.running() == (1, 1)  # it was launched, and nobody could know
        regions.earth.lose = False
        up(regions.earth)
        await asyncio.sleep(120)
        assert len(broker.registry.in_state(WorkerState.READY)) == 2
        assert not broker.daemon.orders.unresolved()
        await asyncio.sleep(3600)
        assert regions.running() == (0, 0)

    live(tmp_path, story)


def test_with_all_regions_down_a_client_hears_of_each(tmp_path: Path) -> None:
    async def story(regions: Regions, broker: RunningBroker) -> None:
        down(regions.earth)
        down(regions.mars)
        await asyncio.sleep(600)
        answer = await broker.ask("GET_WORKER client=a wait=60")
        assert "ec2 earth cannot be used" in answer
        assert "ec2 mars cannot be used" in answer
        assert answer.endswith("[CLOUD]")

    live(tmp_path, story)


def test_settings_that_do_not_work_in_one_region_leave_the_others(tmp_path: Path) -> None:
    async def story(regions: Regions, broker: RunningBroker) -> None:
        regions.earth.study_problems["default"] = ["pool.default.security_groups: there is none"]
        await broker.reload(pool(warm=0, idle_timeout="20m"))
        assert regions.mars.has(await broker.ask("GET_WORKER client=a wait=60"))
        assert "there is none" in (await row(broker))["regions"][0]["obstacle"]

    live(tmp_path, story)


def test_a_region_in_which_another_broker_is_in_charge_is_passed_over(tmp_path: Path) -> None:
    async def story(regions: Regions, broker: RunningBroker) -> None:
        mine = await broker.ask("GET_WORKER client=a")
        rival = str(Claim(99, "rival", EPOCH_UNIX + broker.clock.monotonic()))
        (there,) = regions.earth.machines.values()
        there.instance = replace(there.instance, tags={**there.instance.tags, tags.EPOCH: rival})
        await broker.until(broker.daemon.context.clouds.read_only)
        assert regions.mars.has(await broker.ask("GET_WORKER client=b wait=60"))
        assert regions.running() == (1, 1)
        assert regions.earth.has(mine)
        assert "read-only" in await broker.ask("GET_WORKER client=c region=earth wait=60")

    live(tmp_path, story)


# --- restarts ----------------------------------------------------------------------------------------------


def test_a_restart_finds_the_workers_of_all_regions_and_their_clients(tmp_path: Path) -> None:
    async def main() -> None:
        regions = Regions(tmp_path)
        async with regions.broker(pool(sharing="exclusive")) as broker:
            here = await broker.ask("GET_WORKER client=a")
            there = await broker.ask("GET_WORKER client=b region=mars")
        for cloud in (regions.earth, regions.mars):  # a listing may miss what was launched just now
            for machine in cloud.machines.values():
                machine.hidden = True
        async with regions.broker(pool(sharing="exclusive")) as again:
            assert await again.ask(f"PING {here} client=a") == "OK"
            assert await again.ask(f"PING {there} client=b") == "OK"
            context = again.daemon.context
            homes = {worker.address: context.cloud_of(worker) for worker in again.registry}
            assert {address: cloud.provider.name for address, cloud in homes.items() if cloud} == {
                here: "ec2 earth",
                there: "ec2 mars",
            }
            for cloud in (regions.earth, regions.mars):
                for machine in cloud.machines.values():
                    machine.hidden = False
            await asyncio.sleep(300)
            assert len(again.registry) == 2
            assert regions.launches() == (1, 1)
            await asyncio.sleep(2000)
            assert regions.running() == (0, 0)

    run_virtual(main())


def test_a_start_waits_for_a_slow_region_before_it_buys_in_another(tmp_path: Path) -> None:
    async def main() -> None:
        regions = Regions(tmp_path)
        async with regions.broker(pool()) as broker:
            address = await broker.ask("GET_WORKER client=a region=mars")
        regions.mars.fail["listing"].append(DOWN)
        regions.mars.fail["open"].append(DOWN)
        async with regions.broker(pool()) as again:
            assert await again.ask("GET_WORKER client=a wait=300") == address
            assert regions.launches() == (0, 1)

    run_virtual(main())


def test_a_start_does_not_wait_for_ever_for_a_region_that_is_down(tmp_path: Path) -> None:
    async def main() -> None:
        regions = Regions(tmp_path)
        async with regions.broker(pool()) as broker:
            there = await broker.ask("GET_WORKER client=a region=mars")
        down(regions.mars)
        async with regions.broker(pool()) as again:
            assert regions.earth.has(await again.ask("GET_WORKER client=b wait=300"))
            assert again.clock.monotonic() < 120
            assert not again.daemon.health.not_ready()
            assert again.daemon.context.clouds.serving()
            await asyncio.sleep(HOURS)
            asks = asyncio.create_task(again.ask(f"PING {there} client=a"))
            up(regions.mars)
            assert await asks != "ERROR: Worker not found", "nobody has seen that it is gone"
            await asyncio.sleep(60)
            assert {worker.address for worker in again.registry} >= {there}
            assert regions.launches() == (1, 1)

    run_virtual(main())


def test_a_machine_with_the_name_tag_is_found_in_any_region(tmp_path: Path) -> None:
    async def story(regions: Regions, broker: RunningBroker) -> None:
        machine = regions.mars.machines[regions.mars.add()]
        machine.instance = replace(machine.instance, tags={tags.NAME: "dserv-worker"})
        address = machine.instance.address
        await broker.until(lambda: len(broker.registry) == 1)
        await broker.until(lambda: broker.registry.in_state(WorkerState.READY))
        assert await broker.ask("GET_WORKER client=a") == address
        assert regions.launches() == (0, 0)

    live(tmp_path, story, pool(adopt_name_tag=True))


# --- other regions -----------------------------------------------------------------------------------------


def test_a_region_that_comes_back_takes_its_workers_back(tmp_path: Path) -> None:
    async def story(regions: Regions, broker: RunningBroker) -> None:
        held = await broker.ask("GET_WORKER client=a region=mars")
        await broker.reload(pool(regions=["earth"]))
        await broker.reload(pool())
        assert await broker.ask("GET_WORKER client=b region=mars") == held
        assert regions.launches() == (0, 1)
        assert not broker.daemon.context.leaving

    live(tmp_path, story)


def test_a_region_that_is_added_and_does_not_answer_holds_nobody_up(tmp_path: Path) -> None:
    async def story(regions: Regions, broker: RunningBroker) -> None:
        down(regions.mars)
        await broker.reload(pool(regions=["mars", "earth"]))
        began_at = broker.clock.monotonic()
        assert regions.earth.has(await broker.ask("GET_WORKER client=a wait=60"))
        assert broker.clock.monotonic() - began_at < 10

    live(tmp_path, story, pool(regions=["earth"]))


def test_settings_that_work_in_no_region_say_so(tmp_path: Path) -> None:
    async def story(regions: Regions, broker: RunningBroker) -> None:
        for cloud in (regions.earth, regions.mars):
            cloud.study_problems["default"] = [f"{cloud.name} has no such thing"]
        await broker.reload(pool(idle_timeout="20m"))
        answer = await broker.ask("GET_WORKER client=a wait=60")
        assert "ec2 earth has no such thing" in answer
        assert "ec2 mars has no such thing" in answer
        assert isinstance(broker.daemon.context.clouds.all[0].mistake, SettingsError)

    live(tmp_path, story)
