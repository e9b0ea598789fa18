"""Stopped workers when listings are stale, calls late, disks full, stores lost, settings changed."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker.core.errors import PermanentRefusal, Throttled
from broker.core.model import Instance, InstanceState, WorkerState
from broker.core.stock import SETTLED_SECONDS
from broker.database import GAP_FILE
from broker.testing import FakeCloud, RunningBroker, run_virtual, running_broker
from tests.loops.test_stock import (
    BIG,
    HOUR,
    ONE_MACHINE,
    count,
    play,
    sky,
    stock,
    stopped_machines,
    until_startable,
    until_stopped,
)
from tests.support.brokers import full_disk
from tests.support.regions import Regions
from tests.support.regions import pool as regional


class Past:
    """Machines as EC2 described them before their last start: what a stale listing shows."""

    def __init__(self, cloud: FakeCloud) -> None:
        self._cloud = cloud
        self._then = {id_: machine.instance for id_, machine in cloud.machines.items()}
        self._now: dict[str, Instance] = {}

    def show(self) -> None:
        for id_, then in self._then.items():
            self._now[id_] = self._cloud.machines[id_].instance
            self._cloud.machines[id_].instance = then

    def end(self) -> None:
        """Listings tell the truth again. What was done meanwhile was not done to the picture."""
        for id_, now in self._now.items():
            shown = self._cloud.machines[id_].instance
            if replace(shown, tags=now.tags) == replace(self._then[id_], tags=now.tags):
                self._cloud.machines[id_].instance = replace(now, tags=shown.tags)


# --- no busy worker is killed ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["throttled", "late"])
def test_a_start_that_was_carried_out_late_and_a_listing_from_before_it(tmp_path: Path, how: str) -> None:
    async def story(broker: RunningBroker) -> None:
        await until_startable(broker)
        past, asked_at = Past(broker.cloud), broker.clock.monotonic()
        if how == "throttled":
            broker.cloud.fail["start"].extend([Throttled("slowly")] * 18)
        else:
            broker.cloud.hold["start"] = gate = asyncio.Event()
            asyncio.get_running_loop().call_later(95.0, gate.set)
        ip = await broker.ask("GET_WORKER client=a wait=600")
        await asyncio.sleep(asked_at + SETTLED_SECONDS + 1.0 - broker.clock.monotonic())
        past.show()
        await asyncio.sleep(33.0)
        past.end()
        assert await broker.ask(f"PING {ip} client=a") == "OK"
        assert broker.cloud.count("terminate") == 0

    play(tmp_path, story, ONE_MACHINE)


@pytest.mark.parametrize("second", [ONE_MACHINE, stock(0), stock(2)])
@pytest.mark.parametrize("shown_first", ["the truth", "the past"])
def test_after_a_restart_a_listing_may_be_from_before_the_start(
    tmp_path: Path, second: Any, shown_first: str
) -> None:
    async def main() -> None:
        cloud = sky()
        async with running_broker(ONE_MACHINE, tmp_path, cloud=cloud) as broker:
            await until_startable(broker)
            (machine_id,) = stopped_machines(broker)
            past = Past(cloud)
            ip = await broker.ask("GET_WORKER client=a wait=60")
            await asyncio.sleep(1.0)
            if shown_first == "the past":
                past.show()
        async with running_broker(second, tmp_path, cloud=cloud) as broker:
            await asyncio.sleep(5.0)
            if shown_first == "the truth":
                past.show()
                await asyncio.sleep(30.0)
            past.end()
            await asyncio.sleep(60.0)
            assert machine_id in cloud.running()
            assert await broker.ask(f"PING {ip} client=a") == "OK"
            assert await broker.ask("GET_WORKER client=a wait=1") == ip

    run_virtual(main())


def test_a_busy_worker_that_stays_stopped_is_ended_all_the_same(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER client=a wait=60")
        (machine_id,) = broker.cloud.running()
        broker.cloud.set_state(machine_id, InstanceState.STOPPED)
        await broker.until(lambda: broker.cloud.count("terminate") == 1, seconds_max=SETTLED_SECONDS + 60.0)

    play(tmp_path, story, ONE_MACHINE)


def test_that_the_end_is_taken_back_is_on_disk_before_the_worker_can_be_started(tmp_path: Path) -> None:
    """The disk was full for a moment: at the next restart, whenever that was, a busy worker was ended."""

    async def main() -> None:
        cloud = sky()
        async with running_broker(ONE_MACHINE, tmp_path, cloud=cloud) as broker:
            cloud.hold["stop"] = gate = asyncio.Event()
            await broker.until(lambda: cloud.count("stop") == 1)
            with full_disk(broker):
                gate.set()
                del cloud.hold["stop"]
                await broker.until(lambda: cloud.count("terminate") == 1, seconds_max=120.0)
            await asyncio.sleep(SETTLED_SECONDS)
            ip = await broker.ask("GET_WORKER client=a wait=60")
            (machine_id,) = cloud.running()
            await asyncio.sleep(600.0)
            assert await broker.ask(f"PING {ip} client=a") == "OK"
        async with running_broker(ONE_MACHINE, tmp_path, cloud=cloud) as broker:
            await asyncio.sleep(60.0)
            assert cloud.running() == [machine_id]
            assert await broker.ask(f"PING {ip} client=a") == "OK"

    run_virtual(main())


@pytest.mark.parametrize("lost", ["the store", "leases"])
def test_a_machine_whose_clients_nobody_knows_is_not_taken_for_a_stopped_one(
    tmp_path: Path, lost: str
) -> None:
    """It was given to a second client two minutes later."""

    async def main() -> None:
        cloud = sky()
        async with running_broker(ONE_MACHINE, tmp_path / "a", cloud=cloud) as broker:
            await until_startable(broker)
            past = Past(cloud)
            ip = await broker.ask("GET_WORKER client=a wait=60")
            await asyncio.sleep(1.0)
        if lost == "leases":
            with sqlite3.connect(tmp_path / "a" / "broker.db") as database:
                database.execute("DELETE FROM leases")
            (tmp_path / "a" / GAP_FILE).write_bytes(b"1")
        past.show()
        directory = tmp_path / ("b" if lost == "the store" else "a")
        async with running_broker(ONE_MACHINE, directory, cloud=cloud) as broker:
            await asyncio.sleep(5.0)
            past.end()
            await asyncio.sleep(125.0)
            assert await broker.ask(f"PING {ip} client=a") == "OK"
            assert await broker.ask("GET_WORKER client=b wait=100") != ip

    run_virtual(main())


def test_more_machines_than_the_stock_has_places_may_be_in_use_after_the_store_was_lost(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        cloud = sky()
        async with running_broker(stock(2, max_workers=2), tmp_path / "a", cloud=cloud) as broker:
            await until_startable(broker, 2)
            past = Past(cloud)
            await asyncio.gather(*(broker.ask(f"GET_WORKER client={one} wait=60") for one in "ab"))
            await asyncio.sleep(1.0)
        past.show()
        async with running_broker(stock(1, max_workers=2), tmp_path / "b", cloud=cloud):
            await asyncio.sleep(5.0)
            past.end()
            await asyncio.sleep(20.0)
            assert cloud.count("terminate") == 0

    run_virtual(main())


def test_a_protected_machine_that_is_stopped_and_not_listed_is_still_protected(tmp_path: Path) -> None:
    async def main() -> None:
        cloud = sky()
        async with running_broker(ONE_MACHINE, tmp_path, cloud=cloud) as broker:
            await until_stopped(broker)
            (machine_id,) = stopped_machines(broker)
            cloud.retag(machine_id, protect="yes")
            await asyncio.sleep(HOUR)
        cloud.machines[machine_id].hidden = True
        async with running_broker(ONE_MACHINE, tmp_path, cloud=cloud) as broker:
            await asyncio.sleep(5.0)
            assert json.loads(await broker.ask("TERMINATE_ALL"))["protected"] == [machine_id]
            await asyncio.sleep(20.0)
            assert cloud.count("terminate") == 0

    run_virtual(main())


# --- no money is wasted ----------------------------------------------------------------------------------


def test_a_start_is_within_the_budget_like_a_launch(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await until_startable(broker, 2)
        broker.cloud.boots = False
        asks = [asyncio.create_task(broker.ask(f"GET_WORKER client={one} wait=30")) for one in "abc"]
        await asyncio.sleep(5.0)
        assert broker.cloud.count("start") + broker.cloud.count("launch") == 2 + 1
        await asyncio.gather(*asks)

    chosen = stock(2, budget_usd_per_day=0.5, price_usd_per_hour=1.0, idle_timeout="2m")
    play(tmp_path, story, chosen)


def test_machines_that_do_not_stop_in_time_are_launched_ever_more_rarely(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        broker.cloud.stops_at_once = False
        await asyncio.sleep(24 * HOUR)
        assert 5 <= broker.cloud.count("launch") < 15

    play(tmp_path, story)


def test_machines_that_do_not_come_up_a_second_time_are_started_ever_more_rarely(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        start = broker.cloud.start

        async def in_vain(instance_id: str) -> None:
            await start(instance_id)
            broker.cloud.machines[instance_id].answers = False

        broker.cloud.start = in_vain  # type: ignore[method-assign]
        await until_startable(broker, 2)
        replies = []
        for number in range(12):
            replies.append(await broker.ask(f"GET_WORKER client=c{number} wait=900"))
            await asyncio.sleep(1800.0)
        assert broker.cloud.count("start") < 8
        assert sum("ERROR" not in one for one in replies) > 5

    chosen = stock(2, max_workers=1, launches_per_hour=1000, idle_timeout="5m")
    play(tmp_path, story, chosen)


def test_a_machine_that_falls_back_when_it_is_started_is_replaced(tmp_path: Path) -> None:
    """EC2 answers, and the machine is stopped again at once: it may not read its encrypted disk, say."""

    async def story(broker: RunningBroker) -> None:
        await until_startable(broker)
        (machine_id,) = stopped_machines(broker)

        async def in_vain(instance_id: str) -> None:
            await asyncio.sleep(0.1)

        broker.cloud.start = in_vain  # type: ignore[method-assign]
        assert "ERROR" not in await broker.ask("GET_WORKER client=a wait=900")
        assert broker.cloud.machines[machine_id].instance.state is InstanceState.TERMINATED

    play(tmp_path, story, ONE_MACHINE)


def test_a_protected_worker_fills_no_place_of_the_stock(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.until(lambda: count(broker, WorkerState.READY) == 1)
        (machine_id,) = broker.cloud.running()
        broker.cloud.retag(machine_id, protect="yes")
        await asyncio.sleep(6 * HOUR)
        assert count(broker, WorkerState.STOPPED) == 1

    play(tmp_path, story)


def test_the_stock_of_a_region_that_the_file_does_not_name_any_more_is_ended(tmp_path: Path) -> None:
    async def main() -> None:
        regions = Regions(tmp_path)
        for cloud in (regions.earth, regions.mars):
            kinds = tuple(replace(one, market=BIG.market) for one in cloud.catalogue["default"])
            cloud.catalogue = {"default": kinds}
        kept: dict[str, Any] = {"market": "on-demand", "warm_stopped": 1, "sharing": "exclusive"}
        async with regions.broker(regional(regions=["mars"], **kept)) as broker:
            await until_stopped(broker)
            await asyncio.sleep(HOUR)
        async with regions.broker(regional(regions=["earth"], **kept)) as broker:
            await broker.until(broker.daemon.context.clouds.recovered)
            await asyncio.sleep(HOUR)
            assert (regions.mars.count("terminate"), regions.earth.count("launch")) == (1, 1)

    run_virtual(main())


def test_a_restart_in_order_waits_for_the_answer_to_a_stop(tmp_path: Path) -> None:
    async def main() -> None:
        cloud = sky()
        async with running_broker(stock(), tmp_path, cloud=cloud) as broker:
            cloud.hold["stop"] = gate = asyncio.Event()
            await broker.until(lambda: cloud.count("stop") == 1)
            asyncio.get_running_loop().call_later(1.0, gate.set)
        await asyncio.sleep(2.0)
        del cloud.hold["stop"]
        async with running_broker(stock(), tmp_path, cloud=cloud):
            await asyncio.sleep(60.0)
            assert cloud.count("terminate") == 0

    run_virtual(main())


def test_a_fault_of_our_own_sends_no_second_stop(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        sent: list[str] = []

        async def broken(instance_id: str) -> None:
            sent.append(instance_id)
            raise RuntimeError("a bug")

        broker.cloud.stop = broken  # type: ignore[method-assign]
        await broker.until(lambda: sent)
        await asyncio.sleep(HOUR / 10)
        assert len(sent) == 1
        await broker.until(lambda: broker.cloud.count("terminate") == 1)

    play(tmp_path, story)


def test_one_that_is_used_up_by_new_settings_is_replaced_and_not_started(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER client=a wait=60")
        await until_startable(broker)
        await broker.reload(stock(uses_max=1, max_workers=1))
        await broker.until(lambda: broker.cloud.count("terminate") == 1, seconds_max=120.0)
        assert broker.cloud.count("start") == 0

    play(tmp_path, story, stock(max_workers=1, idle_timeout="3m"))


def test_what_was_made_from_another_image_is_replaced(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await until_stopped(broker)
        (machine_id,) = stopped_machines(broker)
        await broker.reload(stock(image="ami-2"))
        await broker.until(lambda: broker.cloud.count("terminate") == 1, seconds_max=60.0)
        await until_stopped(broker)
        assert stopped_machines(broker) != [machine_id]

    play(tmp_path, story)


# --- what is told ----------------------------------------------------------------------------------------


def test_a_machine_that_was_missing_and_is_back_is_billed_once(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER client=a wait=60")
        (machine_id,) = broker.cloud.running()
        machine = broker.cloud.machines[machine_id]
        for _ in range(20):
            await asyncio.sleep(600.0)
            await broker.ask(f"PING {machine.instance.address} client=a")
        machine.hidden, machine.answers = True, False
        await asyncio.sleep(900.0)
        machine.hidden, machine.answers = False, True
        await asyncio.sleep(120.0)
        billed = broker.daemon.ledger.billed_seconds()[machine_id]
        truth = broker.clock.wall() - machine.instance.launched_unix
        assert billed.low <= truth <= billed.high <= truth + 60.0

    play(tmp_path, story, stock(0, max_workers=1, idle_timeout="1h"))


def test_a_machine_that_was_stopped_and_started_while_nobody_looked_has_a_true_bill(tmp_path: Path) -> None:
    async def main() -> None:
        cloud = sky()
        async with running_broker(ONE_MACHINE, tmp_path, cloud=cloud) as broker:
            await broker.ask("GET_WORKER client=a wait=60")
            await asyncio.sleep(600.0)
            (machine_id,) = cloud.running()
            ran_seconds = broker.clock.wall() - cloud.machines[machine_id].instance.launched_unix
        await cloud.stop(machine_id)
        await asyncio.sleep(20 * HOUR)
        await cloud.start(machine_id)
        await asyncio.sleep(60.0)
        async with running_broker(ONE_MACHINE, tmp_path, cloud=cloud) as broker:
            await asyncio.sleep(60.0)
            billed = broker.daemon.ledger.billed_seconds()[machine_id]
            again_seconds = broker.clock.wall() - cloud.machines[machine_id].instance.launched_unix
            assert billed.low <= ran_seconds + again_seconds <= billed.high

    run_virtual(main())


def test_status_says_when_one_is_stopped_and_how_old_it_is_without_that_time(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.until(lambda: count(broker, WorkerState.READY) == 1)
        (row,) = json.loads(await broker.ask("STATUS"))
        assert row["will_terminate_in"] <= 121
        await until_stopped(broker)
        await asyncio.sleep(HOUR)
        (row,) = json.loads(await broker.ask("STATUS"))
        assert row["age_seconds"] < 300

    play(tmp_path, story)


def test_a_stopped_worker_is_not_made_young_by_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        cloud = sky()
        chosen = stock(max_workers=1, idle_timeout="5m")
        async with running_broker(chosen, tmp_path, cloud=cloud) as broker:
            ip = await broker.ask("GET_WORKER client=a wait=60")
            for _ in range(60):
                await asyncio.sleep(120.0)
                await broker.ask(f"PING {ip} client=a")
            await until_stopped(broker)
        async with running_broker(chosen, tmp_path, cloud=cloud) as broker:
            await asyncio.sleep(5.0)
            (row,) = json.loads(await broker.ask("STATUS"))
            assert row["age_seconds"] >= 2 * HOUR

    run_virtual(main())


def test_what_a_machine_has_cost_does_not_grow_while_it_is_stopped_for_days(tmp_path: Path) -> None:
    """After two days its run was dropped and found again, at every scan."""

    async def main() -> None:
        cloud = sky()
        async with running_broker(ONE_MACHINE, tmp_path, cloud=cloud) as broker:
            await until_stopped(broker)
            ledger = broker.daemon.ledger
            (machine_id,) = stopped_machines(broker)
            cost, billed, ran = (
                ledger.cost_usd_micros("default"),
                ledger.billed_seconds()[machine_id],
                ledger.ran_seconds(machine_id),
            )
            await asyncio.sleep(4 * 24 * HOUR)
            assert ledger.cost_usd_micros("default") == cost
            assert ledger.billed_seconds()[machine_id] == billed
        async with running_broker(ONE_MACHINE, tmp_path, cloud=cloud) as broker:
            await asyncio.sleep(60.0)
            assert broker.daemon.ledger.ran_seconds(machine_id) == ran
            assert broker.daemon.ledger.cost_usd_micros_today("default") == 0

    run_virtual(main())


def test_a_listing_from_before_a_start_makes_no_further_run_of_it(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await until_startable(broker)
        (machine_id,) = stopped_machines(broker)
        past = Past(broker.cloud)
        await broker.ask("GET_WORKER client=a wait=60")
        await asyncio.sleep(60.0)
        past.show()
        await asyncio.sleep(31.0)
        past.end()
        await asyncio.sleep(60.0)
        runs = [one for one in broker.daemon.ledger.runs() if one.startswith(machine_id)]
        assert len(runs) == 2

    play(tmp_path, story, ONE_MACHINE)


def test_no_stop_is_sent_while_the_cloud_has_not_been_listed_for_long(tmp_path: Path) -> None:
    """Another broker may have taken over meanwhile, and given the machine to somebody."""

    async def story(broker: RunningBroker) -> None:
        broker.cloud.fail["stop"].extend([Throttled("slowly")] * 1000)
        await broker.until(lambda: broker.cloud.count("stop") == 1)
        broker.cloud.fail["listing"].extend([Throttled("slowly")] * 1000)
        (cloud,) = broker.daemon.context.clouds.all
        await broker.until(lambda: not cloud.acts(broker.clock.monotonic()))
        sent = broker.cloud.count("stop")
        await asyncio.sleep(120.0)
        assert broker.cloud.count("stop") == sent

    play(tmp_path, story)


def test_a_held_worker_that_is_shown_stopped_is_given_to_nobody_else(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a wait=60")
        (machine_id,) = broker.cloud.running()
        broker.cloud.set_state(machine_id, InstanceState.STOPPED)
        await asyncio.sleep(40.0)
        assert await broker.ask("GET_WORKER client=b wait=60") != address
        assert await broker.ask(f"PING {address} client=a") == "OK"

    chosen = stock(0, sharing="shared", readiness="running")
    play(tmp_path, story, chosen)


def test_a_start_that_takes_three_minutes_costs_no_machine(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await until_startable(broker)
        (machine_id,) = stopped_machines(broker)
        broker.cloud.fail["start"].extend([Throttled("slowly")] * 36)
        assert "ERROR" not in await broker.ask("GET_WORKER client=a wait=600")
        assert broker.cloud.running() == [machine_id]
        assert broker.cloud.count("terminate") == 0

    play(tmp_path, story, ONE_MACHINE)


def test_an_unlisted_machine_is_not_taken_for_a_stopped_one_when_leases_are_missing(tmp_path: Path) -> None:
    async def main() -> None:
        cloud = sky()
        async with running_broker(ONE_MACHINE, tmp_path, cloud=cloud) as broker:
            await until_stopped(broker)
            (machine_id,) = stopped_machines(broker)
        await cloud.start(machine_id)  # as the broker did, whose lease and run a full disk refused
        cloud.machines[machine_id].hidden = True
        (tmp_path / GAP_FILE).write_bytes(b"1")
        async with running_broker(ONE_MACHINE, tmp_path, cloud=cloud) as broker:
            await asyncio.sleep(5.0)
            cloud.machines[machine_id].hidden = False
            await asyncio.sleep(60.0)
            address = cloud.machines[machine_id].instance.address
            assert await broker.ask(f"PING {address} client=a") == "OK"
            assert await broker.ask("GET_WORKER client=b wait=120") != address

    run_virtual(main())


def test_what_was_made_from_another_image_does_not_come_into_the_stock_later(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.until(lambda: count(broker, WorkerState.READY) == 1)
        (machine_id,) = broker.cloud.running()
        await broker.reload(stock(image="ami-2"))
        await until_stopped(broker)
        assert machine_id not in stopped_machines(broker)

    play(tmp_path, story)


def test_one_that_is_too_old_by_new_settings_is_replaced_and_not_started(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=a wait=60")
        for _ in range(60):
            await asyncio.sleep(240.0)
            await broker.ask(f"PING {address} client=a")
        await until_startable(broker)
        await broker.reload(stock(max_workers=1, max_lifetime="2h", hard_lifetime="2h"))
        await broker.until(lambda: broker.cloud.count("terminate") == 1, seconds_max=120.0)
        assert broker.cloud.count("start") == 0

    play(tmp_path, story, stock(max_workers=1, idle_timeout="5m"))


def test_a_start_of_a_worker_that_was_ended_meanwhile_pauses_no_other_starts(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await until_startable(broker, 2)
        broker.cloud.hold["start"] = gate = asyncio.Event()
        ask = asyncio.create_task(broker.ask("GET_WORKER client=a wait=60"))
        await broker.until(lambda: broker.cloud.count("start") == 1)
        (worker,) = broker.registry.in_state(WorkerState.BOOTING)
        broker.cloud.fail["start"].append(PermanentRefusal("it is shutting down"))
        broker.registry.drain(worker.id, "terminate-all", broker.clock.monotonic())
        gate.set()
        del broker.cloud.hold["start"]
        assert "ERROR" not in await ask
        assert broker.cloud.count("start") == 2

    play(tmp_path, story, stock(2, max_workers=1))
