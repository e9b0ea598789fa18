"""The cloud against the books: what a listing proves, and what it does not."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from broker.clock import moment
from broker.core import tags
from broker.core.errors import CloudUnreachable, CredentialsRefused, Throttled
from broker.core.model import InstanceState, Lease, WorkerState
from broker.core.stock import SETTLED_SECONDS
from broker.testing import RunningBroker, lost_answer, run_virtual, running_broker
from tests.support.brokers import live, settings


async def scanned(broker: RunningBroker, times: int = 1) -> None:
    """Wait until so many more complete scans are over."""
    before = broker.cloud.count("listing")
    await broker.until(lambda: broker.cloud.count("listing") >= before + times)
    await asyncio.sleep(0.1)


def test_an_order_whose_answer_was_lost_is_not_given_up_on_one_listing_that_misses_its_machine(
    tmp_path: Path,
) -> None:
    """Simulated history 1888: long after the launch the first complete listing was short of the machine."""

    async def story(broker: RunningBroker) -> None:
        broker.cloud.lose = True
        broker.cloud.fail["launch"].extend(lost_answer() for _ in range(5))
        assert "[CLOUD]" in await broker.ask("GET_WORKER")
        (machine,) = broker.cloud.machines.values()
        machine.hidden = True
        broker.cloud.fail["listing"].extend(CloudUnreachable() for _ in range(1000))
        await asyncio.sleep(600)
        broker.cloud.fail["listing"].clear()
        await scanned(broker)
        assert broker.registry.count("default", WorkerState.ORDERED) == 1, "one look is no proof"
        machine.hidden = False
        await scanned(broker)
        worker = broker.registry.by_instance(machine.instance.id)
        assert worker is not None
        assert worker.order_id == machine.order_id

    live(tmp_path, story)


def test_one_listing_that_misses_a_busy_worker_changes_nothing(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a")
        await asyncio.sleep(200)
        machine = next(iter(broker.cloud.machines.values()))
        machine.hidden = True
        await scanned(broker)
        machine.hidden = False
        assert await broker.ask(f"PING {address} client=a") == "OK"
        assert broker.cloud.count("terminate") == 0

    live(tmp_path, story)


def test_a_worker_that_listings_miss_for_ever_but_that_answers_is_kept(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a")
        next(iter(broker.cloud.machines.values())).hidden = True
        for _ in range(10):
            await asyncio.sleep(300)
            assert await broker.ask(f"PING {address} client=a") == "OK"

    live(tmp_path, story)


def test_a_worker_that_is_neither_listed_nor_answers_is_given_up(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a")
        await asyncio.sleep(200)
        machine = next(iter(broker.cloud.machines.values()))
        machine.hidden, machine.answers = True, False
        await asyncio.sleep(120)
        assert await broker.ask(f"PING {address} client=a") == "OK", "not on the first looks"
        await asyncio.sleep(200)
        assert len(broker.registry) == 0

    live(tmp_path, story)


def test_a_machine_that_is_not_listed_right_after_its_launch_is_neither_forgotten_nor_doubled(
    tmp_path: Path,
) -> None:
    async def story(broker: RunningBroker) -> None:
        asks = [asyncio.create_task(broker.ask(f"GET_WORKER client=c{i}")) for i in range(3)]
        await broker.until(lambda: broker.cloud.machines)
        machine = next(iter(broker.cloud.machines.values()))
        machine.hidden = True
        await asyncio.sleep(90)
        machine.hidden = False
        broker.cloud.boot(machine.instance.id)
        assert len(set(await asyncio.gather(*asks))) == 1
        assert broker.cloud.count("launch") == 1

    live(tmp_path, story, boots=False)


def test_a_failed_scan_proves_nothing(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a")
        broker.cloud.fail["listing"].extend(lost_answer() for _ in range(500))
        for _ in range(6):
            await asyncio.sleep(300)
            assert await broker.ask(f"PING {address} client=a") == "OK"
        assert len(broker.cloud.running()) == 1

    live(tmp_path, story)


def test_rejected_credentials_stop_launches_at_once_and_end_nobody(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a")
        broker.cloud.fail["listing"].extend(CredentialsRefused() for _ in range(500))
        await scanned(broker)
        reply = await broker.ask("GET_WORKER client=b exclusive=yes")
        assert reply.startswith("ERROR: fake cannot be used at the moment: the cloud does not accept")
        assert await broker.ask(f"PING {address} client=a") == "OK"
        assert broker.daemon.health.problems() == []
        await asyncio.sleep(200)
        assert "fake was last scanned" in broker.daemon.health.problems()[0]

    live(tmp_path, story)


def test_a_single_throttled_scan_does_not_stop_launches(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER client=a")
        broker.cloud.fail["listing"].append(Throttled())
        await scanned(broker)
        assert "ERROR" not in await broker.ask("GET_WORKER client=b exclusive=yes")

    live(tmp_path, story)


def test_a_machine_terminated_behind_the_brokers_back_leaves_the_books(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a")
        broker.cloud.set_state(broker.cloud.running()[0], InstanceState.TERMINATED, "User initiated")
        await asyncio.sleep(2)
        assert await broker.ask("GET_WORKER client=b") != address
        await scanned(broker)
        assert await broker.ask(f"PING {address} client=a") == "ERROR: Worker not found"

    live(tmp_path, story)


@pytest.mark.parametrize("state", [InstanceState.STOPPING, InstanceState.STOPPED])
@pytest.mark.parametrize("held", [True, False])
def test_a_stopped_machine_is_drained(tmp_path: Path, state: InstanceState, held: bool) -> None:
    """At once, or when listings have shown it so for two minutes: one may be from before it was started."""

    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER client=a")
        (worker,) = list(broker.registry)
        if not held:
            broker.registry.end_lease(worker.id, "a", "done", broker.clock.monotonic())
        broker.cloud.set_state(broker.cloud.running()[0], state)
        await scanned(broker)
        await asyncio.sleep(5)
        assert broker.cloud.count("terminate") == (0 if held else 1)
        await broker.until(lambda: broker.cloud.count("terminate") == 1, seconds_max=SETTLED_SECONDS + 60)

    live(tmp_path, story)


def test_a_machine_with_our_tag_that_nobody_knows_is_taken_in_and_ends_when_idle(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await scanned(broker)
        broker.cloud.add()
        await scanned(broker)
        assert broker.registry.count("default", WorkerState.READY) == 1
        await asyncio.sleep(920)
        assert broker.cloud.running() == []

    live(tmp_path, story)


def test_a_pending_machine_without_an_address_is_taken_in_too(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await scanned(broker)
        orphan = broker.cloud.add(state=InstanceState.PENDING, address=None)
        await scanned(broker)
        assert broker.registry.count("default", WorkerState.BOOTING) == 1
        broker.cloud.boot(orphan)
        await broker.until(lambda: broker.registry.count("default", WorkerState.READY))

    live(tmp_path, story)


def test_a_machine_of_a_pool_that_is_not_configured_any_more_ends_when_idle(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await scanned(broker)
        broker.cloud.add(pool="forgotten")
        await scanned(broker)
        await asyncio.sleep(920)
        assert broker.cloud.running() == []

    live(tmp_path, story)


def test_a_machine_of_another_broker_is_never_touched(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        foreign = broker.cloud.add()
        machine = broker.cloud.machines[foreign]
        other = {**machine.instance.tags, tags.BROKER: "another-lab"}
        broker.cloud.machines[foreign].instance = replace(machine.instance, tags=other)
        await scanned(broker, 2)
        assert json.loads(await broker.ask("TERMINATE_ALL")) == {"terminated": []}
        await asyncio.sleep(4000)
        assert broker.cloud.running() == [foreign]

    live(tmp_path, story)


def test_an_untagged_machine_is_claimed_by_its_name_only_when_asked_for(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        machine = broker.cloud.add(tags={tags.NAME: "dserv-worker"})
        await scanned(broker, 3)
        wanted = broker.daemon.settings.pool["default"].adopt_name_tag
        assert broker.registry.count("default", WorkerState.READY) == int(wanted)
        assert (tags.BROKER in broker.cloud.machines[machine].instance.tags) is wanted

    for adopt in (False, True):
        live(tmp_path / str(adopt), story, chosen=settings(adopt_name_tag=adopt))


def test_one_order_with_two_machines_keeps_one(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a")
        order = next(iter(broker.cloud.machines.values())).instance.tags[tags.ORDER]
        twin = broker.cloud.add()
        machine = broker.cloud.machines[twin]
        machine.instance = replace(machine.instance, tags={**machine.instance.tags, tags.ORDER: order})
        await scanned(broker, 2)
        await broker.until(lambda: twin not in broker.cloud.running())
        assert await broker.ask("GET_WORKER client=a") == address

    live(tmp_path, story)


def test_terminate_answered_is_not_terminated(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.ends_at_once = False
        address = await broker.ask("GET_WORKER")
        await broker.ask(f"RELEASE {address}")
        await asyncio.sleep(600)
        assert broker.registry.count("default", WorkerState.TERMINATING) == 1
        broker.cloud.set_state(next(iter(broker.cloud.machines)), InstanceState.TERMINATED)
        await broker.until(lambda: len(broker.registry) == 0)

    live(tmp_path, story)


def test_an_idle_broker_asks_the_cloud_twice_a_minute_however_long(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        before = len(broker.cloud.calls)
        await asyncio.sleep(3600)
        assert len(broker.cloud.calls) - before == pytest.approx(120, abs=2)

    live(tmp_path, story)


def test_a_machine_launched_just_before_a_restart_and_not_yet_listed_is_not_launched_twice(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with running_broker(settings(sharing="exclusive"), tmp_path) as broker:
            address = await broker.ask("GET_WORKER client=a")
            machine = next(iter(broker.cloud.machines.values()))
        machine.hidden = True
        async with running_broker(settings(sharing="exclusive"), tmp_path, cloud=broker.cloud) as again:
            ask = asyncio.create_task(again.ask("GET_WORKER client=a"))
            await asyncio.sleep(60)
            machine.hidden = False
            assert await ask == address
            assert len(again.cloud.machines) == 1
            assert await again.ask("GET_WORKER client=b") != address

    run_virtual(main())


def test_the_lease_of_a_machine_that_is_listed_late_is_kept(tmp_path: Path) -> None:
    async def main() -> None:
        async with running_broker(settings(sharing="exclusive"), tmp_path) as broker:
            await asyncio.sleep(700)
            address = await broker.ask("GET_WORKER client=a")
            await asyncio.sleep(700)
            await broker.ask(f"PING {address} client=a")
            machine = next(iter(broker.cloud.machines.values()))
        machine.hidden = True
        async with running_broker(settings(sharing="exclusive"), tmp_path, cloud=broker.cloud) as again:
            await asyncio.sleep(60)
            machine.hidden = False
            await asyncio.sleep(60)
            assert await again.ask(f"PING {address} client=a") == "OK"
            assert await again.ask("GET_WORKER client=b") != address

    run_virtual(main())


def test_a_machine_that_ended_while_the_broker_was_down_is_not_waited_for(tmp_path: Path) -> None:
    async def main() -> None:
        async with running_broker(settings(), tmp_path) as broker:
            address = await broker.ask("GET_WORKER client=a")
            instance = broker.cloud.running()[0]
        broker.cloud.set_state(instance, InstanceState.TERMINATED)
        async with running_broker(settings(), tmp_path, cloud=broker.cloud) as again:
            assert await again.ask("GET_WORKER client=a") != address
            await asyncio.sleep(1300)
            assert again.daemon.context.store.leases() == []
            assert again.daemon.context.store.launched_orders(moment(again.clock)) == []

    run_virtual(main())


def test_after_a_restart_the_ping_of_a_holder_is_answered_even_if_the_first_listing_misses_its_worker(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with running_broker(settings(sharing="exclusive"), tmp_path) as broker:
            address = await broker.ask("GET_WORKER client=a")
            for _ in range(10):
                await asyncio.sleep(120)
                await broker.ask(f"PING {address} client=a")
            machine = next(iter(broker.cloud.machines.values()))
        machine.hidden = True
        async with running_broker(settings(sharing="exclusive"), tmp_path, cloud=broker.cloud) as again:
            assert await again.ask(f"PING {address} client=a") == "OK"
            assert await again.ask("GET_WORKER client=b") != address
            machine.hidden = False
            await asyncio.sleep(60)
            assert await again.ask("GET_WORKER client=a") == address

    run_virtual(main())


def test_an_old_warm_machine_that_the_first_listing_after_a_restart_misses_is_not_launched_again(
    tmp_path: Path,
) -> None:
    """Seed 80028: a machine that nobody holds, an hour without a broker, a short listing."""

    async def main() -> None:
        async with running_broker(settings(warm=1), tmp_path) as broker:
            await asyncio.sleep(1200)
            (machine,) = broker.cloud.machines.values()
        await asyncio.sleep(3600)
        machine.hidden = True
        async with running_broker(settings(warm=1), tmp_path, cloud=broker.cloud) as again:
            await asyncio.sleep(60)
            machine.hidden = False
            await asyncio.sleep(60)
            assert again.cloud.count("launch") == 1
            assert await again.ask("GET_WORKER client=a") == machine.instance.address

    run_virtual(main())


def test_a_held_machine_that_is_not_listed_claims_no_address_that_a_listed_one_has_by_now(
    tmp_path: Path,
) -> None:
    """Simulated histories, seeds 3155 and 2301: its client is gone, and so is it; another has its address."""

    async def main() -> None:
        alone = settings(sharing="exclusive")
        async with running_broker(alone, tmp_path) as broker:
            address = await broker.ask("GET_WORKER client=a")
            (gone,) = broker.cloud.machines.values()
        gone.hidden = True
        new = broker.cloud.add(address=address)
        async with running_broker(alone, tmp_path, cloud=broker.cloud) as again:
            await again.until(lambda: again.registry.count("default", WorkerState.READY))
            found = again.registry.by_address(address)
            assert found is not None
            assert found.instance_id == new
            await again.until(lambda: again.registry.by_instance(gone.instance.id) is None)
            assert await again.ask(f"PING {address} client=b") == "OK"

    run_virtual(main())


# --- machines that the store knows nothing of ----


def test_a_damaged_store_gives_no_exclusive_worker_to_a_second_client(tmp_path: Path) -> None:
    """Simulated history, seed 32."""

    async def main() -> None:
        chosen = settings(sharing="exclusive", max_workers=1)
        async with running_broker(chosen, tmp_path / "one") as broker:
            address = await broker.ask("GET_WORKER client=holder")
        async with running_broker(chosen, tmp_path / "lost", cloud=broker.cloud) as again:
            assert "[TIMEOUT]" in await again.ask("GET_WORKER client=other wait=60")
            assert await again.ask(f"RELEASE {address} client=other") == "OK"
            assert again.cloud.count("terminate") == 0, "it may be in use"
            assert await again.ask(f"PING {address} client=holder") == "OK"
            assert "[DENIED]" in await again.ask(f"PING {address} client=other"), (
                "now it is known whose it is"
            )
            assert await again.ask("GET_WORKER client=holder") == address


def test_a_machine_whose_end_was_decided_before_a_restart_is_not_brought_back_by_a_listing_that_misses_it(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with running_broker(settings(sharing="exclusive"), tmp_path) as broker:
            address = await broker.ask("GET_WORKER client=a")
            (instance,) = broker.cloud.running()
            broker.cloud.fail["terminate"].append(Throttled())
            await broker.ask(f"RELEASE {address} client=a")
            await broker.until(lambda: broker.cloud.count("terminate"))
        broker.cloud.machines[instance].hidden = True
        _write_lease(tmp_path, Lease("late", instance, "a", 900.0, True), address)
        async with running_broker(settings(sharing="exclusive"), tmp_path, cloud=broker.cloud) as again:
            assert await again.ask(f"PING {address} client=a") == "ERROR: Worker not found"
            await again.until(lambda: instance not in again.cloud.running(), seconds_max=10)
            assert await again.ask("GET_WORKER client=b") != address
            again.cloud.machines[instance].hidden = False
            await scanned(again, 2)
            assert [worker.instance_id for worker in again.registry] == again.cloud.running()
            assert [held.lease.client for held in again.daemon.context.store.leases()] == ["b"]

    run_virtual(main())


def test_a_lease_that_outlived_the_end_of_its_machine_does_not_bring_it_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with running_broker(settings(), tmp_path) as broker:
            address = await broker.ask("GET_WORKER client=a")
            (instance,) = broker.cloud.running()
            broker.cloud.fail["terminate"].append(Throttled())
            await broker.ask(f"RELEASE {address} client=a")
            await broker.until(lambda: broker.cloud.count("terminate"))
        broker.cloud.ends_at_once = False
        _write_lease(tmp_path, Lease("late", instance, "a", 900.0, False), address)
        async with running_broker(settings(), tmp_path, cloud=broker.cloud) as again:
            await again.until(lambda: instance not in again.cloud.running(), seconds_max=10)
            again.cloud.machines[instance].hidden = True
            await scanned(again, 3)
            assert again.daemon.runners["reconcile"].failures_total == 0
            assert await again.ask(f"PING {address} client=a") == "ERROR: Worker not found"
            assert again.daemon.context.store.leases() == []

    run_virtual(main())


def test_a_machine_that_the_first_listing_shows_terminated_is_not_brought_back_by_one_that_misses_it(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with running_broker(settings(), tmp_path) as broker:
            address = await broker.ask("GET_WORKER client=a")
            (instance,) = broker.cloud.running()
        broker.cloud.set_state(instance, InstanceState.TERMINATED)
        async with running_broker(settings(), tmp_path, cloud=broker.cloud) as again:
            await scanned(again)
            again.cloud.machines[instance].hidden = True
            await scanned(again, 2)
            assert await again.ask(f"PING {address} client=a") == "ERROR: Worker not found"
            assert again.daemon.context.store.leases() == []

    run_virtual(main())


def test_a_lease_is_kept_although_the_launch_of_its_machine_could_not_be_written(tmp_path: Path) -> None:
    async def main() -> None:
        async with running_broker(settings(sharing="exclusive"), tmp_path) as broker:
            address = await broker.ask("GET_WORKER client=a")
        with closing(sqlite3.connect(tmp_path / "broker.db")) as file, file:
            file.execute("UPDATE orders SET state = 'open'")
            file.execute("DELETE FROM machines")
        async with running_broker(settings(sharing="exclusive"), tmp_path, cloud=broker.cloud) as again:
            assert await again.ask(f"PING {address} client=b") == (
                "ERROR: the worker is held by another client [DENIED]"
            )
            assert await again.ask("GET_WORKER client=b") != address
            assert await again.ask(f"PING {address} client=a") == "OK"

    run_virtual(main())


def test_a_damaged_store_lets_no_release_end_a_shared_worker_under_clients_it_forgot(tmp_path: Path) -> None:
    """Simulated history, seed 65."""

    async def main() -> None:
        async with running_broker(settings(), tmp_path / "one") as broker:
            address = await broker.ask("GET_WORKER client=forgotten")
        async with running_broker(settings(), tmp_path / "lost", cloud=broker.cloud) as again:
            assert await again.ask("GET_WORKER client=other") == address, "it is shared all the same"
            assert await again.ask(f"RELEASE {address} client=other") == "OK"
            await asyncio.sleep(60)
            assert await again.ask(f"PING {address} client=forgotten") == "OK"
            await again.ask(f"RELEASE {address} client=forgotten")
            await asyncio.sleep(901)  # whoever else may have held it has had the time to PING
            assert again.cloud.count("terminate") == 1

    run_virtual(main())


def _write_lease(directory: Path, lease: Lease, address: str) -> None:
    """What a broker leaves that is killed after it has written a machine's end, and before its lease's."""
    with closing(sqlite3.connect(directory / "broker.db")) as file, file:
        file.execute(
            "INSERT INTO leases VALUES (?, ?, 'default', ?, ?, ?, ?, 0)",
            (lease.id, lease.worker_id, address, lease.client, lease.ttl_seconds, lease.exclusive),
        )


def test_a_cloud_that_does_not_answer_is_asked_less_and_less_often(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await scanned(broker)
        broker.cloud.fail["listing"].extend([lost_answer() for _ in range(6)])
        asked_at = []
        for _ in range(8):
            await scanned(broker)
            asked_at.append(broker.clock.monotonic())
        pauses = [round(later - before) for before, later in pairwise(asked_at)]
        assert pauses == [5, 10, 20, 30, 30, 30, 30]

    live(tmp_path, story)


def test_a_machine_is_not_born_in_the_future_when_somebody_sets_the_wall_clock_back(tmp_path: Path) -> None:
    """Simulated history, seed 1972: no listing that missed it counted for a day."""

    async def main() -> None:
        async with running_broker(settings(), tmp_path) as broker:
            await broker.until(broker.daemon.context.clouds.recovered)
            await broker.ask("GET_WORKER client=a wait=0")
            await asyncio.sleep(60)
        async with running_broker(settings(), tmp_path, cloud=broker.cloud) as again:
            again.clock.jump(-86_400)
            await again.until(again.daemon.context.clouds.recovered)
            (worker,) = again.registry
            assert worker.born_at <= again.clock.monotonic()
            (machine,) = broker.cloud.machines.values()
            machine.hidden, machine.answers = True, False
            await again.until(lambda: len(again.registry) == 0, 1200)

    run_virtual(main())


def test_a_new_machine_stays_in_the_books_when_somebody_sets_the_wall_clock_ahead(tmp_path: Path) -> None:
    """Simulated history, seed 2383: it seemed to be of yesterday, and the first listing did not show it."""

    async def main() -> None:
        async with running_broker(settings(), tmp_path) as broker:
            await broker.until(broker.daemon.context.clouds.recovered)
            await broker.ask("GET_WORKER client=a wait=0")
            await asyncio.sleep(10)
        (machine,) = broker.cloud.machines.values()
        machine.hidden = True
        async with running_broker(settings(), tmp_path, cloud=broker.cloud) as again:
            again.clock.jump(86_400)
            await again.until(again.daemon.context.clouds.recovered)
            assert [worker.instance_id for worker in again.registry] == [machine.instance.id]

    run_virtual(main())
