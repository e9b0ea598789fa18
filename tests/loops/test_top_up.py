"""Warm pools as their operator meets them: kept, taken, replaced, scheduled, refused."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from broker.core.errors import OfferingRefused
from broker.core.model import WorkerState
from broker.core.settings import Settings
from broker.testing import FakeCloud, LoopClock, RunningBroker, run_virtual, running_broker
from tests.support.brokers import live, settings

HOUR = 3600.0  # a virtual broker starts on a Friday at 08:00 UTC


def warm(number: int = 1, **pool: Any) -> Settings:
    return settings(warm=number, sharing="exclusive", **pool)


def ready(broker: RunningBroker) -> int:
    return broker.registry.count("default", WorkerState.READY)


async def until_ready(broker: RunningBroker, number: int) -> None:
    await broker.until(lambda: ready(broker) == number)


def unheld(broker: RunningBroker) -> int:
    return sum(1 for _ in broker.registry.unheld("default"))


def test_a_warm_worker_is_there_before_anybody_asks_and_stays(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.until(lambda: ready(broker) == 1, seconds_max=5)
        await asyncio.sleep(6 * HOUR)
        assert len(broker.cloud.running()) == broker.cloud.count("launch") == 1

    live(tmp_path, story, chosen=warm())


def test_a_client_of_a_warm_pool_does_not_wait_and_the_spare_is_replaced_at_once(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.until(lambda: ready(broker) == 1)
        asked_at = broker.clock.monotonic()
        await broker.ask("GET_WORKER client=a")
        assert broker.clock.monotonic() - asked_at < 0.1
        await broker.until(lambda: unheld(broker) == 1, seconds_max=5)
        assert len(broker.cloud.running()) == 2

    live(tmp_path, story, chosen=warm())


def test_spares_fill_the_cap_and_no_more(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        for client in "abc":
            await broker.ask(f"GET_WORKER client={client}")
        await asyncio.sleep(HOUR / 6)
        assert len(broker.cloud.running()) == 4

    live(tmp_path, story, chosen=warm(3, max_workers=4))


def test_a_worker_that_is_given_up_goes_and_the_spare_stays(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER client=a")  # and never again
        await asyncio.sleep(3 * HOUR)
        assert len(broker.cloud.running()) == ready(broker) == 1
        assert broker.cloud.count("launch") <= 3

    live(tmp_path, story, chosen=warm())


def test_the_target_follows_the_schedule_and_the_surplus_ends_an_idle_timeout_after_its_fall(
    tmp_path: Path,
) -> None:
    async def story(broker: RunningBroker) -> None:
        await asyncio.sleep(HOUR - 2)
        assert broker.cloud.count("launch") == 0
        await asyncio.sleep(4)
        assert ready(broker) == 2
        await asyncio.sleep(2 * HOUR)  # two seconds after 11:00
        assert ready(broker) == 2
        await asyncio.sleep(900 - 4)
        assert len(broker.cloud.running()) == 2, "an idle timeout from the fall"
        await asyncio.sleep(64)
        assert broker.cloud.running() == []

    schedule = {"Mon-Fri 10:00-12:00 Europe/Berlin": 2}
    live(tmp_path, story, chosen=warm(0, warm_schedule=schedule, idle_timeout="15m"))


def test_when_the_clocks_are_set_the_schedule_keeps_to_the_time_that_they_show(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.clock.jump(1_805_004_000 - broker.clock.wall())  # 2027-03-14 06:00 UTC, 01:00 in New York
        await asyncio.sleep(HOUR - 10)
        assert broker.cloud.count("launch") == 0
        await asyncio.sleep(20)  # 07:00 UTC: 01:59:59 is followed by 03:00
        assert ready(broker) == 1

    chosen = warm(0, warm_schedule={"Sun 02:30-04:00 America/New_York": 1})
    live(tmp_path, story, chosen=chosen)


def test_a_wall_clock_that_jumps_to_and_fro_neither_launches_nor_ends_more(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.until(lambda: ready(broker) == 2)
        for _ in range(20):
            broker.clock.jump(12 * HOUR)
            await asyncio.sleep(90)
            broker.clock.jump(-12 * HOUR)
            await asyncio.sleep(90)
        assert broker.cloud.count("launch") == len(broker.cloud.running()) == 2

    chosen = warm(0, warm_schedule={"daily 06:00-18:00": 2}, idle_timeout="15m")
    live(tmp_path, story, chosen=chosen)


def test_a_pool_without_capacity_is_asked_less_and_less(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.fail["launch"].extend(OfferingRefused("none there") for _ in range(1000))
        await asyncio.sleep(2 * HOUR)
        assert 5 <= broker.cloud.count("launch") <= 12
        broker.cloud.fail["launch"].clear()
        await broker.until(lambda: ready(broker) == 1, seconds_max=900)

    live(tmp_path, story, chosen=warm(launches_per_hour=100))


def test_machines_that_do_not_come_up_are_not_bought_again_and_again(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await asyncio.sleep(4 * HOUR)
        assert 3 <= broker.cloud.count("launch") <= 4 * 60 / 16 + 4, "a minute's boot, 15 of patience"

    live(tmp_path, story, boots=False, chosen=warm(boot_deadline="1m", launches_per_hour=100))


def test_the_launches_of_an_hour_bound_warm_ones_too(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await asyncio.sleep(HOUR / 2)
        assert broker.cloud.count("launch") == 2
        await asyncio.sleep(HOUR)
        assert ready(broker) == 3

    live(tmp_path, story, chosen=warm(3, launches_per_hour=2))


def test_a_budget_bounds_warm_launches_too(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await asyncio.sleep(300)  # nothing is seen running yet: each counts with an hour of a dollar
        assert broker.cloud.count("launch") == 2

    live(tmp_path, story, boots=False, chosen=warm(3, budget_usd_per_day=2.0))


def test_an_old_spare_is_replaced_before_it_ends_so_that_the_pool_is_never_cold(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.until(lambda: ready(broker) == 1)
        for _ in range(3 * 60):
            await asyncio.sleep(60)
            assert ready(broker) >= 1
            assert len(broker.cloud.running()) <= 2
        assert 3 <= broker.cloud.count("launch") <= 5

    live(tmp_path, story, chosen=warm(max_lifetime="1h"))


def test_at_the_cap_an_old_spare_ends_first_and_is_replaced_then(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.until(lambda: ready(broker) == 1)
        old = broker.cloud.running()
        await asyncio.sleep(HOUR + 60)
        assert broker.cloud.running() != old
        assert len(broker.cloud.running()) == ready(broker) == 1

    live(tmp_path, story, chosen=warm(max_lifetime="1h", max_workers=1))


def test_after_a_restart_nothing_is_launched_twice(tmp_path: Path) -> None:
    async def main() -> None:
        loop_clock = LoopClock(asyncio.get_running_loop())
        cloud = FakeCloud("lab", clock=loop_clock)
        for _ in range(3):
            async with running_broker(warm(2), tmp_path, cloud=cloud) as broker:
                await until_ready(broker, 2)
                await asyncio.sleep(HOUR)
        assert len(cloud.running()) == cloud.count("launch") == 2

    run_virtual(main())


def test_without_its_store_a_broker_does_not_double_what_it_finds(tmp_path: Path) -> None:
    async def main() -> None:
        cloud = FakeCloud("lab", clock=LoopClock(asyncio.get_running_loop()))
        for life in ("first", "second"):
            async with running_broker(warm(), tmp_path / life, cloud=cloud) as broker:
                await until_ready(broker, 1)
                await asyncio.sleep(2 * HOUR)
        assert len(cloud.running()) == cloud.count("launch") == 1

    run_virtual(main())


def test_before_the_first_listing_nothing_is_launched(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.hold["listing"] = asyncio.Event()
        await asyncio.sleep(60)
        assert broker.cloud.count("launch") == 0
        broker.cloud.hold.pop("listing").set()
        await broker.until(lambda: ready(broker) == 1, seconds_max=10)

    live(tmp_path, story, chosen=warm())


def test_terminate_all_means_it_for_a_quarter_of_an_hour(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.until(lambda: ready(broker) == 1)
        await broker.ask("TERMINATE_ALL")
        await asyncio.sleep(890)
        assert broker.cloud.running() == []
        await broker.until(lambda: ready(broker) == 1, seconds_max=60)

    live(tmp_path, story, chosen=warm())


def test_spares_make_room_for_a_client_who_wants_something_else(tmp_path: Path) -> None:
    async def main() -> None:
        cloud = FakeCloud("lab", clock=LoopClock(asyncio.get_running_loop()))
        big = cloud.catalogue["default"][0]
        cloud.catalogue["default"] = (big, replace(big, instance_type="small"))
        async with running_broker(warm(2, max_workers=2, idle_timeout="5m"), tmp_path, cloud=cloud) as broker:
            await broker.until(lambda: ready(broker) == 2)
            reply = await broker.ask("GET_WORKER client=a type=small wait=900")
            assert "ERROR" not in reply

    run_virtual(main())


def test_a_spare_says_when_it_ends_and_is_not_due_for_being_idle(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.until(lambda: ready(broker) == 1)
        await asyncio.sleep(2 * HOUR)
        [row] = json.loads(await broker.ask("STATUS"))
        assert 21_500 < row["will_terminate_in"] < 21_601, "its max_lifetime, two hours from its birth"

    live(tmp_path, story, chosen=warm())


def test_a_broker_that_goes_down_launches_no_warm_worker_any_more(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.until(lambda: ready(broker) == 1)
        await broker.daemon.launch.settle(1.0)
        await broker.ask("GET_WORKER client=a")
        await asyncio.sleep(HOUR / 6)
        assert broker.cloud.count("launch") == 1

    live(tmp_path, story, chosen=warm())
