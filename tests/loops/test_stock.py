"""Workers that are kept stopped, as their operator and their clients meet them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker.core.errors import CloudError, OfferingRefused, PermanentRefusal, Throttled
from broker.core.model import InstanceState, Market, Offering, WorkerState
from broker.core.settings import Settings
from broker.core.stock import SETTLED_SECONDS, STOPPING_SECONDS_MAX, UNUSED_SECONDS
from broker.testing import FakeCloud, LoopClock, RunningBroker, lost_answer, run_virtual, running_broker
from tests.support.brokers import live, settings

HOUR = 3600.0
BIG = Offering("moon", "big", Market.ON_DEMAND, cores=64, price_usd_micros_per_hour=1_000_000)
SMALL = Offering("moon", "small", Market.ON_DEMAND, cores=2, price_usd_micros_per_hour=100_000)


def stock(number: int = 1, **pool: Any) -> Settings:
    wanted: dict[str, Any] = {
        "provider": "ec2",
        "market": "on-demand",
        "image": "ami-1",
        "instance_types": ["big"],
        "sharing": "exclusive",
        "warm_stopped": number,
    }
    return settings(**(wanted | pool))


ONE_MACHINE = stock(max_workers=1)  # no other is launched beside it


def sky(first: int = 1) -> FakeCloud:
    cloud = FakeCloud("lab", clock=LoopClock(asyncio.get_running_loop()), first=first)
    cloud.catalogue = {"default": (BIG,)}
    return cloud


def play(directory: Path, story: Any, chosen: Settings | None = None) -> None:
    async def main() -> None:
        async with running_broker(chosen or stock(), directory, cloud=sky()) as broker:
            await story(broker)

    run_virtual(main())


def count(broker: RunningBroker, *states: WorkerState) -> int:
    return broker.registry.count("default", *states)


async def until_stopped(broker: RunningBroker, number: int = 1) -> None:
    await broker.until(lambda: count(broker, WorkerState.STOPPED) == number)


async def until_startable(broker: RunningBroker, number: int = 1) -> None:
    await until_stopped(broker, number)
    await asyncio.sleep(SETTLED_SECONDS + 1.0)


def stopped_machines(broker: RunningBroker) -> list[str]:
    machines = broker.cloud.machines.items()
    return [id_ for id_, machine in machines if machine.instance.state is InstanceState.STOPPED]


# --- into the stock --------------------------------------------------------------------------------------


def test_a_machine_is_launched_shows_that_it_is_ready_and_is_stopped(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.until(lambda: count(broker, WorkerState.READY) == 1, seconds_max=10.0)
        await broker.until(lambda: count(broker, WorkerState.STOPPED) == 1, seconds_max=UNUSED_SECONDS + 60.0)
        await asyncio.sleep(5 * 24 * HOUR)
        assert broker.cloud.running() == []
        assert (broker.cloud.count("launch"), broker.cloud.count("stop")) == (1, 1)
        assert broker.cloud.count("terminate") == 0

    play(tmp_path, story)


def test_it_is_replaced_when_it_has_been_stopped_for_a_week(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await until_stopped(broker)
        await asyncio.sleep(7 * 24 * HOUR + 600.0)
        assert broker.cloud.count("launch") == 2
        assert len(stopped_machines(broker)) == 1

    play(tmp_path, story)


def test_an_idle_worker_is_stopped_while_there_is_a_place_and_terminated_otherwise(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        for client in "ab":
            await broker.ask(f"GET_WORKER client={client} wait=60")
        await until_stopped(broker)  # the one that was launched for the stock
        await broker.until(lambda: not broker.cloud.running(), seconds_max=2 * HOUR)
        assert len(stopped_machines(broker)) == 1
        assert broker.cloud.count("stop") == 1

    play(tmp_path, story, stock(idle_timeout="5m"))


def test_a_worker_that_somebody_holds_or_waits_for_is_never_stopped(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        ip = await broker.ask("GET_WORKER client=a wait=60")
        for _ in range(60):
            await asyncio.sleep(240.0)
            assert await broker.ask(f"PING {ip} client=a") == "OK"
        (worker,) = [one for one in broker.registry if one.address == ip]
        assert worker.state is WorkerState.READY

    play(tmp_path, story, stock(max_workers=2))


def test_the_stock_counts_against_no_cap_and_its_launch_does(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER client=a wait=60")
        await asyncio.sleep(HOUR)
        assert broker.cloud.count("launch") == 1, "there is no room to launch one that is to be stopped"
        ip = next(one.address for one in broker.registry)
        await broker.ask(f"RELEASE {ip} client=a")
        await until_startable(broker)
        assert len(broker.cloud.running()) == 0
        reply = await broker.ask("GET_WORKER client=b wait=60")
        assert not reply.startswith("ERROR"), "max_workers = 1 has room for it: only that one runs"

    play(tmp_path, story, stock(max_workers=1))


# --- out of the stock ------------------------------------------------------------------------------------


def test_whoever_waits_gets_a_stopped_worker_started_at_its_new_address(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await until_startable(broker)
        (machine_id,) = stopped_machines(broker)
        (before,) = list(broker.registry)
        assert before.address is None
        reply = await broker.ask("GET_WORKER client=a wait=60")
        machine = broker.cloud.machines[machine_id].instance
        assert reply == machine.address
        assert machine.state is InstanceState.RUNNING
        (row,) = json.loads(await broker.ask("STATUS"))[:1]
        assert (row["instance_id"], row["state"], row["leases"]) == (machine_id, "ready", 1)

    play(tmp_path, story, ONE_MACHINE)


def test_the_stock_is_filled_again_once_one_was_taken(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await until_startable(broker)
        await broker.ask("GET_WORKER client=a wait=60")
        await until_stopped(broker)
        assert (broker.cloud.count("launch"), len(broker.cloud.running())) == (2, 1)

    play(tmp_path, story)


def test_one_that_was_stopped_a_moment_ago_is_left_alone(tmp_path: Path) -> None:
    """A listing may still show it at the address that it had."""

    async def story(broker: RunningBroker) -> None:
        await until_stopped(broker)
        await broker.ask("GET_WORKER client=a wait=60")
        assert (broker.cloud.count("launch"), broker.cloud.count("start")) == (2, 0)

    play(tmp_path, story)


def test_three_who_wait_get_two_started_and_one_launched(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await until_startable(broker, 2)
        replies = await asyncio.gather(*(broker.ask(f"GET_WORKER client={one} wait=60") for one in "abc"))
        assert len(set(replies)) == 3
        assert broker.cloud.count("start") == 2

    play(tmp_path, story, stock(2))


def test_a_wish_that_no_stopped_worker_fits_is_bought(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.catalogue = {"default": (BIG, SMALL)}
        await until_startable(broker)
        await broker.ask("GET_WORKER client=a wait=60 type=small")
        assert broker.cloud.count("start") == 0
        await broker.ask("GET_WORKER client=b wait=60 type=big")
        assert broker.cloud.count("start") == 1

    play(tmp_path, story, stock(instance_types=["big", "small"]))


def test_starts_count_as_launches_an_hour(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await until_startable(broker)
        await broker.ask("GET_WORKER client=a wait=60")
        assert "launches_per_hour = 2" in await broker.ask("GET_WORKER client=b wait=0")

    play(tmp_path, story, stock(launches_per_hour=2))


@pytest.mark.parametrize(
    "error", [OfferingRefused("no capacity"), PermanentRefusal("not allowed"), CloudError("what?")]
)
def test_a_start_that_is_refused_leaves_it_stopped_and_another_is_launched(
    tmp_path: Path, error: CloudError
) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.catalogue = {"default": (BIG, SMALL)}
        await until_startable(broker)
        broker.cloud.fail["start"].append(error)
        reply = await broker.ask("GET_WORKER client=a wait=60")
        assert not reply.startswith("ERROR")
        assert count(broker, WorkerState.STOPPED) == 1
        assert broker.cloud.count("start") == 1
        assert broker.cloud.count("launch") == 2

    play(tmp_path, story, stock(instance_types=["big", "small"]))


@pytest.mark.parametrize("error", [lost_answer(), Throttled("slowly")])
def test_a_start_without_an_answer_is_sent_again(tmp_path: Path, error: CloudError) -> None:
    async def story(broker: RunningBroker) -> None:
        await until_startable(broker)
        broker.cloud.fail["start"].append(error)
        (machine_id,) = stopped_machines(broker)
        reply = await broker.ask("GET_WORKER client=a wait=60")
        assert reply == broker.cloud.machines[machine_id].instance.address
        assert broker.cloud.count("start") == 2

    play(tmp_path, story, ONE_MACHINE)


def test_a_worker_whose_start_comes_to_nothing_is_replaced(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await until_startable(broker)
        broker.cloud.hold["start"] = asyncio.Event()  # it never arrives
        await broker.ask("GET_WORKER client=a wait=10")
        assert count(broker, WorkerState.BOOTING) == 1
        await broker.until(lambda: broker.cloud.count("terminate") == 1, seconds_max=600.0 + 60.0)

    play(tmp_path, story)


# --- what must not happen --------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [lost_answer(), PermanentRefusal("not allowed")])
def test_a_worker_whose_stop_failed_is_terminated_and_no_other_is_launched_to_be_stopped(
    tmp_path: Path, error: CloudError
) -> None:
    """The Stop may arrive late: it would stop a machine that is somebody's by then."""

    async def story(broker: RunningBroker) -> None:
        broker.cloud.fail["stop"].extend([error] * 10)
        await broker.until(lambda: broker.cloud.count("terminate") == 1)
        await asyncio.sleep(900.0)
        assert broker.cloud.running() == []
        assert broker.cloud.count("launch") == 1
        await asyncio.sleep(24 * HOUR)
        assert broker.cloud.count("launch") < 12, "it is tried again, ever more rarely"

    play(tmp_path, story)


def test_a_stop_that_was_throttled_is_sent_again(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.fail["stop"].append(Throttled("slowly"))
        await until_stopped(broker)
        assert (broker.cloud.count("stop"), broker.cloud.count("terminate")) == (2, 0)

    play(tmp_path, story)


def test_a_machine_that_does_not_stop_is_terminated(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.stops_at_once = False
        await broker.until(lambda: broker.cloud.count("stop") == 1)
        await asyncio.sleep(STOPPING_SECONDS_MAX - 60.0)
        assert broker.cloud.count("terminate") == 0
        await broker.until(lambda: broker.cloud.count("terminate") == 1, seconds_max=180.0)

    play(tmp_path, story)


def test_a_broker_that_died_between_a_stop_and_its_answer_terminates_the_machine(tmp_path: Path) -> None:
    async def main() -> None:
        cloud = sky()
        async with running_broker(stock(), tmp_path, cloud=cloud) as broker:
            cloud.hold["stop"] = asyncio.Event()
            await broker.until(lambda: cloud.count("stop") == 1)
            (machine_id,) = cloud.running()
        del cloud.hold["stop"]
        async with running_broker(stock(), tmp_path, cloud=cloud) as broker:
            await broker.until(lambda: cloud.count("terminate") == 1)
            assert machine_id not in cloud.running()

    run_virtual(main())


def test_a_restart_finds_what_is_stopped_and_starts_it_for_who_waits(tmp_path: Path) -> None:
    async def main() -> None:
        cloud = sky()
        async with running_broker(stock(), tmp_path, cloud=cloud) as broker:
            await until_stopped(broker)
        async with running_broker(stock(), tmp_path, cloud=cloud) as broker:
            await until_startable(broker)
            reply = await broker.ask("GET_WORKER client=a wait=60")
            assert not reply.startswith("ERROR")
            assert (cloud.count("start"), cloud.count("terminate")) == (1, 0)

    run_virtual(main())


def test_a_listing_from_before_a_start_takes_no_worker_from_who_holds_it(tmp_path: Path) -> None:
    async def main() -> None:
        cloud = sky()
        async with running_broker(stock(), tmp_path, cloud=cloud) as broker:
            await until_startable(broker)
            (machine_id,) = stopped_machines(broker)
            ip = await broker.ask("GET_WORKER client=a wait=60")
            running = cloud.machines[machine_id].instance
            cloud.machines[machine_id].instance = replace(running, state=InstanceState.STOPPED, address=None)
            await asyncio.sleep(40.0)  # a scan
            assert await broker.ask(f"PING {ip} client=a") == "OK"
        async with running_broker(stock(), tmp_path, cloud=cloud) as broker:
            await asyncio.sleep(5.0)
            cloud.machines[machine_id].instance = running
            await asyncio.sleep(60.0)
            assert await broker.ask(f"PING {ip} client=a") == "OK"
            assert cloud.count("terminate") == 0

    run_virtual(main())


def test_one_that_a_person_starts_is_a_worker_again(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await until_startable(broker)
        (machine_id,) = stopped_machines(broker)
        await broker.cloud.start(machine_id)
        await broker.until(lambda: count(broker, WorkerState.READY) == 1, seconds_max=60.0)
        reply = await broker.ask("GET_WORKER client=a wait=1")
        assert reply == broker.cloud.machines[machine_id].instance.address

    play(tmp_path, story)


def test_terminate_all_ends_the_stopped_ones_too(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await until_stopped(broker)
        (machine_id,) = stopped_machines(broker)
        assert json.loads(await broker.ask("TERMINATE_ALL")) == {"terminated": [machine_id]}
        await broker.until(lambda: broker.cloud.count("terminate") == 1, seconds_max=10.0)
        await broker.until(lambda: len(broker.registry) == 0, seconds_max=60.0)

    play(tmp_path, story)


def test_a_stock_that_is_wanted_no_more_is_terminated(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await until_stopped(broker, 2)
        await broker.reload(stock(1))
        await broker.until(lambda: count(broker, WorkerState.STOPPED) == 1, seconds_max=10.0)
        await broker.reload(stock(0))
        await broker.until(lambda: len(broker.registry) == 0, seconds_max=60.0)
        assert stopped_machines(broker) == []

    play(tmp_path, story, stock(2))


def test_a_protected_one_stays(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await until_stopped(broker)
        (machine_id,) = stopped_machines(broker)
        broker.cloud.retag(machine_id, protect="yes")
        await asyncio.sleep(60.0)
        await broker.reload(stock(0))
        await asyncio.sleep(HOUR)
        assert stopped_machines(broker) == [machine_id]

    play(tmp_path, story)


# --- what it costs ---------------------------------------------------------------------------------------


def test_each_time_that_it_ran_is_on_the_bill_and_the_time_between_is_not(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await until_startable(broker)
        (machine_id,) = stopped_machines(broker)
        first = broker.daemon.ledger.billed_seconds()[machine_id]
        await asyncio.sleep(10 * HOUR)
        assert broker.daemon.ledger.billed_seconds()[machine_id] == first
        await broker.ask("GET_WORKER client=a wait=60")
        await asyncio.sleep(899.0)
        both = broker.daemon.ledger.billed_seconds()[machine_id]
        assert 899.0 - 120.0 <= both.low - first.low <= both.high - first.high <= 899.0 + 120.0
        assert len([one for one in broker.daemon.ledger.runs() if one.startswith(machine_id)]) == 2

    play(tmp_path, story, ONE_MACHINE)


def test_a_pool_without_a_stock_terminates_what_somebody_has_stopped(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER client=a")
        (machine_id,) = broker.cloud.running()
        broker.cloud.set_state(machine_id, InstanceState.STOPPED)
        await broker.until(lambda: broker.cloud.count("terminate") == 1, seconds_max=SETTLED_SECONDS + 60.0)

    live(tmp_path, story)


def test_a_restart_whose_first_listing_misses_a_stopped_machine_launches_no_other(tmp_path: Path) -> None:
    """Simulated histories, seeds 1987 and 2107."""

    async def main() -> None:
        cloud = sky()
        async with running_broker(stock(), tmp_path, cloud=cloud) as broker:
            await until_stopped(broker)
            (machine_id,) = stopped_machines(broker)
            await asyncio.sleep(HOUR)
        cloud.machines[machine_id].hidden = True
        async with running_broker(stock(), tmp_path, cloud=cloud) as broker:
            await asyncio.sleep(5.0)
            assert broker.registry.by_instance(machine_id) is not None
            cloud.machines[machine_id].hidden = False
            await asyncio.sleep(HOUR)
            assert (count(broker, WorkerState.STOPPED), cloud.count("launch")) == (1, 1)

    run_virtual(main())


def test_a_restart_does_not_take_a_stopping_machine_for_a_stopped_one(tmp_path: Path) -> None:
    """Simulated history, seed 147: it still ran, and counted against no cap."""

    async def main() -> None:
        cloud = sky()
        async with running_broker(stock(max_workers=1), tmp_path, cloud=cloud) as broker:
            cloud.stops_at_once = False
            await broker.until(lambda: cloud.count("stop") == 1)
            await asyncio.sleep(5.0)
        async with running_broker(stock(max_workers=1), tmp_path, cloud=cloud) as broker:
            await broker.until(lambda: count(broker, WorkerState.STOPPING) == 1, seconds_max=10.0)
            assert "max_workers = 1" in await broker.ask("GET_WORKER client=a wait=0")
            assert cloud.count("launch") == 1

    run_virtual(main())


def test_a_start_that_nobody_saw_is_on_the_bill(tmp_path: Path) -> None:
    """Simulated history, seed 107: started as the broker was killed, and ended before the next one looked."""

    async def main() -> None:
        cloud = sky()
        async with running_broker(stock(max_workers=1), tmp_path, cloud=cloud) as broker:
            await until_startable(broker)
            (machine_id,) = stopped_machines(broker)
            before = broker.daemon.ledger.billed_seconds()[machine_id]
        await cloud.start(machine_id)
        await asyncio.sleep(HOUR)
        cloud.set_state(machine_id, InstanceState.TERMINATED)
        async with running_broker(stock(max_workers=1), tmp_path, cloud=cloud) as broker:
            await asyncio.sleep(5.0)
            after = broker.daemon.ledger.billed_seconds()[machine_id]
            assert after.high - before.high >= HOUR

    run_virtual(main())
