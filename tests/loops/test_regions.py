"""A pool in several regions: the first that sells, whichever is silent, and nothing lost in any of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from broker.core import tags
from broker.core.claim import STALE_SECONDS, Claim
from broker.core.errors import CloudUnreachable, NoCapacity, OfferingRefused
from broker.core.model import Market, WorkerState
from broker.testing import (
    EPOCH_UNIX,
    FakeCloud,
    RunningBroker,
    lost_answer,
    run_virtual,
)
from tests.support.regions import Regions, live_in_two_regions, pool

NONE_LEFT = OfferingRefused("no big machines today")


def live(
    directory: Path, story: Callable[[RunningBroker, FakeCloud, FakeCloud], Awaitable[None]], **more: Any
) -> None:
    async def in_both(regions: Regions, broker: RunningBroker) -> None:
        await story(broker, regions.earth, regions.mars)

    live_in_two_regions(directory, in_both, pool(**more))


# --- where to buy ------------------------------------------------------------------------------------------


def test_the_first_region_that_has_machines_is_bought_in(tmp_path: Path) -> None:
    async def story(broker: RunningBroker, earth: FakeCloud, mars: FakeCloud) -> None:
        address = await broker.ask("GET_WORKER client=a")
        assert earth.has(address)
        assert mars.machines == {}

    live(tmp_path, story)


def test_what_the_first_region_refuses_is_bought_in_the_second(tmp_path: Path) -> None:
    async def story(broker: RunningBroker, earth: FakeCloud, mars: FakeCloud) -> None:
        earth.refuses["big"] = NONE_LEFT
        assert mars.has(await broker.ask("GET_WORKER client=a"))
        assert mars.has(await broker.ask("GET_WORKER client=b exclusive=yes"))
        assert earth.count("launch") == 1, "it cools down"

    live(tmp_path, story)


def test_only_when_no_region_sells_clients_hear_of_it_and_of_all(tmp_path: Path) -> None:
    async def story(broker: RunningBroker, earth: FakeCloud, mars: FakeCloud) -> None:
        for cloud in (earth, mars):
            cloud.refuses["big"] = NONE_LEFT
        reply = await broker.ask("GET_WORKER client=a")
        assert reply == (
            f"ERROR: ec2 earth: no big machines today; ec2 mars: no big machines today [{NoCapacity.code}]"
        )

    live(tmp_path, story)


def test_spot_in_any_region_comes_before_on_demand_in_any(tmp_path: Path) -> None:
    async def story(broker: RunningBroker, earth: FakeCloud, mars: FakeCloud) -> None:
        for cloud in (earth, mars):
            spot = cloud.catalogue["default"][0]
            cloud.catalogue["default"] = (spot, replace(spot, market=Market.ON_DEMAND))
        earth.dry = {Market.SPOT}
        assert mars.has(await broker.ask("GET_WORKER client=a exclusive=yes wait=600"))
        mars.dry = {Market.SPOT}
        began_at = broker.clock.monotonic()
        address = await broker.ask("GET_WORKER client=b exclusive=yes wait=600")
        assert earth.has(address)
        assert broker.clock.monotonic() - began_at >= 120, "spot was waited for, in both"

    live(tmp_path, story, market="spot-then-on-demand", on_demand_after="2m")


def test_a_client_may_say_in_which_region(tmp_path: Path) -> None:
    async def story(broker: RunningBroker, earth: FakeCloud, mars: FakeCloud) -> None:
        assert mars.has(await broker.ask("GET_WORKER client=a region=mars"))
        assert earth.machines == {}
        reply = await broker.ask("GET_WORKER client=a region=venus")
        assert "it has big in earth (64 cores), big in mars (64 cores)" in reply

    live(tmp_path, story)


def test_the_nearest_region_comes_first_where_the_pool_says_so(tmp_path: Path) -> None:
    async def story(broker: RunningBroker, earth: FakeCloud, mars: FakeCloud) -> None:
        earth.round_trip, mars.round_trip = 0.180, 0.020
        assert mars.has(await broker.ask("GET_WORKER client=a"))

    live(tmp_path, story, region_order="latency")


def test_the_caps_are_those_of_the_pool_wherever_its_workers_are(tmp_path: Path) -> None:
    async def story(broker: RunningBroker, earth: FakeCloud, mars: FakeCloud) -> None:
        await broker.ask("GET_WORKER client=a")
        earth.refuses["big"] = NONE_LEFT
        await broker.ask("GET_WORKER client=b exclusive=yes")
        assert "max_workers = 2 is reached" in await broker.ask("GET_WORKER client=c exclusive=yes wait=60")
        assert len(earth.machines) == len(mars.machines) == 1

    live(tmp_path, story, max_workers=2)


def test_a_spare_is_kept_warm_in_whichever_region_has_one(tmp_path: Path) -> None:
    async def main() -> None:
        regions = Regions(tmp_path)
        regions.earth.refuses["big"] = NONE_LEFT
        async with regions.broker(pool(warm=1)) as broker:
            await broker.until(lambda: broker.registry.count("default", WorkerState.READY) == 1)
            await asyncio.sleep(600)
            assert regions.running() == (0, 1)

    run_virtual(main())


# --- regions that are silent -------------------------------------------------------------------------------


def test_a_region_that_is_down_for_hours_keeps_nobody_waiting(tmp_path: Path) -> None:
    async def story(broker: RunningBroker, earth: FakeCloud, mars: FakeCloud) -> None:
        held = await broker.ask("GET_WORKER client=a exclusive=yes")
        earth.fail["listing"].extend(CloudUnreachable("no connection") for _ in range(500))
        earth.fail["launch"].extend(CloudUnreachable("no connection") for _ in range(500))
        await asyncio.sleep(300)
        began_at = broker.clock.monotonic()
        assert mars.has(await broker.ask("GET_WORKER client=b exclusive=yes"))
        assert broker.clock.monotonic() - began_at < 5
        assert await broker.ask(f"PING {held} client=a") == "OK"

    live(tmp_path, story)


def test_a_region_that_is_down_at_the_start_is_waited_for_and_not_for_ever(tmp_path: Path) -> None:
    """It may have a warm worker: but after some scans in vain another region sells one."""

    async def main() -> None:
        regions = Regions(tmp_path)
        regions.earth.fail["listing"].extend(CloudUnreachable("no connection") for _ in range(500))
        async with regions.broker(pool()) as broker:
            assert regions.mars.has(await broker.ask("GET_WORKER client=a"))
            assert 5 < broker.clock.monotonic() < 120
            assert broker.daemon.health.not_ready() == []
            assert broker.daemon.health.problems() == []
            await asyncio.sleep(300)
            assert "ec2 earth was last scanned" in broker.daemon.health.problems()[0]

    run_virtual(main())


def test_an_order_whose_answer_is_lost_with_its_region_is_placed_elsewhere(tmp_path: Path) -> None:
    async def story(broker: RunningBroker, earth: FakeCloud, mars: FakeCloud) -> None:
        await broker.until(broker.daemon.context.clouds.recovered)
        earth.fail["launch"].extend(lost_answer() for _ in range(500))
        assert mars.has(await broker.ask("GET_WORKER client=a wait=600"))
        assert earth.machines == {}

    live(tmp_path, story)


def test_a_region_of_which_another_broker_is_in_charge_is_passed_over(tmp_path: Path) -> None:
    async def story(broker: RunningBroker, earth: FakeCloud, mars: FakeCloud) -> None:
        await broker.until(broker.daemon.context.clouds.recovered)
        theirs = earth.add(pool="default")
        for beat in range(3):
            claim = Claim(99, "somebody-else", EPOCH_UNIX + broker.clock.monotonic() + beat)
            earth.retag(theirs, **{tags.EPOCH.partition(":")[2]: str(claim)})
            await asyncio.sleep(STALE_SECONDS / 10)
        assert mars.has(await broker.ask("GET_WORKER client=a"))
        assert earth.count("launch") == earth.count("terminate") == 0

    live(tmp_path, story)


# --- restarts and reloads ----------------------------------------------------------------------------------


def test_a_restart_finds_the_workers_and_leases_of_both_regions(tmp_path: Path) -> None:
    async def main() -> None:
        regions, both = Regions(tmp_path), pool(sharing="exclusive")
        async with regions.broker(both) as broker:
            here = await broker.ask("GET_WORKER client=a region=earth")
            there = await broker.ask("GET_WORKER client=b region=mars")
        async with regions.broker(both) as again:
            assert await again.ask(f"PING {here} client=a") == "OK"
            assert await again.ask(f"PING {there} client=b") == "OK"
            assert await again.ask("GET_WORKER client=b region=mars") == there
            assert len(regions.earth.machines) == len(regions.mars.machines) == 1

    run_virtual(main())


def test_workers_of_a_region_that_a_reload_has_removed_end_when_nobody_holds_them(tmp_path: Path) -> None:
    async def story(broker: RunningBroker, earth: FakeCloud, mars: FakeCloud) -> None:
        idle = await broker.ask("GET_WORKER client=a region=mars exclusive=yes")
        held = await broker.ask("GET_WORKER client=b region=mars exclusive=yes")
        worker = broker.registry.by_address(idle)
        assert worker is not None
        broker.registry.end_lease(worker.id, "a", "done", broker.clock.monotonic())
        await broker.reload(pool(regions=["earth"]))
        await asyncio.sleep(10)
        assert len(mars.running()) == 1
        assert await broker.ask(f"PING {held} client=b") == "OK"
        assert earth.has(await broker.ask("GET_WORKER client=c"))
        await asyncio.sleep(1000)
        assert mars.running() == []

    live(tmp_path, story)


def test_a_region_that_a_reload_brings_is_bought_in(tmp_path: Path) -> None:
    async def main() -> None:
        regions = Regions(tmp_path)
        async with regions.broker(pool(regions=["earth"])) as broker:
            regions.earth.refuses["big"] = NONE_LEFT
            await broker.reload(pool())
            await broker.until(broker.daemon.context.clouds.recovered)
            assert regions.mars.has(await broker.ask("GET_WORKER client=a"))

    run_virtual(main())


def test_a_broker_whose_file_was_changed_while_it_was_down_looks_where_its_machines_are(
    tmp_path: Path,
) -> None:
    """No machine is ever orphaned, also when somebody writes another region into the file."""

    async def main() -> None:
        regions = Regions(tmp_path)
        async with regions.broker(pool(regions=["mars"])) as broker:
            await broker.ask("GET_WORKER client=a")
        async with regions.broker(pool(regions=["earth"])) as again:
            await again.until(again.daemon.context.clouds.recovered)
            assert regions.earth.has(await again.ask("GET_WORKER client=b")), "nobody new gets the other one"
            await asyncio.sleep(1000)
            assert regions.mars.running() == []
            assert [cloud.provider.name for cloud in again.daemon.context.clouds.all] == ["ec2 earth"]

    run_virtual(main())


def test_a_place_where_nothing_was_left_is_not_looked_for(tmp_path: Path) -> None:
    """Its credentials may be gone: that must not keep the health check red for ever."""

    async def main() -> None:
        regions = Regions(tmp_path)
        async with regions.broker(pool(regions=["mars"])) as broker:
            await broker.until(broker.daemon.context.clouds.recovered)
        regions.mars.fail["listing"].extend(CloudUnreachable("no connection") for _ in range(500))
        async with regions.broker(pool(regions=["earth"])) as again:
            await asyncio.sleep(900)
            assert again.daemon.health.problems() == []

    run_virtual(main())
