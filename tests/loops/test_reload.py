"""New settings while the broker runs: what applies at once, who has to go, and what nobody may lose."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from broker.core.errors import CloudUnreachable, PermanentRefusal, SettingsError
from broker.core.model import Market, Offering, WorkerState
from broker.core.settings import Settings, parse
from broker.testing import FakeCloud, LoopClock, RunningBroker, run_virtual, running_broker
from tests.support.brokers import live, settings


def file(broker: dict[str, Any] | None = None, **pools: dict[str, Any]) -> Settings:
    """A whole file: `default` is there in any case."""
    return parse({"broker": {"id": "lab", **(broker or {})}, "pool": pools}, {})


def elsewhere() -> FakeCloud:
    """Another place, to be called on the running loop."""
    return FakeCloud("lab", ("default", "gpu"), clock=LoopClock(asyncio.get_running_loop()), first=1000)


# --- the file ----------------------------------------------------------------------------------------------


def test_a_file_with_a_mistake_changes_nothing_and_is_shown_until_it_is_mended(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a")
        before = broker.daemon.settings
        await broker.reload(SettingsError(["pool.gpu.wait: is no duration"]))
        assert broker.daemon.settings is before
        assert broker.daemon.health.notes() == ["the file cannot be used: pool.gpu.wait: is no duration"]
        assert broker.daemon.health.problems() == []
        assert broker.daemon.metrics.registry.get_sample_value("compute_broker_settings_outdated") == 1.0
        assert await broker.ask("GET_WORKER client=b") == address
        await broker.reload(file(default={"wait": "1s"}))
        assert broker.daemon.health.notes() == []
        assert broker.daemon.metrics.registry.get_sample_value("compute_broker_settings_outdated") == 0.0
        assert broker.daemon.settings.pool["default"].wait == 1.0

    live(tmp_path, story)


def test_what_the_broker_cannot_change_while_it_runs_stays_and_is_named(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.reload(file({"id": "other", "reconcile_interval": "2m", "silence_timeout": "7s"}))
        now = broker.daemon.settings.broker
        assert (now.id, now.reconcile_interval) == ("lab", 120.0)
        assert broker.daemon.health.notes() == ["broker.id needs a restart"]
        assert broker.daemon.server.settings.silence_timeout == 7.0

    live(tmp_path, story)


def test_two_reloads_at_once_end_with_what_the_file_said_last(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.hold["study"] = asyncio.Event()
        first = asyncio.create_task(broker.reload(file(default={"max_workers": 2})))
        await broker.until(lambda: broker.cloud.count("study"))
        second = asyncio.create_task(broker.reload(file(default={"max_workers": 3})))
        await asyncio.sleep(1)
        broker.cloud.hold["study"].set()
        await asyncio.gather(first, second)
        assert broker.daemon.settings.pool["default"].max_workers == 3

    live(tmp_path, story)


# --- a pool that is changed --------------------------------------------------------------------------------


def test_a_shorter_idle_timeout_ends_an_idle_worker_by_the_new_one(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER client=a")
        (worker,) = broker.registry
        broker.registry.end_lease(worker.id, "a", "given back", broker.clock.monotonic())
        await asyncio.sleep(300)
        assert len(broker.cloud.running()) == 1
        await broker.reload(file(default={"idle_timeout": "2m"}))
        await asyncio.sleep(5)
        assert broker.cloud.running() == []

    live(tmp_path, story, chosen=settings(idle_timeout="15m", max_lifetime="8h"))


def test_a_lease_keeps_the_time_that_it_was_granted_for(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a")
        await broker.reload(file(default={"idle_timeout": "1m"}))
        for _ in range(5):
            await asyncio.sleep(600)
            assert await broker.ask(f"PING {address} client=a") == "OK"
        await asyncio.sleep(905)
        assert broker.cloud.running() == []

    live(tmp_path, story)


def test_a_raised_cap_helps_whoever_waits(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        first = await broker.ask("GET_WORKER client=a")
        ask = asyncio.create_task(broker.ask("GET_WORKER client=b"))
        await asyncio.sleep(10)
        assert not ask.done()
        await broker.reload(file(default={"sharing": "exclusive", "max_workers": 2}))
        assert await ask != first
        assert broker.cloud.count("launch") == 2

    live(tmp_path, story, chosen=settings(sharing="exclusive", max_workers=1))


def test_a_launch_in_the_middle_of_a_reload_is_not_lost_and_keeps_its_parameters(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.hold["launch"] = asyncio.Event()
        ask = asyncio.create_task(broker.ask("GET_WORKER client=a"))
        await broker.until(lambda: broker.cloud.count("launch"))
        old = broker.cloud.catalogue["default"]
        broker.cloud.catalogue["default"] = (Offering("moon", "small", Market.ON_DEMAND, cores=2),)
        await broker.reload(file(default={"max_lifetime": "2h"}))
        broker.cloud.hold.pop("launch").set()
        assert "ERROR" not in await ask
        (worker,) = broker.registry
        assert worker.offering.instance_type == old[0].instance_type
        assert broker.cloud.count("launch") == 1

    live(tmp_path, story)


def test_a_mended_image_is_tried_at_once(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.fail["launch"].append(PermanentRefusal("there is no such image"))
        assert "there is no such image" in await broker.ask("GET_WORKER client=a")
        assert "there is no such image" in await broker.ask("GET_WORKER client=a")
        assert broker.cloud.count("launch") == 1
        await broker.reload(file(default={"image": "ami-1"}))
        assert "ERROR" not in await broker.ask("GET_WORKER client=a")

    live(tmp_path, story)


def test_a_changed_pool_that_cannot_work_is_refused_and_its_workers_stay(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a")
        broker.cloud.study_problems["gpu"] = ["pool.gpu.instance_types: there is no p9"]
        await broker.reload(file(gpu={"instance_types": "p9"}))
        assert await broker.ask("GET_WORKER client=b") == address
        refusal = await broker.ask("GET_WORKER pool=gpu")
        assert "there is no p9" in refusal
        assert refusal.endswith("[CLOUD]")
        broker.cloud.study_problems.clear()
        await broker.reload(file(gpu={"instance_types": "p5"}))
        assert "ERROR" not in await broker.ask("GET_WORKER pool=gpu")

    live(tmp_path, story, chosen=settings({"gpu": {}}))


def test_settings_that_could_not_be_checked_are_checked_by_a_later_scan(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.study_later["gpu"] = CloudUnreachable("the region is away")
        broker.cloud.fail["open"].append(CloudUnreachable("the region is away"))
        await broker.reload(file(default={"idle_timeout": "3m"}, gpu={}))
        assert broker.daemon.settings.pool["default"].idle_timeout == 180.0
        refusal = await broker.ask("GET_WORKER pool=gpu")
        assert "could not be checked yet: the region is away" in refusal
        await asyncio.sleep(60)
        assert "ERROR" not in await broker.ask("GET_WORKER pool=gpu")

    live(tmp_path, story)


# --- a pool that is removed --------------------------------------------------------------------------------


def test_whoever_waits_in_a_removed_pool_hears_it_at_once_and_nobody_else_gets_in(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        ask = asyncio.create_task(broker.ask("GET_WORKER pool=gpu client=a"))
        await broker.until(lambda: broker.cloud.count("launch"))
        asked_at = broker.clock.monotonic()
        await broker.reload(file())
        words = "ERROR: there is no pool 'gpu' any more; there is default [BAD_REQUEST]"
        assert await ask == words
        assert broker.clock.monotonic() - asked_at < 1.0
        assert await broker.ask("GET_WORKER pool=gpu client=b") == words
        assert "there is no pool 'tpu'; there is default" in await broker.ask("GET_WORKER pool=tpu")
        await broker.until(lambda: not broker.cloud.running(), seconds_max=60)

    live(tmp_path, story, chosen=settings({"gpu": {}}), boots=False)


def test_an_unheld_worker_of_a_removed_pool_ends_at_once(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER pool=gpu client=a")
        await broker.ask("GET_WORKER pool=gpu client=b")
        (worker,) = broker.registry
        for client in ("a", "b"):
            broker.registry.end_lease(worker.id, client, "test", broker.clock.monotonic())
        await broker.reload(file())
        await broker.until(lambda: not broker.cloud.running(), seconds_max=5)
        assert await broker.ask(f"PING {address} client=a") == "ERROR: Worker not found"

    live(tmp_path, story, chosen=settings({"gpu": {}}))


def test_a_held_worker_of_a_removed_pool_stays_by_the_timeouts_that_its_pool_had(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER pool=gpu client=a")
        await broker.reload(file(default={"idle_timeout": "1m"}))
        for _ in range(6):
            await asyncio.sleep(3500)
            assert await broker.ask(f"PING {address} client=a") == "OK"
        await asyncio.sleep(3605)
        assert broker.cloud.running() == []

    live(tmp_path, story, chosen=settings({"gpu": {"idle_timeout": "1h", "max_lifetime": "8h"}}))


def test_who_watches_hears_that_a_worker_of_a_removed_pool_is_retired_not_taken_away(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        client = broker.client()
        await client.ask("WATCH client=a")
        address = await broker.ask("GET_WORKER pool=gpu client=a")
        await broker.reload(file())
        notice = await client.reply()
        assert notice is not None
        assert notice.startswith(f"NOTICE retire ip={address} ")
        assert "in=0" in notice

    live(tmp_path, story, chosen=settings({"gpu": {}}))


def test_a_held_worker_of_a_removed_pool_ends_with_its_last_lease(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER pool=gpu client=a")
        await broker.reload(file())
        (worker,) = broker.registry
        broker.registry.end_lease(worker.id, "a", "given back", broker.clock.monotonic())
        await broker.until(lambda: not broker.cloud.running(), seconds_max=5)
        assert await broker.ask(f"PING {address} client=a") == "ERROR: Worker not found"

    live(tmp_path, story, chosen=settings({"gpu": {}}))


def test_a_pool_that_comes_back_takes_its_held_worker_back(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER pool=gpu client=a")
        await broker.reload(file())
        assert [worker.state for worker in broker.registry] == [WorkerState.SUSPECT]
        await broker.reload(file(gpu={}))
        assert await broker.ask("GET_WORKER pool=gpu client=b") == address
        assert broker.cloud.count("launch") == 1
        assert not broker.daemon.context.leaving

    live(tmp_path, story, chosen=settings({"gpu": {}}))


def test_a_client_that_is_about_to_be_served_when_its_pool_goes_gets_no_address(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        first = await broker.ask("GET_WORKER pool=gpu client=a")
        await asyncio.sleep(5)  # the proof of its readiness is old
        hold, connect = asyncio.Event(), broker.cloud.connect

        async def slow(address: str, port: int) -> bool:
            await hold.wait()
            return await connect(address, port)

        broker.daemon.probe._connect = slow
        ask = asyncio.create_task(broker.ask("GET_WORKER pool=gpu client=b"))
        await asyncio.sleep(1)
        await broker.reload(file())
        hold.set()
        assert "there is no pool 'gpu' any more" in await ask
        assert await broker.ask(f"PING {first} client=a") == "OK"

    live(tmp_path, story, chosen=settings({"gpu": {}}))


def test_after_a_restart_machines_of_a_removed_pool_are_looked_after_until_they_are_idle(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with running_broker(settings({"gpu": {}}), tmp_path) as broker:
            address = await broker.ask("GET_WORKER pool=gpu client=a")
            await broker.reload(file())
        async with running_broker(file(), tmp_path, cloud=broker.cloud) as again:
            await asyncio.sleep(10)
            assert await again.ask(f"PING {address} client=a") == "OK"
            await asyncio.sleep(1000)
            assert again.cloud.running() == []

    run_virtual(main())


def test_after_a_restart_the_place_of_a_removed_pool_is_still_looked_at(tmp_path: Path) -> None:
    async def main() -> None:
        mars = elsewhere()
        mars.place = ("ec2", "mars", None)
        async with running_broker(file(gpu={"region": "mars"}), tmp_path, others={"mars": mars}) as broker:
            address = await broker.ask("GET_WORKER pool=gpu client=a")
            await broker.reload(file())
        places: dict[str, Any] = {"cloud": broker.cloud, "others": {"mars": mars}}
        async with running_broker(file(), tmp_path, **places) as again:
            await asyncio.sleep(60)
            assert await again.ask(f"PING {address} client=a") == "OK"
            assert len(mars.running()) == 1
            await asyncio.sleep(1000)
            assert mars.running() == []
            await again.until(lambda: again.daemon.context.clouds.idle() == [], seconds_max=120)
        looks = mars.count("listing")
        async with running_broker(file(), tmp_path, **places) as third:
            await third.ask("GET_WORKER client=a")
            assert mars.count("listing") == looks

    run_virtual(main())


def test_a_left_place_that_cannot_be_reached_does_not_keep_the_broker_from_serving(tmp_path: Path) -> None:
    async def main() -> None:
        mars = elsewhere()
        mars.place = ("ec2", "mars", None)
        async with running_broker(file(gpu={"region": "mars"}), tmp_path, others={"mars": mars}) as broker:
            await broker.ask("GET_WORKER pool=gpu client=a")
            await broker.reload(file())
        for api in ("open", "listing"):
            mars.fail[api].extend(SettingsError(["there is no AWS profile"]) for _ in range(1000))
        async with running_broker(file(), tmp_path, cloud=broker.cloud, others={"mars": mars}) as again:
            assert "ERROR" not in await again.ask("GET_WORKER client=a")
            await again.until(again.daemon.context.clouds.recovered, seconds_max=120)
            await asyncio.sleep(600)
            assert any("fake was last scanned" in one for one in again.daemon.health.problems())

    run_virtual(main())


# --- a pool that moves, and one that is added --------------------------------------------------------------


def test_a_pool_that_moves_keeps_held_workers_where_they_are_and_buys_at_the_new_place(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        mars = elsewhere()
        async with running_broker(file(), tmp_path, others={"mars": mars}) as broker:
            old = await broker.ask("GET_WORKER client=a")
            await broker.reload(file(default={"region": "mars"}))
            await broker.ask("GET_WORKER client=b")
            assert len(mars.running()) == len(broker.cloud.running()) == 1
            assert await broker.ask(f"PING {old} client=a") == "OK"
            assert await broker.ask(f"RELEASE {old} client=a") == "OK"
            await broker.until(lambda: not broker.cloud.running(), seconds_max=5)
            await broker.until(lambda: broker.cloud.count("close"), seconds_max=120)
            assert [cloud.provider for cloud in broker.daemon.context.clouds.all] == [mars]
            assert len(mars.running()) == 1

    run_virtual(main())


def test_a_provider_is_kept_while_it_has_machines(tmp_path: Path) -> None:
    async def main() -> None:
        mars = elsewhere()
        far = file(gpu={"region": "mars"})
        async with running_broker(far, tmp_path, others={"mars": mars}) as broker:
            address = await broker.ask("GET_WORKER pool=gpu client=a")
            await broker.reload(file())
            for _ in range(4):
                await asyncio.sleep(800)
                assert await broker.ask(f"PING {address} client=a") == "OK"
            assert mars.count("close") == 0
            await asyncio.sleep(905)
            assert mars.running() == []
            await broker.until(lambda: mars.count("close") == 1, seconds_max=120)

    run_virtual(main())


def test_a_provider_is_kept_while_a_launch_call_is_under_way(tmp_path: Path) -> None:
    async def main() -> None:
        mars = elsewhere()
        async with running_broker(file(gpu={"region": "mars"}), tmp_path, others={"mars": mars}) as broker:
            mars.hold["launch"] = asyncio.Event()
            ask = asyncio.create_task(broker.ask("GET_WORKER pool=gpu client=a"))
            await broker.until(lambda: mars.count("launch"))
            await broker.reload(file())
            assert "any more" in await ask
            await asyncio.sleep(300)
            assert mars.count("close") == 0
            mars.hold.pop("launch").set()
            await broker.until(lambda: len(mars.machines) == 1 and not mars.running(), seconds_max=30)
            await broker.until(lambda: mars.count("close"), seconds_max=120)

    run_virtual(main())


def test_a_pool_that_moves_back_takes_its_workers_back(tmp_path: Path) -> None:
    async def main() -> None:
        mars = elsewhere()
        async with running_broker(file(), tmp_path, others={"mars": mars}) as broker:
            address = await broker.ask("GET_WORKER client=a")
            await broker.reload(file(default={"region": "mars"}))
            await broker.reload(file())
            assert await broker.ask("GET_WORKER client=b") == address
            assert len(broker.cloud.machines) == 1

    run_virtual(main())


def test_a_request_for_an_added_pool_waits_for_the_first_scan_of_its_cloud(tmp_path: Path) -> None:
    async def main() -> None:
        mars = elsewhere()
        mars.hold["listing"] = asyncio.Event()
        async with running_broker(file(), tmp_path, others={"mars": mars}) as broker:
            await broker.ask("GET_WORKER client=a")
            await broker.reload(file(gpu={"region": "mars"}))
            ask = asyncio.create_task(broker.ask("GET_WORKER pool=gpu client=a"))
            await asyncio.sleep(5)
            assert mars.count("launch") == 0
            assert broker.daemon.health.problems() == []
            mars.hold.pop("listing").set()
            assert "ERROR" not in await ask
            assert len(mars.running()) == 1

    run_virtual(main())


def test_an_added_pool_that_cannot_be_opened_is_refused_and_everything_else_goes_on(tmp_path: Path) -> None:
    async def main() -> None:
        mars = elsewhere()
        mistake = SettingsError(["pool.gpu.image: there is no such image"], ["gpu"])
        mars.fail["open"].extend([mistake, mistake])  # by the reload, and by the scan after it
        async with running_broker(file(), tmp_path, others={"mars": mars}) as broker:
            await broker.ask("GET_WORKER client=a")
            await broker.reload(file(gpu={"region": "mars"}))
            refusal = await broker.ask("GET_WORKER pool=gpu client=a")
            assert "pool.gpu.image: there is no such image" in refusal
            assert "ERROR" not in await broker.ask("GET_WORKER client=b")
            await broker.reload(file())
            await broker.until(lambda: mars.count("close"), seconds_max=120)

    run_virtual(main())


def test_a_place_that_never_answers_is_given_up_when_its_pool_is_removed(tmp_path: Path) -> None:
    async def main() -> None:
        mars = elsewhere()
        mars.fail["open"].extend(CloudUnreachable("no such place") for _ in range(1000))
        async with running_broker(file(), tmp_path, others={"mars": mars}) as broker:
            await broker.reload(file(gpu={"region": "mars"}))
            await asyncio.sleep(60)
            await broker.reload(file())
            await broker.until(lambda: mars.count("close"), seconds_max=120)
            assert broker.daemon.context.clouds.recovered()

    run_virtual(main())


def test_a_pool_added_to_a_cloud_that_is_known_has_its_costs_counted(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER client=a")
        await broker.reload(file(gpu={"price_usd_per_hour": 3.6}))
        await broker.ask("GET_WORKER pool=gpu client=a")
        await asyncio.sleep(600)
        assert broker.daemon.ledger.cost_usd_micros("gpu") > 0

    live(tmp_path, story)


# --- what is remembered ------------------------------------------------------------------------------------


def test_the_cores_of_machine_types_are_known_after_a_start_without_the_api(tmp_path: Path) -> None:
    async def main() -> None:
        async with running_broker(file(), tmp_path) as broker:
            broker.cloud.cores["c7i.16xlarge"] = 64
            await broker.reload(file(default={"max_workers": 2}))
        away = elsewhere()
        away.fail["open"].extend(CloudUnreachable("away") for _ in range(100))
        async with running_broker(file(), tmp_path, cloud=away):
            await asyncio.sleep(1)
            assert away.cores == {"c7i.16xlarge": 64}

    run_virtual(main())


def test_who_waits_over_a_reload_gets_a_lease_of_the_time_that_counts_then(tmp_path: Path) -> None:
    """Simulated history, seed 5121: it was shorter than what its client could rely on by then."""

    async def story(broker: RunningBroker) -> None:
        client = broker.client()
        client.send(b"ACQUIRE client=a\n")
        await broker.until(lambda: broker.cloud.machines)
        await broker.reload(file(default={"idle_timeout": "1h"}))
        broker.cloud.boot(next(iter(broker.cloud.machines)))
        await broker.until(lambda: broker.registry.lease_count("default"))
        (worker,) = broker.registry
        assert [lease.ttl_seconds for lease in broker.registry.leases(worker.id)] == [3600.0]

    live(tmp_path, story, boots=False)
