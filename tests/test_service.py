"""What a client gets, and never gets: the service against a whole broker in virtual time."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker.core.errors import OfferingRefused, PermanentRefusal, SettingsError, Throttled
from broker.core.model import InstanceState, Market, Offering, WorkerState
from broker.core.settings import Settings, parse
from broker.testing import (
    FakeCloud,
    LoopClock,
    Machine,
    RunningBroker,
    lost_answer,
    run_virtual,
    running_broker,
)
from tests.support.brokers import live, no_room, settings
from tests.support.buying import launch_one


async def status(broker: RunningBroker) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(await broker.ask("STATUS"))
    return rows


def test_a_thousand_first_requests_launch_one_machine(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        asks = [
            asyncio.create_task(broker.ask("GET_WORKER", f"10.1.{i // 250}.{i % 250}")) for i in range(1000)
        ]
        await broker.until(lambda: broker.cloud.machines)
        broker.cloud.boot(broker.cloud.running()[0])
        assert len(set(await asyncio.gather(*asks))) == 1
        assert broker.cloud.count("launch") == 1

    live(tmp_path, story, boots=False)


def test_an_exclusive_pool_gives_each_client_a_worker_of_its_own(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        asks = [broker.ask(f"GET_WORKER client=c{i}") for i in range(8)]
        addresses = await asyncio.gather(*asks)
        assert len(set(addresses)) == 8
        assert broker.cloud.count("launch") == 8
        for row in await status(broker):
            assert row["leases"] == 1

    live(tmp_path, story, chosen=settings(sharing="exclusive", max_workers=8))


def test_asking_again_is_the_same_lease_on_the_same_worker(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        first = await broker.ask("GET_WORKER client=a")
        assert await broker.ask("GET_WORKER client=a") == first
        assert [row["leases"] for row in await status(broker)] == [1]

    live(tmp_path, story, chosen=settings(sharing="exclusive"))


def test_clients_beyond_the_cap_queue_and_are_served_in_the_order_they_came(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        held = await broker.ask("GET_WORKER client=first")
        order: list[str] = []

        async def wait_for_one(name: str) -> None:
            await broker.ask(f"GET_WORKER client={name}")
            order.append(name)

        waiting = []
        for name in ("second", "third", "fourth"):
            waiting.append(asyncio.create_task(wait_for_one(name)))
            await asyncio.sleep(1)
        for holder in ("first", "second", "third"):
            await broker.ask(f"RELEASE {held} client={holder}")
            await asyncio.sleep(1)
        await asyncio.gather(*waiting)
        assert order == ["second", "third", "fourth"]
        assert broker.cloud.count("launch") == 1

    live(tmp_path, story, chosen=settings(sharing="exclusive", max_workers=1))


def test_a_wait_ends_on_the_second_and_says_what_is_going_on(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        started = broker.clock.monotonic()
        reply = await broker.ask("GET_WORKER wait=30")
        assert broker.clock.monotonic() - started == pytest.approx(30, abs=0.1)
        assert reply.startswith("ERROR: no worker became ready within 30 s: one has been booting for 30 s")
        assert reply.endswith("[TIMEOUT]")

    live(tmp_path, story, boots=False)


def test_a_machine_that_comes_too_late_stays_warm(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        assert "[TIMEOUT]" in await broker.ask("GET_WORKER wait=5")
        broker.cloud.boot(broker.cloud.running()[0])
        assert "ERROR" not in await broker.ask("GET_WORKER")
        assert broker.cloud.count("launch") == 1

    live(tmp_path, story, boots=False)


def test_a_client_that_gives_up_frees_its_place(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        held = await broker.ask("GET_WORKER client=holder")
        impatient = broker.client()
        impatient.send(b"GET_WORKER client=impatient\n")
        await asyncio.sleep(1)
        patient = asyncio.create_task(broker.ask("GET_WORKER client=patient"))
        await asyncio.sleep(1)
        impatient.vanish()
        await asyncio.sleep(1)
        await broker.ask(f"RELEASE {held} client=holder")
        assert await patient == held
        assert [lease.client for lease in broker.registry.leases(next(iter(broker.registry)).id)] == [
            "patient"
        ]

    live(tmp_path, story, chosen=settings(sharing="exclusive", max_workers=1))


def test_release_ends_the_machine_only_when_nobody_else_uses_it(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a")
        assert await broker.ask("GET_WORKER client=b") == address
        assert await broker.ask(f"RELEASE {address} client=a") == "OK"
        await asyncio.sleep(5)
        assert len(broker.cloud.running()) == 1
        assert await broker.ask(f"PING {address} client=b") == "OK"
        assert await broker.ask(f"RELEASE {address} client=b") == "OK"
        await broker.until(lambda: not broker.cloud.running())

    live(tmp_path, story)


def test_release_with_force_ends_the_machine_under_everybody(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a")
        await broker.ask("GET_WORKER client=b")
        assert await broker.ask(f"RELEASE {address} force client=a") == "OK"
        await broker.until(lambda: not broker.cloud.running())
        assert await broker.ask(f"PING {address} client=b") == "ERROR: Worker not found"

    live(tmp_path, story)


def test_releasing_twice_or_an_unknown_address_is_ok(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER")
        for _ in range(2):
            assert await broker.ask(f"RELEASE {address}") == "OK"
        assert await broker.ask("RELEASE 9.9.9.9") == "OK"

    live(tmp_path, story)


def test_a_released_address_is_never_handed_out_again(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.ends_at_once = False
        address = await broker.ask("GET_WORKER")
        await broker.ask(f"RELEASE {address}")
        assert await broker.ask("GET_WORKER") != address

    live(tmp_path, story)


def test_pings_keep_a_worker_for_hours_and_silence_ends_it_after_the_idle_timeout(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER")
        for _ in range(30):
            await asyncio.sleep(600)
            assert await broker.ask(f"PING {address}") == "OK"
        assert len(broker.cloud.running()) == 1
        await asyncio.sleep(899)
        assert len(broker.cloud.running()) == 1
        await asyncio.sleep(5)
        assert broker.cloud.running() == []

    live(tmp_path, story)


def test_the_ping_of_a_stranger_does_not_take_an_exclusive_worker(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a")
        assert await broker.ask(f"PING {address} client=b") == (
            "ERROR: the worker is held by another client [DENIED]"
        )

    live(tmp_path, story, chosen=settings(sharing="exclusive"))


def test_an_exclusive_wish_in_a_shared_pool_is_a_worker_of_ones_own(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        shared = await broker.ask("GET_WORKER client=a")
        alone = await broker.ask("GET_WORKER exclusive=yes client=b")
        assert alone != shared
        assert await broker.ask("GET_WORKER client=c") == shared

    live(tmp_path, story)


def test_a_worker_that_died_since_its_last_proof_is_set_aside_and_another_is_found(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        dead = await broker.ask("GET_WORKER client=a")
        await asyncio.sleep(10)
        next(iter(broker.cloud.machines.values())).answers = False
        alive = await broker.ask("GET_WORKER client=b")
        assert alive != dead
        assert await broker.ask("GET_WORKER client=a") == alive, "not even its holder gets the dead address"

    live(tmp_path, story)


def test_a_worker_that_answers_again_is_used_again(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a")
        machine = next(iter(broker.cloud.machines.values()))
        await asyncio.sleep(10)
        machine.answers = False
        await broker.until(lambda: broker.registry.in_state(WorkerState.SUSPECT))
        machine.answers = True
        await broker.until(lambda: broker.registry.in_state(WorkerState.READY))
        assert await broker.ask("GET_WORKER client=a") == address
        assert broker.cloud.count("launch") == 1

    live(tmp_path, story)


@pytest.mark.parametrize("wish", ["cores=65", "type=small", "region=mars"])
def test_an_impossible_wish_is_an_error_that_names_what_there_is(tmp_path: Path, wish: str) -> None:
    async def story(broker: RunningBroker) -> None:
        reply = await broker.ask(f"GET_WORKER {wish}")
        assert reply == (
            f"ERROR: pool 'default' has nothing with {wish}; it has big in moon (64 cores) [BAD_REQUEST]"
        )
        assert broker.cloud.count("launch") == 0

    live(tmp_path, story)


def test_an_unknown_pool_is_an_error_that_names_the_pools(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        assert await broker.ask("GET_WORKER pool=gpu") == (
            "ERROR: there is no pool 'gpu'; there is default, wide [BAD_REQUEST]"
        )

    live(tmp_path, story, chosen=settings({"wide": {}}))


def test_pools_do_not_share_their_workers(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        assert await broker.ask("GET_WORKER") != await broker.ask("GET_WORKER pool=wide")

    live(tmp_path, story, chosen=settings({"wide": {}}))


def test_a_wish_for_cores_passes_over_the_small_worker(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.catalogue["default"] = (
            Offering("moon", "small", Market.SPOT, cores=2),
            Offering("moon", "big", Market.SPOT, cores=64),
        )
        small = await broker.ask("GET_WORKER client=a")
        big = await broker.ask("GET_WORKER cores=32 client=b")
        assert small != big
        assert [row["instance_type"] for row in await status(broker)] == ["small", "big"]

    live(tmp_path, story)


# --- launches that fail ----------------------------------------------------------------------------------


def test_a_lost_answer_is_asked_for_again_and_stays_one_machine(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.lose = True
        broker.cloud.fail["launch"].append(lost_answer())
        assert "ERROR" not in await broker.ask("GET_WORKER")
        assert len(broker.cloud.machines) == 1
        tokens = {arguments[0].id for api, arguments in broker.cloud.calls if api == "launch"}
        assert len(tokens) == 1

    live(tmp_path, story)


def test_a_refused_offering_cools_down_and_the_next_is_taken_at_once(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.catalogue["default"] += (Offering("moon", "other", Market.SPOT, cores=64),)
        broker.cloud.fail["launch"].append(OfferingRefused("no big machines today"))
        address = await broker.ask("GET_WORKER")
        assert [row["instance_type"] for row in await status(broker)] == ["other"]
        await broker.ask(f"RELEASE {address}")
        await broker.ask("GET_WORKER")
        launched = [
            arguments[0].offerings[0].instance_type
            for api, arguments in broker.cloud.calls
            if api == "launch"
        ]
        assert launched == ["big", "other", "other"]
        assert broker.clock.monotonic() < 60

    live(tmp_path, story)


def test_without_any_offering_the_client_hears_why_and_there_is_no_hot_loop(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.fail["launch"].extend(OfferingRefused("no capacity in moon") for _ in range(100))
        for _ in range(20):
            assert await broker.ask("GET_WORKER") == "ERROR: no capacity in moon [NO_CAPACITY]"
        assert broker.cloud.count("launch") == 1
        await asyncio.sleep(200)
        broker.cloud.fail["launch"].clear()
        assert "ERROR" not in await broker.ask("GET_WORKER")

    live(tmp_path, story)


def test_a_throttled_launch_is_repeated_later_with_the_same_order(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.fail["launch"].extend([Throttled(), Throttled()])
        assert "ERROR" not in await broker.ask("GET_WORKER")
        assert broker.clock.monotonic() == pytest.approx(3, abs=0.5)
        tokens = [arguments[0].id for api, arguments in broker.cloud.calls if api == "launch"]
        assert len(tokens) == 3
        assert len(set(tokens)) == 1

    live(tmp_path, story)


def test_a_permanent_refusal_is_told_to_everybody_and_not_repeated_for_a_minute(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.fail["launch"].extend(PermanentRefusal("the image does not exist") for _ in range(100))
        for _ in range(10):
            assert await broker.ask("GET_WORKER") == "ERROR: the image does not exist [CLOUD]"
        assert broker.cloud.count("launch") == 1

    live(tmp_path, story)


def test_a_launch_that_never_answers_is_told_and_its_machine_is_found_later(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.lose = True
        broker.cloud.fail["launch"].extend(lost_answer() for _ in range(5))
        assert await broker.ask("GET_WORKER") == "ERROR: connection reset [CLOUD]"
        await broker.until(lambda: broker.registry.in_state(WorkerState.READY))
        assert "ERROR" not in await broker.ask("GET_WORKER")
        assert len(broker.cloud.machines) == 1

    live(tmp_path, story)


def of_two_sizes(broker: RunningBroker) -> None:
    """Pool `default` sells small machines, pool `large` big ones."""
    (big,) = broker.cloud.catalogue["default"]
    broker.cloud.catalogue["default"] = (replace(big, instance_type="small", cores=8),)


def test_a_wish_without_a_pool_goes_to_the_first_pool_that_has_what_is_asked_for(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        of_two_sizes(broker)
        address = await broker.ask("GET_WORKER cores=64 client=ann")
        worker = broker.registry.by_address(address)
        assert worker is not None
        assert (worker.pool, worker.offering.instance_type) == ("large", "big")
        small = await broker.ask("GET_WORKER cores=8 client=ann")
        worker = broker.registry.by_address(small)
        assert worker is not None
        assert worker.pool == "default"
        assert "pool=large type=big" in await broker.ask("ACQUIRE type=big client=ben")

    live(tmp_path, story, chosen=settings({"large": {"sharing": "exclusive"}}))


def test_a_wish_that_no_pool_can_meet_names_what_all_of_them_have(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        of_two_sizes(broker)
        assert await broker.ask("GET_WORKER cores=65") == (
            "ERROR: no pool has anything with cores=65; pool 'default' has small in moon (8 cores); "
            "pool 'large' has big in moon (64 cores) [BAD_REQUEST]"
        )
        assert await broker.ask("GET_WORKER cores=64 pool=default") == (
            "ERROR: pool 'default' has nothing with cores=64; it has small in moon (8 cores) [BAD_REQUEST]"
        )

    live(tmp_path, story, chosen=settings({"large": {}}))


def test_an_order_that_no_listing_ever_shows_was_never_launched(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.fail["launch"].extend(lost_answer() for _ in range(5))
        assert await broker.ask("GET_WORKER") == "ERROR: connection reset [CLOUD]"
        assert broker.registry.count("default", WorkerState.ORDERED) == 1
        await asyncio.sleep(400)
        assert len(broker.registry) == 0
        assert broker.daemon.context.store.open_orders() == []

    live(tmp_path, story)


def test_images_that_die_at_boot_open_the_breaker(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        ask = asyncio.create_task(broker.ask("GET_WORKER wait=7200"))
        reply = await ask
        assert "3 machines in a row did not become ready" in reply
        assert reply.endswith("[LIMIT]")
        assert broker.cloud.count("launch") == 3
        assert broker.cloud.running() == []

    live(tmp_path, story, boots=False, chosen=settings(boot_deadline="5m"))


def test_failed_attempts_count_against_the_launches_an_hour(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        for _ in range(4):
            broker.cloud.fail["launch"].append(PermanentRefusal("no"))
            await broker.ask("GET_WORKER")
            await asyncio.sleep(61)
        assert "launches_per_hour = 3 is reached" in await broker.ask("GET_WORKER")
        assert broker.cloud.count("launch") == 3

    live(tmp_path, story, chosen=settings(launches_per_hour=3))


# --- outages ---------------------------------------------------------------------------------------------


def test_during_an_outage_warm_workers_are_handed_out_and_launches_fail_fast(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a")
        for api in ("listing", "launch", "describe"):
            broker.cloud.fail[api].extend(lost_answer() for _ in range(10_000))
        await asyncio.sleep(8 * 600)
        await broker.ask(f"PING {address} client=a")
        started = broker.clock.monotonic()
        assert len(broker.cloud.running()) in (0, 1)
        reply = await broker.ask("GET_WORKER exclusive=yes client=b")
        assert reply == "ERROR: fake cannot be used at the moment: connection reset [CLOUD]"
        assert broker.clock.monotonic() - started < 1
        assert broker.cloud.count("launch") == 1

    live(tmp_path, story)


def test_a_cloud_that_is_down_at_the_start_is_said_at_once_and_recovered_from(tmp_path: Path) -> None:
    async def story() -> None:
        async with running_broker(settings(), tmp_path) as broker:
            broker.cloud.fail["listing"].extend(lost_answer() for _ in range(3))
            assert await broker.ask("GET_WORKER") == (
                "ERROR: fake cannot be used at the moment: connection reset [CLOUD]"
            )
            await asyncio.sleep(60)
            assert "ERROR" not in await broker.ask("GET_WORKER")

    run_virtual(story())


# --- TERMINATE_ALL, LIST_ALL -----------------------------------------------------------------------------


def test_terminate_all_ends_busy_booting_and_unknown_machines_alike(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER client=a")
        stranger = broker.cloud.add()
        ended = json.loads(await broker.ask("TERMINATE_ALL"))["terminated"]
        assert stranger in ended
        assert len(ended) == 2
        await broker.until(lambda: not broker.cloud.running())
        await asyncio.sleep(600)
        assert broker.cloud.running() == []

    live(tmp_path, story)


def test_terminate_all_ends_a_machine_whose_launch_is_still_under_way(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.hold["launch"] = asyncio.Event()
        ask = asyncio.create_task(broker.ask("GET_WORKER"))
        await broker.until(lambda: broker.cloud.count("launch"))
        await broker.ask("TERMINATE_ALL")
        assert (await ask).endswith("[DRAINING]")
        broker.cloud.hold.pop("launch").set()
        await broker.until(lambda: broker.cloud.machines)
        await broker.until(lambda: not broker.cloud.running())

    live(tmp_path, story)


def test_list_all_is_one_look_for_everybody_who_asks_together(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER")
        before = broker.cloud.count("listing")
        replies = await asyncio.gather(*(broker.ask("LIST_ALL") for _ in range(50)))
        assert broker.cloud.count("listing") - before == 1
        row = json.loads(replies[0])[0]
        assert {"instance_id", "instance_type", "ip", "launch_time", "state"} <= row.keys()

    live(tmp_path, story)


# --- restarts --------------------------------------------------------------------------------------------


def test_a_restart_forgets_nobody(tmp_path: Path) -> None:
    async def main() -> None:
        chosen = settings(sharing="exclusive")
        async with running_broker(chosen, tmp_path) as broker:
            address = await broker.ask("GET_WORKER client=a")
        async with running_broker(chosen, tmp_path, cloud=broker.cloud) as again:
            assert await again.ask(f"PING {address} client=a") == "OK"
            assert await again.ask("GET_WORKER client=b") != address
            assert await again.ask("GET_WORKER client=a") == address

    run_virtual(main())


def test_a_lost_store_loses_history_but_no_machine(tmp_path: Path) -> None:
    async def main() -> None:
        async with running_broker(settings(), tmp_path / "one") as broker:
            address = await broker.ask("GET_WORKER client=a")
        async with running_broker(settings(), tmp_path / "two", cloud=broker.cloud) as again:
            assert await again.ask("GET_WORKER client=b") == address
            await asyncio.sleep(850)
            assert len(again.cloud.running()) == 1
            await asyncio.sleep(60)
            assert again.cloud.running() == []

    run_virtual(main())


def test_a_machine_that_was_launched_in_the_last_breath_is_adopted(tmp_path: Path) -> None:
    async def main() -> None:
        async with running_broker(settings(), tmp_path) as broker:
            broker.cloud.hold["launch"] = asyncio.Event()
            ask = asyncio.create_task(broker.ask("GET_WORKER"))
            await broker.until(lambda: broker.cloud.count("launch"))
            orders = broker.daemon.context.store.open_orders()
            assert len(orders) == 1
        assert (await ask).endswith("[DRAINING]")
        broker.cloud.hold.clear()
        await launch_one(broker.cloud, orders[0])  # the call arrives after all
        async with running_broker(settings(), tmp_path, cloud=broker.cloud) as again:
            assert "ERROR" not in await again.ask("GET_WORKER")
            assert len(again.cloud.machines) == 1
            assert again.daemon.context.store.open_orders() == []

    run_virtual(main())


def test_an_unresolved_order_is_sent_again_when_somebody_waits_and_stays_one_machine(tmp_path: Path) -> None:
    async def main() -> None:
        async with running_broker(settings(), tmp_path) as broker:
            broker.cloud.fail["launch"].extend(lost_answer() for _ in range(5))
            await broker.ask("GET_WORKER")
            orders = broker.daemon.context.store.open_orders()
        async with running_broker(settings(), tmp_path, cloud=broker.cloud) as again:
            assert "ERROR" not in await again.ask("GET_WORKER")
            assert [machine.order_id for machine in again.cloud.machines.values()] == [orders[0].id]

    run_virtual(main())


def test_a_reclaimed_worker_is_never_handed_out_again(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        reclaimed = await broker.ask("GET_WORKER client=a")
        reason = "Server.SpotInstanceTermination"
        broker.cloud.set_state(broker.cloud.running()[0], InstanceState.SHUTTING_DOWN, reason)
        await asyncio.sleep(1.5)  # beyond readiness_max_age the worker port is tried again
        assert await broker.ask("GET_WORKER client=a") != reclaimed
        await asyncio.sleep(40)
        assert await broker.ask(f"PING {reclaimed} client=a") == "ERROR: Worker not found"

    live(tmp_path, story)


def test_settings_that_cannot_work_end_the_start(tmp_path: Path) -> None:
    async def main() -> None:
        clock = LoopClock(asyncio.get_running_loop())
        cloud = FakeCloud("lab", clock=clock)
        cloud.fail["open"].append(SettingsError(["pool.default.security_groups: there is no such group"]))
        with pytest.raises(SettingsError, match="no such group"):
            async with running_broker(settings(), tmp_path, cloud=cloud):
                await asyncio.sleep(1)

    run_virtual(main())


def test_settings_that_cannot_work_do_not_keep_running_machines_alive_for_ever(tmp_path: Path) -> None:
    async def main() -> None:
        clock = LoopClock(asyncio.get_running_loop())
        cloud = FakeCloud("lab", clock=clock)
        cloud.add()
        cloud.fail["open"].append(SettingsError(["pool.default.security_groups: there is no such group"]))
        async with running_broker(settings(), tmp_path, cloud=cloud) as broker:
            reply = await broker.ask("GET_WORKER wait=5")
            assert "ERROR" not in reply, "the machine that runs is handed out"
            assert await broker.ask("GET_WORKER client=b exclusive=yes") == (
                "ERROR: the broker's settings do not work: "
                "pool.default.security_groups: there is no such group [CLOUD]"
            )
            await asyncio.sleep(1000)
            assert cloud.running() == []

    run_virtual(main())


def test_a_restart_does_not_forget_the_launches_of_the_last_hour(tmp_path: Path) -> None:
    async def main() -> None:
        chosen = settings(launches_per_hour=2)
        async with running_broker(chosen, tmp_path) as broker:
            for _ in range(2):
                address = await broker.ask("GET_WORKER")
                await broker.ask(f"RELEASE {address}")
                await asyncio.sleep(60)
        async with running_broker(chosen, tmp_path, cloud=broker.cloud) as again:
            assert "launches_per_hour = 2 is reached" in await again.ask("GET_WORKER")
            await asyncio.sleep(3600)
            assert "ERROR" not in await again.ask("GET_WORKER")

    run_virtual(main())


class FullDisk:
    """Every write of a store fails while this is in place."""

    def __init__(self, broker: RunningBroker, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(broker.daemon.context.store, "_commit", no_room)


def test_on_a_full_disk_nothing_is_launched_and_shared_workers_are_still_handed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a")
        FullDisk(broker, monkeypatch)
        assert await broker.ask("GET_WORKER client=b") == address
        reply = await broker.ask("GET_WORKER client=c exclusive=yes")
        assert reply.startswith("ERROR: cannot write")
        assert reply.endswith("is the disk full? [LIMIT]")
        assert broker.cloud.count("launch") == 1
        monkeypatch.undo()
        assert "ERROR" not in await broker.ask("GET_WORKER client=c exclusive=yes")

    live(tmp_path, story)


def test_on_a_full_disk_an_exclusive_worker_is_not_given_away_on_a_lease_that_would_be_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a")
        waiting = asyncio.create_task(broker.ask("GET_WORKER client=b"))
        await asyncio.sleep(1)
        FullDisk(broker, monkeypatch)
        await broker.ask(f"RELEASE {address} client=a")
        assert (await waiting).endswith("is the disk full? [LIMIT]")

    live(tmp_path, story, chosen=settings(sharing="exclusive", max_workers=1))


def test_a_lease_that_could_not_be_written_is_not_taken_for_written_after_a_look_at_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated history, seed 19: the write had failed by the time the worker's port had been tried."""

    async def story(broker: RunningBroker) -> None:
        gone = broker.client()
        gone.send(b"GET_WORKER client=gone\n")
        await broker.until(lambda: broker.cloud.machines)
        gone.vanish()
        broker.cloud.boot(broker.cloud.running()[0])
        await broker.until(lambda: broker.registry.count("default", WorkerState.READY))
        await asyncio.sleep(10)  # its proof grows old
        FullDisk(broker, monkeypatch)
        reply = await broker.ask("GET_WORKER client=late")
        assert reply.endswith("is the disk full? [LIMIT]")
        monkeypatch.undo()
        assert "ERROR" not in await broker.ask("GET_WORKER client=late")
        assert [lease.lease.client for lease in broker.daemon.context.store.leases()] == ["late"]

    live(tmp_path, story, chosen=settings(sharing="exclusive", max_workers=1), boots=False)


def test_an_order_refused_when_sent_again_fills_its_place_until_its_first_call_cannot_arrive_any_more(
    tmp_path: Path,
) -> None:
    """Simulated history, seed 42: a call came late, after the one sent again was refused."""

    async def story(broker: RunningBroker) -> None:
        broker.cloud.fail["launch"].extend([lost_answer(), OfferingRefused()])
        assert "[TIMEOUT]" in await broker.ask("GET_WORKER client=a wait=30")
        assert broker.daemon.orders.doubtful("default") == 1
        await asyncio.sleep(181)  # the offering has cooled down
        assert "[TIMEOUT]" in await broker.ask("GET_WORKER client=b wait=30"), "the cap holds for both"
        assert broker.cloud.count("launch") == 2
        await asyncio.sleep(300)
        assert broker.daemon.orders.doubtful("default") == 0
        assert "ERROR" not in await broker.ask("GET_WORKER client=c")

    live(tmp_path, story, chosen=settings(max_workers=1))


def test_clients_whose_leases_a_full_disk_refused_keep_their_worker_over_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated history, seed 13: another client's RELEASE ended their worker after the restart."""

    async def main() -> None:
        async with running_broker(settings(), tmp_path) as broker:
            address = await broker.ask("GET_WORKER client=first")
            FullDisk(broker, monkeypatch)
            assert await broker.ask("GET_WORKER client=refused") == address
        monkeypatch.undo()
        async with running_broker(settings(), tmp_path, cloud=broker.cloud) as again:
            await again.ask(f"RELEASE {address} client=first")
            await asyncio.sleep(60)
            assert await again.ask(f"PING {address} client=refused") == "OK"
        async with running_broker(settings(), tmp_path, cloud=broker.cloud) as third:
            assert not third.daemon.context.store.leases_missing, "made up for, and written"

    run_virtual(main())


def test_a_full_disk_does_not_end_an_exclusive_hold_from_before_the_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated history, seed 3925: it was written once more, the disk refused, and the worker was shared."""

    async def main() -> None:
        async with running_broker(settings(), tmp_path) as broker:
            address = await broker.ask("GET_WORKER client=alone exclusive=yes")
        async with running_broker(settings(), tmp_path, cloud=broker.cloud) as again:
            FullDisk(again, monkeypatch)
            await again.until(again.daemon.context.clouds.recovered)
            await asyncio.sleep(10)
            assert await again.ask("GET_WORKER client=alone") == address
            assert await again.ask("GET_WORKER client=other wait=5") != address
            assert await again.ask(f"PING {address} client=alone") == "OK"

    run_virtual(main())


async def unlisted_and_store_damaged(chosen: Settings, directory: Path) -> tuple[FakeCloud, Machine]:
    """A broker has launched for client a and is gone; no listing shows the machine, the store is damaged."""
    async with running_broker(chosen, directory) as broker:
        await broker.ask("GET_WORKER client=a")
    (machine,) = broker.cloud.machines.values()
    machine.hidden = True
    (directory / "broker.db").write_bytes(bytes(4096))
    return broker.cloud, machine


def test_after_its_store_was_damaged_a_broker_waits_until_every_machine_must_be_listed(
    tmp_path: Path,
) -> None:
    """Simulated history, seed 677: a machine that was not listed yet let the cap be exceeded."""

    async def main() -> None:
        chosen = settings(sharing="exclusive", max_workers=1)
        cloud, machine = await unlisted_and_store_damaged(chosen, tmp_path)
        async with running_broker(chosen, tmp_path, cloud=cloud) as again:
            reply = await again.ask("GET_WORKER client=b wait=60")
            assert "the store was damaged: for" in reply
            machine.hidden = False
            await asyncio.sleep(100)
            assert "[TIMEOUT]" in await again.ask("GET_WORKER client=b wait=60")
            assert cloud.count("launch") == 1

    run_virtual(main())


def test_after_its_store_was_damaged_a_broker_waits_for_launch_calls_that_may_be_under_way(
    tmp_path: Path,
) -> None:
    """Simulated history, seed 5738: one arrived four minutes later, and the cap was exceeded."""

    async def main() -> None:
        async with running_broker(settings(), tmp_path) as broker:
            await broker.until(broker.daemon.context.clouds.recovered)
        (tmp_path / "broker.db").write_bytes(bytes(4096))
        async with running_broker(settings(), tmp_path, cloud=broker.cloud) as again:
            reply = await again.ask("GET_WORKER client=a wait=400")
            assert "the store was damaged: for" in reply
            assert broker.cloud.count("launch") == 0
            assert "ERROR" not in await again.ask("GET_WORKER client=a wait=120")

    run_virtual(main())


def test_after_its_store_was_damaged_a_broker_waits_for_a_listing_that_must_show_every_machine(
    tmp_path: Path,
) -> None:
    """Simulated history, seed 1576: the time was over, and the listing that counted was the old one."""

    async def main() -> None:
        one = {"sharing": "exclusive", "max_workers": 1}
        seldom = parse({"broker": {"id": "lab", "reconcile_interval": 120}, "pool": {"default": one}}, {})
        cloud, machine = await unlisted_and_store_damaged(seldom, tmp_path)
        async with running_broker(seldom, tmp_path, cloud=cloud) as again:
            await again.until(again.daemon.context.clouds.recovered)
            await asyncio.sleep(400)
            machine.hidden = False
            assert "[TIMEOUT]" in await again.ask("GET_WORKER client=b wait=200")
            assert cloud.count("launch") == 1

    run_virtual(main())


def test_a_broker_that_is_started_again_knows_that_its_store_was_damaged_a_moment_ago(tmp_path: Path) -> None:
    """Simulated histories, seeds 3514 and 3572: the second start launched at once, beyond the cap."""

    async def main() -> None:
        chosen = settings(sharing="exclusive", max_workers=1)
        cloud, machine = await unlisted_and_store_damaged(chosen, tmp_path)
        async with running_broker(chosen, tmp_path, cloud=cloud) as second:
            await second.until(second.daemon.context.clouds.recovered)
        async with running_broker(chosen, tmp_path, cloud=cloud) as third:
            assert "the store was damaged: for" in await third.ask("GET_WORKER client=b wait=60")
            machine.hidden = False
            await asyncio.sleep(500)
            assert not third.daemon.context.store.lost
        async with running_broker(chosen, tmp_path, cloud=cloud) as fourth:
            assert not fourth.daemon.context.store.lost, "that is over"
            assert cloud.count("launch") == 1

    run_virtual(main())


def test_after_its_store_was_damaged_a_broker_does_not_say_that_a_worker_is_gone_which_it_may_not_see_yet(
    tmp_path: Path,
) -> None:
    """Simulated history, seed 306: a young machine that was not listed, and its client let go of it."""

    async def main() -> None:
        cloud, machine = await unlisted_and_store_damaged(settings(), tmp_path)
        address = machine.instance.address
        async with running_broker(settings(), tmp_path, cloud=cloud) as again:
            await again.until(again.daemon.context.clouds.recovered)
            reply = await again.ask(f"PING {address} client=a")
            assert reply.startswith("ERROR: the store was damaged: for")
            assert reply.endswith("[CLOUD]")
            machine.hidden = False
            await asyncio.sleep(60)
            assert await again.ask(f"PING {address} client=a") == "OK"
            await asyncio.sleep(500)
            assert await again.ask("PING 198.51.100.9 client=a") == "ERROR: Worker not found"

    run_virtual(main())


def test_one_client_on_three_connections_buys_one_exclusive_machine(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        replies = await asyncio.gather(*(broker.ask("GET_WORKER client=anna") for _ in range(3)))
        assert len(set(replies)) == 1
        assert broker.cloud.count("launch") == 1

    live(tmp_path, story, chosen=settings(sharing="exclusive"))


def test_a_terminated_worker_is_not_handed_out_after_a_restart_by_a_stale_listing(tmp_path: Path) -> None:
    async def main() -> None:
        async with running_broker(settings(), tmp_path) as broker:
            address = await broker.ask("GET_WORKER client=a")
            instance = broker.cloud.running()[0]
            await broker.ask(f"RELEASE {address} client=a")
            await broker.until(lambda: broker.cloud.count("terminate"))
        broker.cloud.set_state(instance, InstanceState.RUNNING)  # what an outdated listing still says
        async with running_broker(settings(), tmp_path, cloud=broker.cloud) as again:
            assert await again.ask("GET_WORKER client=b") != address
            await again.until(lambda: instance not in again.cloud.running())

    run_virtual(main())


@pytest.mark.parametrize(
    "state", [InstanceState.SHUTTING_DOWN, InstanceState.STOPPED, InstanceState.TERMINATED]
)
def test_images_that_shut_down_at_boot_open_the_breaker(tmp_path: Path, state: InstanceState) -> None:
    async def story(broker: RunningBroker) -> None:
        ask = asyncio.create_task(broker.ask("GET_WORKER wait=7200"))
        while not ask.done():
            for instance in broker.cloud.running():
                broker.cloud.set_state(instance, state, "Client.InstanceInitiatedShutdown")
            await asyncio.sleep(1)
        assert "3 machines in a row did not become ready" in ask.result()
        assert broker.cloud.count("launch") == 3

    live(tmp_path, story, boots=False)


def test_a_stop_before_the_first_scan_is_told_to_whoever_waits(tmp_path: Path) -> None:
    async def main() -> None:
        clock = LoopClock(asyncio.get_running_loop())
        cloud = FakeCloud("lab", clock=clock)
        cloud.hold["listing"] = asyncio.Event()
        async with running_broker(settings(), tmp_path, cloud=cloud) as broker:
            asks = [asyncio.create_task(broker.ask(line)) for line in ("GET_WORKER", "PING 10.0.0.1")]
            await asyncio.sleep(1)
        for ask in asks:
            assert (await ask).endswith("[DRAINING]")

    run_virtual(main())


def test_a_failed_look_at_a_warm_worker_buys_no_second_machine(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a")
        connect, failures = broker.cloud.connect, 1

        async def fails_once(host: str, port: int) -> bool:
            nonlocal failures
            failures -= 1
            return failures < 0 and await connect(host, port)

        broker.daemon.probe._connect = fails_once
        await asyncio.sleep(31)
        assert failures < 0
        assert await broker.ask("GET_WORKER client=b") == address
        assert broker.cloud.count("launch") == 1

    live(tmp_path, story)


def test_restarts_do_not_make_an_unused_machine_immortal(tmp_path: Path) -> None:
    async def main() -> None:
        cloud = None
        for turn in range(60):
            async with running_broker(settings(max_lifetime="2h"), tmp_path, cloud=cloud) as broker:
                if turn == 0:
                    address = await broker.ask("GET_WORKER client=a")
                    await broker.ask("GET_WORKER client=b")
                    await broker.ask(f"RELEASE {address} client=a")
                    await asyncio.sleep(890)
                    broker.registry.expire_leases(
                        next(iter(broker.registry)).id, broker.clock.monotonic() + 60
                    )
                cloud = broker.cloud
                await asyncio.sleep(600)
        assert cloud is not None
        assert cloud.running() == []

    run_virtual(main())


def test_one_dead_region_does_not_silence_the_clients_of_another(tmp_path: Path) -> None:
    async def main() -> None:
        chosen = settings({"far": {}})
        async with running_broker(chosen, tmp_path) as broker:
            address = await broker.ask("GET_WORKER client=anna")
        dead = FakeCloud("lab", ("far",), clock=LoopClock(asyncio.get_running_loop()))
        dead.fail["listing"].extend(lost_answer() for _ in range(10_000))
        async with running_broker(chosen, tmp_path, cloud=broker.cloud, others={"far": dead}) as again:
            await asyncio.sleep(10)
            for _ in range(20):
                await asyncio.sleep(60)
                assert await again.ask(f"PING {address} client=anna") == "OK"
            assert len(again.cloud.running()) == 1
            assert [row["ip"] for row in await status(again)] == [address]
            assert (await again.ask("GET_WORKER pool=far")).endswith("[CLOUD]")
            assert await again.ask(f"RELEASE {address} client=anna") == "OK"
            await again.until(lambda: not again.cloud.running())

    run_virtual(main())
